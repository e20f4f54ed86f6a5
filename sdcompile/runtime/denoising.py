"""The denoiser as the sampler sees it: model input in, guided output out.

It knows the family's denoiser inputs and guidance; it refuses to know tables and schedulers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile.backends import Engine
from sdcompile.families import Family
from sdcompile.runtime.batches import in_parts
from sdcompile.runtime.guidance import guided
from sdcompile.runtime.output import Clock
from sdcompile.runtime.stepcache import DeepFeatures, Row
from sdcompile.spec import DEEP, Range

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


_JOINED = 2
"""How many are kept: of guided calls and of unguided ones."""


@dataclass(frozen=True)
class Denoiser:
    """A `sampler.Denoise`. The conditioning has one row per image.

    rows        how many rows the engine takes at once
    timesteps, scales   of each call; a scale above 1 guides, unless `takes_scale`
    negative    None when no call is guided
    joined      conditioning already put together, of the last calls
    takes_scale the model takes the guidance scale as an input and is not guided a second time, as in diffusers
    shallow     the engine that stands in where deep features of an earlier call serve; None: never
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
    shallow: Engine | None = None
    features: DeepFeatures | None = None
    joined: dict[tuple[bool, bytes], dict[str, Floats]] = field(default_factory=dict)

    def __call__(
        self, model_input: Floats, index: int, images: NDArray[np.intp], places: NDArray[np.intp] | None = None
    ) -> Floats:
        """`images` says which image a row belongs to; `places` tells the rows of one image apart, where it has many."""
        began = time.perf_counter()
        scale = self.scales[index]
        twice = self.sides(index) == 2
        sample = np.concatenate([model_input] * 2) if twice else model_input
        feeds = {
            "sample": sample,
            "timestep": np.full(len(sample), self.timesteps[index], np.float32),
            **self.conditioning(twice, images),
            **self.family.guidance_feeds(self.facts, scale, len(sample)),
        }
        numbers = (images if places is None else places).tolist()
        output, reused = self._answer(index, feeds, [(side, n) for side in ("-", "+")[not twice :] for n in numbers])
        if twice:
            without, along = np.split(output, 2)
            output = guided(without, along, scale, self.rescale)
        self.clock.denoise_s.append(time.perf_counter() - began)
        self.clock.denoise_rows.append(len(sample))
        self.clock.denoise_shallow.append(reused)
        return output

    def sides(self, index: int) -> int:
        """2 where call `index` is guided, and denoises the negative prompt too; else 1."""
        return 2 if self.negative is not None and self.scales[index] > 1 else 1

    def _answer(self, index: int, feeds: Mapping[str, np.ndarray], rows: list[Row]) -> tuple[Floats, bool]:
        """The output for `feeds`, and whether it was made with deep features of an earlier call."""
        if self.shallow is None or self.features is None:
            return next(iter(in_parts(self.engine, feeds, self.rows).values())), False
        if self.features.serve(index, rows):
            (output,) = in_parts(self.shallow, {**feeds, DEEP: self.features.of(rows)}, self.rows).values()
            return output, True
        made = dict(in_parts(self.engine, feeds, self.rows))
        self.features.keep(rows, made.pop(DEEP))
        (output,) = made.values()
        return output, False

    def conditioning(self, twice: bool, images: NDArray[np.intp]) -> dict[str, Floats]:
        """The rows of these images, put together once: read-only, so that an engine may leave them on its device."""
        key = (twice, images.tobytes())
        if key not in self.joined:
            # As in diffusers: all negative prompts, and then all prompts.
            sides = ([self.negative] if twice and self.negative is not None else []) + [self.positive]
            rows = {name: np.concatenate([side[name][images] for side in sides]) for name in self.positive}
            for array in rows.values():
                array.setflags(write=False)
            while len(self.joined) >= _JOINED:
                self.joined.pop(next(iter(self.joined)))
            self.joined[key] = rows
        return self.joined[key]
