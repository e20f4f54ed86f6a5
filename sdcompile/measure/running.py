"""The process a contender runs in: told to make images, watched for memory from outside."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdcompile import errors, machine
from sdcompile.errors import StageError
from sdcompile.measure import energy
from sdcompile.measure.contenders import Contender

WORKER = Path(__file__).with_name("worker.py")
_POLL_S = 0.1


class Running:
    """A worker process. Use as a context manager: leaving it ends the process."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.anonymous_bytes = 0
        self.gpu_bytes: int | None = None
        self.started = time.perf_counter()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed on leaving
        environment = {
            # A thread that spins while it waits steals from the others of a small machine; alike for all.
            "OMP_NUM_THREADS": str(contender.job["threads"]), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self._child = subprocess.Popen(
            [contender.python, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env={**os.environ, **environment}, text=True,
        )  # fmt: skip
        self._gpu = energy.gpu_memory_of(self._child.pid)
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name=f"watch-{contender.name}", daemon=True)
        self._watcher.start()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._child.stdin:
            self._child.stdin.close()
        try:
            self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._child.stdout:
            self._child.stdout.close()
        self._watcher.join()
        self._log.close()

    def open(self) -> dict[str, Any]:
        """Hand over the job and wait until it is loaded: {"load_s", "what"}."""
        return self.tell(self.contender.job)

    def tell(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """One order, one answer.

        Raises what the worker raised where that is a fault of `errors`; StageError, with the worker's own words,
        when it failed otherwise.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(order) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # it died, and the missing answer says so
        line = self._child.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if fault := answer.get("fault"):
            kind, message, hint = fault
            raise getattr(errors, kind)(f"{self.contender.name}: {message}", hint)
        if "error" in answer:
            raise StageError(f"{self.contender.name} failed: {answer['error']}", answer.get("traceback", ""))
        return answer

    def peak_bytes(self) -> int:
        """Largest resident size so far: mapped weight files count, though the kernel could drop them."""
        return machine.peak_bytes_of(self._child.pid)

    def _last_words(self) -> str:
        code = self._child.wait()
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace").strip()[-1500:]
        killed = " (killed: most likely out of memory)" if code == -9 else ""
        return f"its process ended with exit code {code}{killed}\n{tail}".strip()

    def _watch(self) -> None:
        while not self._done.wait(_POLL_S):
            self.anonymous_bytes = max(self.anonymous_bytes, machine.anonymous_bytes_of(self._child.pid))
            if self._gpu is not None:
                self.gpu_bytes = max(self.gpu_bytes or 0, self._gpu())
