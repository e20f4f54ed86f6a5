"""Device memory, pinned host memory, one stream, CUDA graphs and kernels, through the driver API of cuda-bindings.

The driver API alone, so that neither a CUDA toolkit nor torch is needed. It knows no engine.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sdcompile.errors import HostError, StageError

if TYPE_CHECKING:
    import numpy as np

_HINT = "pip install 'sdcompile[tensorrt-rtx]'"
_THREADS = 256
"""Of a block of a kernel."""

HINT_MEMORY = (
    "close other programs that use the GPU, ask for smaller or fewer images at once, load the bundle with "
    'memory="low", or build it with `build: {weight_streaming: true}`'
)
_HINT_DRIVER = "update the NVIDIA driver: the kernels need one for CUDA 12.0 or later"
_HINT_LOST = "start the program again; if it comes back, `nvidia-smi` and the kernel's log (`dmesg`, Xid) say more"
_HINTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": HINT_MEMORY,
    **dict.fromkeys(
        (
            "CUDA_ERROR_INVALID_PTX", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "CUDA_ERROR_NO_BINARY_FOR_GPU",
            "CUDA_ERROR_JIT_COMPILER_NOT_FOUND",
        ), _HINT_DRIVER,
    ),
    **dict.fromkeys(
        (
            "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA_ERROR_ECC_UNCORRECTABLE", "CUDA_ERROR_HARDWARE_STACK_ERROR",
            "CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_LAUNCH_TIMEOUT",
            "CUDA_ERROR_CONTEXT_IS_DESTROYED", "CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_UNKNOWN",
        ), _HINT_LOST,
    ),
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver was updated while it ran: restart the machine",
}  # fmt: skip
"""What to do about an error of the driver, by its name in cuda.h."""


def load() -> Any:
    """The driver API's module. Raises HostError when cuda-bindings is missing."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise HostError(f"NVIDIA engines cannot run here: cuda-bindings is not installed ({error})", _HINT) from error
    return driver


class Gpu:
    """The first GPU's primary context and one stream on it. Everything it handed out is freed by `close`.

    The primary context is shared with whoever else uses the GPU in this process (torch, onnxruntime).
    Every failing call raises StageError with CUDA's own name for it, and what to do where that is known.
    """

    def __init__(self, api: Any) -> None:
        self._api = api
        self._call("cuInit", 0)
        self._device = self._call("cuDeviceGet", 0)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._frees: list[Callable[[], Any]] = []
        self.enter()
        stream = self._call("cuStreamCreate", int(api.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self._stream = stream
        self._frees.append(lambda: self._call("cuStreamDestroy", stream))

    @property
    def stream(self) -> int:
        return int(self._stream)

    def enter(self) -> None:
        """Make the context current in the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """`size` bytes on the device; returns the address."""
        address = self._call("cuMemAlloc", max(1, size))
        self._frees.append(lambda: self._call("cuMemFree", address))
        return int(address)

    def pinned(self, size: int) -> np.ndarray:
        """`size` bytes of page-locked host memory, as uint8: copies from and to it need no staging."""
        import numpy as np

        address = self._call("cuMemHostAlloc", max(1, size), 0)
        self._frees.append(lambda: self._call("cuMemFreeHost", address))
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(1, size)).from_address(int(address)))

    def copy_in(self, address: int, host: np.ndarray, size: int) -> None:
        self._call("cuMemcpyHtoDAsync", address, host.ctypes.data, size, self._stream)

    def copy_out(self, host: np.ndarray, address: int, size: int) -> None:
        self._call("cuMemcpyDtoHAsync", host.ctypes.data, address, size, self._stream)

    def copy(self, address: int, source: int, size: int) -> None:
        """`size` bytes from one place on the device to another."""
        self._call("cuMemcpyDtoDAsync", address, source, size, self._stream)

    def clear(self, address: int, count: int) -> None:
        """`count` words of 4 bytes become 0."""
        self._call("cuMemsetD32Async", address, 0, count, self._stream)

    def kernels(self, ptx: bytes, names: Sequence[str]) -> Mapping[str, Any]:
        """The kernels of a PTX text, which the driver compiles for its GPU."""
        module = self._call("cuModuleLoadData", ptx + b"\0")
        self._frees.append(lambda: self._call("cuModuleUnload", module))
        return {name: self._call("cuModuleGetFunction", module, name.encode()) for name in names}

    def launch(self, kernel: Any, size: int, parameters: Sequence[Any]) -> None:
        """Put `kernel` on the stream, a thread for each of `size` values. `parameters` are ctypes values, as its
        signature has them: the driver copies what the pointers handed to it point to."""
        pointers = (ctypes.c_void_p * len(parameters))(*map(ctypes.addressof, parameters))
        blocks = -(-size // _THREADS)
        self._call(
            "cuLaunchKernel", kernel, blocks, 1, 1, _THREADS, 1, 1, 0, self._stream, ctypes.addressof(pointers), 0
        )

    def event(self) -> Any:
        """A moment that `record` puts on the stream."""
        event = self._call("cuEventCreate", 0)
        self._frees.append(lambda: self._call("cuEventDestroy", event))
        return event

    def record(self, event: Any) -> None:
        self._call("cuEventRecord", event, self._stream)

    def wait_for(self, event: Any) -> None:
        """Until the stream has passed `event`; at once where it was never recorded."""
        self._call("cuEventSynchronize", event)

    def seconds(self, first: Any, then: Any) -> float:
        """From one recorded event to another, both of which the stream has passed."""
        return float(self._call("cuEventElapsedTime", first, then)) / 1e3

    def wait(self) -> None:
        self._call("cuStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """What `enqueue` puts on the stream, as a graph for `replay`. Nothing of it is run now.

        Raises what `enqueue` raises, and StageError when it put something there that a graph cannot hold.
        """
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except BaseException:
            # The stream would stay in capture, and every later call on it fail. What ending says is of no interest:
            # the fault is that of `enqueue`, which spoils the capture.
            with suppress(StageError):
                self._call("cuGraphDestroy", self._call("cuStreamEndCapture", self._stream))
            raise
        graph = self._call("cuStreamEndCapture", self._stream)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def replay(self, executable: Any) -> None:
        self._call("cuGraphLaunch", executable, self._stream)

    def forget(self, executable: Any) -> None:
        self._call("cuGraphExecDestroy", executable)

    def close(self) -> None:
        """Free everything. Of a GPU that was lost nothing can be freed, and what failed before is what counts."""
        self._frees.insert(0, lambda: self._call("cuDevicePrimaryCtxRelease", self._device))
        with suppress(StageError):
            self.enter()
        while self._frees:
            with suppress(StageError):
                self._frees.pop()()

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *results = getattr(self._api, name)(*arguments)
        if int(code) != 0:
            told = str(getattr(code, "name", code))
            raise StageError(f"CUDA: {name} failed: {told}", _HINTS.get(told, ""))
        return results[0] if results else None
