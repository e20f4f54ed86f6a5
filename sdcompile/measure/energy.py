"""Energy counters of this machine: RAPL of Intel and AMD processors, NVML of NVIDIA GPUs.

Both count what the whole package or board draws, idle share and other programs included. Where
neither can be read, the reason is told instead of a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_RAPL = Path("/sys/class/powercap")
Read = Callable[[], float]


@dataclass(frozen=True)
class Meter:
    """Named counters in joules, or why there are none."""

    counters: dict[str, Read]
    reason: str = ""

    def read(self) -> dict[str, float]:
        return {name: count() for name, count in self.counters.items()}


def meter() -> Meter:
    """Every counter that can be read now. NVML's part was not yet run on a GPU."""
    rapl = dict(_packages(_RAPL))
    counters = {**rapl, **dict(_boards())}
    if counters:
        return Meter(counters)
    domains = sorted(_RAPL.glob("*-rapl:*")) if _RAPL.is_dir() else []
    why = "its files may be read by root only" if domains else "this machine shows none"
    return Meter({}, f"no readable energy counter: RAPL: {why}; NVML: no GPU, driver or pynvml")


def joules(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What was drawn between two readings; a counter that wrapped in between is left out."""
    return {name: after[name] - value for name, value in before.items() if after.get(name, -1.0) >= value}


def _packages(root: Path) -> Iterator[tuple[str, Read]]:
    """The packages among the RAPL domains (Linux powercap): cores and DRAM below them would count twice."""
    for domain in sorted(root.glob("*-rapl:*")) if root.is_dir() else []:
        path = domain / "energy_uj"
        if domain.name.count(":") != 1:
            continue
        with suppress(OSError, ValueError):
            _microjoules(path)
            yield f"cpu{domain.name.rpartition(':')[2]}", lambda path=path: _microjoules(path) / 1e6  # type: ignore[misc]


def _microjoules(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _boards() -> Iterator[tuple[str, Read]]:
    try:
        import pynvml
    except ImportError:
        return
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            with suppress(pynvml.NVMLError):
                pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
                yield (
                    f"gpu{index}",
                    lambda handle=handle: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,  # type: ignore[misc]
                )


def gpu_memory_of(pid: int) -> Callable[[], int] | None:
    """A reader of the GPU memory that process `pid` holds, or None without a GPU. Not yet run on a GPU."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return None

    def held() -> int:
        rows = (row for handle in handles for row in pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
        return sum(row.usedGpuMemory or 0 for row in rows if row.pid == pid)

    return held
