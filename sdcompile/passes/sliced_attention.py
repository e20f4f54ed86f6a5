"""Sliced attention: the same function, a slice of the queries at a time, so that only its scores are in memory.

The slices are written out in the graph, without a loop. Where a backend computes attention in one kernel that
never holds the scores, it brings nothing: see docs/compression.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from sdcompile.passes import levels
from sdcompile.passes.base import Setting

REVISION = 1

NAME = "sliced_attention"
DEFAULT = 4


class Params(BaseModel):
    """How many slices attention to the picture is computed in."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    parts: ClassVar[tuple[str, ...]] = ("attn1",)

    slices: dict[str, Annotated[int, Field(ge=1, le=64)]] | None = Field(
        default=None, min_length=1,
        description="Slices of the queries, by level: {0: 4}. Level 0 has the latents' own size, each further one half "
        "of it. Unset = 4 at the largest level with attention.",
    )  # fmt: skip

    def at(self, there: Sequence[str]) -> dict[str, dict[str, Any]]:
        slices = levels.valued(self.slices, DEFAULT, there)
        return {level: {"slices": count} for level, count in slices.items() if count > 1}


def refuses(params: Params, setting: Setting) -> list[str]:
    there = levels.levels_of(setting.config)
    slices = levels.valued(params.slices, DEFAULT, there)
    faults = levels.unknown("slices", list(slices), setting)
    for level, count in slices.items():
        if level in there and prod(levels.divisors(level, setting)) % count:
            unit = prod(levels.divisors(level, setting))
            faults.append(f"slices.{level}: {count} does not divide the tokens of this level, multiples of {unit}")
    return faults + levels.clashes("slices", params, setting)


PASS = levels.simplification(NAME, Params, refuses, revision=REVISION, layer="attn1", exact=True)
