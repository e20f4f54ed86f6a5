"""Width pruning: every residual stream of a UNet narrower at once; what is left is an ordinary UNet of diffusers.

Each level of `block_out_channels` loses the same share of its channels as nearly as its norms and heads allow:
residuals, skip connections, resnets, transformers, heads and feed-forwards. Channels that are added to each other
go together (`streams`), as many of each group of a norm, those first whose readers best do without
(`thinning`). Then every layer is set by least squares on what the narrower model gives it (`refitting`), and the
time embedding to fewer sinusoids. The config says all of it: no edits.json is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from sdcompile import edits
from sdcompile.errors import StageError
from sdcompile.passes import pruning, refitting, streams, thinning, widths
from sdcompile.passes.base import Pass, Setting, always
from sdcompile.passes.compensation import Moments
from sdcompile.passes.streams import Stream, Wiring
from sdcompile.samples import Samples
from sdcompile.spec import Job, Say

if TYPE_CHECKING:
    from torch import Tensor, nn

REVISION = 2

_RIDGE = 1e-3
"""Of the time embedding, over the mean square of what it reads. Sinusoids of neighbouring frequencies are so alike that
least squares alone takes weights that all but cancel, which bf16 cannot hold. With 256 of SD 1.5's 320 (random
weights) and 1e-6 they have 462 times the source's power, and sinusoids rounded to bf16 leave 29.9 dB; with this 0.85
times, and 57.4 dB. Over all timesteps that fits within 0.2 dB as well."""

_TIMESTEPS = 1000
"""Those that every Stable Diffusion was trained on."""

_BYTES = 1 << 26
"""What the largest hidden state of the rows that layers are refitted on may take, at most."""


class Params(BaseModel):
    """How narrow."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: float = Field(
        default=0.25, ge=0, lt=1,
        description="Share of every level's channels to remove; the nearest that norms and heads allow is taken.",
    )  # fmt: skip
    compensate: bool = Field(
        default=True, description="Least-squares update of every layer, one after the other, on the narrower model."
    )
    round_to: Annotated[int, Field(ge=1, le=256)] = Field(
        default=8, description="Every width is a multiple of this many channels, as the hardware likes."
    )


def refuses(params: Params, setting: Setting) -> list[str]:
    if fixed := narrowed_by(setting.edits):
        return [f"ratio: the source has lost {fixed} already, so that its layers have no common width any more"]
    return widths.faults_of(setting.config, params.ratio, params.round_to)


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Write the checkpoint in `inputs["checkpoint"]` with narrower levels into `out`."""
    params = Params.model_validate({name: job.params[name] for name in Params.model_fields})
    subject = pruning.open_subject(inputs["checkpoint"], job)
    model: Any = subject.model
    if fixed := narrowed_by(subject.edits):
        raise StageError(
            f"{job.component} has lost {fixed} already: its layers have no common width any more",
            "let `width` come first, as it does in one recipe",
        )
    if faults := widths.faults_of(model.config, params.ratio, params.round_to):
        raise StageError(f"components.{job.component}.prune.width.{faults[0]}", "leave `width` out of the recipe")
    calls = pruning.calls_of(Samples(inputs["samples"], job.component, held_out=False), job)
    if params.ratio <= 0.0:
        pruning.finish(inputs, out, job, subject, [], widths=_told(model.config, model.config))
        return
    made = narrow(subject, calls, params, job.say)
    thin: Any = made.model
    told = _told(model.config, thin.config)
    pruning.finish(inputs, out, job, made, [], config=_new_fields(thin.config), widths=told)


def narrowed_by(made: Iterable[edits.Edit]) -> str:
    """The ops among `made` after which a UNet's layers have no common width, in words."""
    return " and ".join(sorted({edit["op"] for edit in made} & {"heads", "channels", "feed_forward"}))


def _new_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("block_out_channels", "attention_head_dim", "time_embedding_dim")}


def _told(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Widths and heads (before, after), and whether groups over two levels' channels have kept their members."""
    return {
        "block_out_channels": [list(old["block_out_channels"]), list(new["block_out_channels"])],
        "attention_head_dim": [old["attention_head_dim"], new["attention_head_dim"]],
        "whole_groups": widths.is_even(old, new),
    }


def narrow(subject: pruning.Subject, calls: Any, params: Params, say: Say) -> pruning.Subject:
    """A narrower copy of `subject`, whose attention dimensions are turned in place (its function stays)."""
    model: Any = subject.model
    thin = _empty(subject, widths.narrowed(model.config, params.ratio, params.round_to))
    wiring = streams.wired(model)
    kept = choose(subject, thin, wiring, calls, params.compensate, say)
    streams.shaped(model, thin, wiring, kept)
    refit_time(model, thin)
    made = pruning.Subject(_wrapped(subject, thin), thin, subject.edits)
    if params.compensate:
        call = _rows(calls, model.config.block_out_channels[0])
        refitting.refit(subject.module, model, made.module, thin, wiring, kept, call, say)
    return made


def _empty(subject: pruning.Subject, config: Mapping[str, Any]) -> Any:
    """A model of `config` without weights, with the same edits."""
    import torch

    # diffusers drops a field that its list of those left to their defaults names, whatever it is set to.
    told = {name: value for name, value in config.items() if name != "_use_default_values"}
    with torch.device("meta"):
        thin = type(subject.model).from_config(told)  # type: ignore[attr-defined]
    edits.replay(thin, subject.edits)
    return thin.to_empty(device="cpu").eval().requires_grad_(False)


def _wrapped(subject: pruning.Subject, thin: nn.Module) -> nn.Module:
    """The module around `subject`'s model, around `thin`."""
    from copy import copy

    module = copy(subject.module)
    module._modules = {**subject.module._modules, "unet": thin}
    return module


def _rows(calls: Any, width: int) -> tuple[Tensor, ...]:
    """As many recorded rows in one call as fit `_BYTES`: those of the most frequent size."""
    import torch

    sizes = [call[0].shape[1:] for call in calls]
    most = max(sizes, key=sizes.count)
    tables = [
        torch.cat(columns) for columns in zip(*(c for c, s in zip(calls, sizes, strict=True) if s == most), strict=True)
    ]
    per_row = 4 * width * most[-1] * most[-2]
    return tuple(table[: max(4, _BYTES // per_row)] for table in tables)


def choose(subject: pruning.Subject, thin: Any, wiring: Wiring, calls: Any, compensate: bool, say: Say) -> streams.Kept:
    """Stream -> its channels that stay, as many as `thin` has."""
    model: Any = subject.model
    readers = [name for name, wire in wiring.layers.items() if wire.reads or name.endswith(".to_k")]
    moments = thinning.record(subject.module, model, readers, calls, say)
    _set_cells(wiring, model.config, thin.config)
    kept = {}
    for number, stream in enumerate(wiring.streams()):
        say(f"which channels of {stream.name} to remove", 0.3 + 0.1 * number / len(wiring.streams()))
        keep = thin.get_submodule(stream.name).weight.shape[0] // wiring.layers[stream.name].copies
        if stream.heads:
            kept[stream] = _inside_heads(model, thin, wiring, stream, moments)
        else:
            views = thinning.views_of(stream, model, wiring, moments, compensate)
            kept[stream] = thinning.chosen(stream, keep, views, compensate)
    return kept


def _inside_heads(model: Any, thin: Any, wiring: Wiring, stream: Stream, moments: Mapping[str, Moments]) -> list[int]:
    """The dimensions of an attention that stay: as many of each head, which is turned for it, or whole heads."""
    at = stream.name.removesuffix(".to_q")
    attention, new = model.get_submodule(at), thin.get_submodule(at)
    width = stream.width // stream.heads
    inside = thinning.covariance(moments[f"{at}.to_out.0"])
    if new.heads == stream.heads:
        queries, keys = (thinning.outputs(getattr(attention, p), moments[f"{at}.{p}"]) for p in ("to_q", "to_k"))
        thinning.turn(attention, queries, keys, inside)
        left = new.to_q.out_features // stream.heads
        # Scores are divided by the root of a head's width, which is less now.
        wiring.gains[f"{at}.to_q"] = (left / width) ** 0.5
        return [head * width + k for head in range(stream.heads) for k in range(left)]
    weight = attention.to_out[0].weight.double()
    power = ((weight @ inside) * weight).sum(0).view(stream.heads, width).sum(1)
    heads = sorted(power.argsort(descending=True, stable=True)[: new.heads].tolist())
    return [head * width + k for head in heads for k in range(width)]


def _set_cells(wiring: Wiring, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Streams that meet in one norm keep its groups whole: as many go of every run that no group divides."""
    if widths.is_even(old, new):
        for stream in wiring.joined():
            stream.cells = stream.width // widths.cell_of(old)


def refit_time(model: Any, thin: Any) -> None:
    """Set the time embedding of `thin`, which reads fewer sinusoids, to give what that of `model` gives.

    Least squares over every timestep, first of linear_1, then of linear_2 on what its activation makes of it.
    """
    import torch

    times = torch.arange(_TIMESTEPS, dtype=torch.float32)
    old, new = model.time_embedding, thin.time_embedding
    with torch.no_grad():
        reads, wanted = thin.time_proj(times).double(), old.linear_1(model.time_proj(times)).double()
        _fit(new.linear_1, reads, wanted)
        hidden = new.act(new.linear_1(thin.time_proj(times))).double()
        _fit(new.linear_2, hidden, old.linear_2(old.act(wanted.float())).double(), old.linear_2)


def _fit(layer: Any, reads: Tensor, wanted: Tensor, near: Any = None) -> None:
    import torch

    start = torch.zeros(reads.shape[1] + 1, wanted.shape[1], dtype=torch.float64)
    if near is not None:
        start = torch.cat([near.weight.double().T, near.bias.double()[None]])
    found = refitting.fitted(start, True, iter([(reads, wanted)]), ridge=_RIDGE)
    layer.weight.copy_(found[:-1].T)
    layer.bias.copy_(found[-1])


PASS = Pass(
    name="width",
    stage="prune",
    kind="checkpoint",
    revision=REVISION,
    params=Params,
    run=run,
    refuses=refuses,
    packages=("torch", "diffusers"),
    calibrates=always,
    idle=lambda params: params.ratio <= 0.0,
    memory=(2.5, 4.5),
)
