"""Pictures larger than the engines: overlapping tiles, blended with smooth weights.

For the denoiser this is MultiDiffusion (Bar-Tal et al., arXiv:2302.08113): at every step the
outputs of all tiles are averaged, so that neighbours agree where they overlap. It knows arrays and
refuses to know what is run on a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

OVERLAP = 0.25
"""The least share of a tile's side that it has in common with its neighbour."""


@dataclass(frozen=True)
class Tiling:
    """How an area of (height, width) is covered by tiles of one size: the first row and column of each."""

    height: int
    width: int
    tile_height: int
    tile_width: int

    def corners(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """Top left corners, evenly spread over multiples of `multiple`, by rows."""
        for top in _firsts(self.height, self.tile_height, multiple):
            for left in _firsts(self.width, self.tile_width, multiple):
                yield top, left

    @property
    def count(self) -> int:
        return sum(1 for _ in self.corners())


def _firsts(side: int, tile: int, multiple: int) -> list[int]:
    if side <= tile:
        return [0]
    count = 1 + -(-(side - tile) // max(1, int(tile * (1 - OVERLAP))))
    return [round((side - tile) * n / (count - 1) / multiple) * multiple for n in range(count)]


def over_tiles(run: Callable[[Floats], Floats], array: Floats, tiling: Tiling, up: int = 1, down: int = 1) -> Floats:
    """`run` on every tile of `array` (N, C, H, W), all tiles in one call of N rows each, tile after tile.

    What `run` gives is up / down times as high and wide (a decoder up 8, an encoder down 8). Where
    tiles overlap, each counts by its distance from its own edge.
    """
    corners = list(tiling.corners(down))
    tops, lefts = tiling.tile_height, tiling.tile_width
    outputs = np.split(run(np.concatenate([array[..., y : y + tops, x : x + lefts] for y, x in corners])), len(corners))
    sides = (tiling.height * up // down, tiling.width * up // down)
    total = np.zeros((*outputs[0].shape[:2], *sides), np.float32)
    weights = np.zeros(sides, np.float32)
    tile = ramp(outputs[0].shape[2])[:, None] * ramp(outputs[0].shape[3])
    for (y, x), output in zip(corners, outputs, strict=True):
        top, left = y * up // down, x * up // down
        window = (slice(top, top + tile.shape[0]), slice(left, left + tile.shape[1]))
        total[(..., *window)] += output * tile
        weights[window] += tile
    return np.divide(total, weights, dtype=np.float32)


def ramp(side: int) -> Floats:
    """Weights along a side: a sine that rises over OVERLAP of it, is 1 in the middle, and falls; never 0."""
    edge = np.minimum(np.arange(side), np.arange(side)[::-1]) + 0.5
    rise = (edge / (side * OVERLAP)).clip(max=1.0)
    return (np.sin(np.pi / 2 * rise) ** 2).astype(np.float32)


def upscaled(latents: Floats, height: int, width: int) -> Floats:
    """Latents (N, C, h, w) at another size, linear along each side; edges are repeated."""
    rows, columns = _linear(latents.shape[2], height), _linear(latents.shape[3], width)
    return np.einsum("yh,nchw,xw->ncyx", rows, latents, columns, optimize=True).astype(np.float32)


def _linear(before: int, after: int) -> Floats:
    """The matrix (after, before) that interpolates linearly between the centres of pixels."""
    place = ((np.arange(after) + 0.5) * before / after - 0.5).clip(0, before - 1)
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, before - 1)
    share = place - low
    matrix = np.zeros((after, before), np.float32)
    matrix[np.arange(after), low] += 1 - share
    matrix[np.arange(after), high] += share
    return matrix
