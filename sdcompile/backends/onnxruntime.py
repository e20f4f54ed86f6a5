"""The ONNX Runtime backend: the exported graph, run on the CPU or by the CUDA or TensorRT provider.

ONNX Runtime optimises the graph when it opens it, so the engine is the ONNX itself and `build`
proves that it opens; the TensorRT provider's engines are built then, and kept beside it. It never falls
back to another provider than the one asked for. It knows no model and no store.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sdcompile.backends import onnxruntime_tensorrt as trt
from sdcompile.backends.base import Backend, Card, Host, Probe, card_from_job, read_card, write_card
from sdcompile.backends.onnxruntime_binding import Bindings
from sdcompile.backends.onnxruntime_profile import least
from sdcompile.backends.onnxruntime_settings import settings_of
from sdcompile.backends.trt import driver
from sdcompile.errors import HostError, StageError
from sdcompile.files import link
from sdcompile.machine import installed
from sdcompile.spec import Job, Precision

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime as ort

_PROVIDERS = {
    "cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider",
}  # fmt: skip
_NEEDS = {
    "cuda": "check `nvidia-smi`, and that CUDA 13 and cuDNN 9 are installed; or build with provider: cpu",
    "tensorrt": "check `nvidia-smi`, and that CUDA, cuDNN 9 and the TensorRT that this ONNX Runtime was made for are "
    "installed (pip install 'sdcompile[tensorrt]'); or build with provider: cuda",
}
_INT8_KERNELS = frozenset({
    "QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
    "ConvInteger", "QAttention",
})  # fmt: skip
_HINT = "pip install 'sdcompile[onnxruntime]'  (or 'sdcompile[onnxruntime-gpu]' for CUDA; one of them)"


class Options(BaseModel):
    """`build:` of a recipe whose backend is onnxruntime.

    provider            "auto" is the CPU; CUDA and TensorRT are used only where they are asked for
    graph_optimization  how far ONNX Runtime rewrites the graph when it opens it
    threads             worker threads; the host's wish at run time comes first
    builder_optimization_level, workspace_mib, hardware_compatibility, timing_cache
                        of provider tensorrt alone: what they are for backend tensorrt
    cuda_graphs         of provider cuda alone: replay each shape as one CUDA graph from its third call on. ONNX
                        Runtime refuses graphs of which the CPU has to compute a part
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    graph_optimization: Literal["all", "extended", "basic", "disable"] = "all"
    threads: int | None = Field(default=None, ge=1)
    builder_optimization_level: int | None = Field(default=None, ge=0, le=5)
    workspace_mib: int | None = Field(default=None, ge=1)
    hardware_compatibility: Literal["none", "ampere_plus"] | None = None
    timing_cache: bool | None = None
    cuda_graphs: bool | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Options:
        for name, provider in _OF_PROVIDER.items():
            if getattr(self, name) is not None and self.provider != provider:
                text = f"{name} is for provider {provider}, and provider is {self.provider}"
                raise PydanticCustomError("sdcompile", "{text}", {"text": text})
        return self

    @property
    def device(self) -> str:
        return "cpu" if self.provider == "auto" else self.provider


_OF_PROVIDER = {
    "builder_optimization_level": "tensorrt", "workspace_mib": "tensorrt", "hardware_compatibility": "tensorrt",
    "timing_cache": "tensorrt", "cuda_graphs": "cuda",
}  # fmt: skip


_LEVELS = {"all": "ENABLE_ALL", "extended": "ENABLE_EXTENDED", "basic": "ENABLE_BASIC", "disable": "DISABLE_ALL"}


def probe() -> Probe:
    """Of the GPU's providers, those that ONNX Runtime has, and a driver and libraries are here for."""
    cpu, gpu = installed("onnxruntime"), installed("onnxruntime-gpu")
    if cpu is None and gpu is None:
        return Probe(available=False, reason="onnxruntime is not installed", hint=_HINT)
    notes = []
    if cpu and gpu:
        notes.append("onnxruntime and onnxruntime-gpu are both installed and overwrite each other: uninstall one")
    if not gpu:
        none = "it is not installed (pip uninstall onnxruntime && pip install 'sdcompile[onnxruntime-gpu]')"
        missing = {"cuda": none, "tensorrt": none}
    elif reason := driver.look().reason:
        missing = {"cuda": reason, "tensorrt": reason}
    else:
        missing = {}
        notes.append("CUDA is compiled in; whether it loads here shows only when an engine is opened")
    library = next(filter(None, map(installed, trt.DISTRIBUTIONS)), None)
    if library is None:
        missing.setdefault("tensorrt", "TensorRT is not installed (pip install 'sdcompile[tensorrt]')")
    versions = {"cuda": {"onnxruntime-gpu": gpu}, "tensorrt": {"onnxruntime-gpu": gpu, "tensorrt": library}}
    providers = {
        name: {**driver.look().identity, **{k: v for k, v in told.items() if v}}
        for name, told in versions.items()
        if name not in missing
    }
    return Probe(
        available=True, version=gpu or cpu, devices=("cpu", *providers), notes=tuple(notes), providers=providers,
        missing=missing,
    )  # fmt: skip


def refuses(precision: Precision, options: BaseModel) -> list[str]:
    """What TensorRT's provider cannot build."""
    assert isinstance(options, Options)
    if options.provider == "tensorrt" and precision == "int8":
        return [
            "int8 with provider tensorrt is not built: TensorRT takes symmetric int8 only; backend tensorrt makes that"
        ]
    return []


def lacks(found: Probe, precision: Precision, options: BaseModel) -> str:
    """The provider that is asked for and cannot be here, or what its GPU cannot build."""
    assert isinstance(options, Options)
    if options.device == "cpu":
        return ""
    if options.device not in found.devices:
        return f"provider {options.device} cannot run here: {found.missing.get(options.device, 'it is not installed')}"
    return trt.too_old(options, found.providers.get(options.device, {}))


def device(found: Probe, options: BaseModel) -> Mapping[str, str]:
    """The GPU and the versions of the provider that is asked for; nothing of the CPU's."""
    assert isinstance(options, Options)
    return found.providers.get(options.device, {})


def export(options: BaseModel) -> Mapping[str, Any]:
    """The fused attention of ONNX Runtime's own providers; TensorRT knows no such operator and fuses its parts."""
    assert isinstance(options, Options)
    return {} if options.provider == "tensorrt" else {"attention": "mha"}


def build(src: Path, out: Path, job: Job) -> None:
    """Put the ONNX and its weights into `out` (linked where possible) and prove that it opens.

    Raises HostError when the provider asked for is not there, StageError when ONNX Runtime
    refuses the graph.
    """
    for path in sorted(p for p in src.iterdir() if p.name.startswith("model.onnx")):
        link(path, out / path.name)
    measured: dict[str, Any] = {}
    if job.precision == "int8":
        job.say("opening the engine, to see what runs in int8", None)
        measured |= _integer_operators(out / "model.onnx", job)
    options = Options.model_validate(dict(job.params.get("options") or {}))
    if options.device != "tensorrt":
        write_card(out, card_from_job(BACKEND.name, job, measured))
        job.say("opening the engine once", None)
        open_engine(out, Host()).close()
        return
    built_for = dict(probe().providers.get(options.device, {}))
    card = card_from_job(BACKEND.name, job, {**measured, trt.BUILT_FOR: built_for})
    write_card(out, card)
    engines = out / trt.ENGINES
    engines.mkdir()
    job.say("building engines with TensorRT", None)
    told = trt.provider_options(options, card, engines, trt.timings_in(job.cache, options, built_for))
    OnnxRuntimeEngine(card, _session(out / "model.onnx", options, Host(), tensorrt=told), options).close()
    if not list(engines.glob("*.engine")):
        raise StageError(
            f"{job.component}: TensorRT's provider was loaded, but it took no part of the graph",
            "build it with backend tensorrt, which says what it does not take, or with provider: cuda",
        )


def _integer_operators(path: Path, job: Job) -> dict[str, int]:
    """How many operators of the graph, as ONNX Runtime rewrites it, compute on 8-bit integers, and read 4-bit weights.

    Raises StageError when activations are quantized and none does, or weights have 4 bits and no kernel reads those.
    """
    import onnx

    options = Options.model_validate(dict(job.params.get("options") or {}))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="optimized-") as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        _session(path, options, Host(), optimized=optimized)
        kinds = [node.op_type for node in onnx.load(optimized, load_external_data=False).graph.node]
    found = sum(kind in _INT8_KERNELS for kind in kinds)
    narrow = kinds.count("MatMulNBits")
    if _has_bits4(path) and not narrow:
        raise StageError(
            f"{job.component}: weights have 4 bits, but ONNX Runtime would widen them all when it opens the engine",
            "build it with `build: {graph_optimization: all}`, or with `quantize: {bits: 8}`",
        )
    if not found and {"QuantizeLinear", "DynamicQuantizeLinear"} & set(kinds):
        raise StageError(
            f"{job.component}: the graph is quantized, but ONNX Runtime runs none of it in int8",
            "this is no gain: build it in another precision, or with `build: {graph_optimization: all}`",
        )
    return {"int8_operators": found, "int4_weights": narrow}


def _has_bits4(path: Path) -> bool:
    import onnx

    types = {tensor.data_type for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    return bool(types & {onnx.TensorProto.INT4, onnx.TensorProto.UINT4})


def open_engine(folder: Path, host: Host) -> OnnxRuntimeEngine:
    """The session on `folder/model.onnx`. Raises HostError and StageError as `build` does."""
    card = read_card(folder, BACKEND.name)
    options = Options.model_validate(dict(card.options))
    if options.device != "tensorrt":
        return OnnxRuntimeEngine(card, _session(folder / "model.onnx", options, host), options)
    engines = trt.copied(folder, host)
    try:
        told = trt.provider_options(options, card, Path(engines.name), None)
        session = _session(folder / "model.onnx", options, host, tensorrt=told)
        return OnnxRuntimeEngine(card, session, options, engines)
    except BaseException:
        engines.cleanup()
        raise


def profile(folder: Path, feeds: Mapping[str, np.ndarray], calls: int) -> list[tuple[str, float]]:
    """What one call of the engine in `folder` spends in each node, by ONNX Runtime's own clocks (see `Backend`)."""
    card = read_card(folder, BACKEND.name)
    graph, given = folder / "model.onnx", {tensor.name: feeds[tensor.name] for tensor in card.spec.inputs}
    opening = partial(_session, graph, Options.model_validate(dict(card.options)), Host())
    return least(graph, lambda file: opening(profile_to=file), given, calls)


def fits_here(folder: Path) -> str:
    """Nothing to choose from; raises HostError where the provider the engine in `folder` asks for cannot be here, or
    TensorRT's engines in it were built for another GPU or version."""
    card = read_card(folder, BACKEND.name)
    options, found = Options.model_validate(dict(card.options)), probe()
    if options.device == "cpu":
        return ""
    name = f"{card.component} (onnxruntime) was built for provider {options.device}"
    if why := lacks(found, card.precision, options.model_copy(update={"hardware_compatibility": None})):
        raise HostError(f"{name}: {why}", _NEEDS[options.device])
    built_for = card.measured.get(trt.BUILT_FOR, {})
    if why := trt.misfit(options, built_for, device(found, options)):
        raise HostError(f"{name} elsewhere: {why}", "sdcompile build RECIPE, on this machine")
    return ""


def _session(
    path: Path,
    options: Options,
    host: Host,
    *,
    tensorrt: Mapping[str, str] | None = None,
    optimized: Path | None = None,
    profile_to: Path | None = None,
) -> ort.InferenceSession:
    """`tensorrt`: what its provider is told; `optimized`: where to write the graph as ONNX Runtime rewrote it;
    `profile_to`: with what a file starts that tells of every call."""
    device = options.device
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise HostError(f"backend onnxruntime cannot run here: {error}", _HINT) from error

    wanted = _PROVIDERS[device]
    offered = ort.get_available_providers()
    if wanted not in offered:
        raise HostError(
            f"ONNX Runtime here has no {wanted} (it has {', '.join(offered)})",
            "pip uninstall onnxruntime && pip install 'sdcompile[onnxruntime-gpu]', or build with provider: cpu",
        )
    level = f"ORT_{_LEVELS[options.graph_optimization]}"
    settings = settings_of(path, level, host.threads or options.threads, optimized=optimized, profile_to=profile_to)
    providers: list[Any] = [wanted]
    if device != "cpu":
        # TF32 would make "fp32" mean 10 bits of mantissa.
        told = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        if options.cuda_graphs:
            told["enable_cuda_graph"] = "1"
        providers = [(_PROVIDERS["cuda"], told), _PROVIDERS["cpu"]]
        ort.preload_dlls()
    if tensorrt is not None:
        trt.load()
        providers.insert(0, (wanted, dict(tensorrt)))
    try:
        session = ort.InferenceSession(path, settings, providers=providers)
    except Exception as error:
        # ONNX Runtime's exception classes derive from Exception alone.
        raise StageError(
            f"ONNX Runtime refuses {path.name}: {str(error).splitlines()[0]}",
            "if it cannot capture the graph: build it with cuda_graphs: false" if options.cuda_graphs else "",
        ) from error
    session.disable_fallback()
    # get_available_providers() lists what was compiled in; only the session knows what loaded.
    if session.get_providers()[0] != wanted:
        raise HostError(
            f"{wanted} was asked for, but ONNX Runtime could not load it and fell back to {session.get_providers()[0]}",
            _NEEDS.get(device, ""),
        )
    return session


class OnnxRuntimeEngine:
    """An ONNX Runtime session. On a GPU its inputs and outputs are bound to the device's memory (never run on one
    yet)."""

    def __init__(
        self, card: Card, session: ort.InferenceSession, options: Options,
        scratch: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:  # fmt: skip
        """`scratch` goes when the engine is closed."""
        self.inputs, self.outputs = card.spec.inputs, card.spec.outputs
        self._names = [tensor.name for tensor in self.outputs]
        self._session: ort.InferenceSession | None = session
        self._scratch = scratch
        self._bindings: Bindings | None = None
        if options.device != "cpu":
            # TensorRT's provider takes what lies in CUDA's memory as well.
            self._bindings = Bindings(session, self._names, "cuda", graphs=bool(options.cuda_graphs))
        self.facts: Mapping[str, Any] = {
            "device": options.device,
            "provider": session.get_providers()[0],
            "precision": _computed_in(card, options.device),
            "asked": card.precision,
            "threads": session.get_session_options().intra_op_num_threads or None,
            **{key: value for key, value in card.measured.items() if key != trt.BUILT_FOR},
        }

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert self._session is not None, "the engine is closed"
        arrays = {t.name: feeds[t.name] for t in self.inputs}
        run = self._bindings or partial(self._session.run, self._names)
        return dict(zip(self._names, run(arrays), strict=True))

    def close(self) -> None:
        # What is bound goes before the session whose memory it is.
        self._bindings = None
        self._session = None
        if self._scratch is not None:
            self._scratch.cleanup()


def _computed_in(card: Card, device: str) -> str:
    """What the arithmetic is done in: the CPU provider casts to fp32 where it has no fp16 kernel, and so it does
    where weights alone are integers.

    On x86 it has no fp16 kernels for what diffusion models are made of; on Arm it has some.
    """
    if card.precision == "fp16" and device == "cpu":
        return "fp32" if platform.machine().lower() in {"x86_64", "amd64"} else "mixed"
    if card.precision == "int8" and not card.measured["int8_operators"]:
        return "fp32"
    return card.precision


BACKEND = Backend(
    name="onnxruntime",
    takes="onnx",
    realises={"fp32": (), "fp16": ("cast_fp16",), "int8": ("nncf_int8",)},
    options=Options,
    probe=probe,
    build=build,
    open=open_engine,
    lacks=lacks,
    fits=fits_here,
    device=device,
    profile=profile,
    export=export,
    refuses=refuses,
    modes={"static": (8,), "weights": (8, 4), "dynamic": (8,)},
)
