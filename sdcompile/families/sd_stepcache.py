"""Step caching of family `sd`: where its UNet is cut, and what the shallow half takes and gives.

DeepCache (Ma, Fang and Wang 2023, arXiv:2312.00858): what a UNet computes far from its ends changes
little from one denoising step to the next. On most steps only its outermost layers are computed, on
a hidden state (`deep`) that an earlier, whole step had at that point of the way up. `depth` counts the
layers of the way up that are computed anew, from the last one inwards; with each comes the part of the
way down whose skip connection it takes. Depth 1 is DeepCache's branch 0. Plain Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sdcompile.errors import RecipeError
from sdcompile.spec import DEEP, ComponentSpec, TensorSpec

SHALLOW = "unet_cached"

_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}


class Cut(NamedTuple):
    """`levels` whole levels of the UNet lie outside, and `layers` of the way up of the next one."""

    levels: int
    layers: int


def cut(config: Mapping[str, Any], depth: int) -> Cut:
    """Where `depth` cuts a UNet2DConditionModel of `config`.

    Raises RecipeError when nothing would be left inside, or the UNet is made of blocks that have no such layers.
    """
    foreign = {*config.get("down_block_types", ()), *config.get("up_block_types", ())} - _BLOCKS
    if foreign:
        raise RecipeError(f"step_cache: this UNet has {', '.join(sorted(foreign))}, which it does not know how to cut")
    widths, layers = config["block_out_channels"], config.get("layers_per_block", 2)
    # A level has one layer more on its way up: it takes the skip connection of what led down to it.
    ups = [n + 1 for n in (layers if isinstance(layers, (list, tuple)) else [layers] * len(widths))]
    if not 1 <= depth < sum(ups):
        raise RecipeError(
            f"step_cache.depth: {depth} is out of range: this UNet has {sum(ups)} layers on its way up, "
            f"of which 1 to {sum(ups) - 1} can be computed anew"
        )
    levels = 0
    while depth >= ups[levels]:
        depth -= ups[levels]
        levels += 1
    return Cut(levels, depth)


def step_cached(
    configs: Mapping[str, Mapping[str, Any]], specs: Mapping[str, ComponentSpec], depth: int
) -> dict[str, ComponentSpec]:
    """`specs` with a UNet that also gives `deep`, and the shallow component that takes it.

    Raises RecipeError as `cut`, its fault beginning with the field below that of the component.
    """
    config, unet = configs["unet"], specs["unet"]
    levels, layers = cut(config, depth)
    # Between two levels the way up is as wide as the deeper one, and already as large as the outer one.
    divisor = 2 ** (levels if layers else levels - 1)
    sides = ("h", "w") if divisor == 1 else (f"h/{divisor}", f"w/{divisor}")
    deep = TensorSpec(DEEP, ("R", config["block_out_channels"][levels], *sides), "float32")
    sample, timestep, states, *rest = unet.inputs
    return {
        **specs,
        "unet": ComponentSpec("unet", unet.inputs, (*unet.outputs, deep)),
        SHALLOW: ComponentSpec(SHALLOW, (sample, timestep, states, deep, *rest), unet.outputs),
    }
