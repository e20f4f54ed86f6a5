"""Run by test_bindings.py in a process whose libcuda.so.1 is libcuda_on_cpu.cpp: sampling through NVIDIA's bindings.

Prints what was tried, and whether the device gave the bytes of the host, as JSON.
"""

from __future__ import annotations

import ctypes
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from sdcompile.backends import Host
from sdcompile.backends.base import Card, write_card
from sdcompile.backends.trt import cuda, engine
from sdcompile.backends.trt.arrays import DeviceArrays
from tests.backends.played_cuda import fake_trt
from tests.backends.test_trt_arrays import all_sums
from tests.runtime.test_ondevice import FACTS, HERE, SHAPES, SPEC, TABLES, both, unet


class Played:
    """What `fake_trt` needs of a driver: the stream, and a place on it for work in Python."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.played_stream.restype = ctypes.c_void_p
        self.stream = self.library.played_stream()
        self.calls: list[str] = []
        self.work: list[Any] = []

    def put(self, work: Any) -> None:
        self.work.append(ctypes.CFUNCTYPE(None)(work))
        assert self.library.played_put(self.work[-1]) == 0


def main(folder: Path) -> dict[str, bool]:
    played = Played()
    sys.modules["tensorrt_rtx"] = fake_trt(played, compute=unet, output="out")  # type: ignore[assignment, arg-type]
    write_card(folder, Card("tensorrt_rtx", "unet", "fp16", SPEC, SHAPES, {"options": {}}, FACTS))
    (folder / "portable.plan").write_bytes(b"plan")

    def opened(compute: Any) -> tuple[Any, Any]:
        return engine.open_plan("tensorrt_rtx", "tensorrt_rtx", folder, Host(cache=folder), HERE), played

    arrays = DeviceArrays(cuda.Gpu(cuda.load()), run=lambda feeds: {})
    arrays.begin()
    warnings.simplefilter("ignore")
    found = {f"kernel {name}": right for name, right in all_sums(arrays)}
    for name, table in TABLES.items():
        if not table.clean_scale:
            host, device = both(opened, table)
            found[name] = host.tobytes() == device.tobytes()
    running, _ = opened(unet)
    running.close()
    real = DeviceArrays.weighted
    DeviceArrays.weighted = lambda self, terms: real(self, terms[:-1])  # type: ignore[method-assign]
    host, device = both(opened, TABLES["multistep"])
    return {**found, "a missing term": host.tobytes() == device.tobytes()}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))  # noqa: T201
