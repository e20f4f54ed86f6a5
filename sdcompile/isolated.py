"""Running one op in a process of its own.

A large step gets one: its memory is given back whole when it ends, its peak is its own, and a
library that crashes or is killed for memory takes the step down instead of the build.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from sdcompile import errors, machine
from sdcompile.errors import StageError
from sdcompile.spec import Say


def run(function: Callable[[Say], None], say: Say, name: str) -> int:
    """Call `function(say)` in a fresh process; returns the peak resident bytes of it or of one it started.

    `function` must be picklable. Errors a user can cause come back as they are; any other one as
    RuntimeError with the child's traceback. Raises StageError when the child was killed.
    """
    # spawn: a forked child of a process with torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    # Not daemonic: an engine builder that is run in here starts a process of its own, which daemons may not.
    child = context.Process(target=_work, args=(function, sending), name=name)
    child.start()
    sending.close()
    try:
        return _listen(receiving, child, say, name)
    finally:
        if child.is_alive():
            child.terminate()
        child.join()
        receiving.close()


def _listen(receiving: Connection, child: Any, say: Say, name: str) -> int:
    while True:
        try:
            kind, *told = receiving.recv()
        except EOFError:
            child.join()
            raise _died(name, child.exitcode) from None
        if kind == "say":
            say(*told)
        elif kind == "done":
            peak: int = told[0]
            return peak
        elif kind == "fault":
            raise getattr(errors, told[0])(told[1], told[2])
        elif kind == "interrupt":
            raise KeyboardInterrupt
        else:
            raise RuntimeError(f"{name} failed in its own process:\n{told[0]}")


def _died(name: str, code: int | None) -> StageError:
    if code is not None and code < 0:
        number = signal.Signals(-code)
        hint = "most likely out of memory: close other programs, or build on a larger machine"
        return StageError(f"{name}: its process was killed by {number.name}", hint if number == signal.SIGKILL else "")
    return StageError(f"{name}: its process ended with exit code {code} before it was done")


def _die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it goes, however it goes (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _work(function: Callable[[Say], None], sending: Connection) -> None:
    _die_with_parent()

    def say(text: str, fraction: float | None = None) -> None:
        sending.send(("say", text, fraction))

    try:
        function(say)
        sending.send(("done", max(machine.peak_bytes(), machine.peak_of_children_bytes())))
    except KeyboardInterrupt:
        sending.send(("interrupt",))
    except errors.SdcompileError as error:
        sending.send(("fault", type(error).__name__, error.message, error.hint))
    # Whatever it is, the parent raises it again, with the traceback of here.
    except BaseException:
        sending.send(("bug", traceback.format_exc()))
