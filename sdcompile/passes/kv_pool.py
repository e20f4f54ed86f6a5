"""Pooled keys and values: every token attends to the means of small squares of tokens instead of to all.

Low-rank attention with a fixed projection: Linformer (Wang et al. 2020, arXiv:2006.04768, section 4) names mean
pooling as one that needs no training and no fixed number of tokens. A mean commutes with the projections, so
`to_k` and `to_v` run on the pooled tokens too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from sdcompile.passes import levels
from sdcompile.passes.base import Setting

REVISION = 1

NAME = "kv_pool"
DEFAULT = 2


class Params(BaseModel):
    """Keys and values of attention to the picture from means of squares of tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    parts: ClassVar[tuple[str, ...]] = ("attn1",)

    pool: dict[str, Annotated[int, Field(ge=1, le=16)]] | None = Field(
        default=None, min_length=1,
        description="Side of the squares, by level: {0: 2}; 1 leaves a level as it is. Level 0 has the latents' own "
        "size, each further one half of it. Unset = 2 at the largest level with attention.",
    )  # fmt: skip

    def at(self, there: Sequence[str]) -> dict[str, dict[str, Any]]:
        sides = levels.valued(self.pool, DEFAULT, there)
        return {level: {"pool": side} for level, side in sides.items() if side > 1}


def refuses(params: Params, setting: Setting) -> list[str]:
    there = levels.levels_of(setting.config)
    sides = levels.valued(params.pool, DEFAULT, there)
    faults = levels.unknown("pool", list(sides), setting)
    for level, side in sides.items():
        if level in there:
            faults += levels.indivisible(f"pool.{level}", level, side, setting)
    return faults + levels.clashes("pool", params, setting)


PASS = levels.simplification(NAME, Params, refuses, revision=REVISION, layer="attn1")
