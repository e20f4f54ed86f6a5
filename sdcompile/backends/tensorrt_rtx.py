"""The TensorRT-RTX backend: engines for NVIDIA GPUs, built ahead of time on a machine that needs none.

Precision is what the ONNX carries (strong typing); this file only says which passes put it there.
Machine code is made from the plan where it is loaded (portable), or for one architecture here. It
knows no model and no store.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from sdcompile import machine
from sdcompile.backends.base import Backend, Host, Probe, read_card
from sdcompile.backends.trt import driver, targets
from sdcompile.backends.trt.building import build_engines
from sdcompile.backends.trt.compiling import Order
from sdcompile.backends.trt.engine import TrtEngine, open_plan
from sdcompile.backends.trt.fitting import fits
from sdcompile.errors import HostError
from sdcompile.spec import Job, Precision

VERSION = "1.7.1.116"
"""The one version this backend works with: plans are bound to it, int8 convolutions need 1.7, and the layer
table is read in the words of this one."""

_DISTRIBUTIONS = ("tensorrt-rtx-cu12", "tensorrt-rtx-cu13")
_HINT = "pip install 'sdcompile[tensorrt-rtx]'"


class Options(BaseModel):
    """`build:` of a recipe whose backend is tensorrt_rtx.

    compute_capabilities  one engine each; "portable" runs on every RTX GPU from Ampere on
    workspace_mib         scratch memory a kernel may take; unset = all there is
    weight_streaming      weights may stay in host memory where the GPU's is short; without CUDA graphs then
    fused_attention       stop the build when an fp16 or int8 engine computes an attention in several kernels
    cuda_graphs           replay each shape as one CUDA graph after its first call
    device_latents        latents stay on the GPU between steps, where nothing has to look at them on the host

    Refit and stripped plans are not offered: 1.7.1 builds them only where there is a GPU (tried), and its wheels
    lack what version compatible plans need.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    compute_capabilities: tuple[targets.Target, ...] = Field(default=("portable",), min_length=1)
    workspace_mib: int | None = Field(default=None, ge=1)
    weight_streaming: bool = False
    fused_attention: bool = True
    cuda_graphs: bool = True
    device_latents: bool = True


def probe() -> Probe:
    version = next(filter(None, map(machine.version, _DISTRIBUTIONS)), None)
    if version is None:
        return Probe(available=False, reason="tensorrt_rtx is not installed", hint=_HINT)
    if version != VERSION:
        return Probe(
            available=False, version=version, hint=_HINT,
            reason=f"tensorrt_rtx {version} is installed; this sdcompile works with {VERSION}",
        )  # fmt: skip
    found = driver.look()
    notes = (f"engines are built here but cannot run here: {found.reason}",) if found.reason else ()
    return Probe(
        available=True, version=version, devices=tuple(device.name for device in found.devices), notes=notes,
        cannot_run=found.reason, identity=found.identity,
    )  # fmt: skip


def refuses(precision: Precision, options: BaseModel) -> list[str]:
    """Why an engine of `precision` cannot be built for some of the targets in `options`; [] = it can."""
    assert isinstance(options, Options)
    return targets.refused(precision, options.compute_capabilities)


def build(src: Path, out: Path, job: Job) -> None:
    """Build `src/model.onnx` for every target (see `trt.building`).

    Raises HostError when TensorRT-RTX is missing, StageError when it refuses the graph or an engine
    is not of its precision.
    """
    found = probe()
    if not found.available:
        raise HostError(f"backend tensorrt_rtx cannot build here: {found.reason}", found.hint)
    assert job.spec is not None
    options = Options.model_validate(dict(job.params.get("options") or {}))
    wanted = {
        "WEIGHT_STREAMING": options.weight_streaming,
        # What NVIDIA requires of an engine whose work is captured as a CUDA graph. It excludes weight streaming.
        "REQUIRE_USER_ALLOCATION": options.cuda_graphs and not options.weight_streaming,
    }
    nowhere = Path()
    orders: dict[str, Order] = {
        target: Order(
            module="tensorrt_rtx", version=VERSION, onnx=src / "model.onnx", plan=nowhere, log=nowhere, table=nowhere,
            profile=job.spec.profile(job.shapes), target=None if target == targets.PORTABLE else target.upper(),
            flags=tuple(name for name, on in wanted.items() if on),
            workspace=None if options.workspace_mib is None else options.workspace_mib << 20,
        )
        for target in dict.fromkeys(options.compute_capabilities)
    }  # fmt: skip
    build_engines(BACKEND.name, src, out, job, orders, fused_attention=options.fused_attention)


def fits_here(folder: Path) -> str:
    """The target of the engine in `folder` that runs on this machine's GPU. Raises HostError as `open_engine` does."""
    return fits(read_card(folder, BACKEND.name), probe())


def open_engine(folder: Path, host: Host) -> TrtEngine:
    """The engine in `folder` that fits this machine's GPU.

    Raises HostError when there is no driver, no GPU of a kind it was built for, or another version
    of TensorRT-RTX; StageError when the files are damaged.
    """
    return open_plan(BACKEND.name, "tensorrt_rtx", folder, host, probe())


BACKEND = Backend(
    name="tensorrt_rtx",
    takes="onnx",
    realises={"fp32": (), "fp16": ("cast_fp16",), "bf16": ("cast_bf16",), "int8": ("nncf_int8",)},
    rests=("fp16",),
    # Zero points other than 0 are refused by the parser; quantised products keep an attention from one kernel.
    quantize={"symmetric": True, "attention_products": False},
    options=Options,
    probe=probe,
    build=build,
    open=open_engine,
    fits=fits_here,
    memory=(1.6, 0.6),
    packages=("tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
    revision=2,
    refuses=refuses,
)
