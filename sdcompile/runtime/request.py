"""A request for images, checked: what diffusers' arguments mean to this model, or why it cannot be done.

It knows what a model offers (sizes, samplers, steps) and refuses to know how images are made.
"""

from __future__ import annotations

import difflib
import math
import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sdcompile.errors import BundleError, RecipeError
from sdcompile.runtime.model import Model
from sdcompile.runtime.sampler import spans
from sdcompile.spec import Range

if TYPE_CHECKING:
    from numpy.typing import NDArray

OutputType = Literal["pil", "np", "latent"]


@dataclass(frozen=True)
class Request:
    """Every argument of a call, resolved. `prompts` and `negative_prompts` have one entry per image.

    seeds      one for the whole batch, or one per image
    guided     whether the negative prompt is denoised along
    latents    unit noise (N, C, h, w) float32 to start from, or None to draw it from the seeds
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    num_inference_steps: int
    guidance_scale: float
    guided: bool
    height: int
    width: int
    seeds: tuple[int, ...]
    sampler: str
    output_type: OutputType
    latents: NDArray[np.float32] | None

    def latent_shape(self, model: Model) -> tuple[int, int, int, int]:
        factor = model.facts["vae_scale_factor"]
        return len(self.prompts), model.facts["latent_channels"], self.height // factor, self.width // factor


def resolve(
    model: Model,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    height: int | None,
    width: int | None,
    num_images_per_prompt: int,
    seed: int | Sequence[int] | None,
    latents: Any,
    sampler: str | None,
    output_type: str,
) -> Request:
    """Fill in the model's defaults and check every value.

    Raises RecipeError for a value that no model could take, BundleError for one that this model's
    engines were not built for.
    """
    prompts, negatives = _prompts(prompt, negative_prompt, model.defaults.negative_prompt)
    per_prompt = _count("num_images_per_prompt", num_images_per_prompt)
    prompts, negatives = (tuple(p for p in each for _ in range(per_prompt)) for each in (prompts, negatives))
    if output_type not in get_args(OutputType):
        raise RecipeError(f"output_type={output_type!r} is unknown", f"one of: {', '.join(get_args(OutputType))}")
    noise = None if latents is None else _latents(model, latents, len(prompts), height, width)
    if noise is not None:
        height, width = (side * model.facts["vae_scale_factor"] for side in noise.shape[2:])
    chosen = _sampler(model, sampler)
    steps = model.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
    scale = _guidance(model.defaults.guidance_scale if guidance_scale is None else guidance_scale)
    return Request(
        prompts=prompts,
        negative_prompts=negatives,
        num_inference_steps=_steps(model, chosen, steps),
        guidance_scale=scale,
        # As diffusers: a model that takes the guidance scale as an input is not guided a second time.
        guided=scale > 1 and not model.facts.get("time_cond_proj_dim"),
        **_size(model, height, width),
        seeds=_seeds(seed, len(prompts)),
        sampler=chosen,
        output_type=output_type,  # type: ignore[arg-type]
        latents=noise,
    )


def _prompts(
    prompt: str | Sequence[str] | None, negative: str | Sequence[str] | None, default: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if prompt is None:
        raise RecipeError("no prompt was given", 'an empty prompt is legal: ""')
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    negative = default if negative is None else negative
    negatives = (negative,) * len(prompts) if isinstance(negative, str) else tuple(negative)
    for what, values in (("prompt", prompts), ("negative_prompt", negatives)):
        for value in values:
            if not isinstance(value, str):
                raise RecipeError(f"{what} holds {value!r}, which is no text")
    if not prompts:
        raise RecipeError("the list of prompts is empty", "give at least one prompt")
    if len(negatives) != len(prompts):
        raise RecipeError(
            f"{len(negatives)} negative prompts were given for {len(prompts)} prompts",
            "give one for each prompt, or a single text for all",
        )
    return prompts, negatives


def _whole(what: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise RecipeError(f"{what}={value!r} is no whole number") from error


def _count(what: str, value: Any) -> int:
    number = _whole(what, value)
    if number < 1:
        raise RecipeError(f"{what}={number}: at least 1 is needed")
    return number


def _guidance(value: Any) -> float:
    try:
        scale = float(value)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"guidance_scale={value!r} is no number") from error
    if not math.isfinite(scale):
        raise RecipeError(f"guidance_scale={scale} is not finite", "usual values are 1 (off) to 15")
    return scale


def _sampler(model: Model, name: str | None) -> str:
    name = model.defaults.sampler if name is None else name
    if name not in model.samplers:
        near = difflib.get_close_matches(str(name), model.samplers, 1)
        known = ", ".join(model.samplers)
        raise RecipeError(
            f"sampler {name!r} is not in this model: it has {known}",
            (f"did you mean {near[0]}? " if near else "") + "Others are added in the recipe's samplers list.",
        )
    return name


def _steps(model: Model, sampler: str, value: Any) -> int:
    steps = _count("num_inference_steps", value)
    available = model.samplers[sampler].num_inference_steps
    if steps not in available:
        raise RecipeError(
            f"sampler {sampler} is compiled for {spans(available)} steps, not for {steps}",
            f"ask for one of these, or rebuild with --set sampler_steps=[1,{max(steps, *available)}]",
        )
    return steps


def _size(model: Model, height: Any, width: Any) -> dict[str, int]:
    asked = {
        "height": model.defaults.height if height is None else height,
        "width": model.defaults.width if width is None else width,
    }
    sides = {side: _whole(side, value) for side, value in asked.items()}
    multiple = model.facts["size_multiple"]
    faults, legal = [], {}
    for side, value in sides.items():
        bounds = model.shapes[side[0].upper()]
        legal[side] = _nearest(value, bounds, multiple)
        if value % multiple or not bounds.min <= value <= bounds.max:
            faults.append(f"{side} {value} is not what the engines were built for: {_sides(bounds, multiple)}")
    if faults:
        raise BundleError("\n".join(faults), f"the nearest size is width {legal['width']}, height {legal['height']}")
    return sides


def _sides(bounds: Range, multiple: int) -> str:
    return f"{bounds.min} only" if bounds.is_static else f"{bounds.min} to {bounds.max} in steps of {multiple}"


def _nearest(value: int, bounds: Range, multiple: int) -> int:
    return min(max(round(value / multiple) * multiple, bounds.min), bounds.max)


def _seeds(seed: Any, images: int) -> tuple[int, ...]:
    if seed is None:
        return (secrets.randbits(32),)
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != images:
            raise RecipeError(f"{len(seed)} seeds were given for {images} images", "give one for each, or one for all")
        return tuple(_whole("seed", value) for value in seed)
    return (_whole("seed", seed),)


def _latents(model: Model, latents: Any, images: int, height: int | None, width: int | None) -> NDArray[np.float32]:
    noise = np.asarray(latents)
    channels, factor = model.facts["latent_channels"], model.facts["vae_scale_factor"]
    if noise.dtype.kind != "f":
        raise RecipeError(f"latents are {noise.dtype}; they must be floating point", "latents.astype('float32')")
    wanted = (images, channels, height // factor if height else "h", width // factor if width else "w")
    if noise.ndim != 4 or any(isinstance(w, int) and w != n for w, n in zip(wanted, noise.shape, strict=True)):
        raise RecipeError(
            f"latents have shape {noise.shape}; {images} image(s) of this model and size need "
            f"({', '.join(map(str, wanted))})",
            f"one row per image, {channels} channels, one latent per {factor} pixels",
        )
    if not np.isfinite(noise).all():
        raise RecipeError("latents hold values that are NaN or infinite", "start from standard normal noise")
    return np.ascontiguousarray(noise, np.float32)
