"""What the passes that simplify attention share: levels of a UNet, what they refuse of a setting, how they run.

A level is a resolution, as a name: "0" is that of the latents, each further one has half the height and width.
The middle block has the last. Which levels have attention the config says, so a plan can refuse the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sdcompile import edits
from sdcompile.errors import StageError
from sdcompile.passes import pruning
from sdcompile.passes.base import Pass, Setting, always, never
from sdcompile.spec import Job

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import nn

V = TypeVar("V")

DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
"""What diffusers' UNet2DConditionModel has where a config does not say."""


class Simplifier(Protocol):
    """Parameters of such a pass: `parts` of a block it changes, and per level what its edit says."""

    @property
    def parts(self) -> Sequence[str]: ...

    def at(self, there: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Level -> fields of the edit; `there` are the levels that have attention."""


SIMPLIFIERS = ("token_merge", "kv_pool", "linear_attention", "top_k", "sliced_attention")
"""The passes that put something in place of an attention. A layer takes one of them."""


def levels_of(config: Mapping[str, Any]) -> list[str]:
    """The levels that have attention, the largest first."""
    down = config.get("down_block_types") or DOWN
    up = config.get("up_block_types") or UP
    last = len(down) - 1
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn") or ""
    return [
        str(level)
        for level in range(last + 1)
        if "CrossAttn" in down[level] or "CrossAttn" in up[last - level] or (level == last and "CrossAttn" in middle)
    ]


def blocks_of(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(level, module) of every transformer block, in the model's order."""
    last = len(model.down_blocks) - 1  # type: ignore[arg-type]
    for name, module in model.named_modules():
        if hasattr(module, "attn1") and hasattr(module, "ff"):
            yield _level_of(name, last), name


def _level_of(module: str, last: int) -> str:
    side, _, rest = module.partition(".")
    number = int(rest.partition(".")[0]) if side != "mid_block" else last
    return str(last - number if side == "up_blocks" else number)


def valued(values: Mapping[str, V] | None, default: V, levels: Sequence[str]) -> dict[str, V]:
    """`values` by level; unset, `default` at the largest level there is."""
    return dict(values) if values is not None else dict.fromkeys(levels[:1], default)


def unknown(field: str, named: Sequence[str], setting: Setting) -> list[str]:
    """A fault for every level that has no attention."""
    there = levels_of(setting.config)
    sizes = ", ".join(f"{level} ({' x '.join(map(str, _sides(level, setting)))})" for level in there)
    return [
        f"{field}: level '{level}' has no attention; those that have: {sizes or 'none'}"
        for level in named
        if level not in there
    ]


def indivisible(field: str, level: str, unit: int, setting: Setting) -> list[str]:
    """A fault when a side of this level can be anything else than a multiple of `unit`."""
    bad = [divisor for divisor in divisors(level, setting) if divisor % unit]
    if not bad:
        return []
    return [f"{field}: {unit} does not divide the sides of level {level}, which are multiples of {bad[0]}"]


def divisors(level: str, setting: Setting) -> tuple[int, int]:
    """What height and width of this level are always divisible by: themselves, where they are fixed."""
    fixed = (setting.shapes[letter].opt if setting.shapes[letter].is_static else 0 for letter in "hw")
    high, wide = (side or setting.multiples[letter] for side, letter in zip(fixed, "hw", strict=True))
    return max(1, high >> int(level)), max(1, wide >> int(level))


def _sides(level: str, setting: Setting) -> tuple[int, int]:
    return setting.shapes["h"].opt >> int(level), setting.shapes["w"].opt >> int(level)


def smallest(level: str, setting: Setting) -> int:
    """Tokens of this level in the smallest picture."""
    return (setting.shapes["h"].min >> int(level)) * (setting.shapes["w"].min >> int(level))


def clashes(field: str, params: Simplifier, setting: Setting) -> list[str]:
    """A fault for every earlier pass, and of a pruned source every edit, that has changed one of the same layers."""
    faults = []
    there = levels_of(setting.config)
    for other in SIMPLIFIERS:
        taken = _made_before(other, setting)
        if other in setting.before:
            before: Simplifier = setting.before[other]
            taken |= {(level, part) for level in before.at(there) for part in before.parts}
        shared = [level for level in params.at(there) if any((level, part) in taken for part in params.parts)]
        parts = [part for part in params.parts if any((level, part) in taken for level in shared)]
        if shared:
            faults.append(
                f"{field}: {' and '.join(parts)} of level {', '.join(shared)} has {other} already; a layer takes one "
                f"of {', '.join(SIMPLIFIERS)}"
            )
    return faults


def _made_before(op: str, setting: Setting) -> set[tuple[str, str]]:
    """(level, part) of what the source's own edits `op` have changed."""
    last = len(setting.config.get("down_block_types") or DOWN) - 1
    return {
        (_level_of(edit["module"], last), part)
        for edit in setting.edits
        if edit["op"] == op
        for part in edit.get("parts") or [edit["module"].rpartition(".")[2]]
    }


def simplification(
    name: str,
    params: type[BaseModel],
    refuses: Callable[[Any, Setting], list[str]],
    *,
    revision: int,
    layer: str = "",
    exact: bool = False,
) -> Pass:
    """The record of the pass that makes the edit `name` of transformer blocks, or of their `layer`, as a
    `Simplifier` of `params` says. Samples are wanted only to tell what it costs: an `exact` one costs nothing.
    """

    def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
        told: Any = params.model_validate({field: job.params[field] for field in params.model_fields})
        simplify(inputs, out, job, name, told, layer)

    return Pass(
        name=name, stage="prune", kind="checkpoint", revision=revision, params=params, run=run, refuses=refuses,
        packages=("torch", "diffusers"), calibrates=never if exact else always, exact=exact, memory=(1.5, 1.5),
        idle=lambda params: not params.at(("0",)),
    )  # fmt: skip


def simplify(inputs: Mapping[str, Path], out: Path, job: Job, op: str, params: Simplifier, layer: str = "") -> None:
    """Put into `out` the checkpoint in `inputs["checkpoint"]` with the edit `op` at every level of `params.at`.

    The edit names the transformer block, or `layer` of it. The weights stay as they are. Raises StageError when a
    level has lost its attention to an earlier pass.
    """
    subject = pruning.open_subject(inputs["checkpoint"], job)
    places = list(blocks_of(subject.model))
    there = sorted({level for level, _ in places})
    wanted = params.at(there)
    gone = [level for level in wanted if level not in there]
    if gone or not there:
        raise StageError(
            f"{op}: no attention is left at level {', '.join(gone) or '0'} of {job.component}",
            f"leave the level out ({', '.join(there) or 'none'} have attention), or remove fewer blocks",
        )
    made = [
        {"op": op, "module": f"{module}.{layer}" if layer else module, **wanted[level]}
        for level, module in places
        if level in wanted
    ]
    edits.replay(subject.model, made)
    pruning.finish(inputs, out, job, subject, made, same_weights=True)
