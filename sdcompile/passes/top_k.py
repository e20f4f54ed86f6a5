"""Top-k attention to the prompt: each place of the picture sees only the words it scores highest.

The softmax is taken over those alone. Finding them needs every score, so no work is saved, and no backend has
one kernel for it: see the figures in docs/compression.md before using it for speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from sdcompile.passes import levels
from sdcompile.passes.base import Setting

REVISION = 1

NAME = "top_k"


class Params(BaseModel):
    """How many words each place of the picture attends to."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)
    parts: ClassVar[tuple[str, ...]] = ("attn2",)

    k: int = Field(default=32, ge=1, description="Words each place attends to: fewer than the prompt has tokens.")
    levels: tuple[str, ...] | None = Field(
        default=None,
        description="Levels, as in [0, 1]: level 0 has the latents' own size, each further one half of it. "
        "Unset = all.",
    )

    def at(self, there: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {level: {"k": self.k} for level in (there if self.levels is None else self.levels)}


def refuses(params: Params, setting: Setting) -> list[str]:
    tokens = setting.shapes["T"]
    named = list(params.at(levels.levels_of(setting.config)))
    faults = levels.unknown("levels", named, setting)
    if params.k >= tokens.min:
        faults.append(f"k: {params.k} is not less than the {tokens.min} tokens of the shortest prompt")
    return faults + levels.clashes("k", params, setting)


PASS = levels.simplification(NAME, Params, refuses, revision=REVISION, layer="attn2")
