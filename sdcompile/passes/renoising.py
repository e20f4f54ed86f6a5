"""Denoiser inputs made on the fly: what the teacher takes a row's picture for, or a picture of one's own, noised.

x = sqrt(a_t) x0 + sqrt(1 - a_t) noise (Ho et al. 2020, arXiv:2006.11239, eq. 4), a_t being the model's cumulated
alphas. One answer of the teacher gives x0; with new noise, at a timestep that is as noisy or noisier, it is an
input on the way to another picture, and the teacher's answer to that is another lesson.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdcompile.errors import StageError
from sdcompile.samples import PICTURES, TOLD

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Call = tuple[Tensor, ...]


@dataclass(frozen=True)
class Pictures:
    """Latents (N, C, h, w) without noise; of each, which row of every conditioning (captions, ...) is its own.

    told: place of a conditioning among the columns of a call -> its rows
    """

    latents: Tensor
    caption: Tensor
    told: Mapping[int, Tensor]

    def fit(self, call: Call) -> bool:
        """Are these pictures of the sizes of the call's rows?"""
        return self.latents.shape[1:] == call[0].shape[1:] and all(
            rows.shape[1:] == call[place].shape[1:] for place, rows in self.told.items()
        )


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


def pictures_of(folder: Path, names: Sequence[str]) -> Pictures:
    """The pictures in `folder` (see `samples.write_pictures`), mapped; `names` are those of a call's columns."""
    from safetensors.torch import load_file

    arrays = load_file(folder / f"{PICTURES}.safetensors")
    told = {names.index(k.removeprefix(TOLD)): rows for k, rows in arrays.items() if k.startswith(TOLD)}
    return Pictures(arrays["latents"], arrays["caption"], told)


def shown(call: Call, share: float, schedule: Schedule, pictures: Pictures, random: torch.Generator) -> Call:
    """The call with so many of its rows made `pictures`, drawn with their captions, with noise of any timestep."""
    import torch

    latents, timesteps, *told = (column.clone() for column in call)
    rows = (torch.rand(len(latents), generator=random) < share).nonzero()[:, 0]
    which = torch.randint(len(pictures.latents), (len(rows),), generator=random)
    then = torch.randint(len(schedule.alphas), (len(rows),), generator=random)
    alphas = schedule.at(then)
    noise = torch.randn((len(rows), *latents.shape[1:]), generator=random)
    latents[rows] = alphas.sqrt() * pictures.latents[which] + (1 - alphas).sqrt() * noise
    timesteps[rows] = then.to(timesteps.dtype)
    for place, known in pictures.told.items():
        told[place - 2][rows] = known[pictures.caption[which]]
    return (latents, timesteps, *told)


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
