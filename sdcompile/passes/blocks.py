"""Block pruning: pairs of a resnet and its attention leave, with the skip connection between them; or the mid block.

What BK-SDM removes (Kim et al. 2023, arXiv:2305.15798), here either named, or chosen by how little the
output changes without it. A removed pair leaves a hole that least squares cannot fill: let `recover`
follow. The result is an ordinary diffusers folder as long as every block keeps a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sdcompile import edits
from sdcompile.errors import RecipeError, StageError
from sdcompile.passes import narrowing, pruning, sites
from sdcompile.passes.base import Pass, always, by_modules
from sdcompile.samples import Samples
from sdcompile.spec import Job, Say

REVISION = 2

MID = "mid_block"


class Params(BaseModel):
    """Which blocks to remove."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(
        default=1, ge=0, le=64, description="How many to remove, those first that the output misses least."
    )
    remove: tuple[str, ...] | None = Field(
        default=None, min_length=1,
        description="Those to remove instead of `count`, in this order: mid_block, or a down and an up layer as in "
        "down_blocks.1.1+up_blocks.2.1; the numbers are those after earlier removals.",
    )  # fmt: skip
    mid_block: bool = Field(default=True, description="May `count` choose the mid block?")


def refuses(params: Params, modules: Mapping[str, str]) -> list[str]:
    """What no order of removals allows; whether channels meet only the model itself tells."""
    layers = sites.names_of("channels", modules)
    downs, ups = (_counts(name for name in layers if name.startswith(f"{side}_blocks.")) for side in ("down", "up"))
    has_mid = any(name.startswith(f"{MID}.") for name in layers)
    named = [MID] if has_mid else []
    for down, count in enumerate(downs):
        up = len(downs) - 1 - down
        named += [f"down_blocks.{down}.{i}+up_blocks.{up}.{j}" for i in range(count) for j in range(ups[up])]
    faults = []
    for number, name in enumerate(params.remove or ()):
        if name not in named or (name == MID and MID in (params.remove or ())[:number]):
            faults.append(
                f"remove.{number}: '{name}' is no block that can be removed; such are {', '.join(named[:4])}, ..."
            )
    most = sum(downs) + (has_mid and params.mid_block)
    if params.remove is None and params.count > most:
        faults.append(f"count: only {most} blocks could be removed at all, not {params.count}")
    return faults


def _counts(resnets: Iterable[str]) -> list[int]:
    """Layers of each block, of names as down_blocks.0.resnets.1."""
    found: dict[int, int] = {}
    for name in resnets:
        block = int(name.split(".")[1])
        found[block] = found.get(block, 0) + 1
    return [found[block] for block in sorted(found)]


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Write the checkpoint in `inputs["checkpoint"]` without some of its blocks into `out`."""
    params = Params.model_validate({name: job.params[name] for name in Params.model_fields})
    subject = pruning.open_subject(inputs["checkpoint"], job)
    calls = pruning.calls_of(Samples(inputs["samples"], job.component, held_out=False), job)
    rows = remove(subject, calls, params, "blocks", job.say)
    pruning.finish(inputs, out, job, subject, [row["edit"] for row in rows], blocks=rows)


def remove(
    subject: pruning.Subject, calls: narrowing.Calls, params: Params, field: str, say: Say
) -> list[dict[str, Any]]:
    """Remove blocks from the model in place; returns, per block, its name, edit and the cost of taking it alone.

    relative_error is that of the model's output, against the model as it was before this pass.
    Raises RecipeError when a named block is not one that can go, StageError when there are fewer than `count`.
    """
    probes = narrowing.probes_of(calls)
    wanted = narrowing.outputs(subject.module, probes)
    rows: list[dict[str, Any]] = []
    turns = len(params.remove) if params.remove is not None else params.count
    for turn in range(turns):
        open_to = candidates(subject.model, params.mid_block or params.remove is not None)
        if params.remove is not None:
            name = params.remove[turn]
            if name not in open_to:
                raise RecipeError(
                    f"{field}.remove: '{name}' is no block that can be removed", f"there are: {', '.join(open_to)}"
                )
            open_to = {name: open_to[name]}
        if not open_to:
            raise StageError(f"{field}: only {turn} blocks can be removed, not {turns}", "lower `count`")
        errors = {}
        for number, (name, edit) in enumerate(open_to.items()):
            say(f"without {name}", (turn + number / len(open_to)) / turns)
            with without(subject.model, edit):
                errors[name] = narrowing.relative_error(wanted, narrowing.outputs(subject.module, probes))
        name = min(errors, key=lambda name: errors[name])
        edits.replay(subject.model, [open_to[name]])
        rows.append({"block": name, "relative_error": errors[name], "edit": open_to[name]})
    return rows


def candidates(model: Any, mid_block: bool) -> dict[str, dict[str, Any]]:
    """Name -> edit of everything that can be removed now, with channels that still meet."""
    found: dict[str, dict[str, Any]] = {}
    if mid_block and model.mid_block is not None:
        found[MID] = {"op": "remove_mid_block"}
    blocks = len(model.down_blocks)
    for down in range(blocks):
        up = blocks - 1 - down
        for i in range(len(model.down_blocks[down].resnets)):
            for j in range(len(model.up_blocks[up].resnets)):
                edit = {
                    "op": "remove_pair", "down": f"down_blocks.{down}", "down_index": i, "up": f"up_blocks.{up}",
                    "up_index": j,
                }  # fmt: skip
                if _is_legal(model, edit):
                    found[f"down_blocks.{down}.{i}+up_blocks.{up}.{j}"] = edit
    return found


def _is_legal(model: Any, edit: edits.Edit) -> bool:
    try:
        with without(model, edit):
            return True
    except StageError:
        return False


@contextmanager
def without(model: Any, edit: edits.Edit) -> Iterator[None]:
    """The model as it is after `edit`, for a while."""
    from torch import nn

    blocks = [*model.down_blocks, *model.up_blocks]
    names = ("resnets", "attentions")
    lists = [(b, n, list(getattr(b, n))) for b in blocks for n in names if getattr(b, n, None) is not None]
    mid = model.mid_block
    try:
        edits.replay(model, [edit])
        yield
    finally:
        model.mid_block = mid
        for block, name, layers in lists:
            setattr(block, name, nn.ModuleList(layers))


PASS = Pass(
    name="blocks",
    stage="prune",
    kind="checkpoint",
    revision=REVISION,
    params=Params,
    run=run,
    refuses=by_modules(refuses),
    packages=("torch", "diffusers"),
    calibrates=always,
    idle=lambda params: params.remove is None and not params.count,
    memory=(1.5, 1.5),
)
