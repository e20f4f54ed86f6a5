"""Inpainting by masking: what is to be kept of a picture is put back after every step, noised as the latents are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdcompile.errors import RecipeError
from sdcompile.runtime.joining import signal
from sdcompile.runtime.tables import Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Kept:
    """The picture's latents `clean` (1 or N, C, h, w), the run's first noise, and where to paint anew (mask 1)."""

    table: Table
    clean: Floats
    noise: Floats
    mask: Floats

    def put_back(self, index: int, latents: Floats) -> Floats:
        """Latents after call `index` of the table, with the kept parts of the picture at their noise level.

        Raises RecipeError where the sampler's noise levels are not known.
        """
        kept = np.broadcast_to(self.clean, latents.shape)
        if index + 1 < len(self.table.calls):
            following = self.table.calls[index + 1]
            share = signal(following)
            if share is None:
                raise RecipeError(
                    f"sampler {self.table.sampler} does not say how noisy its latents are, so no part can be kept",
                    "choose another sampler",
                )
            kept = (share * kept + np.sqrt(1 - share**2) * self.noise) / following.scale
        return (kept * (1 - self.mask) + latents * self.mask).astype(np.float32)
