"""Linear attention: the softmax of attention to the picture becomes a feature map, elu(x) + 1.

Katharopoulos et al. 2020 (arXiv:2006.16236): work and memory grow with the tokens, not with their square. A model
trained with softmax does not survive it where it matters; let `recover` follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from sdcompile.passes import levels
from sdcompile.passes.base import Pass, Setting, always
from sdcompile.spec import Job

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


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Write the checkpoint in `inputs["checkpoint"]` with linear attention into `out`."""
    params = Params.model_validate({name: job.params[name] for name in Params.model_fields})
    levels.simplify(inputs, out, job, NAME, params, "attn1")


PASS = Pass(
    name=NAME,
    stage="prune",
    kind="checkpoint",
    revision=REVISION,
    params=Params,
    run=run,
    packages=("torch", "diffusers"),
    calibrates=always,
    refuses=refuses,
    memory=(1.5, 1.5),
)
