"""Deep features of the denoiser from one call to the next: when they are reused, and whose they are.

Of every `every` calls of a table the first is whole, and so is one that asks for a row which the last
whole call did not have (guidance that begins later). A sampler with two calls a step counts both. It
refuses to know engines.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Row = tuple[str, int]
"""A side of guidance, and a place: the number of an image, or of a tile of one."""


@dataclass
class DeepFeatures:
    """The deep features of the last whole call, row by row."""

    every: int
    _rows: dict[Row, NDArray[np.float32]] = field(default_factory=dict)

    def serve(self, index: int, rows: Iterable[Row]) -> bool:
        """May call `index` be shallow?"""
        return index % self.every != 0 and all(row in self._rows for row in rows)

    def keep(self, rows: Iterable[Row], deep: NDArray[np.float32]) -> None:
        """Those of a whole call, in the order of `rows`; older ones are forgotten."""
        self._rows = dict(zip(rows, deep, strict=True))

    def of(self, rows: Iterable[Row]) -> NDArray[np.float32]:
        return np.stack([self._rows[row] for row in rows])
