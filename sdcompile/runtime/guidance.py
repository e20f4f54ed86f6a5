"""Classifier-free guidance as data: one scale for every denoiser call, and the formula that applies it.

A call whose scale is 1 or less is not guided: the negative prompt is not denoised, so its row
costs nothing. It knows no engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sdcompile.runtime.values import Interval, Schedule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

# Made from guidance_scale w when a schedule names no scales of its own; each has w as its mean.
# Phases: the 5, 7, 9 of a request at 7.
_FACTORS = {"constant": (1.0,), "linear": (0.5, 1.5), "cosine": (0.5, 1.5), "phases": (5 / 7, 1.0, 9 / 7)}
_PHASES = (0.3, 0.6)


def scales(
    guidance_scale: float, schedule: Schedule, interval: Interval | None, timesteps: Sequence[float]
) -> tuple[float, ...]:
    """The guidance scale of each call; 1 where guidance does not act.

    `timesteps` are those of the calls, first to last. A schedule runs over the calls from first to
    last: linear, along half a cosine (slow, fast, slow), or in phases that end at 30 %, 60 % and
    100 % of the calls. A guidance_scale of 1 or less turns guidance off whatever the schedule.
    Outside `interval` there is none (Kynkäänniemi et al., Applying Guidance in a Limited Interval,
    arXiv:2404.07724).
    """
    if guidance_scale <= 1:
        return (guidance_scale,) * len(timesteps)
    levels = schedule.scales or tuple(factor * guidance_scale for factor in _FACTORS[schedule.kind])
    found = []
    for index, timestep in enumerate(timesteps):
        fraction = index / max(1, len(timesteps) - 1)
        if interval is not None:
            place = timestep if interval.timesteps else fraction
            if not interval.start <= place <= interval.stop:
                found.append(1.0)
                continue
        found.append(_level(schedule.kind, levels, fraction, index / len(timesteps)))
    return tuple(found)


def _level(kind: str, levels: Sequence[float], fraction: float, elapsed: float) -> float:
    if kind == "constant":
        return levels[0]
    if kind == "phases":
        return levels[sum(elapsed >= end for end in _PHASES)]
    if kind == "cosine":
        fraction = 0.5 - 0.5 * math.cos(math.pi * fraction)
    return levels[0] + (levels[1] - levels[0]) * fraction


def guided(negative: Floats, positive: Floats, scale: float, rescale: float = 0.0) -> Floats:
    """negative + scale * (positive - negative), (N, C, h, w) float32.

    With `rescale` > 0 each image's standard deviation is brought back towards that of `positive`
    (Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv:2305.08891,
    section 3.4), as diffusers' guidance_rescale does.
    """
    output = negative + np.float32(scale) * (positive - negative)
    if rescale == 0.0:
        return output
    axes = tuple(range(1, output.ndim))
    wanted, found = (x.std(axis=axes, keepdims=True, ddof=1, dtype=np.float64) for x in (positive, output))
    # A constant output has nothing to bring back.
    factor = np.divide(wanted, found, out=np.ones_like(found), where=found > 0)
    return (output * (rescale * factor + (1.0 - rescale))).astype(np.float32)
