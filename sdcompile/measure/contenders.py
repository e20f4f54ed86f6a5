"""What is measured: bundles as they are asked by default, and peers asked the same on the same weights.

Knows what a worker must be told (see `worker`), and runs none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdcompile import bundle, machine
from sdcompile.backends.trt import driver
from sdcompile.errors import HostError, RecipeError
from sdcompile.families import FAMILIES
from sdcompile.measure.peers import PEERS
from sdcompile.runtime import choosing, values
from sdcompile.runtime.options import APPROXIMATIONS, exactly
from sdcompile.spec import at_target

_PEERS_FOLDER = "SDCOMPILE_PEERS"


@dataclass(frozen=True)
class Ask:
    """What every contender is asked; None leaves it to each bundle's own default."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Contender:
    """One thing to measure.

    name        how tables call it
    kind        "bundle", or a name of PEERS
    job         what its worker is told
    latent      (channels, pixels per latent) of its noise
    python      the interpreter it runs under
    bytes       of weights on disk, from which its memory is guessed before it runs
    components  name -> {backend, precision, computed_in}, of a bundle
    digest      of a bundle
    """

    name: str
    kind: str
    job: Mapping[str, Any]
    latent: tuple[int, int]
    python: str = sys.executable
    bytes: int = 0
    components: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    digest: str | None = None

    def noise_shape(self, count: int) -> tuple[int, int, int, int]:
        channels, factor = self.latent
        return count, channels, self.job["call"]["height"] // factor, self.job["call"]["width"] // factor


def of_bundles(
    paths: Sequence[Path],
    ask: Ask,
    threads: int,
    memory: str,
    step_caches: Sequence[str] = (),
    targets: Sequence[str] = (),
    widths: Sequence[str] = (),
) -> list[Contender]:
    """The bundles at `paths`, each once for every one of `step_caches` and of `widths`, or as it is by default.

    A bundle of several targets is measured as every one of `targets`, or as the one that runs here. Raises
    RecipeError when one is named twice or lacks the asked sampler, target, width, or engine that step caching
    needs; HostError when no target runs here.
    """
    found = []
    for path, name in zip(paths, _names(paths), strict=True):
        for one in ways(path, targets, alone=len(paths) == 1):
            made = [_of_bundle(path, at_target(name, one.target), one, ask, threads, memory)]
            for option, asked in (("step_cache", step_caches), ("unet_width", widths)):
                made = [_asked(plain, one, option, value) for plain in made for value in asked] or made
            found += made
    return found


def _asked(plain: Contender, manifest: bundle.Manifest, option: str, value: str) -> Contender:
    """`plain`, asked for this value of an approximation."""
    require(manifest, option, value)
    call = {**plain.job["call"], option: value}
    return replace(plain, name=f"{plain.name}, {APPROXIMATIONS[option]} {value}", job={**plain.job, "call": call})


def require(manifest: bundle.Manifest, option: str, value: str) -> None:
    """Raise RecipeError when `value` is none of an approximation, or the bundle lacks the engine it needs."""
    family = FAMILIES[manifest.family]
    if option == "unet_width" and values.unet_width(value) not in (built := family.widths(manifest.components)):
        raise RecipeError(
            f"{manifest.name} has no width {value}, so it cannot take --unet-width {value}",
            f"its widths are {', '.join(built)}; another is built with: components: {{unet: {{widths: ...}}}}",
        )
    shallow = family.shallow
    if option == "step_cache" and values.step_cache(value) is not None and shallow not in manifest.components:
        raise RecipeError(
            f"{manifest.name} has no {shallow}, so it cannot take --step-cache {value}",
            "build it with: --set 'components.unet.step_cache={every: 3}'",
        )


def ways(path: Path, targets: Sequence[str], *, alone: bool) -> list[bundle.Manifest]:
    """The manifests of the targets to measure of the bundle at `path`: `targets`, or the one that runs here.

    A bundle of one target that is measured beside others (not `alone`) is measured whatever `targets` says.
    Raises RecipeError for a target it does not have, HostError when none runs here.
    """
    manifest = bundle.read(path)
    if not manifest.targets:
        return [choosing.named(path, manifest, targets[0])] if targets and alone else [manifest]
    if not targets:
        return [choosing.choose(path, manifest, None, FAMILIES[manifest.family].required)[0]]
    return [choosing.named(path, manifest, target) for target in dict.fromkeys(targets)]


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names without .sdc; whole paths where two would be the same."""
    stems = [path.resolve().name.removesuffix(bundle.SUFFIX) for path in paths]
    names = [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"{name} is named twice", "name each bundle once")
    return names


def _of_bundle(path: Path, name: str, manifest: bundle.Manifest, ask: Ask, threads: int, memory: str) -> Contender:
    folders = tuple(f"{manifest.folder_of(component)}/" for component in manifest.components)
    defaults = manifest.defaults
    asked = {key: getattr(ask, key) for key in ("num_inference_steps", "guidance_scale", "height", "width")}
    call = {key: getattr(defaults, key) if value is None else value for key, value in asked.items()}
    sampler = ask.sampler or defaults.sampler
    if sampler not in manifest.samplers:
        raise RecipeError(f"{name} has no sampler {sampler}", f"it has {', '.join(manifest.samplers)}")
    return Contender(
        name,
        "bundle",
        {
            "kind": "bundle", "bundle": str(path), "target": manifest.target or None, "threads": threads,
            "memory": memory, "sampler": sampler,
            "call": {**call, "negative_prompt": defaults.negative_prompt},
        },
        (manifest.facts["latent_channels"], manifest.facts["vae_scale_factor"]),
        bytes=sum(entry.bytes for file, entry in manifest.files.items() if file.startswith(folders)),
        components={
            name: {"backend": entry.backend, "precision": entry.precision, "computed_in": entry.facts.get("precision")}
            for name, entry in manifest.components.items()
        },
        digest=bundle.digest(path),
    )  # fmt: skip


def of_peer(name: str, like: Contender, model: Mapping[str, Path], scratch: Path) -> Contender:
    """The peer `name`, asked what the bundle `like` is asked, on the same model.

    model: "source" -> its diffusers folder, and component -> the folder of its own source, where it has one.

    Raises RecipeError for an unknown peer or a source that is no such folder, HostError where the
    peer is not installed.
    """
    if name not in PEERS:
        raise RecipeError(f"--vs {name}: no such peer", f"there are: {', '.join(PEERS)}")
    source = model.get("source")
    if source is None or not (source / "model_index.json").is_file():
        raise RecipeError(
            f"{name} needs the diffusers folder that {like.name} was built from"
            + (f"; {source} is none" if source else ""),
            "name it: --source FOLDER",
        )
    manifest = bundle.read(Path(like.job["bundle"]))
    sampler = manifest.samplers[like.job["sampler"]]
    own = [f"sampler {like.job['sampler']}, which is fitted"] if sampler.fit else []
    # Approximations are asked of the bundle alone.
    own += [f"{option}, a default of {like.name}" for option in exactly(manifest.defaults.options)]
    row = PEERS[name]
    decoder = model.get("vae_decoder")
    if decoder is not None and row.export:
        own.append(f"the decoder {like.name} was built with, {decoder.name}")
    if own:
        raise RecipeError(
            f"{name} does not know {', '.join(own)}: it would answer another request",
            "measure a bundle without it, or leave --vs out; another sampler: --sampler NAME",
        )
    job = {
        **like.job, "call": exactly(like.job.get("call", {})), "kind": name, "source": str(source.resolve()),
        "scheduler": sampler.scheduler, "scheduler_config": sampler.config,
        "exported": str(scratch / row.export) if row.export else None,
        "decoder": str(decoder.resolve()) if decoder else None,
    }  # fmt: skip
    weights = sum(path.stat().st_size for path in source.glob("*/*.safetensors"))
    return Contender(name, name, job, like.latent, python_of(name), weights)


def python_of(peer: str) -> str:
    """The interpreter that holds `peer`: this one, or that of the peers' own environment.

    Raises HostError when its packages are in neither.
    """
    row = PEERS[peer]
    folder = Path(os.environ.get(_PEERS_FOLDER) or ".venv-peers")
    if not row.export:
        missing = [package for package in row.packages if machine.version(package) is None]
        if missing:
            raise HostError(f"{peer} needs {', '.join(missing)}, not installed", "pip install 'sdcompile[compile]'")
        torch = machine.version("torch") or ""
        if row.gpu and (torch.endswith("+cpu") or (reason := driver.look().reason)):
            why = f"torch here is {torch}, which has no CUDA" if torch.endswith("+cpu") else reason
            raise HostError(f"{peer} cannot run here: {why}", "on a machine with an NVIDIA GPU: pip install torch")
        return sys.executable
    python = folder / "bin" / "python"
    if not python.is_file():
        raise HostError(
            f"{peer} needs an environment of its own, since its libraries clash with these: {folder} is not there",
            f"make peers (in a checkout), or: python -m venv {folder} && {folder}/bin/pip install "
            f"'optimum-intel[openvino]' optimum-onnx diffusers onnxruntime; another place: {_PEERS_FOLDER}=DIR",
        )
    return str(python)
