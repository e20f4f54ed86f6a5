"""The mappings inside a recipe that stand alone: shapes, samplers, defaults, verification."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, model_validator

from sdcompile.recipe.fields import MAX_STEPS, FileName, Number, Part, Size, String, Whole, did_you_mean, fault, shown
from sdcompile.recipe.generation import FittedFields, RequestDefaults


class ShapesRecipe(Part):
    """Sizes the engines are built for: one number (static) or [min, opt, max]. Unset = the model's own."""

    batch: Size | None = Field(default=None, description="Images in one call.")
    height: Size | None = Field(default=None, description="Image height in pixels.")
    width: Size | None = Field(default=None, description="Image width in pixels.")
    tokens: Size | None = Field(
        default=None, description="Prompt tokens; a multiple of the text encoder's length (77)."
    )


class SamplerRecipe(FittedFields, Part):
    """A sampler: a short name, or a name of your own with a diffusers scheduler class and config fields."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: FileName = Field(description="Short name (ddim, dpmpp_2m, ...), or a name of your own if scheduler is given.")
    scheduler: String | None = Field(
        default=None, description="diffusers scheduler class, as in DPMSolverMultistepScheduler."
    )

    @property
    def config(self) -> dict[str, Any]:
        """The scheduler config fields this recipe sets over the source's own (use_karras_sigmas, ...)."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        if not isinstance(data, (str, Mapping, SamplerRecipe)):
            raise fault(f"expected a sampler's name, or a mapping with a name, got {shown(data)}")
        return {"name": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _known(self, info: ValidationInfo) -> SamplerRecipe:
        for key in self.config:
            if get_close_matches(key, ["scheduler"], cutoff=0.8):
                raise fault(f"unknown field '{key}', did you mean 'scheduler'?")
        if self.scheduler is not None and not self.scheduler.isidentifier():
            raise fault(f"scheduler '{self.scheduler}' is no diffusers class name")
        if (self.fit is None) != (self.base is None) or (self.fit is None) != (self.num_inference_steps is None):
            raise fault("a fitted sampler has base, num_inference_steps and fit: all three of them")
        if self.fit is not None:
            if self.scheduler is not None or self.config:
                raise fault("a fitted sampler takes scheduler and settings from its base")
            return self
        if info.context and info.context.samplers and self.scheduler is None and self.name not in info.context.samplers:
            near = did_you_mean(self.name, info.context.samplers)
            raise fault(
                f"unknown sampler '{self.name}'{near}"
                + ("" if "?" in near else "; or name its diffusers class as 'scheduler'")
            )
        return self


class DefaultsRecipe(RequestDefaults, Part):
    """What a request to the bundle gets where it leaves an argument open."""

    sampler: String | None = Field(default=None, description="One of `samplers`. Unset = the first of them.")
    num_inference_steps: Annotated[Whole, Field(ge=1, le=MAX_STEPS)] = Field(default=20, description="Denoising steps.")
    guidance_scale: Number = Field(default=7.5, description="Classifier-free guidance scale; <= 1 turns guidance off.")
    negative_prompt: String = Field(default="", description="Negative prompt.")
    height: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="Pixels. Unset = opt of shapes.height."
    )
    width: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="Pixels. Unset = opt of shapes.width."
    )


class FloorRecipe(Part):
    """How close a component must come to its fp32 reference. Unset = the default of its precision."""

    min_snr_db: Number | None = Field(default=None, description="Lowest signal-to-noise ratio of any output, in dB.")
    min_cosine: Annotated[Number, Field(ge=-1, le=1)] | None = Field(
        default=None, description="Lowest cosine of any output."
    )


class VerifyRecipe(Part):
    """How a build is verified; further keys are component names with floors of their own."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, FloorRecipe]

    prompts: tuple[String, ...] | None = Field(
        default=None, min_length=1, description="Prompts to verify with. Unset = built in ones."
    )
    seed: Annotated[Whole, Field(ge=0, lt=1 << 63)] = Field(default=0, description="Seed of the verification images.")
    num_inference_steps: Annotated[Whole, Field(ge=1, le=MAX_STEPS)] | None = Field(
        default=None, description="Denoising steps of the verification images. Unset = chosen by the verify stage."
    )
    min_image_psnr_db: Number | None = Field(default=None, description="Lowest PSNR of any whole image, in dB.")
    min_decoder_psnr_db: Number | None = Field(
        default=None,
        description="Lowest mean PSNR, in dB, of a decoder from another source to the model's own, same latents. "
        "Unset = 15, which one made for other latents does not reach.",
    )
    on_fail: Literal["stop", "fallback"] = Field(
        default="stop", description="When a floor is missed: stop the build, or build that component in fp32 instead."
    )

    on_nan: Literal["stop", "fallback"] | None = Field(
        default=None,
        description="The same for NaN, values beyond fp16 and all one colour, at any shape. Unset = as on_fail.",
    )
    each_pass: bool = Field(
        default=False,
        description="Build an engine after every pass too, and tell what each changes in the time of a call; with the "
        "tiny model, also in how well pictures fit their prompts. Nothing is refused for it.",
    )

    @property
    def floors(self) -> dict[str, FloorRecipe]:
        """Component -> floors this recipe sets."""
        return dict(self.__pydantic_extra__ or {})

    @model_validator(mode="before")
    @classmethod
    def _bare_names(cls, data: Any) -> Any:
        return empty_for_null(data, but=cls.model_fields)


def empty_for_null(data: Any, but: Collection[str] = ()) -> Any:
    """`components: {vae_encoder: }` lists a component with nothing of its own."""
    if not isinstance(data, Mapping):
        return data
    return {k: {} if v is None and k not in but else v for k, v in data.items()}
