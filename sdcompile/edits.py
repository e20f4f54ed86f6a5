"""Structural edits: what was taken out of a torch model or made simpler in it, as a list that can be replayed.

A pruned checkpoint is the original config.json, the weights that are left, and `edits.json` beside
them. Replaying the edits on an empty module of that config gives the shapes the weights fit, so
every room that reads a checkpoint reads a pruned one. One table says, per op, how a module is
shaped; applied to a module with weights the same functions slice them.

    {"op": "heads", "module": "mid_block.attentions.0.transformer_blocks.0.attn1", "of": 8, "keep": [0, 2]}
    {"op": "channels", "module": "mid_block.resnets.0", "of": 1280, "keep": [...], "groups": 24}
    {"op": "feed_forward", "module": "mid_block.attentions.0.transformer_blocks.0.ff", "of": 5120, "keep": [...]}
    {"op": "remove_pair", "down": "down_blocks.1", "down_index": 1, "up": "up_blocks.2", "up_index": 1}
    {"op": "remove_mid_block"}
    {"op": "token_merge", "module": "down_blocks.0.attentions.0.transformer_blocks.0", "ratio": 0.5, "stride": 2,
     "parts": ["attn1"]}
    {"op": "kv_pool", "module": "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "pool": 2}
    {"op": "linear_attention", "module": "down_blocks.0.attentions.0.transformer_blocks.0.attn1"}
    {"op": "top_k", "module": "down_blocks.0.attentions.0.transformer_blocks.0.attn2", "k": 32}
    {"op": "sliced_attention", "module": "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "slices": 4}

`of` is the count the edit was made on: replayed on anything else it is refused. Module paths are
those of the diffusers model. The room knows torch modules by their diffusers attributes (inside
functions, so that importing it loads nothing) and no pass, recipe or family.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sdcompile.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "edits.json"
FORMAT = 1

Edit = Mapping[str, Any]
V = TypeVar("V")


def read(folder: Path) -> list[dict[str, Any]]:
    """The edits of a checkpoint folder; none when it has no edits.json. Raises StageError when that is damaged."""
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version, rows = data["version"], data["edits"]
        unknown = [row["op"] for row in rows if row["op"] not in OPS]
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{FILE} is damaged: {error}", "run the prune stage again") from error
    if version != FORMAT or unknown:
        what = f"version {version}" if version != FORMAT else f"the op '{unknown[0]}'"
        raise StageError(f"{FILE} has {what}, which this sdcompile does not know", "update sdcompile")
    return [dict(row) for row in rows]


def write(folder: Path, edits: Iterable[Edit]) -> None:
    data = {"version": FORMAT, "edits": [dict(edit) for edit in edits]}
    (folder / FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def replay(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Apply `edits` to `model` in place, in order; a model on the meta device only changes shape.

    Raises StageError when an edit does not fit the module it names.
    """
    for edit in edits:
        try:
            OPS[edit["op"]](model, edit)
        except (KeyError, AttributeError, TypeError) as error:
            raise StageError(f"the edit {_short(edit)} does not fit this model: {error}", _HINT) from error


_HINT = "config.json and edits.json of a pruned checkpoint belong together"


def _short(edit: Edit) -> str:
    return json.dumps({k: v for k, v in edit.items() if k != "keep"})


# --- the table ---


def _heads(model: nn.Module, edit: Edit) -> None:
    """Attention heads: rows of to_q, to_k, to_v, columns of to_out; the width of a head stays."""
    attention: Any = model.get_submodule(edit["module"])
    keep = _kept(edit, attention.heads)
    width = attention.to_q.out_features // attention.heads
    inside = _spread(keep, width)
    for name in ("to_q", "to_k", "to_v"):
        _take_rows(getattr(attention, name), inside)
    _take_columns(attention.to_out[0], inside)
    attention.heads = attention.sliceable_head_dim = len(keep)
    attention.inner_dim = attention.inner_kv_dim = len(inside)


def _channels(model: nn.Module, edit: Edit) -> None:
    """Channels between the two convolutions of a resnet, with the norm, its `groups`, and the time embedding."""
    resnet: Any = model.get_submodule(edit["module"])
    of = resnet.conv1.out_channels
    keep, groups = _kept(edit, of), edit["groups"]
    if groups < 1 or len(keep) % groups:
        raise StageError(f"the edit {_short(edit)} leaves {len(keep)} channels, which {groups} groups cannot share")
    _take_rows(resnet.conv1, keep)
    if resnet.time_emb_proj is not None:
        halves = resnet.time_emb_proj.out_features // of  # scale and shift, or shift alone
        _take_rows(resnet.time_emb_proj, [half * of + k for half in range(halves) for k in keep])
    _take_rows(resnet.norm2, keep)
    resnet.norm2.num_groups = groups
    _take_columns(resnet.conv2, keep)


def _feed_forward(model: nn.Module, edit: Edit) -> None:
    """Hidden units of a feed-forward: rows of the first layer (a gated one has two per unit), columns of the last."""
    forward: Any = model.get_submodule(edit["module"])
    first, last = forward.net[0].proj, forward.net[2]
    of = last.in_features
    keep = _kept(edit, of)
    _take_rows(first, [half * of + k for half in range(first.out_features // of) for k in keep])
    _take_columns(last, keep)


def _remove_pair(model: nn.Module, edit: Edit) -> None:
    """A resnet (and its attention) of a down block, and the one of an up block that takes its skip connection.

    What BK-SDM does (Kim et al. 2023, arXiv:2305.15798): the skip that the first would make is the
    one the second would take. Refused when the channels of what is left do not meet.
    """
    for side in ("down", "up"):
        block: Any = model.get_submodule(edit[side])
        index = edit[f"{side}_index"]
        if not 0 <= index < len(block.resnets):
            raise StageError(f"the edit {_short(edit)} names resnet {index} of {len(block.resnets)}", _HINT)
        del block.resnets[index]
        if getattr(block, "attentions", None) is not None:
            del block.attentions[index]
    fault = fault_of_channels(model)
    if fault:
        raise StageError(f"the edit {_short(edit)} cannot be made: {fault}", "choose another pair to remove")


def _remove_mid_block(model: Any, edit: Edit) -> None:
    """The whole block between the down and the up blocks, which leaves its input's channels as they are."""
    if getattr(model, "mid_block", None) is None:
        raise StageError("the edit remove_mid_block does not fit: this model has no mid block", _HINT)
    model.mid_block = None


def _token_merge(model: nn.Module, edit: Edit) -> None:
    from sdcompile import attention

    attention.merge_tokens(model, edit["module"], edit["ratio"], edit["stride"], edit["parts"])


def _kv_pool(model: nn.Module, edit: Edit) -> None:
    from sdcompile import attention

    attention.attend_with(model, edit["module"], edit["op"], attention.plain, pool=edit["pool"])


def _linear_attention(model: nn.Module, edit: Edit) -> None:
    from sdcompile import attention

    attention.attend_with(model, edit["module"], edit["op"], attention.linear)


def _top_k(model: nn.Module, edit: Edit) -> None:
    from sdcompile import attention

    attention.attend_with(model, edit["module"], edit["op"], attention.top_k(edit["k"]))


def _sliced_attention(model: nn.Module, edit: Edit) -> None:
    from sdcompile import attention

    attention.attend_with(model, edit["module"], edit["op"], attention.sliced(edit["slices"]))


OPS: dict[str, Callable[[nn.Module, Edit], None]] = {
    "heads": _heads,
    "channels": _channels,
    "feed_forward": _feed_forward,
    "remove_pair": _remove_pair,
    "remove_mid_block": _remove_mid_block,
    "token_merge": _token_merge,
    "kv_pool": _kv_pool,
    "linear_attention": _linear_attention,
    "top_k": _top_k,
    "sliced_attention": _sliced_attention,
}
"""op -> (model, edit): shape `model` in place."""


def fault_of_channels(model: Any) -> str:
    """Why the channels of a UNet's blocks do not meet, or "": walks the blocks and their skip connections."""
    current = model.conv_in.out_channels
    skips = [current]
    for block in model.down_blocks:
        for resnet in block.resnets:
            if resnet.in_channels != current:
                return f"a resnet of {resnet.in_channels} channels would get {current}"
            current = resnet.out_channels
            skips.append(current)
        if block.downsamplers is not None:
            skips.append(current)
    for block in model.up_blocks:
        for resnet in block.resnets:
            skip = skips.pop() if skips else 0
            if resnet.in_channels != current + skip:
                return f"a resnet of {resnet.in_channels} channels would get {current} and a skip of {skip}"
            current = resnet.out_channels
    return f"{len(skips)} skip connections would be left over" if skips else ""


def _kept(edit: Edit, of: int) -> list[int]:
    keep = list(edit["keep"])
    if edit["of"] != of:
        raise StageError(f"the edit {_short(edit)} was made on {edit['of']} units; here are {of}", _HINT)
    if not keep or keep[0] < 0 or keep[-1] >= of or any(a >= b for a, b in pairwise(keep)):
        raise StageError(f"the edit {_short(edit)} keeps {keep[:8]}, which is no rising choice of 0 to {of - 1}", _HINT)
    return keep


def _spread(units: Sequence[int], width: int) -> list[int]:
    """The places of `units` where each is `width` wide."""
    return [unit * width + k for unit in units for k in range(width)]


def _take_rows(layer: Any, rows: Sequence[int]) -> None:
    """Keep these outputs of a linear layer or convolution, or channels of a norm."""
    for name in ("weight", "bias"):
        if getattr(layer, name, None) is not None:
            _replace(layer, name, getattr(layer, name)[list(rows)])
    for name in ("out_features", "out_channels", "num_channels"):
        if hasattr(layer, name):
            setattr(layer, name, len(rows))


def _take_columns(layer: Any, columns: Sequence[int]) -> None:
    """Keep these inputs of a linear layer or convolution."""
    _replace(layer, "weight", layer.weight[:, list(columns)])
    for name in ("in_features", "in_channels"):
        if hasattr(layer, name):
            setattr(layer, name, len(columns))


def _replace(layer: nn.Module, name: str, values: Tensor) -> None:
    from torch import nn

    old = getattr(layer, name)
    setattr(layer, name, nn.Parameter(values.detach().clone(), requires_grad=old.requires_grad))


# --- what can be said without a model ---


def renamed(modules: Mapping[str, V], edits: Iterable[Edit]) -> dict[str, V]:
    """Those of a UNet's `modules`, by path, that are left after `edits`, by the paths that they then have."""
    left = dict(modules)
    for edit in edits:
        if edit["op"] == "remove_mid_block":
            left = {path: value for path, value in left.items() if not path.startswith("mid_block.")}
        elif edit["op"] == "remove_pair":
            gone = {edit[side]: edit[f"{side}_index"] for side in ("down", "up")}
            moved = ((_after_removal(path, gone), value) for path, value in left.items())
            left = {path: value for path, value in moved if path}
    return left


def _after_removal(path: str, gone: Mapping[str, int]) -> str:
    """`path` where a block has lost its layer of the index in `gone`; "" for what is in that layer."""
    side, _, rest = path.partition(".")
    number, _, rest = rest.partition(".")
    index = gone.get(f"{side}.{number}")
    part, _, rest = rest.partition(".")
    if index is None or part not in ("resnets", "attentions"):
        return path
    place, _, rest = rest.partition(".")
    if int(place) == index:
        return ""
    return f"{side}.{number}.{part}.{int(place) - (int(place) > index)}.{rest}"


def in_config(config: Mapping[str, Any], edits: Sequence[Edit]) -> tuple[dict[str, Any], str]:
    """(config of a UNet that says what `edits` do, ""), or (`config`, why an ordinary config cannot).

    diffusers' configs know how many layers a block has, but only one width for a resnet's input,
    inside and output, and one width for a transformer and its heads together.
    """
    made = dict(config)
    blocks = len(config["down_block_types"])
    layers = config.get("layers_per_block", 2)
    counts = [layers] * blocks if isinstance(layers, int) else list(layers)
    for edit in edits:
        if edit["op"] == "remove_mid_block":
            made["mid_block_type"] = None
        elif edit["op"] == "remove_pair":
            down, up = (int(edit[side].rpartition(".")[2]) for side in ("down", "up"))
            if down + up != blocks - 1:
                return dict(config), f"{edit['down']} and {edit['up']} do not mirror each other"
            counts[down] -= 1
        else:
            return dict(config), _WHY.get(edit["op"], f"a config knows no {edit['op']}; edits.json does")
    if min(counts) < 1:
        return dict(config), "a block without layers has no place in layers_per_block"
    if counts != ([layers] * blocks if isinstance(layers, int) else list(layers)):
        made["layers_per_block"] = counts[0] if len(set(counts)) == 1 else counts
    return made, ""


_WHY = {
    "heads": "a transformer's config has one width, heads times their width; fewer heads of the same width "
    "inside an unchanged transformer cannot be said",
    "channels": "a block's config has one width; a resnet that is narrower inside cannot be said",
    "feed_forward": "a transformer's config has no feed-forward width; it is always four times the transformer's",
}
