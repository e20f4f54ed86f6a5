"""Latents on the GPU between two calls of an engine: `backends.base.Device` with the kernels in kernels.cu.

Everything is put on the engine's stream and nothing waits for all of it but `get` and `wait`, so the host may be
steps ahead; `put` waits for the last copy of that size, so that drawing noise in every step keeps it one step ahead.
Blocks of memory are used again as soon as nothing here points to them: what is put on the stream later runs later.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.backends.trt.cuda import Gpu

if TYPE_CHECKING:
    import numpy as np

KERNELS = Path(__file__).with_name("kernels.ptx")
MOST_TERMS = 32
_ITEM = 4
"""Bytes of a value: float32, or uint32 for counters."""


class Terms(ctypes.Structure):
    """`struct Terms` of kernels.cu."""

    _fields_ = [
        ("arrays", ctypes.c_void_p * MOST_TERMS), ("values", ctypes.c_double * MOST_TERMS), ("count", ctypes.c_uint32),
    ]  # fmt: skip


class _Block:
    """Memory that goes back to where free blocks of its size are kept."""

    def __init__(self, address: int, free: list[int]) -> None:
        self.address, self._free = address, free

    def __del__(self) -> None:
        self._free.append(self.address)


@dataclass(frozen=True)
class DeviceArray:
    """Values of 4 bytes each, at `address` in a block that stays taken as long as the array is there."""

    address: int
    shape: tuple[int, ...]
    block: _Block

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return _ITEM * self.size

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceArray:
        first, last, _ = rows.indices(len(self))
        row = _ITEM * prod(self.shape[1:])
        return DeviceArray(self.address + first * row, (last - first, *self.shape[1:]), self.block)


class DeviceArrays:
    """`run` is the engine whose stream `gpu` has: feeds of host and device to outputs on the device.

    Raises StageError where the driver does not take the kernels: one from before CUDA 12.0 does not know their PTX.
    """

    known = False
    most_terms = MOST_TERMS

    def __init__(self, gpu: Gpu, run: Callable[[Mapping[str, Any]], dict[str, DeviceArray]]) -> None:
        self._gpu, self.run = gpu, run
        self._free: dict[int, list[int]] = {}
        # Size -> pinned memory, and the moment from which on it may be written to.
        self._staging: dict[int, tuple[np.ndarray, Any]] = {}
        self._events: list[Any] = []
        self._marks = 0
        self._kernels = gpu.kernels(KERNELS.read_bytes(), ("scaled", "weighted", "guided", "count_bad"))

    def begin(self) -> None:
        self._gpu.enter()
        self._marks = 0

    def empty(self, shape: tuple[int, ...]) -> DeviceArray:
        size = _ITEM * prod(shape)
        free = self._free.setdefault(size, [])
        block = _Block(free.pop() if free else self._gpu.allocate(size), free)
        return DeviceArray(block.address, shape, block)

    def put(self, array: np.ndarray) -> DeviceArray:
        import numpy as np

        assert array.dtype == np.float32
        made = self.empty(array.shape)
        pinned, copied = self._pinned(made.nbytes)
        pinned[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._gpu.copy_in(made.address, pinned, made.nbytes)
        self._gpu.record(copied)
        return made

    def get(self, array: DeviceArray) -> np.ndarray:
        return self._taken(array, "float32")

    def scaled(self, array: DeviceArray, factor: float) -> DeviceArray:
        made = self.empty(array.shape)
        self._launch("scaled", made.size, _at(array), ctypes.c_double(factor), _at(made))
        return made

    def weighted(self, terms: Sequence[tuple[DeviceArray, float]]) -> DeviceArray:
        made, packed = self.empty(terms[0][0].shape), Terms(count=len(terms))
        for place, (array, value) in enumerate(terms):
            packed.arrays[place], packed.values[place] = array.address, value
        self._launch("weighted", made.size, packed, _at(made))
        return made

    def guided(self, negative: DeviceArray, positive: DeviceArray, scale: float) -> DeviceArray:
        made = self.empty(positive.shape)
        self._launch("guided", made.size, _at(negative), _at(positive), ctypes.c_float(scale), _at(made))
        return made

    def joined(self, arrays: Sequence[DeviceArray]) -> DeviceArray:
        made = self.empty((sum(map(len, arrays)), *arrays[0].shape[1:]))
        place = made.address
        for array in arrays:
            self._gpu.copy(place, array.address, array.nbytes)
            place += array.nbytes
        return made

    def copied(self, address: int, shape: tuple[int, ...]) -> DeviceArray:
        """What is now at `address`, float32 of `shape`."""
        made = self.empty(shape)
        self._gpu.copy(made.address, address, made.nbytes)
        return made

    def counters(self, count: int) -> DeviceArray:
        made = self.empty((count,))
        self._gpu.clear(made.address, count)
        return made

    def count_bad(self, array: DeviceArray, counters: DeviceArray, place: int) -> None:
        self._launch("count_bad", array.size, _at(array), _at(counters[place : place + 1]))

    def counted(self, counters: DeviceArray) -> np.ndarray:
        return self._taken(counters, "uint32")

    def wait(self) -> None:
        self._gpu.wait()

    def mark(self) -> None:
        if self._marks == len(self._events):
            self._events.append(self._gpu.event())
        self._gpu.record(self._events[self._marks])
        self._marks += 1

    def laps(self) -> list[float]:
        marks = self._events[: self._marks]
        return [self._gpu.seconds(first, then) for first, then in itertools.pairwise(marks)]

    def _launch(self, kernel: str, size: int, *parameters: Any) -> None:
        self._gpu.launch(self._kernels[kernel], size, (*parameters, ctypes.c_uint32(size)))

    def _taken(self, array: DeviceArray, dtype: str) -> np.ndarray:
        pinned, _ = self._pinned(array.nbytes)
        self._gpu.copy_out(pinned, array.address, array.nbytes)
        self._gpu.wait()
        return pinned.view(dtype).reshape(array.shape).copy()

    def _pinned(self, size: int) -> tuple[np.ndarray, Any]:
        """Pinned memory out of which no copy is still to come, and the event to record after the next one."""
        if size not in self._staging:
            self._staging[size] = self._gpu.pinned(size), self._gpu.event()
        self._gpu.wait_for(self._staging[size][1])
        return self._staging[size]


def _at(array: DeviceArray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.address)
