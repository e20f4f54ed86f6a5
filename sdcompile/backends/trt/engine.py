"""A plan of TensorRT or TensorRT-RTX on a GPU: which plan fits, and one call of it.

Nothing of either library is touched before the driver has said that there is a GPU: without one
their runtimes fail late or crash the process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sdcompile.backends.base import Card, Host, Probe, is_constant, read_card
from sdcompile.backends.trt import cuda, targets
from sdcompile.backends.trt.arrays import DeviceArray, DeviceArrays
from sdcompile.errors import HostError, StageError

if TYPE_CHECKING:
    import numpy as np

_GRAPHS = 8
"""CUDA graphs kept, one per shape; the one used longest ago makes room."""

Key = tuple[tuple[int, ...], ...]


def fits(card: Card, found: Probe) -> str:
    """The target of `card`'s engines that runs on this machine.

    Raises HostError that names what was built, for what, what is here, and how to build for it.
    """
    name, built = f"{card.component} ({card.backend})", tuple(card.measured["engines"])
    if not found.available:
        raise HostError(f"{name} cannot run here: {found.reason}", found.hint)
    if found.version != card.measured["version"] and not card.options.get("version_compatible"):
        raise HostError(
            f"{name} was built with version {card.measured['version']} of its library; {found.version} is installed, "
            "and engines run on the version they were built with",
            f"rebuild it: sdcompile build RECIPE --set backend={card.backend}",
        )
    if found.cannot_run:
        raise HostError(
            f"{name} was built for {', '.join(built)} and cannot run here: {found.cannot_run}",
            "run it on a machine with such a GPU, or rebuild it for this one: sdcompile build RECIPE "
            "--set backend=openvino",
        )
    device = found.identity["architecture"]
    chosen = targets.choose(built, device)
    if chosen is None:
        raise HostError(
            f"{name} was built for {', '.join(built)}; the GPU here is {found.identity['gpu']} ({device})",
            f"rebuild it for this GPU: {rebuild(card.backend, device)}",
        )
    return chosen


def rebuild(backend: str, device: str) -> str:
    """The command that builds for a GPU of architecture `device`: where RTX does not, with TensorRT on that GPU."""
    if backend == "tensorrt_rtx" and device in get_args(targets.Target):
        return f"sdcompile build RECIPE --set 'build.compute_capabilities=[{device}]'"
    return "sdcompile build RECIPE --set backend=tensorrt  (on that machine)"


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
        self._runtime_cache = _RuntimeCache(host, card, target, identity)
        plan = folder / card.measured["engines"][target]["plan"]
        self._runtime = trt.Runtime(self._log)
        if card.options.get("version_compatible"):
            # Such a plan brings the runtime it was built with, as machine code; bundles are trusted like programs.
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise StageError(f"{plan} does not load: {self._log.reason()}", "copy the bundle again, or rebuild it")
        if card.options.get("strip_plan"):
            self._put_weights_back(trt, folder / "model.onnx")
        if card.options.get("weight_streaming"):
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        self._context: Any = self._runtime_cache.context(trt, self._engine)
        self._host: dict[str, np.ndarray] = {}
        self._device: dict[str, int] = {}
        for tensor in (*self.inputs, *self.outputs):
            size = _size(tensor.shape(card.shapes, "max"), tensor.dtype)
            self._host[tensor.name], self._device[tensor.name] = gpu.pinned(size), gpu.allocate(size)
            self._must(self._context.set_tensor_address(tensor.name, self._device[tensor.name]), "bind", tensor.name)
        # Input -> the array the device has, if that cannot change.
        self._fed: dict[str, np.ndarray] = {}
        # Inputs whose copies out of pinned memory nobody has waited for.
        self._underway: set[str] = set()
        self.arrays = DeviceArrays(gpu, self._on_device) if card.options.get("device_latents", True) else None
        self._graphs: OrderedDict[Key, Any] = OrderedDict()
        self._use_graphs = bool(card.options.get("cuda_graphs", True))
        self.facts: Mapping[str, Any] = {
            "device": identity["gpu"],
            "precision": card.precision,
            "asked": card.precision,
            "target": target,
            **{key: identity[key] for key in ("architecture", "driver")},
            "version": card.measured["version"],
            "cuda_graphs": self._use_graphs,
        }

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
        assert self._context is not None, "the engine is closed"
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
        self._run(key)
        shapes = {t.name: tuple(self._context.get_tensor_shape(t.name)) for t in self.outputs}
        return shapes, {name: here[name] for name in sent}

    def _remember(self, sent: Mapping[str, np.ndarray]) -> None:
        self._fed |= {name: array for name, array in sent.items() if is_constant(array)}

    def _wait(self) -> None:
        self._gpu.wait()
        self._underway.clear()

    def close(self) -> None:
        if self._context is None:
            return
        self._gpu.enter()
        self._wait()
        self._runtime_cache.save()
        while self._graphs:
            self._gpu.forget(self._graphs.popitem()[1])
        # Buffers and context go before the engine, the engine before its runtime.
        self._context = self._engine = self._runtime = None
        self._gpu.close()

    def _put_weights_back(self, trt: Any, onnx: Path) -> None:
        refitter = trt.Refitter(self._engine, self._log)
        self._must(
            trt.OnnxParserRefitter(refitter, self._log).refit_from_file(str(onnx)), "take the weights of", str(onnx)
        )
        self._must(refitter.refit_cuda_engine(), "take the weights of", str(onnx))

    def _run(self, key: Key) -> None:
        """Put the engine's work for the shapes `key` on the stream: as a graph from the second call of them on."""
        for tensor, shape in zip(self.inputs, key, strict=True):
            self._must(self._context.set_input_shape(tensor.name, shape), "take shape", f"{shape} of {tensor.name}")
        if key in self._graphs:
            self._graphs.move_to_end(key)
            self._gpu.replay(self._graphs[key])
            return
        # The first call of a shape finishes its lazy work (kernels, memory), which a capture may not hold.
        self._enqueue()
        if self._use_graphs:
            self._wait()
            while len(self._graphs) >= _GRAPHS:
                self._gpu.forget(self._graphs.popitem(last=False)[1])
            self._graphs[key] = self._gpu.capture(self._enqueue)

    def _enqueue(self) -> None:
        self._must(self._context.execute_async_v3(self._gpu.stream), "run", "")

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


class _RuntimeCache:
    """TensorRT-RTX finishes its kernels on the machine that runs them; where the host allows, they are kept in a file.

    TensorRT has no such cache: its context is opened plainly.
    """

    def __init__(self, host: Host, card: Card, target: str, identity: Mapping[str, str]) -> None:
        name = f"{card.component}-{target}-{identity['architecture']}.rtxcache"
        self._path = host.cache / name if host.cache is not None else None
        self._cache: Any = None

    def context(self, trt: Any, engine: Any) -> Any:
        if not hasattr(trt, "IRuntimeCache"):
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        # Kernels for a new shape are made in the call that brings it: a graph captured before they are would keep
        # the slow ones.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache = config.create_runtime_cache()
        if self._path is not None and self._path.is_file():
            # A file of another driver or GPU is refused and kernels are made anew.
            self._cache.deserialize(self._path.read_bytes())
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)

    def save(self) -> None:
        if self._cache is not None and self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._path.with_suffix(".new")
            fresh.write_bytes(memoryview(self._cache.serialize()))
            fresh.replace(self._path)


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
