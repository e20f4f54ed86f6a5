"""Denoiser inputs made on the fly: what the teacher takes a row's picture for, noised again.

x = sqrt(a_t) x0 + sqrt(1 - a_t) noise (Ho et al. 2020, arXiv:2006.11239, eq. 4), a_t being the model's cumulated
alphas. One answer of the teacher gives x0; with new noise, at a timestep that is as noisy or noisier, it is an
input on the way to another picture, and the teacher's answer to that is another lesson.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdcompile.errors import StageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Call = tuple[Tensor, ...]


@dataclass(frozen=True)
class Schedule:
    """alphas: the cumulated product for each timestep of training; kind: what the denoiser predicts."""

    alphas: Tensor
    kind: str

    def at(self, timesteps: Tensor) -> Tensor:
        """Of each row, to be multiplied with latents (N, C, h, w)."""
        places = timesteps.round().long().clamp(0, len(self.alphas) - 1)
        return self.alphas[places].view(-1, 1, 1, 1)

    def picture(self, latents: Tensor, timesteps: Tensor, answers: Tensor) -> Tensor:
        """x0, by what the denoiser answered."""
        alphas = self.at(timesteps)
        if self.kind == "sample":
            return answers
        if self.kind == "v_prediction":
            return alphas.sqrt() * latents - (1 - alphas).sqrt() * answers
        return (latents - (1 - alphas).sqrt() * answers) / alphas.sqrt().clamp(min=1e-3)


def schedule_of(assets: Path) -> Schedule:
    """The noise schedule the model was trained with. Raises StageError where its scheduler config tells none."""
    from diffusers import DDPMScheduler

    config = json.loads((assets / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    scheduler = DDPMScheduler.from_config(config)
    kind = str(scheduler.config["prediction_type"])
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise StageError(
            f"the source's scheduler predicts {kind!r}, from which no picture can be told",
            "leave it to recorded rows: `recover: {renoise: 0}`",
        )
    return Schedule(scheduler.alphas_cumprod, kind)


def renoised(
    call: Call, share: float, schedule: Schedule, teach: Callable[[Call], Tensor], random: torch.Generator
) -> Call:
    """The call with so many of its rows noised again; `teach` answers calls. Latents and timesteps come first.

    Of a denoiser that is fed more than it answers (a mask beside the latents), the rows stay as they are.
    """
    import torch

    latents, timesteps, *told = call
    chosen = (torch.rand(len(latents), generator=random) < share).nonzero()[:, 0]
    if not len(chosen):
        return call
    then = timesteps[chosen]
    answers = teach((latents[chosen], then, *(column[chosen] for column in told)))
    if answers.shape != latents[chosen].shape:
        return call
    last = len(schedule.alphas) - 1
    later = then + (torch.rand(len(chosen), generator=random) * (last - then)).round()
    alphas = schedule.at(later)
    noise = torch.randn(answers.shape, generator=random)
    picture = schedule.picture(latents[chosen], then, answers)
    latents, timesteps = latents.clone(), timesteps.clone()
    latents[chosen] = alphas.sqrt() * picture + (1 - alphas).sqrt() * noise
    timesteps[chosen] = later.to(timesteps.dtype)
    return (latents, timesteps, *told)
