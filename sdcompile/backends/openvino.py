"""The OpenVINO backend: the exported graph as OpenVINO IR, compiled on the CPU when it is opened.

Precision is a compile hint here, always stated and always read back from what was compiled: a
CPU without bf16 or fp16 units computes in fp32 whatever was asked. It knows no model and no store.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sdcompile import machine
from sdcompile.backends import mapped, racing
from sdcompile.backends import openvino_graphs as graphs
from sdcompile.backends.base import Backend, Card, Engine, Host, Probe, card_from_job, read_card, write_card
from sdcompile.backends.openvino_ir import HINT, convert, import_openvino, reason
from sdcompile.errors import StageError
from sdcompile.spec import Job, Say

if TYPE_CHECKING:
    import numpy as np
    import openvino as ov

_TYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_NAMES = {"float32": "fp32", "f32": "fp32", "float16": "fp16", "f16": "fp16", "bfloat16": "bf16", "bf16": "bf16"}

_COMPILED_BYTES = 500_000_000
"""Compiled models of one engine are kept up to this much weight, four at most; the one in use always is."""

_TIE = 1.05
"""fp16 may be this much slower than bf16 and still be taken: its error is eight times smaller."""

_GAIN = 1.03
"""A dynamic model must be this much slower than a static one before it is given up."""

_PAYBACK_CALLS = 100
"""Calls after which a static compilation must have paid for itself: five images of twenty steps."""


class Options(BaseModel):
    """`build:` of a recipe whose backend is openvino.

    half        "auto": where bf16 is asked and the CPU has fp16 units, both are timed and fp16 taken
                when it ties, as its error is smaller; "asked": bf16 means bf16
    shape_mode  "static" compiles once per requested shape, "dynamic" once for all; "auto" times both
    weights     how weights are stored; "auto" stores fp16 for fp16 and bf16 when their range allows
    streams     requests in flight OpenVINO prepares for; a pipeline sends one at a time
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    half: Literal["asked", "auto"] = "auto"
    shape_mode: Literal["auto", "static", "dynamic"] = "auto"
    weights: Literal["auto", "fp32", "fp16"] = "auto"
    streams: int = Field(default=1, ge=1)


def probe() -> Probe:
    version = machine.version("openvino")
    if version is None:
        return Probe(available=False, reason="openvino is not installed", hint=HINT)
    units = half_units(machine.cpu_features())
    missing = [name for name in ("bf16", "fp16") if name not in units]
    notes = (
        ()
        if not missing
        else (f"this CPU has no {' or '.join(missing)} units: where asked for, OpenVINO computes in fp32 instead",)
    )
    return Probe(available=True, version=version, devices=("CPU",), notes=notes)


def half_units(features: Iterable[str]) -> frozenset[str]:
    """Of bf16 and fp16, those the CPU with these features (`machine.cpu_features`) computes in, as OpenVINO sees it.

    Linux does not list amx_fp16 everywhere, so a missing fp16 is no proof; the compiled model's
    own report (`facts["precision"]`) is.
    """
    flags, units = set(features), set()
    if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        units.add("bf16")
    if flags & {"avx512_fp16", "amx_fp16", "asimdhp"}:
        units.add("fp16")
    return frozenset(units)


def build(src: Path, out: Path, job: Job) -> None:
    """Convert `src/model.onnx` to `out/model.xml` + `model.bin`, and settle shape mode and half type.

    What "auto" stands for is measured here and written, with the figures, to engine.json. Raises
    HostError when OpenVINO is missing, StageError when it refuses the graph.
    """
    options = Options.model_validate(dict(job.params.get("options") or {}))
    core = import_openvino().Core()
    job.say("converting to OpenVINO IR", None)
    measured: dict[str, Any] = {"weights": convert(core, src / "model.onnx", out, _float(job), options.weights)}
    measured |= settle(core, out, card_from_job(BACKEND.name, job, measured), options, job.say)
    card = card_from_job(BACKEND.name, job, measured)
    if job.precision == "int8":
        job.say("compiling once, to see what runs in int8", None)
        _check_int8(core, out, card)
    write_card(out, card)


def _float(job: Job | Card) -> str:
    """The precision of what is not int8."""
    return str(job.params["rest"]) if job.precision == "int8" else job.precision


def _check_int8(core: ov.Core, folder: Path, card: Card) -> None:
    """Raise StageError when a model with quantized activations would compute nothing in int8."""
    engine = OpenVinoEngine(core, folder, card, Host(), shape_mode=card.measured["shape_mode"], hint=_float(card))
    found = engine.facts.get("int8_operators")
    engine.close()
    if found == 0:
        raise StageError(
            f"{card.component}: the graph is quantized, but OpenVINO runs no convolution or product of it in int8",
            "this is no gain: build it in another precision, or ignore fewer modules (`quantize: {ignore: ...}`)",
        )


def open_engine(folder: Path, host: Host) -> OpenVinoEngine:
    """The engine in `folder`. A dynamic one is compiled now, a static one at the first call of each shape.

    Raises HostError when OpenVINO is missing, StageError when the files are damaged.
    """
    card = read_card(folder, BACKEND.name)
    core = import_openvino().Core()
    measured = card.measured
    engine = OpenVinoEngine(core, folder, card, host, shape_mode=measured["shape_mode"], hint=measured["hint"])
    engine.check()
    return engine


def profile(folder: Path, feeds: Mapping[str, np.ndarray], calls: int) -> list[tuple[str, float]]:
    """What one call of the engine in `folder` spends in each kernel, by OpenVINO's own counters (see `Backend`)."""
    card = read_card(folder, BACKEND.name)
    mode, hint = card.measured["shape_mode"], card.measured["hint"]
    core = import_openvino().Core()
    engine = OpenVinoEngine(core, folder, card, Host(), shape_mode=mode, hint=hint, counting=True)
    try:
        engine(feeds)  # kernels are made at the first call
        rows = []
        for _ in range(calls):
            engine(feeds)
            rows.append(engine.counted())
    finally:
        engine.close()
    return [(same[0][0], min(seconds for _, seconds in same)) for same in zip(*rows, strict=True)]


def settle(core: ov.Core, folder: Path, card: Card, options: Options, say: Say) -> dict[str, Any]:
    """Decide shape mode and compile hint of the engine in `folder`, measuring where they are "auto".

    Returns {"shape_mode", "hint"} and, when something was timed, "timings" and "cpu".
    """
    shape_mode: str = options.shape_mode
    hint = _float(card)
    timings: dict[str, Any] = {}
    if not card.spec.dynamic_letters(card.shapes):
        shape_mode = "static"
    elif shape_mode == "auto":
        say("timing static against dynamic shapes", None)
        timings["shape_mode"] = _race(core, folder, card, {m: (m, hint) for m in ("static", "dynamic")})
        shape_mode = choose_shape_mode(timings["shape_mode"])
    units = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    # int8 beside an fp16 hint does not compile: the two meet in one product (OpenVINO 2026.4).
    if hint == "bf16" and card.precision != "int8" and options.half == "auto" and {"BF16", "FP16"} <= set(units):
        say("timing fp16 against bf16", None)
        timings["half"] = _race(core, folder, card, {h: (shape_mode, h) for h in ("bf16", "fp16")})
        hint = choose_half(timings["half"])
    settled: dict[str, Any] = {"shape_mode": shape_mode, "hint": hint}
    if timings:
        settled |= {"timings": timings, "cpu": core.get_property("CPU", "FULL_DEVICE_NAME")}
    return settled


def choose_shape_mode(timings: Mapping[str, Mapping[str, float]]) -> str:
    """ "static" when that is 3 % cheaper a call and its compilation, paid once per shape, comes back in 100 calls."""
    static, dynamic = timings["static"], timings["dynamic"]
    saved_ms = dynamic["cpu_ms"] - static["cpu_ms"]
    cheaper = dynamic["cpu_ms"] >= _GAIN * static["cpu_ms"]
    return "static" if cheaper and _PAYBACK_CALLS * saved_ms >= static["first_cpu_ms"] else "dynamic"


def choose_half(timings: Mapping[str, Mapping[str, float]]) -> str:
    """ "fp16" when it is at most 5 % dearer a call than bf16, else "bf16"."""
    return "fp16" if timings["fp16"]["cpu_ms"] <= _TIE * timings["bf16"]["cpu_ms"] else "bf16"


def _race(core: ov.Core, folder: Path, card: Card, rivals: Mapping[str, tuple[str, str]]) -> dict[str, racing.Timing]:
    """Time rivals (name -> shape mode, hint) at the usual shapes; large models one at a time, to save memory."""

    def opening(shape_mode: str, hint: str) -> Callable[[], Engine]:
        return lambda: OpenVinoEngine(core, folder, card, Host(), shape_mode=shape_mode, hint=hint)

    openings = {name: opening(*rival) for name, rival in rivals.items()}
    return racing.race(openings, racing.usual_feeds(card), together=_compiled_bytes(folder, card) <= _COMPILED_BYTES)


def _compiled_bytes(folder: Path, card: Card) -> int:
    """What the weights may take once compiled: a CPU without half units unpacks fp16 to fp32."""
    stored = (folder / "model.bin").stat().st_size
    return 2 * stored if card.measured["weights"] == "fp16" else stored


class OpenVinoEngine:
    """OpenVINO IR on the CPU.

    Weights stay mapped from the file; compiled models of the last shapes are kept as far as
    `_COMPILED_BYTES` allows. `hint` is the type asked of the compiler ("fp32", "fp16", "bf16"). `counting` has
    OpenVINO clock every kernel, which takes a little time itself.
    """

    def __init__(
        self, core: ov.Core, folder: Path, card: Card, host: Host, *, shape_mode: str, hint: str, counting: bool = False
    ) -> None:
        self.inputs, self.outputs = card.spec.inputs, card.spec.outputs
        self._core = core
        self._folder = folder
        self._card = card
        self._host = host
        self._shape_mode = shape_mode
        self._hint = hint
        self._counting = counting
        self._requests: OrderedDict[tuple[tuple[int, ...], ...], ov.InferRequest] = OrderedDict()
        self._seen: set[tuple[tuple[int, ...], ...]] = set()
        self._model: ov.Model | None = None
        self._facts: dict[str, Any] | None = None
        compiled_bytes = max(1, _compiled_bytes(folder, card))
        self._keep = min(4, max(1, _COMPILED_BYTES // compiled_bytes))
        self._cached = host.cache is not None and compiled_bytes <= _COMPILED_BYTES

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the compiled model reports of itself; compiles the usual shape when nothing is compiled yet."""
        if self._facts is None:
            self._request(self._usual_shape())
        assert self._facts is not None
        return self._facts

    def check(self) -> None:
        """Read the model, and compile it when one compilation serves every shape."""
        if self._shape_mode == "dynamic":
            self._request(())
        else:
            self._read()

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = {t.name: feeds[t.name] for t in self.inputs}
        key = tuple(array.shape for array in arrays.values())
        request = self._request(() if self._shape_mode == "dynamic" else key)
        try:
            if key in self._seen:
                results = request.infer(arrays, share_outputs=False)
            else:
                # Dynamic kernels pack their weights at the first call of a shape.
                with mapped.pages_released(self._folder):
                    results = request.infer(arrays, share_outputs=False)
                self._seen.add(key)
        except RuntimeError as error:
            raise StageError(f"{self._card.component}: OpenVINO cannot run shapes {key}: {reason(error)}") from error
        return {t.name: results[t.name] for t in self.outputs}

    def counted(self) -> list[tuple[str, float]]:
        """Of the last call: the operators that each kernel computes and the seconds it took, in order."""
        request = next(reversed(self._requests.values()))
        return graphs.counted(request)

    def close(self) -> None:
        self._requests.clear()
        self._model = None
        mapped.trim()

    def _usual_shape(self) -> tuple[tuple[int, ...], ...]:
        if self._shape_mode == "dynamic":
            return ()
        return tuple(t.shape(self._card.shapes, "opt") for t in self.inputs)

    def _request(self, key: tuple[tuple[int, ...], ...]) -> ov.InferRequest:
        """The request whose compiled model takes `key`: one shape per input, or () for any."""
        if key in self._requests:
            self._requests.move_to_end(key)
            return self._requests[key]
        while len(self._requests) >= self._keep:
            self._requests.popitem(last=False)
            mapped.trim()
        model = self._read()
        try:
            if key:
                model.reshape({t.name: list(shape) for t, shape in zip(self.inputs, key, strict=True)})
            with mapped.pages_released(self._folder):
                compiled = self._core.compile_model(model, "CPU", self._settings())
        except RuntimeError as error:
            raise StageError(f"{self._card.component}: OpenVINO cannot compile the model: {reason(error)}") from error
        # While its mapping is released during later calls, the model that owns it must live.
        self._model = model
        self._facts = self._facts_of(model, compiled)
        self._requests[key] = compiled.create_infer_request()
        return self._requests[key]

    def _read(self) -> ov.Model:
        try:
            return self._core.read_model(self._folder / "model.xml")
        except RuntimeError as error:
            raise StageError(
                f"{self._folder} holds no whole OpenVINO model: {reason(error)}", "build it again"
            ) from error

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _TYPES[self._runnable_hint()],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": self._card.options.get("streams", 1),
            "PERF_COUNT": self._counting,
        }
        if self._host.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self._host.threads
            # Pinned, the threads of every process take the first processors, and workers would share them.
            settings["ENABLE_CPU_PINNING"] = self._host.threads >= machine.threads()
        # A cached large model saves a tenth of its compilation (fp16 weights, 220 M parameters: 2.9 s of
        # processor time to 2.7) and costs its weights again, on disk and in memory while it loads.
        if self._cached:
            settings["CACHE_DIR"] = str(self._host.cache)
        return settings

    def _runnable_hint(self) -> str:
        """The hint, but fp32 for an fp16 this CPU has no units for.

        Where a CPU has bf16 units alone, OpenVINO (2026.4) would take bf16 for fp16, which is eight
        times coarser than what was asked for.
        """
        units = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return "fp32" if self._hint == "fp16" and "FP16" not in units else self._hint

    def _facts_of(self, model: ov.Model, compiled: ov.CompiledModel) -> dict[str, Any]:
        computed = _NAMES[compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()]
        integers: dict[str, Any] = {}
        if self._card.precision == "int8":
            # Weights alone are widened inside the products, which compute in floats.
            what = "operators" if graphs.has_quantized_activations(model) else "weights"
            found = graphs.integer_operators(compiled)
            integers = {f"{kind}_{what}": count for kind, count in found.items()} | {"rest": computed}
        return {
            "device": "CPU",
            "precision": "int8" if integers.get("int8_operators") else computed,
            **integers,
            "asked": self._card.precision,
            "weights": self._card.measured["weights"],
            "execution_mode": str(compiled.get_property("EXECUTION_MODE_HINT")).rpartition(".")[2].lower(),
            "shape_mode": self._shape_mode,
            "streams": int(compiled.get_property("NUM_STREAMS")),
            "threads": int(compiled.get_property("INFERENCE_NUM_THREADS")),
            "pinned": bool(compiled.get_property("ENABLE_CPU_PINNING")),
        }


BACKEND = Backend(
    name="openvino",
    takes="onnx",
    realises={"fp32": (), "fp16": (), "bf16": (), "int8": ("nncf_int8",)},
    # Products of integers with scales from each call take 1.2 times as long as fp32 here (OpenVINO 2026.4).
    modes={"static": (8,), "weights": (8, 4)},
    rests=("bf16", "fp32"),
    # Quantized products keep an attention from one kernel, and where there is AMX they come out wrong beside bf16
    # (OpenVINO 2026.4: the tiny model's UNet at -0.4 dB in verification, 12 dB being the floor).
    quantize={"attention_products": False},
    options=Options,
    probe=probe,
    build=build,
    open=open_engine,
    packages=("openvino",),
    profile=profile,
    host_bound=True,
    revision=2,
)
