"""The options of a call: one record for Python arguments, flags, recipe defaults and rows of a prompt file.

A new option is a field here, its check in `values`, and its meaning in the room that uses it. This
room knows which options there are; it refuses to know what they do.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from sdcompile.errors import RecipeError
from sdcompile.spec import FULL


@dataclass(frozen=True)
class Options:
    """What a call may say besides its prompt; names are diffusers' where it has one. None = left open.

    negative_prompt         one text for all prompts, or one per prompt
    num_inference_steps, guidance_scale, height, width (pixels), num_images_per_prompt, output_type
    seed                    one int for the whole batch, or one per image
    latents                 unit noise (N, C, h, w) to start from, instead of the seed's
    sampler                 one of the model's samplers
    tiling                  "off", or "auto": sizes beyond the built ones are made of tiles (see `tiles`)
    hires                   make it small, then larger: how many times as large, and with what strength
    unet_width              "full", or one of the narrower widths the bundle was built with (`width` is in pixels)
    step_cache              "off", or N: one whole call of the denoiser in every N (see `stepcache`)
    profile                 a named set of options in the bundle (see `profiles`)
    prompt_weighting        "off" or "a1111" (see `prompts`)
    guidance_schedule, guidance_interval, guidance_rescale   see `guidance`
    stages                  samplers one after the other, in place of `sampler` (see `joining`)
    early_stop              see `values.EarlyStop`
    image, mask_image, strength   a picture to start from, where to paint it anew (white), and how much of
                            the noise to add (0 to 1); see `conditions`
    """

    negative_prompt: Any = None
    num_inference_steps: Any = None
    guidance_scale: Any = None
    height: Any = None
    width: Any = None
    num_images_per_prompt: Any = None
    seed: Any = None
    latents: Any = None
    sampler: Any = None
    output_type: Any = None
    prompt_weighting: Any = None
    guidance_schedule: Any = None
    guidance_interval: Any = None
    guidance_rescale: Any = None
    stages: Any = None
    early_stop: Any = None
    image: Any = None
    mask_image: Any = None
    strength: Any = None
    tiling: Any = None
    hires: Any = None
    step_cache: Any = None
    unet_width: Any = None
    profile: Any = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any], where: str = "") -> Self:
        """The options named in `arguments`. Raises RecipeError, beginning with `where`, for a name that is none."""
        for name in arguments:
            if name not in NAMES:
                near = difflib.get_close_matches(name, NAMES, 1)
                raise RecipeError(
                    f"{where}no option is called {name!r}",
                    f"did you mean {near[0]}?" if near else f"there are: {', '.join(NAMES)}",
                )
        return cls(**arguments)

    def given(self) -> dict[str, Any]:
        """The options that are not left open."""
        return {name: value for name in NAMES if (value := getattr(self, name)) is not None}

    def over(self, defaults: Options) -> Options:
        """These options, with what they leave open taken from `defaults`."""
        return replace(defaults, **self.given())


NAMES: tuple[str, ...] = tuple(field.name for field in fields(Options))

BUILT_IN = Options(
    negative_prompt="",
    num_images_per_prompt=1,
    output_type="pil",
    prompt_weighting="off",
    guidance_schedule="constant",
    guidance_rescale=0.0,
    tiling="off",
    step_cache="off",
    unet_width=FULL,
)
"""What neither a call nor a model says."""

APPROXIMATIONS: Mapping[str, str] = {"step_cache": "step cache", "unet_width": "width"}
"""Options that make another denoiser do, as int8 is another one, in words: no part of what is asked, so that whoever
measures a bundle asks its peers and the reference without them."""


def exactly(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` without the approximations among them."""
    return {name: value for name, value in options.items() if name not in APPROXIMATIONS}
