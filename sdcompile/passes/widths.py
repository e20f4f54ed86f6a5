"""Which widths a UNet's config can have: every level's share of channels, in numbers that its norms and heads divide.

A level is an entry of `block_out_channels`. Its width is that of everything on it: residual streams, the inside
of resnets, transformers with their heads (a config knows one width for all of these) and a quarter of their
feed-forwards. Plain Python: a plan asks before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import gcd, lcm
from typing import Any

from sdcompile.passes.levels import DOWN, UP, levels_of

_PLAIN: dict[str, Any] = {
    "class_embed_type": None, "addition_embed_type": None, "encoder_hid_dim_type": None, "dual_cross_attention": False,
    "only_cross_attention": False, "resnet_time_scale_shift": "default", "time_embedding_type": "positional",
    "attention_type": "default", "cross_attention_norm": None, "num_attention_heads": None, "time_cond_proj_dim": None,
}  # fmt: skip
"""Fields of a config that this pass knows one value of. Most UNets of Stable Diffusion have it."""

_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
_MID = "UNetMidBlock2DCrossAttn"


def narrowed(config: Mapping[str, Any], ratio: float, round_to: int) -> dict[str, Any]:
    """`config` with every level's width as near to `1 - ratio` of what it was as can be; of two, the wider.

    Heads become narrower where their number divides the new width; else fewer, of the width they had. The time
    embedding keeps its width.
    """
    heads = _heads(config)
    made = [
        _nearest(width, count, (1 - ratio) * width, step_of(config, round_to), attends)
        for width, count, attends in zip(_widths(config), heads, _attends(config), strict=True)
    ]
    pairs = zip(_widths(config), made, heads, strict=True)
    fewer = [h if new % h == 0 else max(1, new // (old // h)) for old, new, h in pairs]
    changed = {
        "block_out_channels": made,
        "time_embedding_dim": config.get("time_embedding_dim") or 4 * _widths(config)[0],
    }
    return {**config, **changed, **({} if fewer == heads else {"attention_head_dim": fewer})}


def step_of(config: Mapping[str, Any], round_to: int) -> int:
    """Every width is a multiple of this: equal groups of every norm, and what the hardware likes."""
    return lcm(config.get("norm_num_groups") or 32, round_to)


def is_even(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Does every level keep the same share? Then groups of norms over two levels' channels keep their members."""
    first, *rest = zip(_widths(old), _widths(new), strict=True)
    return all(before * first[1] == after * first[0] for before, after in rest)


def cell_of(config: Mapping[str, Any]) -> int:
    """Channels of the largest run that lies within one group of every norm, whatever it lies beside."""
    return gcd(*_widths(config)) // (config.get("norm_num_groups") or 32)


def faults_of(config: Mapping[str, Any], ratio: float, round_to: int) -> list[str]:
    """Why a UNet of `config` cannot be narrowed so, each as "field: fault"."""
    if foreign := _foreign(config):
        return [f"ratio: it does not know how to narrow a UNet with {', '.join(foreign)}"]
    if ratio <= 0.0:
        return []
    step = step_of(config, round_to)
    if uneven := [width for width in _widths(config) if width % (config.get("norm_num_groups") or 32)]:
        return [f"ratio: {uneven[0]} channels are no whole groups of norm_num_groups"]
    if small := [width for width in _widths(config) if width < step]:
        return [f"round_to: {small[0]} channels are less than {step}, which norm_num_groups and round_to both divide"]
    new = narrowed(config, ratio, round_to)
    told = f"a level's width is a multiple of {step} (norm_num_groups and round_to), its heads alike"
    if new["block_out_channels"] == _widths(config):
        least = min(1 - w / c for c, w in zip(_widths(config), _one_less(config, step), strict=True))
        hint = f"from a ratio of {least / 2 + 0.005:.2f} on one becomes narrower" if least < 1 else "none can be less"
        return [f"ratio: {ratio:g} is nearer to nothing than to the next legal width: {told}; {hint}"]
    if _shortcuts(new) != _shortcuts(config):
        widths = ", ".join(map(str, new["block_out_channels"]))
        return [
            f"ratio: with widths {widths}, residual blocks would gain or lose a shortcut, which they have where "
            f"input and output differ; {told}; choose a ratio at which different widths stay different"
        ]
    return []


def _widths(config: Mapping[str, Any]) -> list[int]:
    return list(config.get("block_out_channels") or (320, 640, 1280, 1280))


def _heads(config: Mapping[str, Any]) -> list[int]:
    """Heads of each level. diffusers' `attention_head_dim` of a UNet is their number, whatever its name."""
    told = config.get("attention_head_dim") or 8
    return [told] * len(_widths(config)) if isinstance(told, int) else list(told)


def _attends(config: Mapping[str, Any]) -> list[bool]:
    return [str(level) in levels_of(config) for level in range(len(_widths(config)))]


def _legal(width: int, heads: int, step: int, attends: bool) -> list[int]:
    return [
        new for new in range(step, width + 1, step) if not attends or new % heads == 0 or new % (width // heads) == 0
    ]


def _nearest(width: int, heads: int, wanted: float, step: int, attends: bool) -> int:
    return min(_legal(width, heads, step, attends), key=lambda new: (abs(new - wanted), -new), default=width)


def _one_less(config: Mapping[str, Any], step: int) -> list[int]:
    """Each level's next smaller width; 0 where it has none."""
    rows = zip(_widths(config), _heads(config), _attends(config), strict=True)
    return [max((n for n in _legal(w, h, step, a) if n < w), default=0) for w, h, a in rows]


def _shortcuts(config: Mapping[str, Any]) -> list[bool]:
    """Where a level begins with a shortcut because its width is not that of the one above; ways up always do."""
    return [a != b for a, b in pairwise(_widths(config))]


def _foreign(config: Mapping[str, Any]) -> list[str]:
    blocks = {*(config.get("down_block_types") or DOWN), *(config.get("up_block_types") or UP)}
    found = sorted(blocks - _BLOCKS)
    if config.get("mid_block_type", _MID) not in (_MID, None):
        found.append(config["mid_block_type"])
    return found + [f"{name} {config[name]}" for name, usual in _PLAIN.items() if config.get(name, usual) != usual]
