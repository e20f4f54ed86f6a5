"""A request for images, checked: what diffusers' arguments mean to this model, or why it cannot be done.

It knows what a model offers (sizes, samplers, steps) and refuses to know how images are made.
"""

from __future__ import annotations

import difflib
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np

from sdcompile.errors import BundleError, RecipeError
from sdcompile.families import FAMILIES
from sdcompile.runtime import conditions, values
from sdcompile.runtime.model import Model
from sdcompile.runtime.offer import unknown_width
from sdcompile.runtime.options import BUILT_IN, Options
from sdcompile.runtime.tables import spans
from sdcompile.runtime.tiles import upscaled
from sdcompile.runtime.values import EarlyStop, Hires, Interval, Schedule, Stage
from sdcompile.spec import FULL, Range

if TYPE_CHECKING:
    from numpy.typing import NDArray

OutputType = Literal["pil", "np", "latent"]
T = TypeVar("T")

ENCODER = "vae_encoder"
"""The component that makes latents of a picture; bundles hold it where the recipe lists it."""


@dataclass(frozen=True)
class Request:
    """Every option of a call, resolved. `prompts` and `negative_prompts` have one entry per image.

    seeds      one for the whole batch, or one per image
    latents    unit noise (N, C, h, w) float32 to start from, or None to draw it from the seeds
    image      a picture to start from, (1 or N, 3, H, W) float32 in [-1, 1], noised by `strength`
    mask       (1 or N, 1, h, w): 1 where it is painted anew, 0 where it is kept
    clean      the latents of such a picture (N, C, h, w), scaled, in place of `image`
    seeded     was the seed given, so that the same request means the same images?
    hires      a second pass, at a larger size
    unet_width  which width of the denoiser makes the images
    step_cache  N: of every N calls of the denoiser the first is whole, the others shallow; None = all whole
    """

    profile: str | None
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    prompt_weighting: str
    num_inference_steps: int
    guidance_scale: float
    guidance_schedule: Schedule
    guidance_interval: Interval | None
    guidance_rescale: float
    height: int
    width: int
    seeds: tuple[int, ...]
    sampler: str
    stages: tuple[Stage, ...]
    early_stop: EarlyStop | None
    output_type: OutputType
    latents: NDArray[np.float32] | None
    image: NDArray[np.float32] | None
    mask: NDArray[np.float32] | None
    strength: float
    tiling: str
    hires: Hires | None
    step_cache: int | None
    unet_width: str = FULL
    clean: NDArray[np.float32] | None = None
    seeded: bool = False

    @property
    def first_step(self) -> int | None:
        """The step to begin at; None to begin in noise alone. As diffusers counts it."""
        if (self.image is None and self.clean is None) or (self.mask is not None and self.strength == 1):
            return None
        return self.num_inference_steps - min(int(self.num_inference_steps * self.strength), self.num_inference_steps)

    def latent_shape(self, model: Model) -> tuple[int, int, int, int]:
        factor = model.facts["vae_scale_factor"]
        return len(self.prompts), model.facts["latent_channels"], self.height // factor, self.width // factor


def defaults_of(model: Model) -> Options:
    """What a call to `model` gets where it leaves an option open."""
    named = model.defaults.model_dump(exclude={"options"}) | model.defaults.options
    return Options.of(named, "the bundle's defaults: ").over(BUILT_IN)


def resolve(model: Model, prompt: str | Sequence[str] | None, options: Options) -> Request:
    """Fill in the model's defaults and check every value.

    Raises RecipeError for a value that no model could take, BundleError for one that this model's
    engines were not built for.
    """
    if options.profile is not None:
        options = options.over(model.profiles.named(options.profile))
    asked = options.over(defaults_of(model))
    prompts, negatives = _prompts(prompt, asked.negative_prompt)
    per_prompt = values.count("num_images_per_prompt", asked.num_images_per_prompt)
    prompts, negatives = (tuple(p for p in each for _ in range(per_prompt)) for each in (prompts, negatives))
    height, width, noise = asked.height, asked.width, None
    output_type: Any = values.choice("output_type", asked.output_type, get_args(OutputType))
    if asked.latents is not None:
        noise = _latents(model, asked.latents, len(prompts), options.height, options.width)
        height, width = (side * model.facts["vae_scale_factor"] for side in noise.shape[2:])
    if asked.image is not None and options.height is None and options.width is None:
        height, width = conditions.size_of("image", asked.image)
    tiling, hires = values.tiling(asked.tiling), _if_set(values.hires, asked.hires)
    sides = _size(model, height, width, tiling)
    if hires is not None:
        _size(model, *larger(hires, **sides, model=model), tiling)
    stages = () if asked.stages is None else _stages(model, asked.stages)
    sampler = stages[0].sampler if stages else _sampler(model, asked.sampler)
    compiled = model.samplers[sampler].num_inference_steps
    if options.num_inference_steps is None and len(compiled) == 1:
        asked = replace(asked, num_inference_steps=compiled[0])
    request = Request(
        profile=asked.profile,
        prompts=prompts,
        negative_prompts=negatives,
        prompt_weighting=values.prompt_weighting(asked.prompt_weighting),
        num_inference_steps=_steps(model, sampler, asked.num_inference_steps),
        guidance_scale=values.guidance_scale(asked.guidance_scale),
        guidance_schedule=values.guidance_schedule(asked.guidance_schedule),
        guidance_interval=None
        if asked.guidance_interval is None
        else values.guidance_interval(asked.guidance_interval),
        guidance_rescale=values.guidance_rescale(asked.guidance_rescale),
        height=sides["height"],
        width=sides["width"],
        seeds=_seeds(asked.seed, len(prompts)),
        sampler=sampler,
        stages=stages,
        early_stop=_if_set(values.early_stop, asked.early_stop),
        output_type=output_type,
        latents=noise,
        tiling=tiling,
        hires=hires,
        step_cache=_step_cache(model, asked.step_cache),
        unet_width=_unet_width(model, asked.unet_width),
        seeded=asked.seed is not None,
        **_start(model, asked, len(prompts), **sides),
    )
    second = request if hires is None else second_pass(request, model, None)
    for part in (request, second):
        _check_start(part)
    return request


def larger(hires: Hires, height: int, width: int, model: Model) -> tuple[int, int]:
    """Height and width of the second pass, to the nearest size the model can make."""
    multiple = model.facts["size_multiple"]
    return round(height * hires.scale / multiple) * multiple, round(width * hires.scale / multiple) * multiple


def second_pass(request: Request, model: Model, final: NDArray[np.float32] | None) -> Request:
    """The second pass of a hires request, from the `final` latents of the first (None: only to be checked)."""
    assert request.hires is not None
    height, width = larger(request.hires, request.height, request.width, model)
    size = (side // model.facts["vae_scale_factor"] for side in (height, width))
    clean = np.zeros((1, 1, 1, 1), np.float32) if final is None else upscaled(final, *size)
    return replace(
        request, height=height, width=width, image=None, mask=None, latents=None, clean=clean,
        strength=request.hires.strength, hires=None,
    )  # fmt: skip


def _check_start(request: Request) -> None:
    if request.first_step is not None and (request.stages or request.first_step >= request.num_inference_steps):
        raise RecipeError(
            f"strength={request.strength:g} of {request.num_inference_steps} steps leaves none to make"
            if not request.stages else "stages do not begin from a picture",
            "raise strength or num_inference_steps, or leave stages out",
        )  # fmt: skip


def _start(model: Model, asked: Options, images: int, height: int, width: int) -> dict[str, Any]:
    """image, mask and strength of a request."""
    strength = values.number(
        "strength", asked.strength if asked.strength is not None else _strength(asked), "", 0.0, 1.0
    )
    if asked.image is None:
        if asked.mask_image is not None:
            raise RecipeError("mask_image needs an image to keep parts of", "give one as image")
        return {"image": None, "mask": None, "strength": strength}
    if model.components and ENCODER not in model.components:
        raise BundleError(
            f"this bundle has no {ENCODER}, which a picture to start from needs",
            f"rebuild it with: --set components.{ENCODER}.precision=fp32",
        )
    image, mask = conditions.picture("image", asked.image, height, width), None
    if asked.mask_image is not None:
        mask = conditions.mask("mask_image", asked.mask_image, height, width, model.facts["vae_scale_factor"])
    for what, array in (("image", image), ("mask_image", mask)):
        if array is not None and len(array) not in (1, images):
            raise RecipeError(
                f"{len(array)} {what}s were given for {images} images", "give one for all, or one for each"
            )
    return {"image": image, "mask": mask, "strength": strength}


def _step_cache(model: Model, value: Any) -> int | None:
    every, shallow = values.step_cache(value), FAMILIES[model.family].shallow
    if every is not None and model.components and shallow not in model.components:
        raise BundleError(
            f"this bundle has no {shallow}, which step_cache needs",
            "leave step_cache out, or rebuild it with: --set 'components.unet.step_cache={every: 3}'",
        )
    return every


def _unet_width(model: Model, value: Any) -> str:
    width, built = values.unet_width(value), FAMILIES[model.family].widths(model.components)
    if model.components and width not in built:
        raise BundleError(
            f"unet_width: {unknown_width(width, built)}",
            f"ask for one of these, or build it: --set 'components.unet.widths.{width}={{channels: {{ratio: 0.3}}}}'",
        )
    return width


def _strength(asked: Options) -> float:
    """diffusers' defaults: all of the noise where a mask says what to keep, else four fifths."""
    return 0.8 if asked.mask_image is None else 1.0


def _if_set(check: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else check(value)


def _prompts(prompt: str | Sequence[str] | None, negative: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if prompt is None:
        raise RecipeError("no prompt was given", 'an empty prompt is legal: ""')
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    negatives = (negative,) * len(prompts) if isinstance(negative, str) else tuple(negative)
    for what, texts in (("prompt", prompts), ("negative_prompt", negatives)):
        for value in texts:
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


def _sampler(model: Model, name: Any) -> str:
    if name not in model.samplers:
        near = difflib.get_close_matches(str(name), model.samplers, 1)
        known = ", ".join(model.samplers)
        raise RecipeError(
            f"sampler {name!r} is not in this model: it has {known}",
            (f"did you mean {near[0]}? " if near else "") + "Others are added in the recipe's samplers list.",
        )
    return name


def _stages(model: Model, value: Any) -> tuple[Stage, ...]:
    stages = values.stages(value)
    for stage in stages:
        _sampler(model, stage.sampler)
    return stages


def _steps(model: Model, sampler: str, value: Any) -> int:
    steps = values.count("num_inference_steps", value)
    available = model.samplers[sampler].num_inference_steps
    if steps not in available:
        raise RecipeError(
            f"sampler {sampler} is compiled for {spans(available)} steps, not for {steps}",
            f"ask for one of these, or rebuild with --set sampler_steps=[1,{max(steps, *available)}]",
        )
    return steps


def _size(model: Model, height: Any, width: Any, tiling: str = "off") -> dict[str, int]:
    sides = {side: values.whole(side, value) for side, value in (("height", height), ("width", width))}
    multiple = model.facts["size_multiple"]
    faults, legal = [], {}
    for side, value in sides.items():
        bounds = model.shapes[side[0].upper()]
        legal[side] = _nearest(value, bounds, multiple)
        most = math.inf if tiling == "auto" else bounds.max
        if value % multiple or not bounds.min <= value <= most:
            faults.append(f"{side} {value} is not what the engines were built for: {_sides(bounds, multiple)}")
    if faults:
        hint = f"the nearest size is width {legal['width']}, height {legal['height']}"
        raise BundleError("\n".join(faults), f"{hint}; larger ones can be made of tiles: tiling auto")
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
        return tuple(values.whole("seed", value) for value in seed)
    return (values.whole("seed", seed),)


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
