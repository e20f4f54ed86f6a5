"""A step in a process of its own: what it says, what it raises, and what happens when it dies."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest

from sdcompile import isolated
from sdcompile.errors import HostError, StageError


def _speak(say):
    say("half way", 0.5)


def _refuse(say):
    raise HostError("no such device", "plug it in")


def _err(say):
    raise ZeroDivisionError("our own bug")


def _die(number, say):
    os.kill(os.getpid(), number)


def _leave(say):
    os._exit(3)


def test_what_the_child_says_is_heard_and_its_peak_comes_back():
    heard = []
    peak = isolated.run(_speak, lambda text, fraction: heard.append((text, fraction)), "a.b.c")
    assert heard == [("half way", 0.5)]
    assert peak > 1 << 20


def test_an_error_of_the_users_comes_back_as_it_is():
    with pytest.raises(HostError) as caught:
        isolated.run(_refuse, print, "a.b.c")
    assert (caught.value.message, caught.value.hint) == ("no such device", "plug it in")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match=r"in _err\n.*\nZeroDivisionError: our own bug"):
        isolated.run(_err, print, "a.b.c")


def test_a_child_that_is_killed_is_a_failed_step_and_not_a_crash():
    with pytest.raises(StageError, match=r"a\.b\.c: its process was killed by SIGKILL") as caught:
        isolated.run(partial(_die, signal.SIGKILL), print, "a.b.c")
    assert "out of memory" in caught.value.hint
    with pytest.raises(StageError, match="killed by SIGSEGV"):
        isolated.run(partial(_die, signal.SIGSEGV), print, "a.b.c")
    with pytest.raises(StageError, match="exit code 3"):
        isolated.run(_leave, print, "a.b.c")


def _nest(say):
    isolated.run(_speak, say, "inner")


def test_an_op_in_a_process_of_its_own_may_start_one_itself():
    heard = []
    isolated.run(_nest, lambda text, fraction: heard.append((text, fraction)), "a.b.c")
    assert heard == [("half way", 0.5)]
