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
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sdcompile.backends.base import Backend, Card, Host, Probe, card_from_job, read_card, write_card
from sdcompile.backends.onnxruntime_binding import Bindings
from sdcompile.backends.trt import driver
from sdcompile.errors import HostError, StageError
from sdcompile.files import link
from sdcompile.machine import version
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
ENGINES = "engines"
"""Where an engine folder keeps what TensorRT's provider built (*.engine) and timed."""
_INT8_KERNELS = frozenset({
    "QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
    "ConvInteger", "QAttention",
})  # fmt: skip
_TENSORRT = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
_HINT = "pip install 'sdcompile[onnxruntime]'  (or 'sdcompile[onnxruntime-gpu]' for CUDA; never both)"


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


def probe() -> Probe:
    cpu, gpu = version("onnxruntime"), version("onnxruntime-gpu")
    if cpu is None and gpu is None:
        return Probe(available=False, reason="onnxruntime is not installed", hint=_HINT)
    notes = []
    if cpu and gpu:
        notes.append("onnxruntime and onnxruntime-gpu are both installed and overwrite each other: uninstall one")
    if gpu:
        notes.append("CUDA is compiled in; whether it loads here shows only when an engine is opened")
    devices = ["cpu"] if not gpu else ["cpu", "cuda"]
    if gpu and any(map(version, _TENSORRT)):
        devices.append("tensorrt")
    return Probe(available=True, version=gpu or cpu, devices=tuple(devices), notes=tuple(notes))


def refuses(precision: Precision, options: BaseModel) -> list[str]:
    """What TensorRT's provider cannot build."""
    assert isinstance(options, Options)
    if options.provider == "tensorrt" and precision == "int8":
        return [
            "int8 with provider tensorrt is not built: TensorRT takes symmetric int8 only; backend tensorrt makes that"
        ]
    return []


def lacks(found: Probe, precision: Precision, options: BaseModel) -> str:
    """The provider that is asked for and not installed here."""
    assert isinstance(options, Options)
    if options.device == "cpu" or options.device in found.devices:
        return ""
    return f"provider {options.device} is not installed here (pip install 'sdcompile[onnxruntime-gpu]')"


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
    write_card(out, card_from_job(BACKEND.name, job, measured))
    options = Options.model_validate(dict(job.params.get("options") or {}))
    if options.device != "tensorrt":
        job.say("opening the engine once", None)
        open_engine(out, Host()).close()
        return
    (out / ENGINES).mkdir()
    job.say("building engines with TensorRT", None)
    open_engine(out, Host()).close()
    if not list((out / ENGINES).glob("*.engine")):
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
    session = _session(folder / "model.onnx", options, host, card=card)
    return OnnxRuntimeEngine(card, session, options)


def tensorrt_options(options: Options, card: Card, engines: Path) -> dict[str, str]:
    """What TensorRT's provider is told: one profile, where engines are kept.

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
    if options.timing_cache is not False:
        told |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(engines)}
    if options.builder_optimization_level is not None:
        told["trt_builder_optimization_level"] = str(options.builder_optimization_level)
    if options.workspace_mib is not None:
        told["trt_max_workspace_size"] = str(options.workspace_mib << 20)
    if options.hardware_compatibility == "ampere_plus":
        told["trt_engine_hw_compatible"] = "1"
    return told


def _load_tensorrt() -> None:
    """Load TensorRT's libraries into the process, where the provider looks for them. Raises HostError without them."""
    try:
        import_module("tensorrt")
    except ImportError as error:
        raise HostError(
            f"provider tensorrt cannot run here: TensorRT is not installed ({error})",
            "pip install 'sdcompile[tensorrt]' in the version this ONNX Runtime was made for, or provider: cuda",
        ) from error


def fits_here(folder: Path) -> str:
    """Nothing to choose from; raises HostError where the provider the engine in `folder` asks for cannot be here."""
    card = read_card(folder, BACKEND.name)
    device = Options.model_validate(dict(card.options)).device
    if device == "cpu":
        return ""
    if device not in probe().devices:
        raise HostError(
            f"{card.component} (onnxruntime) was built for provider {device}, which is not installed here",
            _NEEDS[device],
        )
    if reason := driver.look().reason:
        raise HostError(f"{card.component} (onnxruntime) was built for provider {device} and cannot run here: {reason}")
    return ""


def _session(
    path: Path, options: Options, host: Host, *, card: Card | None = None, optimized: Path | None = None
) -> ort.InferenceSession:
    """`card`, of the engine that is opened, tells TensorRT its shapes; `optimized`: where to write the graph as ONNX
    Runtime rewrote it."""
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
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = getattr(
        ort.GraphOptimizationLevel,
        f"ORT_{'DISABLE' if options.graph_optimization == 'disable' else 'ENABLE'}_"
        f"{'ALL' if options.graph_optimization == 'disable' else options.graph_optimization.upper()}",
    )
    threads = host.threads or options.threads
    if threads is not None:
        settings.intra_op_num_threads = threads
    if optimized is not None:
        settings.optimized_model_filepath = str(optimized)
        settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    # Spinning workers burn whole cores between calls (7x the CPU time of a text encoder call, measured).
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = [wanted]
    if device != "cpu":
        # TF32 would make "fp32" mean 10 bits of mantissa.
        told = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        if options.cuda_graphs:
            told["enable_cuda_graph"] = "1"
        providers = [(_PROVIDERS["cuda"], told), _PROVIDERS["cpu"]]
        ort.preload_dlls()
    if device == "tensorrt":
        assert card is not None
        _load_tensorrt()
        providers.insert(0, (wanted, tensorrt_options(options, card, path.parent / ENGINES)))
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

    def __init__(self, card: Card, session: ort.InferenceSession, options: Options) -> None:
        self.inputs, self.outputs = card.spec.inputs, card.spec.outputs
        self._names = [tensor.name for tensor in self.outputs]
        self._session: ort.InferenceSession | None = session
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
            **card.measured,
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
    export=export,
    refuses=refuses,
    modes={"static": (8,), "weights": (8, 4), "dynamic": (8,)},
)
