"""A plan of TensorRT or TensorRT-RTX on a GPU: opened, and one call of it.

Nothing of either library is touched before the driver has said that there is a GPU: without one
their runtimes fail late or crash the process.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.backends.base import Card, Host, Probe, is_constant, read_card
from sdcompile.backends.trt import cuda
from sdcompile.backends.trt.arrays import DeviceArray, DeviceArrays
from sdcompile.backends.trt.contexts import Contexts, KernelFile
from sdcompile.backends.trt.fitting import fits
from sdcompile.errors import HostError, SdcompileWarning, StageError

if TYPE_CHECKING:
    import numpy as np

_GRAPHS = 8
"""CUDA graphs kept, one per shape; the one used longest ago makes room."""

Key = tuple[tuple[int, ...], ...]


@dataclass
class _Lane:
    """A context, the shapes it was told last, and its work for them as a CUDA graph."""

    context: Any
    shapes: Key = ()
    graph: Any = None


def open_plan(backend: str, module: str, folder: Path, host: Host, found: Probe) -> TrtEngine:
    """The engine in `folder` for this machine's GPU. Raises HostError as `fits`, StageError when it does not load."""
    card = read_card(folder, backend)
    target = fits(card, found)
    api = cuda.load()
    try:
        trt = import_module(module)
    except ImportError as error:
        raise HostError(f"backend {backend} cannot run here: {error}", found.hint) from error
    gpu = cuda.Gpu(api)
    try:
        return TrtEngine(trt, gpu, folder, card, target, host, found.identity)
    except BaseException:
        gpu.close()
        raise


class TrtEngine:
    """One plan, one stream, buffers for the largest shapes; every shape becomes a CUDA graph after its first call.

    Each graph has a context of its own, which is never told other shapes: a graph holds what its context was when it
    was captured. Where the library or the driver cannot capture the work, it runs as it is, and `facts` say why.

    Feeds go through pinned memory; copies and kernels are ordered by the stream, and a call waits
    for it once, at its end. A read-only array that is fed again (a prompt's embeddings, at every step) is still
    on the device and is not copied again. What `arrays` keeps on the device is copied there and no call waits.
    """

    def __init__(
        self, trt: Any, gpu: cuda.Gpu, folder: Path, card: Card, target: str, host: Host, identity: Mapping[str, str]
    ) -> None:
        self.inputs, self.outputs = card.spec.inputs, card.spec.outputs
        self._card, self._gpu = card, gpu
        self._log = _log(trt)
        built = card.measured["engines"][target]
        plan = folder / built["plan"]
        self._runtime = trt.Runtime(self._log)
        if card.options.get("version_compatible"):
            # Such a plan brings the runtime it was built with, as machine code; bundles are trusted like programs.
            self._runtime.engine_host_code_allowed = True
        content = plan.read_bytes()
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise StageError(f"{plan} does not load: {self._log.reason()}", "copy the bundle again, or rebuild it")
        if card.options.get("strip_plan"):
            self._put_weights_back(trt, folder / "model.onnx")
        if card.options.get("weight_streaming"):
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        digest = built.get("sha256") or hashlib.sha256(content).hexdigest()
        del content
        self._host: dict[str, np.ndarray] = {}
        self._device: dict[str, int] = {}
        for tensor in (*self.inputs, *self.outputs):
            size = _size(tensor.shape(card.shapes, "max"), tensor.dtype)
            self._host[tensor.name], self._device[tensor.name] = gpu.pinned(size), gpu.allocate(size)
        # Input -> the array the device has, if that cannot change.
        self._fed: dict[str, np.ndarray] = {}
        # Inputs whose copies out of pinned memory nobody has waited for.
        self._underway: set[str] = set()
        # Why there are no graphs; "" = there are. Streamed weights get memory while they run: no capture may hold that.
        streamed = "weights are streamed" if card.options.get("weight_streaming") else ""
        self._no_graphs = streamed if card.options.get("cuda_graphs", True) else "turned off in the recipe"
        self._contexts: Any = Contexts(
            trt, self._engine, gpu, self._device, KernelFile(host.cache, digest, identity["gpu"]), shared=not streamed
        )
        self._lanes: OrderedDict[Key, _Lane] = OrderedDict()
        self._spare: _Lane | None = self._new_lane()
        # Shapes whose kernels have been written down.
        self._kept: set[Key] = set()
        self._no_arrays = "" if card.options.get("device_latents", True) else "turned off in the recipe"
        self.arrays = None if self._no_arrays else self._device_arrays()
        self._facts = {
            "device": identity["gpu"],
            "precision": card.precision,
            "asked": card.precision,
            "target": target,
            **{key: identity[key] for key in ("architecture", "driver")},
            "version": card.measured["version"],
        }

    @property
    def facts(self) -> Mapping[str, Any]:
        """As of now: whether shapes can become CUDA graphs shows when the first one has run."""
        off = {"cuda_graphs": self._no_graphs, "device_latents": self._no_arrays}
        why = {f"{name}_off": reason for name, reason in off.items() if reason}
        return {**self._facts, **{name: not reason for name, reason in off.items()}, **why}

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        shapes, sent = self._put_on_stream(feeds)
        for tensor in self.outputs:
            size = _size(shapes[tensor.name], tensor.dtype)
            self._gpu.copy_out(self._host[tensor.name], self._device[tensor.name], size)
        self._wait()
        self._remember(sent)
        return {t.name: self._taken(t.name, shapes[t.name], t.dtype) for t in self.outputs}

    def _on_device(self, feeds: Mapping[str, np.ndarray | DeviceArray]) -> dict[str, DeviceArray]:
        assert self.arrays is not None
        shapes, sent = self._put_on_stream(feeds)
        # Of a copy that fails later CUDA tells at the next wait, and at every call after it.
        self._remember(sent)
        return {t.name: self.arrays.copied(self._device[t.name], shapes[t.name]) for t in self.outputs}

    def _put_on_stream(
        self, feeds: Mapping[str, np.ndarray | DeviceArray]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
        """Feed and run the engine; the shapes of its outputs, and the arrays that were sent from the host."""
        assert self._engine is not None, "the engine is closed"
        self._gpu.enter()
        arrays = {t.name: feeds[t.name] for t in self.inputs}
        key = tuple(array.shape for array in arrays.values())
        self._check(key)
        here = {name: array for name, array in arrays.items() if not isinstance(array, DeviceArray)}
        sent = {name: size for name, array in here.items() if (size := self._stage(name, array))}
        for name, size in sent.items():
            self._gpu.copy_in(self._device[name], self._host[name], size)
            self._underway.add(name)
        for name, array in arrays.items():
            if isinstance(array, DeviceArray):
                self._fed.pop(name, None)
                self._gpu.copy(self._device[name], array.address, array.nbytes)
        context = self._run(key)
        shapes = {t.name: tuple(context.get_tensor_shape(t.name)) for t in self.outputs}
        return shapes, {name: here[name] for name in sent}

    def _remember(self, sent: Mapping[str, np.ndarray]) -> None:
        self._fed |= {name: array for name, array in sent.items() if is_constant(array)}

    def _wait(self) -> None:
        self._gpu.wait()
        self._underway.clear()

    def close(self) -> None:
        if self._engine is None:
            return
        with suppress(StageError):  # of a GPU that was lost there is nothing to wait for
            self._gpu.enter()
            self._wait()
            while self._lanes:
                self._drop(self._lanes.popitem()[1])
        # Contexts go before the engine, the engine before its runtime, and all before the memory they use.
        self._lanes.clear()
        self._spare = self._contexts = self._engine = self._runtime = None
        self._gpu.close()

    def _put_weights_back(self, trt: Any, onnx: Path) -> None:
        refitter = trt.Refitter(self._engine, self._log)
        self._must(
            trt.OnnxParserRefitter(refitter, self._log).refit_from_file(str(onnx)), "take the weights of", str(onnx)
        )
        self._must(refitter.refit_cuda_engine(), "take the weights of", str(onnx))

    def _run(self, key: Key) -> Any:
        """Put the engine's work for the shapes `key` on the stream: as a graph from the second call of them on.

        Returns the context that knows the shapes of the outputs."""
        lane = self._lane(key)
        if lane.graph is not None:
            self._gpu.replay(lane.graph)
            return lane.context
        if lane.shapes != key:
            for tensor, shape in zip(self.inputs, key, strict=True):
                self._must(lane.context.set_input_shape(tensor.name, shape), "take shape", f"{shape} of {tensor.name}")
            lane.shapes = key
        # The first call of a shape finishes its lazy work (kernels, memory), which a capture may not hold.
        self._enqueue(lane.context)
        if key not in self._kept:
            self._contexts.keep_kernels()
            self._kept.add(key)
        if not self._no_graphs:
            self._wait()
            self._capture(lane)
        return lane.context

    def _lane(self, key: Key) -> _Lane:
        """The lane of the shapes `key`; those that become no graph share one. The one used longest ago makes room."""
        if self._no_graphs and key not in self._lanes:
            key = ()
        if key not in self._lanes:
            while len(self._lanes) >= _GRAPHS:
                self._drop(self._lanes.popitem(last=False)[1])
            self._lanes[key], self._spare = self._spare or self._new_lane(), None
        self._lanes.move_to_end(key)
        return self._lanes[key]

    def _new_lane(self) -> _Lane:
        try:
            return _Lane(self._contexts.new())
        except StageError as error:
            raise StageError(
                f"{self._card.component}: {error.message}: {self._log.reason()}", cuda.HINT_MEMORY
            ) from error

    def _drop(self, lane: _Lane) -> None:
        if lane.graph is not None:
            self._gpu.forget(lane.graph)

    def _capture(self, lane: _Lane) -> None:
        """Make the lane's work a graph, or none from now on: after a capture that failed a context still runs."""
        capturable = getattr(lane.context, "is_stream_capturable", None)  # TensorRT does not tell, RTX does
        try:
            if capturable is not None and not capturable(self._gpu.stream):
                raise StageError(f"{self._card.backend} cannot capture its work")
            lane.graph = self._gpu.capture(lambda: self._enqueue(lane.context))
        except StageError as error:
            self._no_graphs = error.message
            self._tell("it runs without CUDA graphs", error.message)

    def _device_arrays(self) -> DeviceArrays | None:
        try:
            return DeviceArrays(self._gpu, self._on_device)
        except StageError as error:
            self._no_arrays = error.message
            self._tell("its latents come to the host at every step", f"{error.message}; {error.hint}".rstrip("; "))
            return None

    def _tell(self, what: str, why: str) -> None:
        warnings.warn(f"{self._card.component}: {what}: {why}", SdcompileWarning, stacklevel=2)

    def _enqueue(self, context: Any) -> None:
        self._must(context.execute_async_v3(self._gpu.stream), "run", "")

    def _stage(self, name: str, array: np.ndarray) -> int:
        """Put `array` into pinned memory; how many bytes the device lacks: none when it was fed this array before.

        An array is known to be unchanged only if nobody can write to it, so only those are recognised. (Comparing
        bytes instead costs as much as sending them: 23 us for 462 KiB, where staging them takes 5 and the bus some 20.)
        """
        import numpy as np

        if array is self._fed.get(name):
            return 0
        self._fed.pop(name, None)
        if name in self._underway:
            self._wait()
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._host[name][: flat.size] = flat
        return int(flat.size)

    def _taken(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        held = self._host[name][: _size(shape, dtype)]
        return held.view(dtype).reshape(shape).copy()

    def _check(self, key: Key) -> None:
        profile = self._card.spec.profile(self._card.shapes)
        for tensor, shape in zip(self.inputs, key, strict=True):
            low, _, high = profile[tensor.name]
            if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                raise StageError(f"{tensor.name} has shape {shape}; the engine was built for {low} to {high}")

    def _must(self, done: bool, verb: str, what: str) -> None:
        if not done:
            reason = self._log.reason()
            raise StageError(f"{self._card.component}: the engine does not {verb} {what}".rstrip() + f": {reason}")


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if int(level) <= int(trt.ILogger.Severity.ERROR):
                self.errors.append(message)

        def reason(self) -> str:
            return "; ".join(dict.fromkeys(self.errors[-3:])) or "no reason given"

    return Log()


def _size(shape: tuple[int, ...], dtype: str) -> int:
    import numpy as np

    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
