"""What a recipe says of step caching: how often the whole denoiser runs, and how much of it the other steps compute.

It knows the rule by which the shallow component is named and inherits; where a denoiser can be cut is the family's.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sdcompile.recipe.fields import MAX_STEPS, Number, Part, Whole

_SUFFIX = "_cached"


class StepCacheRecipe(Part):
    """Reuse of the denoiser's deep features on some steps (DeepCache), by a second, shallow engine NAME_cached."""

    every: Annotated[Whole, Field(ge=2, le=MAX_STEPS)] = Field(
        description="Of this many calls the first runs the whole denoiser, the others the shallow engine. The "
        "bundle's default; a request may say another number, or turn it off (`step_cache: off`)."
    )
    depth: Annotated[Whole, Field(ge=1)] = Field(
        default=1,
        description="How many of the last layers on the way up the shallow engine computes anew (DeepCache's branch, "
        "plus 1); more of them cost time and come nearer to the whole.",
    )
    min_psnr_db: Number | None = Field(
        default=None,
        description="Lowest PSNR, in dB, of a verification image with cached steps to the reference's without. "
        "Unset: it is reported and stops nothing.",
    )


def cached(component: str) -> str:
    """The shallow component that step caching of `component` adds."""
    return component + _SUFFIX


def base_of(component: str) -> str | None:
    """The component whose settings a shallow one inherits; None for one that is none."""
    return component.removesuffix(_SUFFIX) if component.endswith(_SUFFIX) else None
