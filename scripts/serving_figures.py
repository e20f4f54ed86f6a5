"""What keeping and sharing saves on the tiny model: caches, warm-up, workers. Part of generation_figures.py.

Each row is measured beside what it is compared with, in turns, and must give the very same pictures: a
difference stops the script. Seconds are processor time of this process, but for the workers', which are
others: theirs is the time on the wall. A figure is the median of its rounds' ratios.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdcompile import load
from sdcompile.runtime.many import generate_many
from sdcompile.runtime.options import Options
from sdcompile.runtime.promptfiles import Row

ROUNDS = 5
MANY = 48
"""Images of a job that workers share."""

_LIMIT = 1 << 30

Made = tuple[float, np.ndarray]
"""Seconds, and the pictures they were spent on."""


def measure(bundle: Path, prompts: list[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row for each way to save time, as {"row", "than", "seconds", "ratio"}."""
    rows = []
    for name, than, one_round in (
        ("prompt remembered", "prompt new", _remembered),
        ("prompt read from disk", "prompt new", _read),
        ("image read from disk", "image made", _image_read),
        ("first request after warm_up()", "first request", _warmed),
        ("2 workers", "1 worker", _workers),
    ):
        pairs = [one_round(bundle, prompts, number) for number in range(ROUNDS)]
        for (_, plain), (_, saved) in pairs:
            if not np.array_equal(plain, saved):
                raise SystemExit(f"{name}: other pictures than {than}")
        seconds = [statistics.median(pair[side][0] for pair in pairs) for side in (0, 1)]
        ratio = statistics.median(saved[0] / plain[0] for plain, saved in pairs)
        rows.append({"row": name, "than": than, "seconds": [round(s, 4) for s in seconds], "ratio": round(ratio, 3)})
        say(f"| {name} | {than} | {seconds[0]:.3f} s | {seconds[1]:.3f} s | {ratio:.2f} |")
    return rows


def _made(pipe: Any, prompt: str, seed: int) -> Made:
    began = time.process_time()
    images = pipe(prompt, seed=seed, output_type="np").images
    return time.process_time() - began, images


def _remembered(bundle: Path, prompts: list[str], number: int) -> tuple[Made, Made]:
    with load(bundle, memory="high") as pipe:
        pipe.warm_up()
        return _made(pipe, prompts[number], number), _made(pipe, prompts[number], number)


def _read(bundle: Path, prompts: list[str], number: int) -> tuple[Made, Made]:
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for _ in range(2):  # the second pipeline stands for another process: nothing is in its memory
            with load(bundle, memory="high") as pipe:
                pipe.warm_up()
                pipe.keep_prompts(Path(folder), _LIMIT)
                made.append(_made(pipe, prompts[number], number))
        return made[0], made[1]


def _image_read(bundle: Path, prompts: list[str], number: int) -> tuple[Made, Made]:
    with tempfile.TemporaryDirectory() as folder, load(bundle, memory="high") as pipe:
        pipe.warm_up()
        plain = _made(pipe, prompts[number], number)
        pipe.keep_images(Path(folder), _LIMIT)
        _made(pipe, prompts[number], number)
        return plain, _made(pipe, prompts[number], number)


def _warmed(bundle: Path, prompts: list[str], number: int) -> tuple[Made, Made]:
    with load(bundle, memory="high") as pipe:
        cold = _made(pipe, prompts[number], number)
    with load(bundle, memory="high") as pipe:
        pipe.warm_up()
        return cold, _made(pipe, prompts[number], number)


def _workers(bundle: Path, prompts: list[str], number: int) -> tuple[Made, Made]:
    from PIL import Image

    rows = [Row(prompts[n % len(prompts)]) for n in range(MANY)]
    made = []
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            saved = generate_many(
                bundle, rows, Path(folder), common=Options(seed=number), count=count, threads=1, progress=_quiet
            )
            spent = time.perf_counter() - began
            made.append((spent, np.stack([np.asarray(Image.open(image.path)) for image in saved])))
    return made[0], made[1]


def _quiet(*counts: float) -> None:
    """Nobody watches."""
