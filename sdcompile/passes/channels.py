"""Channel pruning: channels inside resnets (between conv1 and conv2) and hidden units of feed-forwards.

Whole groups of the norm between the convolutions go, so that groups stay equal and the statistics of
those left unchanged; the layer that reads them is set by least squares. Widths that residuals share are
left alone: every layer of a level would have to agree on them. See `narrowing` for which and how many.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdcompile.passes import narrowing, pruning, sites
from sdcompile.passes.base import Pass, always, by_modules
from sdcompile.passes.importance import Importance, working_gib
from sdcompile.samples import Samples
from sdcompile.spec import Job

REVISION = 3

_FIND = {"resnets": sites.channels_of, "feed_forward": sites.feed_forwards_of}
_OPS = {"resnets": "channels", "feed_forward": "feed_forward"}


class Params(BaseModel):
    """Which channels to remove."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: float = Field(
        default=0.3, ge=0, lt=1,
        description="Share of the layers' multiply-accumulates to remove, or with `uniform` of each layer's channels.",
    )  # fmt: skip
    uniform: bool = Field(
        default=False, description="The same share of every layer; else by sensitivity, under one budget."
    )
    importance: Importance = Field(
        default="reconstruction",
        description="Which channels go first: those whose loss the others make up for best (reconstruction), of "
        "least gradient times activation (taylor), of least weights (l1, l2).",
    )
    compensate: bool = Field(default=True, description="Least-squares update of the next layer.")
    round_to: Annotated[int, Field(ge=1, le=256)] = Field(
        default=8, description="What stays of a layer is a multiple of this many channels, as the hardware likes."
    )
    max_ratio: float = Field(default=0.75, gt=0, lt=1, description="Largest share of one layer's channels to remove.")
    parts: tuple[Literal["resnets", "feed_forward"], ...] = Field(
        default=("resnets", "feed_forward"), min_length=1, description="What to prune."
    )
    layers: tuple[str, ...] = Field(
        default=("*",),
        min_length=1,
        description="Modules to prune, by path as in `quantize: {ignore: ...}`: `mid_block`, `ff`.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Params:
        if self.ratio > self.max_ratio:
            raise ValueError(f"a ratio of {self.ratio:g} cannot be reached where max_ratio is {self.max_ratio:g}")
        return self


def refuses(params: Params, modules: Mapping[str, str]) -> list[str]:
    names = [name for part in dict.fromkeys(params.parts) for name in sites.names_of(_OPS[part], modules)]
    fault = sites.fault_of(names, params.layers)
    return [f"layers: {fault}"] if fault else []


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Write the checkpoint in `inputs["checkpoint"]` without some of its channels into `out`."""
    params = Params.model_validate({name: job.params[name] for name in Params.model_fields})
    subject = pruning.open_subject(inputs["checkpoint"], job)
    places = [site for part in dict.fromkeys(params.parts) for site in _FIND[part](subject.model)]
    sites.need(places, job.component, "resnet or feed-forward")
    places = sites.matching(places, params.layers, "channels.layers")
    calls = pruning.calls_of(Samples(inputs["samples"], job.component, held_out=False), job)
    request = narrowing.Request(
        params.ratio, params.uniform, params.importance, compensate=params.compensate, round_to=params.round_to,
        most=params.max_ratio,
    )  # fmt: skip
    rows = narrowing.narrow(subject.module, subject.model, places, calls, request, job.say)
    pruning.finish(inputs, out, job, subject, narrowing.edits_of(rows), layers=narrowing.told(rows))


PASS = Pass(
    name="channels",
    stage="prune",
    kind="checkpoint",
    revision=REVISION,
    params=Params,
    run=run,
    refuses=by_modules(refuses),
    packages=("torch", "diffusers"),
    calibrates=always,
    idle=lambda params: params.ratio <= 0.0,
    working=working_gib,
    memory=(1.5, 3.5),
)
