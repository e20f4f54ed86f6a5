"""Sampling without coming back to the host between steps: when it can be done, and the denoiser for it.

It knows what asks for latents on the host; it refuses to know which device keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile.backends import Device
from sdcompile.runtime.denoising import Denoiser
from sdcompile.runtime.request import Request
from sdcompile.runtime.tables import Table

if TYPE_CHECKING:
    from numpy.typing import NDArray


def device_for(denoiser: Denoiser, table: Table, request: Request, images: int, *, looks: bool) -> Device | None:
    """Where the latents of `images` images can stay between the steps of `table`; None = they come to the host.

    They have to come for whatever looks at them there (`looks`: a callback, tiles, a mask), for early stop, guidance
    rescale and the step cache, and for more or fewer rows than the engine takes in one call.
    """
    device: Device | None = getattr(denoiser.engine, "arrays", None)
    if device is None or looks or request.early_stop is not None or denoiser.features is not None or denoiser.rescale:
        return None
    rows = {images * denoiser.sides(index) for index in range(len(table.calls))}
    fits = all(denoiser.rows.min <= n <= denoiser.rows.max for n in rows)
    return device if fits and max(len(call.terms) for call in table.calls) <= device.most_terms else None


@dataclass(frozen=True)
class DeviceDenoiser:
    """`denoiser` as a `sampler.Denoise` for model inputs on `device`."""

    denoiser: Denoiser
    device: Device
    timesteps: list[Any]
    guidance: dict[tuple[float, int], dict[str, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(cls, denoiser: Denoiser, device: Device) -> DeviceDenoiser:
        """Timesteps are sent at once: a copy in every step would wait for the one before."""
        device.begin()
        most = denoiser.rows.max
        sent = device.put(np.repeat(np.array(denoiser.timesteps, np.float32), most))
        return cls(denoiser, device, [sent[n * most : (n + 1) * most] for n in range(len(denoiser.timesteps))])

    def __call__(self, model_input: Any, index: int, images: NDArray[np.intp]) -> Any:
        self.device.mark()
        denoiser, scale = self.denoiser, self.denoiser.scales[index]
        twice = denoiser.sides(index) == 2
        sample = self.device.joined([model_input] * 2) if twice else model_input
        feeds = {
            "sample": sample,
            "timestep": self.timesteps[index][: len(sample)],
            **denoiser.conditioning(twice, images),
            **self._guidance(scale, len(sample)),
        }
        (output,) = self.device.run(feeds).values()
        if twice:
            output = self.device.guided(output[: len(images)], output[len(images) :], scale)
        self.device.mark()
        denoiser.clock.denoise_rows.append(len(sample))
        denoiser.clock.denoise_shallow.append(False)
        return output

    def finish(self) -> None:
        """Tell the clock how long each call took, once the latents have been fetched."""
        self.denoiser.clock.denoise_s += self.device.laps()[::2]

    def _guidance(self, scale: float, rows: int) -> dict[str, np.ndarray]:
        """What the family feeds for a scale: read-only, so that the engine may leave it on its device."""
        if (scale, rows) not in self.guidance:
            made = self.denoiser.family.guidance_feeds(self.denoiser.facts, scale, rows)
            self.guidance[scale, rows] = {name: array.copy() for name, array in made.items()}
            for array in self.guidance[scale, rows].values():
                array.setflags(write=False)
        return self.guidance[scale, rows]
