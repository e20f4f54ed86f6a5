"""Linear attention: the softmax of attention to the picture becomes a feature map, elu(x) + 1.

Katharopoulos et al. 2020 (arXiv:2006.16236): work and memory grow with the tokens, not with their square. A model
trained with softmax does not survive it where it matters; let `recover` follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from sdcompile.passes import levels
from sdcompile.passes.base import Setting

REVISION = 1

NAME = "linear_attention"


class Params(BaseModel):
    """Where attention to the picture becomes linear."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)
    parts: ClassVar[tuple[str, ...]] = ("attn1",)

    levels: tuple[str, ...] | None = Field(
        default=None,
        description="Levels, as in [0]: level 0 has the latents' own size, each further one half of it. "
        "Unset = the largest with attention.",
    )

    def at(self, there: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {level: {} for level in (there[:1] if self.levels is None else self.levels)}


def refuses(params: Params, setting: Setting) -> list[str]:
    named = list(params.at(levels.levels_of(setting.config)))
    faults = levels.unknown("levels", named, setting)
    return faults + levels.clashes("levels", params, setting)


PASS = levels.simplification(NAME, Params, refuses, revision=REVISION, layer="attn1")
