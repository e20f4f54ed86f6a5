"""Head pruning: whole attention heads leave to_q, to_k, to_v and to_out; the module that is left is smaller.

Self- and cross-attention alike. What stays of to_out is set by least squares so that the layer's output
on the recorded inputs changes least. Which heads go, how many of each layer: see `narrowing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdcompile.passes import narrowing, pruning, sites
from sdcompile.passes.base import Pass, always, by_modules
from sdcompile.passes.importance import Importance, working_gib
from sdcompile.samples import Samples
from sdcompile.spec import Job

REVISION = 3


class Params(BaseModel):
    """Which heads to remove."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: float = Field(
        default=0.25, ge=0, lt=1,
        description="Share to remove: of the attention layers' multiply-accumulates, or with `uniform` of each "
        "layer's heads.",
    )  # fmt: skip
    uniform: bool = Field(
        default=False, description="The same share of every layer; else by sensitivity, under one budget."
    )
    importance: Importance = Field(
        default="reconstruction",
        description="Which heads go first: those whose loss the others make up for best (reconstruction), of least "
        "gradient times activation (taylor), of least weights (l1, l2).",
    )
    merge: bool = Field(
        default=False,
        description="Cluster heads by the likeness of their outputs; one of each cluster stays and takes over.",
    )
    compensate: bool = Field(default=True, description="Least-squares update of the output projection.")
    max_ratio: float = Field(default=0.75, gt=0, lt=1, description="Largest share of one layer's heads to remove.")
    layers: tuple[str, ...] = Field(
        default=("*",),
        min_length=1,
        description="Modules to prune, by path as in `quantize: {ignore: ...}`: `attn2` is cross-attention.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Params:
        if self.ratio > self.max_ratio:
            raise ValueError(f"a ratio of {self.ratio:g} cannot be reached where max_ratio is {self.max_ratio:g}")
        if self.merge and not self.compensate:
            raise ValueError("merge is done by least squares: it needs compensate: true")
        return self


def refuses(params: Params, modules: Mapping[str, str]) -> list[str]:
    fault = sites.fault_of(sites.names_of("heads", modules), params.layers)
    return [f"layers: {fault}"] if fault else []


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Write the checkpoint in `inputs["checkpoint"]` without some of its heads into `out`."""
    params = Params.model_validate({name: job.params[name] for name in Params.model_fields})
    subject = pruning.open_subject(inputs["checkpoint"], job)
    places = list(sites.heads_of(subject.model))
    sites.need(places, job.component, "attention with more than one head")
    places = sites.matching(places, params.layers, "heads.layers")
    calls = pruning.calls_of(Samples(inputs["samples"], job.component, held_out=False), job)
    request = narrowing.Request(
        params.ratio, params.uniform, params.importance, params.merge, params.compensate, most=params.max_ratio
    )
    rows = narrowing.narrow(subject.module, subject.model, places, calls, request, job.say)
    pruning.finish(inputs, out, job, subject, narrowing.edits_of(rows), layers=narrowing.told(rows))


PASS = Pass(
    name="heads",
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
    memory=(1.5, 1.5),
)
