"""The denoiser as the sampler sees it: model input in, guided output out.

It knows the family's denoiser inputs and guidance; it refuses to know tables and schedulers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile.backends import Engine
from sdcompile.families import Family
from sdcompile.runtime.batches import in_parts
from sdcompile.runtime.guidance import guided
from sdcompile.runtime.output import Clock
from sdcompile.spec import Range

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Denoiser:
    """A `sampler.Denoise`. The conditioning has one row per image.

    rows        how many rows the engine takes at once
    timesteps, scales   of each call; a scale above 1 guides, unless `takes_scale`
    negative    None when no call is guided
    takes_scale the model takes the guidance scale as an input and is not guided a second time, as in diffusers
    """

    engine: Engine
    family: Family
    facts: Mapping[str, Any]
    rows: Range
    timesteps: tuple[float, ...]
    scales: tuple[float, ...]
    rescale: float
    positive: Mapping[str, Floats]
    negative: Mapping[str, Floats] | None
    clock: Clock

    def __call__(self, model_input: Floats, index: int, images: NDArray[np.intp]) -> Floats:
        began = time.perf_counter()
        scale = self.scales[index]
        twice = self.negative is not None and scale > 1
        # As in diffusers: all negative prompts, and then all prompts.
        sides = ([self.negative] if twice and self.negative is not None else []) + [self.positive]
        sample = np.concatenate([model_input] * len(sides)) if twice else model_input
        conditioning = {name: np.concatenate([side[name][images] for side in sides]) for name in self.positive}
        feeds = {
            "sample": sample,
            "timestep": np.full(len(sample), self.timesteps[index], np.float32),
            **conditioning,
            **self.family.guidance_feeds(self.facts, scale, len(sample)),
        }
        (output,) = in_parts(self.engine, feeds, self.rows).values()
        if twice:
            without, along = np.split(output, 2)
            output = guided(without, along, scale, self.rescale)
        self.clock.denoise_s.append(time.perf_counter() - began)
        self.clock.denoise_rows.append(len(sample))
        return output
