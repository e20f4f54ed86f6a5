"""Token merging: attention (and if asked, the feed-forward) runs on fewer tokens, those alike having become one.

ToMe for Stable Diffusion (Bolya and Hoffman 2023, arXiv:2303.17604); what is computed: `attention.TokenMerge`.
Needs no training. Self-attention grows with the square of the tokens, so that it pays where they are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sdcompile.passes import levels
from sdcompile.passes.base import Setting

REVISION = 1

NAME = "token_merge"
DEFAULT = 0.5


class Params(BaseModel):
    """Which tokens become one (ToMe), before attention and back after it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: dict[str, Annotated[float, Field(ge=0, lt=1)]] | None = Field(
        default=None, min_length=1,
        description="Share of the tokens to merge away, by level: {0: 0.5}. Level 0 has the latents' own size, each "
        "further one half of it. Unset = 0.5 at the largest level with attention.",
    )  # fmt: skip
    stride: Literal[2, 4] = Field(
        default=2,
        description="One token of each stride x stride region stays whatever its likeness: 2 allows ratios up to 0.75, "
        "4 up to 0.93.",
    )
    parts: tuple[Literal["attn1", "attn2", "ff"], ...] = Field(
        default=("attn1",),
        description="Layers that run on merged tokens: attention to the picture, to the prompt, the feed-forward.",
    )

    def at(self, there: Sequence[str]) -> dict[str, dict[str, Any]]:
        ratios = levels.valued(self.ratio, DEFAULT, there)
        told = {"stride": self.stride, "parts": list(self.parts)}
        return {level: {"ratio": ratio, **told} for level, ratio in ratios.items() if ratio}


def refuses(params: Params, setting: Setting) -> list[str]:
    there = levels.levels_of(setting.config)
    ratios = levels.valued(params.ratio, DEFAULT, there)
    faults = levels.unknown("ratio", list(ratios), setting)
    if not params.parts:
        faults.append("parts: expected at least one of attn1, attn2, ff")
    most = 1 - 1 / params.stride**2
    for level, ratio in ratios.items():
        if ratio > most:
            faults.append(f"ratio.{level}: {ratio:g} is more than a stride of {params.stride} can merge ({most:g})")
        if level in there and ratio:
            faults += levels.indivisible("stride", level, params.stride, setting)
            if levels.smallest(level, setting) * round(1000 * ratio) < 1000:
                tokens = levels.smallest(level, setting)
                faults.append(f"ratio.{level}: {ratio:g} of the {tokens} tokens of the smallest picture is none")
    return faults + levels.clashes("ratio", params, setting)


PASS = levels.simplification(NAME, Params, refuses, revision=REVISION)
