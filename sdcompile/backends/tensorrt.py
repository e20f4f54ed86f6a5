"""The TensorRT backend (10.13 to 11.x): engines built on the NVIDIA GPU that runs them.

Networks are strongly typed: the ONNX carries the precision, no builder flag and no calibrator does.
Kernels are chosen by timing them, so a build needs its GPU; where there is none, backend
tensorrt_rtx builds. It knows no model and no store.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sdcompile import machine
from sdcompile.backends.base import Backend, Host, Probe, read_card
from sdcompile.backends.trt import driver, targets
from sdcompile.backends.trt.building import build_engines
from sdcompile.backends.trt.compiling import Order
from sdcompile.backends.trt.engine import TrtEngine, open_plan
from sdcompile.backends.trt.fitting import fits, numbers
from sdcompile.errors import HostError
from sdcompile.files import link
from sdcompile.spec import Job, Precision

OLDEST, NEWEST = (10, 13), (12, 0)
"""Versions this backend is written for: from the first with a streamed build to before the next major one."""

_DISTRIBUTIONS = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
_HINT = "pip install 'sdcompile[tensorrt]'"
_ELSEWHERE = "build on a machine with the GPU it is for, or with backend tensorrt_rtx, which needs none"
_COMPATIBILITY = {"none": "NONE", "ampere_plus": "AMPERE_PLUS", "same_compute_capability": "SAME_COMPUTE_CAPABILITY"}


class Options(BaseModel):
    """`build:` of a recipe whose backend is tensorrt.

    builder_optimization_level  how long kernels are searched for, as in trtexec
    workspace_mib               scratch memory a kernel may take; unset = all there is
    hardware_compatibility      "none": runs on the model of GPU it was built on; "same_compute_capability": also on
                                other models of its architecture; "ampere_plus": on GPUs from Ampere on, slower
    version_compatible          also runs on later TensorRT versions; the plan then carries code of its own. Not with
                                refit: that code cannot do it
    weight_streaming            weights may stay in host memory where the GPU's is short; without CUDA graphs then
    refit                       weights can be put back in (REFIT_IDENTICAL: the same values)
    strip_plan                  leave weights out of the plan; they are put in from the ONNX when it is opened
    timing_cache                keep kernel timings in the store (faster rebuilds), also in the bundle, or not at all
    fused_attention             claim that each attention is one kernel: told, and never refused, where it is several
    cuda_graphs                 replay each shape as one CUDA graph after its first call
    device_latents              latents stay on the GPU between steps, where nothing has to look at them on the host
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    builder_optimization_level: int = Field(default=3, ge=0, le=5)
    workspace_mib: int | None = Field(default=None, ge=1)
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    version_compatible: bool = False
    weight_streaming: bool = False
    refit: bool = False
    strip_plan: bool = False
    timing_cache: Literal["store", "bundle", "off"] = "store"
    fused_attention: bool = True
    cuda_graphs: bool = True
    device_latents: bool = True

    @model_validator(mode="after")
    def _fits_together(self) -> Options:
        if self.strip_plan and not self.refit:
            text = "strip_plan needs refit: true, or the weights could not be put back"
            raise PydanticCustomError("sdcompile", "{text}", {"text": text})
        if self.version_compatible and self.refit:
            # NVIDIA, "How TensorRT Works", Runtime Options: the lean runtime "cannot refit or serialize engines".
            text = "version_compatible engines are run by TensorRT's lean runtime, which cannot refit: leave one out"
            raise PydanticCustomError("sdcompile", "{text}", {"text": text})
        return self


def probe() -> Probe:
    version = next(filter(None, map(machine.version, _DISTRIBUTIONS)), None)
    if version is None:
        return Probe(available=False, reason="tensorrt is not installed", hint=_HINT)
    if not OLDEST <= numbers(version)[:2] < NEWEST:
        return Probe(
            available=False, version=version, hint=_HINT,
            reason=f"tensorrt {version} is installed; this sdcompile works with {OLDEST[0]}.{OLDEST[1]} to 11.x",
        )  # fmt: skip
    found = driver.look()
    if found.reason:
        return Probe(available=False, version=version, reason=found.reason, hint=_ELSEWHERE)
    names = tuple(device.name for device in found.devices)
    return Probe(available=True, version=version, devices=names, identity=found.identity)


def order(options: Options, job: Job, onnx: Path, version: str, identity: Mapping[str, str]) -> Order:
    """What to build; its plan, log and table are named by `build_engines`."""
    assert job.spec is not None
    wanted = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "WEIGHT_STREAMING": options.weight_streaming,
        # Not REFIT: from 11.3 on its engines may drop the bias of a GEMM even when nothing is refitted
        # (NVIDIA's known issue); REFIT_IDENTICAL is not affected.
        "REFIT_IDENTICAL": options.refit,
        "STRIP_PLAN": options.strip_plan,
    }
    settings: dict[str, int | str] = {"builder_optimization_level": options.builder_optimization_level}
    if options.hardware_compatibility != "none":
        level = _COMPATIBILITY[options.hardware_compatibility]
        settings["hardware_compatibility_level"] = f"HardwareCompatibilityLevel.{level}"
    nowhere = Path()
    return Order(
        module="tensorrt", version=version, onnx=onnx, plan=nowhere, log=nowhere, table=nowhere,
        profile=job.spec.profile(job.shapes), flags=tuple(name for name, on in wanted.items() if on),
        settings=settings, workspace=None if options.workspace_mib is None else options.workspace_mib << 20,
        timing_cache=None if options.timing_cache == "off" else _timings(job, version, identity),
    )  # fmt: skip


def build(src: Path, out: Path, job: Job) -> None:
    """Build `src/model.onnx` for the GPU of this machine (see `trt.building`).

    Raises HostError when TensorRT or a GPU is missing, StageError when it refuses the graph or the
    engine is not of its precision.
    """
    found = probe()
    if not found.available:
        raise HostError(f"backend tensorrt cannot build here: {found.reason}", found.hint)
    assert found.version is not None
    options = Options.model_validate(dict(job.params.get("options") or {}))
    if why := lacks(found, job.precision, options):
        raise HostError(f"{job.component}: {why}")
    given = order(options, job, src / "model.onnx", found.version, found.identity)
    ampere = options.hardware_compatibility == "ampere_plus"
    target = targets.AMPERE_PLUS if ampere else found.identity["architecture"]
    build_engines(
        BACKEND.name, src, out, job, {target: given}, fused_attention=options.fused_attention, built_on=found.identity
    )
    if options.strip_plan:
        for path in sorted(src.glob("model.onnx*")):
            link(path, out / path.name)
    if options.timing_cache == "bundle" and given.timing_cache is not None and given.timing_cache.is_file():
        shutil.copy2(given.timing_cache, out / "timing.cache")


def lacks(found: Probe, precision: Precision, options: BaseModel) -> str:
    """Why the GPU here cannot build this; "" = it can. Ampere (sm80) has what Turing lacks."""
    assert isinstance(options, Options)
    if not found.identity or int(found.identity["architecture"].removeprefix("sm")) >= 80:
        return ""
    asked = {
        "bf16": ("in fp16", precision == "bf16"),
        "hardware_compatibility: ampere_plus": (
            "with hardware_compatibility: none", options.hardware_compatibility == "ampere_plus",
        ),
    }  # fmt: skip
    faults = {name: instead for name, (instead, wanted) in asked.items() if wanted}
    if not faults:
        return ""
    device = f"{found.identity['gpu']} ({found.identity['architecture']})"
    return (
        f"{' and '.join(faults)} can be built on GPUs from Ampere on; the GPU here is {device} "
        f"(build it {', '.join(faults.values())}, or on a newer GPU)"
    )


def _timings(job: Job, version: str, identity: Mapping[str, str]) -> Path | None:
    """Where timings of this version on this GPU are kept; None when the op was given nowhere to keep them."""
    if job.cache is None:
        return None
    gpu = "".join(c if c.isalnum() else "-" for c in f"{identity.get('gpu', '')}-{identity.get('driver', '')}")
    return job.cache / "tensorrt" / f"{version}-{gpu}.timings"


def fits_here(folder: Path) -> str:
    """The target of the engine in `folder` that runs on this machine's GPU. Raises HostError as `open_engine` does."""
    return fits(read_card(folder, BACKEND.name), probe())


def open_engine(folder: Path, host: Host) -> TrtEngine:
    """The engine in `folder`, on this machine's GPU.

    Raises HostError when there is no driver, another GPU than it was built for, or another version
    of TensorRT; StageError when the files are damaged.
    """
    return open_plan(BACKEND.name, "tensorrt", folder, host, probe())


BACKEND = Backend(
    name="tensorrt",
    takes="onnx",
    realises={"fp32": (), "fp16": ("cast_fp16",), "bf16": ("cast_bf16",), "int8": ("nncf_int8",)},
    rests=("fp16",),
    # Zero points other than 0 are refused by the parser; quantised products keep an attention from one kernel.
    quantize={"symmetric": True, "attention_products": False},
    options=Options,
    probe=probe,
    build=build,
    open=open_engine,
    lacks=lacks,
    fits=fits_here,
    memory=(1.6, 0.6),
    packages=_DISTRIBUTIONS,
    revision=2,
    host_bound=True,
)
