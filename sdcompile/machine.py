"""What this machine is: processor, memory, disk, and the versions of what is installed on it.

Reads /proc and package metadata only; imports none of the libraries it reports on.
"""

from __future__ import annotations

import gc
import os
import platform
import shutil
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

# The instruction sets that decide which precision is fast, and whether it runs at all.
_FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "amx_fp16", "asimd", "asimddp", "asimdhp", "i8mm", "bf16",
)  # fmt: skip


@cache
def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    rows = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in rows}


def cpu_model() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """Which of the instruction sets that matter here this processor has."""
    info = _cpuinfo()
    present = set((info.get("flags") or info.get("Features") or "").split())
    return tuple(feature for feature in _FEATURES if feature in present)


def threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def identity() -> dict[str, str]:
    """What of this machine can change the bytes or figures of a step: part of such steps' keys."""
    return {"machine": platform.machine(), "cpu": cpu_model(), "features": " ".join(cpu_features())}


def memory_bytes() -> tuple[int, int]:
    """(total, available) memory; available counts what the kernel can free, and obeys a cgroup limit."""
    rows = {}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            rows[name] = int(value.split()[0]) * 1024
    except OSError:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    total, available = rows["MemTotal"], rows["MemAvailable"]
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return total, available
    return min(total, limit), min(available, max(0, limit - used))


def free_disk_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds `folder`, or would once it exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def reset_peak() -> None:
    """Start a new measurement of `peak_bytes` (Linux; elsewhere the peak is since process start)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_bytes() -> int:
    """The largest resident size of this process since `reset_peak`."""
    found = peak_bytes_of(os.getpid())
    if found:
        return found
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_bytes_of(pid: int) -> int:
    """The largest resident size of a process, or 0 where it cannot be read (Linux only)."""
    return _status_bytes(pid, "VmHWM")


def anonymous_bytes_of(pid: int) -> int:
    """What a process holds now besides mapped files, or 0 where it cannot be read (Linux only)."""
    return _status_bytes(pid, "RssAnon")


def _status_bytes(pid: int, field: str) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    # A process that has ended but was not waited for has no memory lines.
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), 0)


def peak_of_children_bytes() -> int:
    """The largest resident size that any process started by this one, and ended, ever had."""
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


_EITHER = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu")}
"""Distributions of one library: whichever is installed does. (Two at once overwrite each other.)"""


def version(library: str) -> str | None:
    """The installed version of a library, by the name of its distribution or of the usual one of several; or None."""
    return next(filter(None, map(installed, _EITHER.get(library, (library,)))), None)


def installed(distribution: str) -> str | None:
    """The installed version of this very distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def release_memory() -> None:
    """Give memory freed by a step back to the system, so that the next step's peak is its own."""
    gc.collect()
    with suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
