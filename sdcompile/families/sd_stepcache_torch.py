"""The torch half of step caching: the UNet that also gives its deep hidden state, and the shallow one that takes it.

Both are the same diffusers model; `sd_stepcache` says where it is cut. Module paths stay those of the whole model,
so that a layer has one name in weights, ONNX graphs and reports of either.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sdcompile.families.sd_stepcache import Cut, cut

Place = tuple[Any, int | None]
"""A block and one of its layers (a resnet and its attention), or None for its way to the next level."""


class WithDeep(nn.Module):
    """As `sd_torch.Denoiser`, and the hidden state on the way up where the outer layers begin.

    sample (R, C, h, w), timestep (R,), encoder_hidden_states (R, T, D)[, timestep_cond (R, E)]
    -> (R, C, h, w), (R, width, h / k, w / k) as `sd_stepcache.step_cached` has it
    """

    def __init__(self, unet: Any, depth: int) -> None:
        super().__init__()
        self.unet = unet
        self.cut = cut(unet.config, depth)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        deep: list[Tensor] = []

        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            deep.append(output[0] if isinstance(output, tuple) else output)

        handle = self._last_inside().register_forward_hook(keep)
        try:
            (output,) = self.unet(
                sample, timestep, encoder_hidden_states=encoder_hidden_states, timestep_cond=timestep_cond,
                return_dict=False,
            )  # fmt: skip
        finally:
            handle.remove()
        return output, deep[0]

    def _last_inside(self) -> nn.Module:
        """The module whose output is the deep hidden state."""
        block: Any = self.unet.up_blocks[-1 - self.cut.levels]
        layers = getattr(block, "attentions", None) or block.resnets
        inside: nn.Module = layers[len(layers) - 1 - self.cut.layers] if self.cut.layers else block
        return inside


class Shallow(nn.Module):
    """The outer layers of a UNet, which is cut to them in place.

    sample (R, C, h, w), timestep (R,), encoder_hidden_states (R, T, D), deep (R, width, h / k, w / k)
    [, timestep_cond (R, E)] -> (R, C, h, w)
    """

    def __init__(self, unet: Any, depth: int) -> None:
        super().__init__()
        where = cut(unet.config, depth)
        self.unet = unet
        self._down, self._up = list(_down(unet, depth)), list(_up(unet, where))
        _drop_others(unet, [*self._down, *self._up])

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        deep: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        unet = self.unet
        if unet.config.center_input_sample:
            sample = 2 * sample - 1.0
        emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), timestep_cond)
        if unet.time_embed_act is not None:
            emb = unet.time_embed_act(emb)
        hidden = unet.conv_in(sample)
        skips = [hidden]
        for block, layer in self._down:
            hidden = (
                block.downsamplers[0](hidden)
                if layer is None
                else _layer(block, layer, hidden, emb, encoder_hidden_states)
            )
            skips.append(hidden)
        hidden = deep
        for block, layer in self._up:
            if layer is None:
                hidden = block.upsamplers[0](hidden)
            else:
                hidden = _layer(block, layer, torch.cat([hidden, skips.pop()], dim=1), emb, encoder_hidden_states)
        if unet.conv_norm_out is not None:
            hidden = unet.conv_act(unet.conv_norm_out(hidden))
        output: Tensor = unet.conv_out(hidden)
        return output


def _layer(block: Any, index: int, hidden: Tensor, emb: Tensor, states: Tensor) -> Tensor:
    hidden = block.resnets[index](hidden, emb)
    if getattr(block, "attentions", None) is None:
        return hidden
    attended: Tensor = block.attentions[index](hidden, encoder_hidden_states=states, return_dict=False)[0]
    return attended


def _down(unet: Any, depth: int) -> Iterator[Place]:
    """What makes the `depth` outermost skip connections, after conv_in which makes the first."""
    places = (
        (block, layer)
        for block in unet.down_blocks
        for layer in (*range(len(block.resnets)), *(() if block.downsamplers is None else (None,)))
    )
    return islice(places, depth - 1)


def _up(unet: Any, where: Cut) -> Iterator[Place]:
    """The layers of the way up that lie outside the cut, with the ways between their levels."""
    blocks = len(unet.up_blocks)
    for number in range(blocks - 1 - where.levels, blocks):
        block = unet.up_blocks[number]
        count = where.layers if number == blocks - 1 - where.levels else len(block.resnets)
        for layer in range(len(block.resnets) - count, len(block.resnets)):
            yield block, layer
        if count and block.upsamplers is not None:
            yield block, None


def _drop_others(unet: Any, kept: list[Place]) -> None:
    """Take out what the shallow half does not run, leaving the names of what it does."""
    unet.mid_block = None
    for blocks in (unet.down_blocks, unet.up_blocks):
        for number, block in enumerate(blocks):
            mine = [layer for other, layer in kept if other is block]
            if not mine:
                blocks[number] = nn.Identity()
                continue
            for layers in (block.resnets, getattr(block, "attentions", None) or []):
                for index in range(len(layers)):
                    if index not in mine:
                        layers[index] = nn.Identity()
            if None not in mine:
                block.downsamplers = block.upsamplers = None
