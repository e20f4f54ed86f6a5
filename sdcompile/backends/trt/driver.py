"""Which NVIDIA GPUs this machine has, asked of the driver itself.

Standard library only: no CUDA toolkit and no Python binding is needed to say that there is no
GPU. TensorRT's own runtime must not be asked: without a driver it may crash the process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sdcompile.backends.trt.targets import name_of

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR (cuda.h)


@dataclass(frozen=True)
class Device:
    """One GPU: its product name, architecture ("sm89") and memory."""

    name: str
    architecture: str
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    """What was found. `reason` says why no engine can run here ("" = it can); engines run on the first device."""

    devices: tuple[Device, ...] = ()
    version: str = ""
    reason: str = ""

    @property
    def identity(self) -> Mapping[str, str]:
        """What of the GPU decides bytes and figures: part of the key of what is built or verified on it."""
        if not self.devices:
            return {}
        first = self.devices[0]
        return {"gpu": first.name, "architecture": first.architecture, "driver": self.version}


@cache
def look() -> Driver:
    """Load the driver and list its devices; a missing or broken driver is a reason, never an error."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Driver(reason="no NVIDIA driver was found here")
    return ask(cuda)


def ask(cuda: Any) -> Driver:
    """The devices of a loaded driver library."""
    if code := cuda.cuInit(0):
        return Driver(reason=f"the NVIDIA driver does not start (cuInit: CUDA error {code})")
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    if (code := cuda.cuDeviceGetCount(ctypes.byref(count))) or not count.value:
        return Driver(
            reason=f"the NVIDIA driver offers no GPU (CUDA error {code})" if code else "no NVIDIA GPU was found here"
        )
    told = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return Driver(tuple(_device(cuda, index) for index in range(count.value)), told)


def _device(cuda: Any, index: int) -> Device:
    name, memory, device = ctypes.create_string_buffer(128), ctypes.c_size_t(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Device(name.value.decode(), name_of((capability[0], capability[1])), memory.value)
