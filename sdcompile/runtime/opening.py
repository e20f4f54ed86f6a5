"""From a bundle folder to a pipeline: is it whole, can this machine run it, how much memory is there.

Which of several targets runs is `choosing`'s to say. It refuses to know how images are made (`pipeline`)
and how an engine runs (`backends`).
"""

from __future__ import annotations

import logging
import warnings
from functools import partial
from pathlib import Path

from sdcompile import bundle, machine
from sdcompile.backends import BACKENDS, Engine, Host
from sdcompile.bundle import Manifest
from sdcompile.errors import BundleError, RecipeError
from sdcompile.families import FAMILIES
from sdcompile.runtime import SdcompileWarning
from sdcompile.runtime.choosing import choose
from sdcompile.runtime.model import Model
from sdcompile.runtime.pipeline import Pipeline

_MEMORY = ("auto", "low", "high")
_GIB = 1 << 30
_log = logging.getLogger("sdcompile")


def open_bundle(
    folder: Path, threads: int | None, cache: Path | None, memory: str, verify_files: bool, target: str | None = None
) -> Pipeline:
    """The work of `runtime.load`, which documents it."""
    if memory not in _MEMORY:
        raise RecipeError(f"memory={memory!r} is unknown", f"one of: {', '.join(_MEMORY)}")
    if threads is not None and threads < 1:
        raise RecipeError(f"threads={threads}: at least one thread is needed", "leave it out for the library's choice")
    whole = bundle.read(folder)
    for one in whole.by_target().values():
        needed = _required(folder, one)
    manifest, why = choose(folder, whole, target, needed)
    if why:
        _log.info("%s: %s", folder, why)
    if verify_files:
        read = (f"{manifest.folder_of(name)}/" for name in manifest.components)
        bundle.check(folder, manifest, (*read, "samplers/", "tokenizer/"))
    model = Model.from_bundle(folder, manifest, why)
    low = memory == "low" or (memory == "auto" and _is_tight(manifest, needed))
    return Pipeline(model, partial(_open_engine, folder, manifest, Host(threads, cache)), low_memory=low)


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
    family = FAMILIES[manifest.family]
    # A request may ask for these, besides what every one needs.
    others = (name for name in manifest.components if name == family.shallow or family.plain(name) != name)
    return tuple(dict.fromkeys((*required, *others)))


def _is_tight(manifest: Manifest, components: tuple[str, ...]) -> bool:
    prefixes = tuple(f"{manifest.folder_of(name)}/" for name in components)
    total = sum(entry.bytes for path, entry in manifest.files.items() if path.startswith(prefixes))
    return total * 3 // 2 + _GIB > machine.memory_bytes()[1]


def _open_engine(folder: Path, manifest: Manifest, host: Host, name: str) -> Engine:
    """Open one engine; warn where it computes in another precision here than when it was verified.

    A CPU without bf16 units computes a bf16 engine in fp32, so figures taken there say little of
    a machine that has them.
    """
    entry = manifest.components[name]
    engine = BACKENDS[entry.backend].open(folder / manifest.folder_of(name), host)
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
