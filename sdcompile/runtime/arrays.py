"""What the sampling loop does to latents, in numpy: `backends.base.Arrays` for every engine that keeps none itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Counts = NDArray[np.uint32]


class Numpy:
    known = True

    def put(self, array: Floats) -> Floats:
        return array

    def get(self, array: Floats) -> Floats:
        return array.copy()

    def scaled(self, array: Floats, factor: float) -> Floats:
        return (array * np.float64(factor)).astype(np.float32)

    def weighted(self, terms: Sequence[tuple[Floats, float]]) -> Floats:
        total = np.zeros(terms[0][0].shape, np.float64)
        for array, value in terms:
            total += np.multiply(array, value, dtype=np.float64)
        return total.astype(np.float32)

    def counters(self, count: int) -> Counts:
        return np.zeros(count, np.uint32)

    def count_bad(self, array: Floats, counters: Counts, place: int) -> None:
        finite = np.isfinite(array)
        if not finite.all():
            counters[place] += array.size - finite.sum()

    def counted(self, counters: Counts) -> Counts:
        return counters

    def wait(self) -> None:
        pass


NUMPY = Numpy()
