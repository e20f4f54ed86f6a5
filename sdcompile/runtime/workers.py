"""A queue of tasks over several processes: each takes the next one; a task whose worker dies is taken up again.

It knows processes and pipes; what a task is, its caller knows.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from sdcompile.errors import SdcompileError, StageError

T = TypeVar("T")
R = TypeVar("R")

ATTEMPTS = 3
"""How often a task is tried before its workers' deaths are the task's fault."""


def run(
    tasks: Sequence[T], workers: int, setup: Callable[[], Callable[[T], R]], done: Callable[[int, R], None]
) -> None:
    """Run every task in one of `workers` processes; `done(number of the task, result)` is called here.

    `setup` is called once in every process and gives the function of a task; both must be picklable.
    An error of a task stops all and is raised here. Raises StageError for a task that killed its
    worker ATTEMPTS times.
    """
    waiting = deque(range(len(tasks)))
    tried = [0] * len(tasks)
    context = multiprocessing.get_context("spawn")
    open_workers: dict[Connection, tuple[Any, int]] = {}

    def start(number: int) -> None:
        """A process that begins with task `number`."""
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, setup), daemon=True)
        process.start()
        theirs.close()
        give(ours, process, number)

    def give(pipe: Connection, process: Any, number: int) -> None:
        tried[number] += 1
        open_workers[pipe] = (process, number)
        try:
            pipe.send(tasks[number])
        except OSError:  # it is dead already; its end of the pipe will say so
            return

    try:
        while waiting or open_workers:
            while waiting and len(open_workers) < workers:
                start(waiting.popleft())
            for pipe in wait(list(open_workers)):
                assert isinstance(pipe, Connection)
                process, number = open_workers.pop(pipe)
                try:
                    answer = pipe.recv()
                except (EOFError, OSError):
                    pipe.close()
                    process.join()
                    _require_more_attempts(number, tried[number], process.exitcode)
                    waiting.appendleft(number)
                    continue
                if isinstance(answer, BaseException):
                    raise answer
                done(number, answer)
                if waiting:
                    give(pipe, process, waiting.popleft())
                else:
                    pipe.close()
                    process.join()
    finally:
        for pipe, (process, _) in open_workers.items():
            pipe.close()
            process.terminate()
            process.join()


def _require_more_attempts(number: int, tried: int, exit_code: int | None) -> None:
    if tried >= ATTEMPTS:
        raise StageError(
            f"batch {number + 1} ended its worker process {tried} times (exit code {exit_code})",
            "use fewer workers if memory is short; the same command goes on from what is finished",
        )


def _work(pipe: Connection, setup: Callable[[], Callable[[Any], Any]]) -> None:
    try:
        make = setup()
        while True:
            pipe.send(make(pipe.recv()))
    except (EOFError, KeyboardInterrupt):
        return  # nothing more to do
    except SdcompileError as error:
        pipe.send(error)
