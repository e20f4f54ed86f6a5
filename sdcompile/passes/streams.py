"""Which channels of a UNet are the same ones: its streams, and the layers that read and write each.

Layers whose outputs are added share their channels: the input and the output of a resnet without a shortcut, a
transformer and what it is added to, a skip connection and where it was taken. They lose the same channels or
none. A shortcut, a convolution between two levels and a transformer's projections begin a stream of their
own, as do the inside of a resnet, of an attention's heads and of a feed-forward. The model says all of this by
its modules in their order; nothing has to be traced. The room knows modules; what goes is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdcompile.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(eq=False)
class Stream:
    """Channels that stay or go together wherever they are read and written.

    name    that of the layer that writes them first
    width   how many there are; cells, equal runs of them that lose as many each
    heads   of an attention's inside: how many, 0 elsewhere
    """

    name: str
    width: int
    cells: int
    heads: int = 0


@dataclass(frozen=True)
class Wire:
    """A layer between streams.

    reads    the streams whose channels are its inputs, side by side; none: its inputs stay whole
    writes   the stream of its outputs; None: they stay whole
    copies   how often it writes each channel, one run of all after the other (a gated layer: twice)
    beside   module and side ("input" or "output") of what is added to its output
    """

    reads: tuple[Stream, ...]
    writes: Stream | None
    copies: int = 1
    beside: tuple[str, str] | None = None


Kept = Mapping[Stream, list[int]]
"""The channels of each stream that stay, rising."""


@dataclass
class Wiring:
    """layers: path -> wire, of every linear layer and convolution whose shape a width decides; norms: path -> the
    streams of its channels; gains: path -> what a narrower layer's outputs are to be, over the whole one's.
    """

    layers: dict[str, Wire] = field(default_factory=dict)
    norms: dict[str, tuple[Stream, ...]] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)

    def streams(self) -> list[Stream]:
        """Every stream, in the order in which it is written first."""
        return list(dict.fromkeys(wire.writes for wire in self.layers.values() if wire.writes is not None))

    def joined(self) -> set[Stream]:
        """The streams that a norm takes side by side with another."""
        return {stream for streams in self.norms.values() if len(streams) > 1 for stream in streams}


def wired(model: Any) -> Wiring:
    """The streams of a UNet2DConditionModel. Raises StageError where a resnet adds to two of them at once."""
    wiring = Wiring()
    groups = model.config.norm_num_groups
    now = Stream("conv_in", model.conv_in.out_channels, groups)
    wiring.layers["conv_in"] = Wire((), now)
    skips = [now]
    for i, block in enumerate(model.down_blocks):
        for j in range(len(block.resnets)):
            now = _layer(wiring, f"down_blocks.{i}", block, j, (now,))
            skips.append(now)
        if block.downsamplers is not None:
            now = _resampled(wiring, f"down_blocks.{i}.downsamplers.0.conv", block.downsamplers[0].conv, now)
            skips.append(now)
    if model.mid_block is not None:
        now = _resnet(wiring, "mid_block.resnets.0", model.mid_block.resnets[0], (now,))
        for j, attention in enumerate(model.mid_block.attentions):
            _transformer(wiring, f"mid_block.attentions.{j}", attention, now)
            now = _resnet(wiring, f"mid_block.resnets.{j + 1}", model.mid_block.resnets[j + 1], (now,))
    for i, block in enumerate(model.up_blocks):
        for j in range(len(block.resnets)):
            now = _layer(wiring, f"up_blocks.{i}", block, j, (now, skips.pop()))
        if block.upsamplers is not None:
            now = _resampled(wiring, f"up_blocks.{i}.upsamplers.0.conv", block.upsamplers[0].conv, now)
    wiring.norms["conv_norm_out"] = (now,)
    wiring.layers["conv_out"] = Wire((now,), None)
    return wiring


def _layer(wiring: Wiring, at: str, block: Any, index: int, reads: tuple[Stream, ...]) -> Stream:
    """A resnet and its attention."""
    out = _resnet(wiring, f"{at}.resnets.{index}", block.resnets[index], reads)
    if getattr(block, "attentions", None) is not None:
        _transformer(wiring, f"{at}.attentions.{index}", block.attentions[index], out)
    return out


def _resnet(wiring: Wiring, at: str, resnet: Any, reads: tuple[Stream, ...]) -> Stream:
    groups = resnet.norm2.num_groups
    inside = Stream(f"{at}.conv1", resnet.conv1.out_channels, groups)
    wiring.norms |= {f"{at}.norm1": reads, f"{at}.norm2": (inside,)}
    wiring.layers[f"{at}.conv1"] = Wire(reads, inside)
    wiring.layers[f"{at}.time_emb_proj"] = Wire((), inside)
    if resnet.conv_shortcut is not None:
        out = Stream(f"{at}.conv2", resnet.conv2.out_channels, groups)
        wiring.layers[f"{at}.conv2"] = Wire((inside,), out)
        wiring.layers[f"{at}.conv_shortcut"] = Wire(reads, out, beside=(f"{at}.conv2", "output"))
        return out
    if len(reads) > 1:
        raise StageError(f"{at} adds its output to two streams side by side, which cannot be narrowed")
    wiring.layers[f"{at}.conv2"] = Wire((inside,), reads[0], beside=(f"{at}.norm1", "input"))
    return reads[0]


def _resampled(wiring: Wiring, at: str, conv: Any, reads: Stream) -> Stream:
    out = Stream(at, conv.out_channels, reads.cells)
    wiring.layers[at] = Wire((reads,), out)
    return out


def _transformer(wiring: Wiring, at: str, transformer: Any, stream: Stream) -> None:
    inner = Stream(f"{at}.proj_in", transformer.proj_in.weight.shape[0], 1)
    wiring.norms[f"{at}.norm"] = (stream,)
    wiring.layers[f"{at}.proj_in"] = Wire((stream,), inner)
    for k, block in enumerate(transformer.transformer_blocks):
        b = f"{at}.transformer_blocks.{k}"
        for norm, name in (("norm1", "attn1"), ("norm2", "attn2")):
            attention = getattr(block, name)
            inside = Stream(f"{b}.{name}.to_q", attention.to_q.out_features, attention.heads, attention.heads)
            told = (inner,) if name == "attn1" else ()
            wiring.norms[f"{b}.{norm}"] = (inner,)
            wiring.layers[f"{b}.{name}.to_q"] = Wire((inner,), inside)
            wiring.layers |= {f"{b}.{name}.{part}": Wire(told, inside) for part in ("to_k", "to_v")}
            wiring.layers[f"{b}.{name}.to_out.0"] = Wire((inside,), inner, beside=(f"{b}.{norm}", "input"))
        first, last = block.ff.net[0].proj, block.ff.net[2]
        hidden = Stream(f"{b}.ff.net.0.proj", last.in_features, 1)
        wiring.norms[f"{b}.norm3"] = (inner,)
        wiring.layers[f"{b}.ff.net.0.proj"] = Wire((inner,), hidden, copies=first.out_features // last.in_features)
        wiring.layers[f"{b}.ff.net.2"] = Wire((hidden,), inner, beside=(f"{b}.norm3", "input"))
    wiring.layers[f"{at}.proj_out"] = Wire((inner,), stream, beside=(f"{at}.norm", "input"))


def shaped(model: nn.Module, empty: nn.Module, wiring: Wiring, kept: Kept) -> None:
    """Give the narrower `empty` the weights of `model` that are left; `kept` has the rising channels of each stream.

    The time embedding's first layer, which reads fewer sinusoids, is not among them. Raises StageError where
    the channels kept do not have the shape of `empty`.
    """
    import torch

    targets = dict(empty.named_parameters())
    for name, whole in model.named_parameters():
        weight: Tensor = whole
        layer, _, part = name.rpartition(".")
        if layer in wiring.layers:
            wire = wiring.layers[layer]
            if wire.writes is not None:
                weight = weight[_rows(wire, kept)]
            if part == "weight" and wire.reads:
                weight = weight[:, places(wire.reads, kept)]
        elif layer in wiring.norms:
            weight = weight[places(wiring.norms[layer], kept)]
        target = targets.pop(name)
        if layer == TIMED:
            continue
        if target.shape != weight.shape:
            raise StageError(f"{name} would be {tuple(weight.shape)}, where the config has {tuple(target.shape)}")
        with torch.no_grad():
            target.copy_(weight * wiring.gains.get(layer, 1.0))
    if targets:
        raise StageError(f"the narrower model has {', '.join(targets)}, which the wider one has not")


TIMED = "time_embedding.linear_1"
"""The layer at the sinusoids of the time, of which there are as many as the first level has channels."""


def places(streams: tuple[Stream, ...], kept: Kept) -> list[int]:
    """Where the kept channels of streams that lie side by side are."""
    found, start = [], 0
    for stream in streams:
        found += [start + k for k in kept[stream]]
        start += stream.width
    return found


def _rows(wire: Wire, kept: Kept) -> list[int]:
    assert wire.writes is not None
    return [copy * wire.writes.width + k for copy in range(wire.copies) for k in kept[wire.writes]]


def outputs_of(wire: Wire, kept: Kept, whole: int) -> list[int]:
    """Which of the `whole` outputs of the wider layer the narrower one has."""
    return list(range(whole)) if wire.writes is None else _rows(wire, kept)
