"""Execution contexts of one engine, the memory they share, and the kernels that TensorRT-RTX makes for them.

It knows no feeds and no CUDA graphs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdcompile.backends.trt.cuda import Gpu
from sdcompile.errors import StageError
from sdcompile.files import write_whole

_SUFFIX = ".rtxcache"
_KEPT = 64
"""Files of kernels kept; those written or read longest ago make room."""


class Contexts:
    """Makes contexts whose inputs and outputs lie at `addresses`.

    They run one after another on one stream, so with `shared` they have one block of memory for activations. NVIDIA
    asks for that where work is captured ("use one execution context per captured graph and share memory across the
    contexts", Optimizing TensorRT-RTX Performance), and an RTX engine built with REQUIRE_USER_ALLOCATION has no
    contexts but those.
    """

    def __init__(
        self, trt: Any, engine: Any, gpu: Gpu, addresses: Mapping[str, int], kernels: KernelFile, *, shared: bool
    ) -> None:
        self._engine, self._addresses, self._kernels = engine, addresses, kernels
        strategies = trt.ExecutionContextAllocationStrategy
        self._how = strategies.USER_MANAGED if shared else strategies.STATIC
        self._memory = (0, 0)
        if shared:
            size = int(engine.device_memory_size_v2)
            self._memory = gpu.allocate(size), size
        self._made: Any = None
        # TensorRT has its kernels in the plan; RTX finishes them here.
        if hasattr(trt, "IRuntimeCache"):
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(self._how)
            # Kernels for a new shape are made in the call that brings it: a graph captured before they are would keep
            # the slow ones.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            self._made = config.create_runtime_cache()
            if blob := kernels.read():
                # A file of another driver or GPU is refused and kernels are made anew.
                self._made.deserialize(blob)
            config.set_runtime_cache(self._made)
            self._how = config

    def new(self) -> Any:
        """A context, ready to be told shapes. Raises StageError when there is none to be had."""
        context = self._engine.create_execution_context(self._how)
        if context is None:
            raise StageError("no execution context")
        if self._memory[0]:
            context.set_device_memory(*self._memory)
        for name, address in self._addresses.items():
            if not context.set_tensor_address(name, address):
                raise StageError(f"no place for {name}")
        return context

    def keep_kernels(self) -> None:
        """Write down what has been made, for the next time the engine is opened."""
        if self._made is not None and (blob := self._made.serialize()) is not None:
            self._kernels.write(bytes(memoryview(blob)))


class KernelFile:
    """Where the kernels of one plan are kept for one model of GPU. It only saves time: no fault of a disk is raised."""

    def __init__(self, folder: Path | None, plan: str, gpu: str) -> None:
        folder = folder or user_cache()
        name = "".join(c if c.isalnum() else "-" for c in gpu)
        self._path = None if folder is None else folder / f"{plan[:32]}-{name}{_SUFFIX}"
        self._there = b""

    def read(self) -> bytes:
        """The kernels kept; b"" = none."""
        if self._path is not None:
            with suppress(OSError):
                self._there = self._path.read_bytes()
                os.utime(self._path)
        return self._there

    def write(self, blob: bytes) -> None:
        if self._path is None or blob == self._there:
            return
        with suppress(OSError):
            write_whole(self._path, blob)
            self._there = blob
            found = sorted(self._path.parent.glob(f"*{_SUFFIX}*"), key=lambda path: path.stat().st_mtime_ns)
            for path in found[:-_KEPT]:
                path.unlink(missing_ok=True)


def user_cache() -> Path | None:
    """Where the user's programs keep what only saves time, by the platform's convention; None = nowhere."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "")
    else:
        base = os.environ.get("XDG_CACHE_HOME", "")
        with suppress(RuntimeError):  # a user without a home
            # A relative path counts as unset (XDG Base Directory Specification).
            base = base if base.startswith("/") else str(Path.home() / ".cache")
    return Path(base) / "sdcompile" if base else None
