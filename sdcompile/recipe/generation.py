"""Fields of a recipe that say how images are made: defaults of a bundle's requests, fitted samplers.

The checks are the runtime's own (`runtime.values`), so that a recipe refuses what a call refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sdcompile.errors import RecipeError
from sdcompile.recipe.fields import MAX_STEPS, FileName, Number, String, Whole, fault
from sdcompile.runtime.options import Options
from sdcompile.runtime.values import CHECKS, count, guidance_scale


def _checked(option: str) -> AfterValidator:
    check: Callable[[Any], Any] = CHECKS[option]

    def kept_as_written(value: Any) -> Any:
        if value is None:
            return None
        try:
            check(value)
        except RecipeError as error:
            raise fault(f"{error.message}; {error.hint}" if error.hint else error.message) from None
        return value

    return AfterValidator(kept_as_written)


class FitRecipe(BaseModel):
    """How a sampler is fitted to the trajectories of a many-step teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher_steps: Annotated[Whole, Field(ge=2, le=MAX_STEPS)] = Field(
        default=100, description="Steps of the base sampler that serve as the teacher."
    )
    prompts: Annotated[Whole, Field(ge=1)] | tuple[String, ...] = Field(
        default=32, description="Prompts to fit to: how many of the built-in ones, or a list."
    )
    held_out: Annotated[Whole, Field(ge=1)] | tuple[String, ...] = Field(
        default=16, description="Other prompts, which decide whether the fit is kept."
    )
    seed: Annotated[Whole, Field(ge=0, lt=1 << 31)] = Field(default=0, description="Seed of prompts and noise.")
    guidance_scale: Number | None = Field(
        default=None, description="Guidance scale to fit for. Unset = defaults.guidance_scale."
    )
    iterations: Annotated[Whole, Field(ge=0, le=20)] = Field(
        default=3, description="Rounds of refinement of all coefficients and timesteps together."
    )


class FittedFields(BaseModel):
    """The fields of a fitted sampler."""

    base: String | None = Field(default=None, description="Fitted sampler: the one of `samplers` it starts from.")
    num_inference_steps: Annotated[Whole, Field(ge=1, le=MAX_STEPS)] | None = Field(
        default=None, description="Fitted sampler: its number of steps."
    )
    fit: FitRecipe | None = Field(default=None, description="Fitted sampler: teacher, prompts and seed.")


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "guidance_scale": guidance_scale,
    **{name: partial(count, name) for name in ("num_inference_steps", "height", "width")},
}
"""Checks of the options that `DefaultsRecipe` has fields of its own for."""


def _profile(value: Any) -> Any:
    try:
        given = Options.of(value).given()
        if "profile" in given:
            raise RecipeError("a profile cannot name another one")
        for name, setting in given.items():
            {**CHECKS, **_PLAIN}.get(name, lambda same: same)(setting)
    except RecipeError as error:
        raise fault(f"{error.message}; {error.hint}" if error.hint else error.message) from None
    return value


Profiles = dict[FileName, Annotated[dict[str, Any], AfterValidator(_profile)]]
"""Profile -> the options it sets."""


class RequestDefaults(BaseModel):
    """What a request gets where it leaves an option open, besides sampler, steps, scale and size."""

    prompt_weighting: Annotated[Any, _checked("prompt_weighting")] = Field(
        default=None, description='"a1111" reads (word:1.3), [word] and BREAK; unset = "off", as diffusers.'
    )
    guidance_schedule: Annotated[Any, _checked("guidance_schedule")] = Field(
        default=None, description="constant, linear, cosine or phases, with scales of their own: phases:5,7,9."
    )
    guidance_interval: Annotated[Any, _checked("guidance_interval")] = Field(
        default=None, description='Guide only there: [0.2, 0.8] of the steps, or timesteps "t200..800".'
    )
    guidance_rescale: Annotated[Any, _checked("guidance_rescale")] = Field(
        default=None, description="Against overexposure, 0 (off) to 1, as in diffusers."
    )

    stages: Annotated[Any, _checked("stages")] = Field(
        default=None, description='Samplers one after the other: "dpmpp_2m:6@7,euler_ancestral@9".'
    )
    early_stop: Annotated[Any, _checked("early_stop")] = Field(
        default=None, description="Finish an image when its predicted clean latents change by less: 1e-4, or 1e-4:5."
    )

    tiling: Annotated[Any, _checked("tiling")] = Field(
        default=None, description='"auto" makes sizes beyond the built ones of tiles; unset = "off".'
    )
    hires: Annotated[Any, _checked("hires")] = Field(
        default=None, description="Make it small, then so many times as large with a strength: 2@0.6."
    )
    step_cache: Annotated[Any, _checked("step_cache")] = Field(
        default=None, description='"off", or N: one whole call of the denoiser in every N. Unset = `step_cache.every`.'
    )
    unet_width: Annotated[Any, _checked("unet_width")] = Field(
        default=None, description='One of the unet\'s `widths`; unset = "full", the denoiser none was cut from.'
    )

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set (see runtime.options)."""
        return {name: value for name in RequestDefaults.model_fields if (value := getattr(self, name)) is not None}
