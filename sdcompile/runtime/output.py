"""What a call made: the images, the request they answer, and the seconds they took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile.runtime.request import Request
from sdcompile.runtime.values import Schedule
from sdcompile.spec import FULL

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Output:
    """What a call made.

    images    PIL images, (N, H, W, 3) float32 in [0, 1], or latents (N, C, h, w): as `output_type` asked
    request   every argument as resolved: prompts per image, seeds, sampler, steps, size
    timings   seconds: text_encoder_s, denoise_s (one per denoiser step), vae_s, open_s (engines, in all);
              denoise_shallow (one per denoiser step: were deep features reused?), on_device (one per pass: did the
              latents stay on the engine's device between steps? denoise_s is then what the device measured);
              counts: denoise_rows (one per denoiser step), steps (one per image: the denoiser steps it
              took), where prompts came from: prompts_cached (memory), prompts_read (disk), prompts_computed, and
              images_read: finished images that were taken from disk
    """

    images: list[Image] | Floats
    request: Request
    timings: Mapping[str, Any]
    model: str = ""
    digest: str = ""
    target: str = ""

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.request.seeds

    @property
    def sampler(self) -> str:
        return self.request.sampler

    @property
    def num_inference_steps(self) -> int:
        return self.request.num_inference_steps

    def metadata(self, index: int) -> dict[str, str]:
        """How image `index` was made, as PNG text. `seed` and `index` name it: one seed may serve a whole batch."""
        request = self.request
        return {
            "prompt": request.prompts[index],
            "negative_prompt": request.negative_prompts[index],
            "seed": str(request.seeds[index] if len(request.seeds) > 1 else request.seeds[0]),
            "index": str(index),
            "batch": str(len(request.prompts)),
            "sampler": request.sampler,
            "num_inference_steps": str(request.num_inference_steps),
            "guidance_scale": f"{request.guidance_scale:g}",
            "size": f"{request.width}x{request.height}",  # of the first pass, where there are two
            **_unusual(request),
            "model": self.model,
            "bundle": self.digest,
            **({"target": self.target} if self.target else {}),
        }


def _unusual(request: Request) -> dict[str, str]:
    """The options that do something besides what a plain diffusers call does."""
    told: dict[str, Any] = {
        "profile": request.profile,
        "prompt_weighting": request.prompt_weighting if request.prompt_weighting != "off" else None,
        "guidance_schedule": request.guidance_schedule if request.guidance_schedule != Schedule("constant") else None,
        "guidance_interval": request.guidance_interval,
        "stages": ",".join(map(str, request.stages)) or None,
        "early_stop": request.early_stop,
        "tiling": request.tiling if request.tiling != "off" else None,
        "hires": request.hires,
        "step_cache": request.step_cache,
        "unet_width": request.unet_width if request.unet_width != FULL else None,
        "strength": f"{request.strength:g}" if request.image is not None else None,
        "guidance_rescale": f"{request.guidance_rescale:g}" if request.guidance_rescale else None,
    }
    return {name: str(value) for name, value in told.items() if value is not None}


@dataclass
class Clock:
    """Seconds and counts of one call, as they add up."""

    text_encoder_s: float = 0.0
    denoise_s: list[float] = field(default_factory=list)
    vae_s: float = 0.0
    open_s: float = 0.0
    denoise_rows: list[int] = field(default_factory=list)
    denoise_shallow: list[bool] = field(default_factory=list)
    on_device: list[bool] = field(default_factory=list)
    prompts_cached: int = 0
    prompts_read: int = 0
    prompts_computed: int = 0
    images_read: int = 0
    steps: list[int] = field(default_factory=list)

    def timings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
