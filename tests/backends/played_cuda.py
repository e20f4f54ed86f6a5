"""A GPU that is only played: CUDA's driver API and as much of TensorRT as an engine uses.

Memory is host memory, filled with NaN. Work is queued, and done when the stream is waited for, so that a copy, a
launch or a wait in the wrong place gives wrong numbers. Kernels are those of kernels.cu, compiled for the CPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections import defaultdict
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sdcompile.backends.trt import arrays

SOURCE = arrays.KERNELS.with_suffix(".cu")


class Code(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


def compiled(folder: Path, source: str, library: str) -> Path:
    """One of the C++ files beside this one as a shared library, with the kernels.cu that lies in `folder`.

    Skips the test where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here: kernels.cu cannot be compiled for the CPU")
    subprocess.run(
        ["g++", "-O1", "-std=c++20", "-ffp-contract=off", "-shared", "-fPIC", f"-I{folder}", "-o", folder / library,
         Path(__file__).with_name(source), "-ldl"],
        check=True,
    )  # fmt: skip
    return folder / library


def kernels(folder: Path, source: str | None = None) -> ctypes.CDLL:
    """kernels.cu, or a `source` altered for a test, for the CPU."""
    (folder / "kernels.cu").write_text(SOURCE.read_text() if source is None else source)
    loaded = ctypes.CDLL(str(compiled(folder, "kernels_on_cpu.cpp", "kernels.so")))
    loaded.prepare.restype = ctypes.c_void_p
    loaded.perform.argtypes = [ctypes.c_void_p]
    return loaded


class FakeCuda:
    """The driver API."""

    stream = 9
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, library: ctypes.CDLL | None = None):
        self.calls, self.memory, self.queue, self.captured = [], {}, [], None
        self.arity: defaultdict[str, set[int]] = defaultdict(set)
        self.fail, self.fault, self.spoiled = "", Code.CUDA_ERROR_OUT_OF_MEMORY, False
        self.library, self.now = library, 0.0

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            self.arity[name].add(len(arguments))
            if self.fail in (name, "all"):
                # Also a capture that went wrong is over.
                self.captured = None if name == "cuStreamEndCapture" else self.captured
                return (self.fault,)
            known = getattr(type(self), f"_{name}", None)
            result = known(self, *arguments) if known else None
            if isinstance(result, Code):
                return (result,)
            return (Code.CUDA_SUCCESS,) if result is None else (Code.CUDA_SUCCESS, result)

        return call

    def put(self, work):
        (self.queue if self.captured is None else self.captured).append(work)

    def _cuDeviceGet(self, index):  # noqa: N802
        return index

    def _cuDevicePrimaryCtxRetain(self, device):  # noqa: N802
        return 7

    def _cuStreamCreate(self, flags):  # noqa: N802
        return 9

    def _cuMemAlloc(self, size):  # noqa: N802
        held = ctypes.create_string_buffer(b"\xff" * size, size)
        self.memory[ctypes.addressof(held)] = held
        return ctypes.addressof(held)

    def _cuMemHostAlloc(self, size, flags):  # noqa: N802
        return self._cuMemAlloc(size)

    def _cuMemFree(self, address):  # noqa: N802
        del self.memory[address]

    _cuMemFreeHost = _cuMemFree  # noqa: N815

    def _cuMemcpyHtoDAsync(self, to, source, size, stream):  # noqa: N802
        assert stream == 9
        self.put(lambda: ctypes.memmove(to, source, size))

    _cuMemcpyDtoHAsync = _cuMemcpyDtoDAsync = _cuMemcpyHtoDAsync  # noqa: N815

    def _cuMemsetD32Async(self, to, value, count, stream):  # noqa: N802
        assert (value, stream) == (0, 9)
        self.put(lambda: ctypes.memset(to, 0, 4 * count))

    def _cuModuleLoadData(self, image):  # noqa: N802
        assert image == arrays.KERNELS.read_bytes() + b"\0", "the driver reads PTX to its NUL"
        return "module"

    def _cuModuleGetFunction(self, module, name):  # noqa: N802
        assert module == "module"
        return name

    def _cuLaunchKernel(self, kernel, x, y, z, threads, ty, tz, shared, stream, parameters, extra):  # noqa: N802
        assert (y, z, ty, tz, shared, stream, extra) == (1, 1, 1, 1, 0, 9, 0)
        assert self.library is not None, "this test launches no kernels"
        # As the driver does, this copies what the pointers point to before it returns.
        launch = self.library.prepare(kernel, x, threads, ctypes.c_void_p(parameters))
        assert launch, f"{kernel} is no kernel of kernels.cu"
        self.put(lambda: self.library.perform(launch))

    def _cuEventCreate(self, flags):  # noqa: N802
        return SimpleNamespace(at=None, recorded=False)

    def _cuEventRecord(self, event, stream):  # noqa: N802
        assert stream == 9
        event.at, event.recorded = None, True
        self.put(lambda: self._pass(event))

    def _pass(self, event):
        self.now += 1.0
        event.at = self.now

    def _cuEventSynchronize(self, event):  # noqa: N802
        while event.recorded and event.at is None:
            self.queue.pop(0)()

    def _cuEventElapsedTime(self, first, then):  # noqa: N802
        return Code.CUDA_ERROR_NOT_READY if None in (first.at, then.at) else then.at - first.at

    def _cuStreamSynchronize(self, stream):  # noqa: N802
        assert self.captured is None, "waiting is illegal while a stream is captured"
        while self.queue:
            self.queue.pop(0)()

    def _cuStreamBeginCapture(self, stream, mode):  # noqa: N802
        self.captured = []

    def _cuStreamEndCapture(self, stream):  # noqa: N802
        graph, self.captured = self.captured, None
        return Code.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED if self.spoiled else graph

    def _cuGraphInstantiate(self, graph, flags):  # noqa: N802
        return list(graph)

    def _cuGraphLaunch(self, graph, stream):  # noqa: N802
        self.queue.extend(graph)


def doubled(feeds):
    return 2 * feeds["x"]


SIZE = 4096
"""Bytes that activations of the played engine take."""


def fake_trt(
    api: FakeCuda,
    *,
    loads: bool = True,
    runs: bool = True,
    compute=doubled,
    output: str = "y",
    capturable: bool = True,
    captures: bool = True,
    streams: bool = False,
):
    """A module with as much of TensorRT-RTX as an engine uses.

    Its engine has one output, `compute` of the inputs: float32 of the first input's shape. It is one built with
    REQUIRE_USER_ALLOCATION unless it `streams` weights. `capturable` is what it says of itself, `captures` whether
    its work can be captured. A graph whose context was told other shapes since gives NaN.
    """

    class Context:
        def __init__(self):
            self.addresses, self.shapes, self.memory = {}, {}, None
            api.calls.append("context")

        def set_device_memory(self, address, size):
            assert size == SIZE
            self.memory = address

        def is_stream_capturable(self, stream):
            assert stream == api.stream
            assert self.shapes, "it depends on the shapes"
            return capturable

        def set_tensor_address(self, name, address):
            self.addresses[name] = address
            return True

        def set_input_shape(self, name, shape):
            self.shapes[name] = tuple(shape)
            return True

        def get_tensor_shape(self, name):
            return next(iter(self.shapes.values()))

        def execute_async_v3(self, stream):
            assert stream == api.stream
            assert streams or self.memory, "nobody gave it memory"
            api.calls.append("execute")
            shapes, captured = dict(self.shapes), getattr(api, "captured", None) is not None
            if captured and not captures:
                api.spoiled = True
                return False

            def run():
                if captured and self.shapes != shapes:
                    values(self.addresses[output], next(iter(shapes.values())))[:] = np.nan
                    return
                feeds = {name: values(self.addresses[name], shape) for name, shape in shapes.items()}
                values(self.addresses[output], next(iter(shapes.values())))[:] = compute(feeds)

            api.put(run)
            return runs

    strategies = SimpleNamespace(STATIC=0, USER_MANAGED=2)

    class Logger:
        Severity = SimpleNamespace(ERROR=1)

        def __init__(self):
            pass

    class Cache:
        blob = b"kernels"

        def serialize(self):
            return self.blob

        def deserialize(self, blob):
            api.calls.append(f"cache:{bytes(blob).decode()}")
            return True

    class Config:
        strategy = None
        create_runtime_cache = Cache

        def set_runtime_cache(self, cache):
            return True

        def set_execution_context_allocation_strategy(self, strategy):
            self.strategy = strategy

    class Engine:
        device_memory_size_v2 = SIZE
        create_runtime_config = Config
        weight_streaming_budget_v2 = None

        def get_weight_streaming_automatic_budget(self):
            return 7

        def create_execution_context(self, config):
            wanted = strategies.STATIC if streams else strategies.USER_MANAGED
            return Context() if config.strategy == wanted else None

    class Runtime:
        def __init__(self, log):
            api.calls.append("Runtime")
            self.log = log

        def deserialize_cuda_engine(self, plan):
            if not loads:
                self.log.log(1, "serialization assertion failed")
                return None
            return Engine()

    return SimpleNamespace(
        __name__="tensorrt_rtx", ILogger=Logger, Runtime=Runtime, IRuntimeCache=Cache,
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER=1),
        ExecutionContextAllocationStrategy=strategies,
    )  # fmt: skip


def values(address, shape):
    """The float32 values of `shape` at `address`."""
    size = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address)).reshape(shape)
