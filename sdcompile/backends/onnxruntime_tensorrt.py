"""What ONNX Runtime's TensorRT provider is told, and the engines it keeps.

The provider writes into the folder of its engines whatever it misses there, in place: an engine for another GPU or
version, and its timings. A finished engine folder is therefore never named to it: it gets a copy.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from sdcompile.backends.base import Card, Host
from sdcompile.errors import HostError

if TYPE_CHECKING:
    from sdcompile.backends.onnxruntime import Options

DISTRIBUTIONS = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
ENGINES = "engines"
"""Where an engine folder keeps what TensorRT's provider built (*.engine)."""
BUILT_FOR = "built_for"
"""Key of a card's `measured`: the GPU and the versions that the engines are for."""


def provider_options(options: Options, card: Card, engines: Path, timings: Path | None) -> dict[str, str]:
    """What TensorRT's provider is told: one profile, where engines are kept, and timings (None = nowhere).

    No precision flag (trt_fp16_enable, ...): without one the provider builds strongly typed (microsoft/onnxruntime
    #18707), so that the graph's own types hold, and nodes kept in float32 are computed so.
    """
    bounds = card.spec.profile(card.shapes)
    told = {
        f"trt_profile_{which}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, sides[index]))}" for name, sides in bounds.items()
        )
        for index, which in enumerate(("min", "opt", "max"))
    }
    told |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(engines)}
    if timings is not None:
        told |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(timings)}
    if options.builder_optimization_level is not None:
        told["trt_builder_optimization_level"] = str(options.builder_optimization_level)
    if options.workspace_mib is not None:
        told["trt_max_workspace_size"] = str(options.workspace_mib << 20)
    if options.hardware_compatibility == "ampere_plus":
        told["trt_engine_hw_compatible"] = "1"
    return told


def timings_in(cache: Path | None, options: Options, built_for: Mapping[str, str]) -> Path | None:
    """The folder in `cache` for timings of this GPU and these versions, made; None where none are to be kept."""
    if cache is None or options.timing_cache is False:
        return None
    name = "".join(c if c.isalnum() or c == "." else "-" for c in "-".join(built_for.values()))
    folder = cache / "onnxruntime-tensorrt" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def copied(folder: Path, host: Host) -> TemporaryDirectory[str]:
    """A copy of the engines in `folder`, in the host's cache if it has one; it goes with what is returned."""
    if host.cache is not None:
        host.cache.mkdir(parents=True, exist_ok=True)
    scratch = TemporaryDirectory(dir=host.cache, prefix="engines-")
    shutil.copytree(folder / ENGINES, scratch.name, dirs_exist_ok=True)
    return scratch


def load() -> None:
    """Load TensorRT's libraries into the process, where the provider looks for them. Raises HostError without them."""
    try:
        import_module("tensorrt")
    except ImportError as error:
        raise HostError(
            f"provider tensorrt cannot run here: TensorRT is not installed ({error})",
            "pip install 'sdcompile[tensorrt]' in the version this ONNX Runtime was made for, or provider: cuda",
        ) from error


def too_old(options: Options, here: Mapping[str, str]) -> str:
    """Why the GPU `here` cannot build what `options` ask for; "" = it can."""
    if options.hardware_compatibility != "ampere_plus" or _number(here) >= 80:
        return ""
    return (
        "hardware_compatibility: ampere_plus can be built on GPUs from Ampere on; the GPU here is "
        f"{here['gpu']} ({here['architecture']}) (build it with hardware_compatibility: none, or on a newer GPU)"
    )


def misfit(options: Options, built_for: Mapping[str, str], here: Mapping[str, str]) -> str:
    """How this machine differs from the one that engines were built for; "" = they run. With ampere_plus, the GPU may
    be another one."""
    names = [name for name in built_for if name not in ("gpu", "driver", "architecture")]
    if options.hardware_compatibility != "ampere_plus" or _number(here) < 80:
        names.append("architecture")
    return ", ".join(
        f"{name} is {here.get(name)} here, and was {built_for[name]}"
        for name in names
        if here.get(name) != built_for.get(name)
    )


def _number(identity: Mapping[str, str]) -> int:
    """89 of "sm89"; that of Ampere where no GPU is known, as nothing can be said against it."""
    return int(identity.get("architecture", "sm80").removeprefix("sm"))
