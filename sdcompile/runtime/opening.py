"""From a bundle folder to a pipeline: is it whole, can this machine run it, how much memory is there.

It refuses to know how images are made (`pipeline`) and how an engine runs (`backends`).
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

from sdcompile import bundle, machine
from sdcompile.backends import BACKENDS, Engine, Host, Probe
from sdcompile.bundle import Manifest
from sdcompile.errors import BundleError, HostError, RecipeError
from sdcompile.families import FAMILIES
from sdcompile.runtime import SdcompileWarning
from sdcompile.runtime.model import Model
from sdcompile.runtime.pipeline import Pipeline

_MEMORY = ("auto", "low", "high")
_GIB = 1 << 30
_DEVELOPMENT = ("stub", "reference")  # backends nobody deploys on


def open_bundle(folder: Path, threads: int | None, cache: Path | None, memory: str, verify_files: bool) -> Pipeline:
    """The work of `runtime.load`, which documents it."""
    if memory not in _MEMORY:
        raise RecipeError(f"memory={memory!r} is unknown", f"one of: {', '.join(_MEMORY)}")
    if threads is not None and threads < 1:
        raise RecipeError(f"threads={threads}: at least one thread is needed", "leave it out for the library's choice")
    manifest = bundle.read(folder)
    needed = _required(folder, manifest)
    require_backends(folder, manifest, needed)
    if verify_files:
        read = (f"components/{name}/" for name in manifest.components)
        bundle.check(folder, manifest, (*read, "samplers/", "tokenizer/"))
    model = Model.from_bundle(folder, manifest)
    low = memory == "low" or (memory == "auto" and _is_tight(manifest, needed))
    return Pipeline(model, partial(_open_engine, folder, manifest, Host(threads, cache)), low_memory=low)


def require_backends(folder: Path, manifest: Manifest, components: tuple[str, ...]) -> None:
    """Raise HostError, naming reason and remedy, when this machine cannot run one of `components`."""
    for name in components:
        fitting(folder, manifest, name)


def fitting(folder: Path, manifest: Manifest, name: str) -> str:
    """Which of the engines built for component `name` this machine runs ("" where there is one for all).

    Nothing is loaded. Raises BundleError for a backend unknown here, HostError, naming reason and remedy.
    """
    backend = manifest.components[name].backend
    if backend not in BACKENDS:
        raise BundleError(
            f"{folder}: {name} was compiled by backend {backend!r}, which this sdcompile does not have",
            "upgrade sdcompile",
        )
    probe = BACKENDS[backend].probe()
    if probe.available:
        return BACKENDS[backend].fits(folder / "components" / name)
    here = [b.name for b in BACKENDS.values() if b.name not in _DEVELOPMENT and _runs(b.probe())]
    rebuild = f"sdcompile build RECIPE --set backend={here[0] if here else 'onnxruntime'}"
    raise HostError(
        f"{folder}: {name} needs backend {backend}, which cannot run here: {probe.reason}",
        f"{probe.hint}; or rebuild it for this machine: {rebuild}" if probe.hint else f"rebuild it: {rebuild}",
    )


def _runs(probe: Probe) -> bool:
    return probe.available and not probe.cannot_run


def _required(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    if manifest.family not in FAMILIES:
        raise BundleError(
            f"{folder} holds a model of family {manifest.family!r}, which this sdcompile does not have",
            "upgrade sdcompile",
        )
    required = FAMILIES[manifest.family].required
    missing = [name for name in required if name not in manifest.components]
    if missing:
        raise BundleError(
            f"{folder} has no {', '.join(missing)}: images need {', '.join(required)}",
            "build the whole recipe, without --only",
        )
    return (*required, *(name for name in (FAMILIES[manifest.family].shallow,) if name in manifest.components))


def _is_tight(manifest: Manifest, components: tuple[str, ...]) -> bool:
    prefixes = tuple(f"components/{name}/" for name in components)
    total = sum(entry.bytes for path, entry in manifest.files.items() if path.startswith(prefixes))
    return total * 3 // 2 + _GIB > machine.memory_bytes()[1]


def _open_engine(folder: Path, manifest: Manifest, host: Host, name: str) -> Engine:
    """Open one engine; warn where it computes in another precision here than when it was verified.

    A CPU without bf16 units computes a bf16 engine in fp32, so figures taken there say little of
    a machine that has them.
    """
    entry = manifest.components[name]
    engine = BACKENDS[entry.backend].open(folder / "components" / name, host)
    verified = entry.facts.get("precision")
    # fp32 is fp32 everywhere; asking an engine what it runs may compile it, so it is asked only where it may differ.
    if verified and entry.precision != "fp32" and (here := engine.facts.get("precision")) != verified:
        warnings.warn(
            f"{name} was verified computing in {verified} and computes in {here} on this machine; "
            f"verify it here: sdcompile verify {folder} --source SOURCE",
            SdcompileWarning,
            stacklevel=2,
        )
    return engine
