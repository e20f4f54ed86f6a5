"""Engines take a range of rows at once; feeds of any number of rows are run in parts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from sdcompile.backends import Engine
from sdcompile.spec import Range


def in_parts(engine: Engine, feeds: Mapping[str, np.ndarray], rows: Range) -> dict[str, np.ndarray]:
    """Run `engine` on feeds of any number of rows: as many per call as `rows` allows, evenly, and
    padded with copies of the last row where `rows` asks for more."""
    total = len(next(iter(feeds.values())))
    calls = -(-total // rows.max)
    if calls == 1 and total >= rows.min:
        # The arrays themselves, not views of them: by these an engine knows what it was fed before.
        return dict(engine({name: np.ascontiguousarray(array) for name, array in feeds.items()}))
    bounds = [total * part // calls for part in range(calls + 1)]
    parts = []
    for first, last in itertools.pairwise(bounds):
        part = {name: _padded(array[first:last], rows.min) for name, array in feeds.items()}
        parts.append({name: array[: last - first] for name, array in engine(part).items()})
    return parts[0] if calls == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    missing = rows - len(array)
    if missing <= 0:
        return np.ascontiguousarray(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
