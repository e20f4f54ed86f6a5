"""Where a UNet can be made narrower: heads of attentions, channels inside resnets, hidden units of feed-forwards.

A site is a layer that reads what some units wrote (`reader`), and the units: attention heads for
to_out, whole groups of norm2's channels for conv2, hidden units for the feed-forward's last layer.
Each kind is closed: nothing else reads those units, so no dependency graph has to be traced (which is
what Torch-Pruning is for; it needs a forward pass per graph and hand-written rules for diffusers'
attention and resampling layers all the same). The room knows modules; who goes is decided elsewhere.

Whole groups of norm2 go, so the statistics of those that stay do not change, and the layer that
reads them can be compensated exactly as a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdcompile.errors import RecipeError, StageError
from sdcompile.passes import patterns
from sdcompile.passes.compensation import Layer

if TYPE_CHECKING:
    from torch import Tensor, nn

UNFOLDED = 6144
"""Columns up to which a convolution's inputs are unfolded; a wider one is compensated channel by channel,
as if its taps' inputs were independent: the float64 moments would take more than 300 MB."""

ROWS = 2048
"""Rows taken of one call: a strided choice of a large layer's positions says as much of its moments."""


@dataclass(frozen=True)
class Site:
    """One layer that can lose inputs.

    op       the edit that removes units (`sdcompile.edits.OPS`)
    module   what that edit names
    reader   the linear layer or convolution that reads the units
    writers  the layers whose outputs are theirs
    units    how many there are; width, the inputs of `reader` each of them owns
    """

    op: str
    module: str
    reader: str
    writers: tuple[str, ...]
    units: int
    width: int

    def edit(self, keep: Sequence[int]) -> dict[str, Any]:
        """The edit that leaves the units `keep`."""
        if self.op != "channels":
            return {"op": self.op, "module": self.module, "of": self.units, "keep": list(keep)}
        channels = [unit * self.width + k for unit in keep for k in range(self.width)]
        of = self.units * self.width
        return {"op": self.op, "module": self.module, "of": of, "keep": channels, "groups": len(keep)}

    def counts(self, round_to: int) -> list[int]:
        """How many units may go, rising from 0: what stays is at least one and a multiple of `round_to` inputs."""
        return [
            n
            for n in range(self.units)
            if n == 0 or (self.units - n) * self.width % (round_to if self.rounds else 1) == 0
        ]

    @property
    def rounds(self) -> bool:
        """Heads come as they are; channels and hidden units in multiples that hardware likes."""
        return self.op != "heads"


def heads_of(model: nn.Module) -> Iterator[Site]:
    """Every attention of more than one head, in the model's order."""
    for name, module in model.named_modules():
        layer: Any = module
        if not (hasattr(layer, "to_q") and hasattr(layer, "heads")) or layer.heads < 2:
            continue
        plain = layer.to_k is not None and layer.to_q.out_features == layer.to_k.out_features
        if plain and layer.norm_q is None and layer.added_kv_proj_dim is None:
            writers = tuple(f"{name}.{part}" for part in ("to_q", "to_k", "to_v"))
            width = layer.to_q.out_features // layer.heads
            yield Site("heads", name, f"{name}.to_out.0", writers, layer.heads, width)


def channels_of(model: nn.Module) -> Iterator[Site]:
    """The inside of every resnet, by groups of its second norm."""
    for name, module in model.named_modules():
        layer: Any = module
        if not all(hasattr(layer, part) for part in ("conv1", "norm2", "conv2", "time_emb_proj")):
            continue
        groups = layer.norm2.num_groups
        writers = (f"{name}.conv1",) + ((f"{name}.time_emb_proj",) if layer.time_emb_proj is not None else ())
        yield Site("channels", name, f"{name}.conv2", writers, groups, layer.conv1.out_channels // groups)


def feed_forwards_of(model: nn.Module) -> Iterator[Site]:
    """Every transformer feed-forward whose first layer is a (gated) linear one."""
    for name, module in model.named_modules():
        net: Any = getattr(module, "net", None)
        if net is not None and len(net) == 3 and hasattr(net[0], "proj"):
            yield Site("feed_forward", name, f"{name}.net.2", (f"{name}.net.0.proj",), net[2].in_features, 1)


_MARKS = {"heads": ".to_q", "channels": ".conv2", "feed_forward": ".net.2"}
"""Op of a site -> the layer by which its module is told from others where names are all there is."""


def names_of(op: str, paths: Iterable[str]) -> list[str]:
    """The modules that sites of `op` have, of a model with weights at `paths`; those too small to lose any, too."""
    return [path.removesuffix(_MARKS[op]) for path in paths if path.endswith(_MARKS[op])]


def fault_of(names: Sequence[str], wanted: Sequence[str]) -> str:
    """Which patterns of `wanted` (see `patterns`) name none of the modules `names`; "" where each names one."""
    return patterns.fault_of(names, wanted, "layer that can be pruned")


def matching(sites: Sequence[Site], wanted: Sequence[str], field: str) -> list[Site]:
    """The sites whose module one of the patterns `wanted` names. Raises RecipeError with each that names nothing."""
    names = [site.module for site in sites]
    if fault := fault_of(names, wanted):
        raise RecipeError(f"{field}: {fault}", patterns.HINT)
    found = patterns.named(names, wanted)
    return [site for site in sites if site.module in found]


def layer_of(model: nn.Module, site: Site) -> Layer:
    """The reader as a matrix over the columns that `rows_of` gives, in float64."""
    import torch

    reader: Any = model.get_submodule(site.reader)
    weight = reader.weight.detach().double()
    inputs = torch.arange(site.units * site.width).view(site.units, site.width)
    taps = weight[0, 0].numel()
    if is_unfolded(weight):
        columns = (inputs[:, :, None] * taps + torch.arange(taps)).flatten(1)
        weight, outputs = weight.flatten(1), len(weight)
    else:
        columns = inputs
        weight, outputs = weight.flatten(2).permute(0, 2, 1).flatten(0, 1), len(weight) * taps
    bias = torch.zeros(outputs, dtype=torch.float64)
    if reader.bias is not None and outputs == len(reader.bias):
        bias = reader.bias.detach().double()
    return Layer(weight, bias, columns)


def assign(model: nn.Module, site: Site, weight: Tensor, bias: Tensor) -> None:
    """Write a matrix as `layer_of` gives it back into the reader."""
    import torch

    reader: Any = model.get_submodule(site.reader)
    old = reader.weight
    if is_unfolded(old):
        shaped = weight.view(old.shape)
    else:
        shaped = weight.view(len(old), -1, old.shape[1]).permute(0, 2, 1).reshape(old.shape)
        bias = reader.bias.detach().double() + bias.view(len(old), -1).sum(1) if reader.bias is not None else bias
    reader.weight = torch.nn.Parameter(shaped.to(old.dtype), requires_grad=False)
    if reader.bias is not None:
        reader.bias = torch.nn.Parameter(bias.to(old.dtype), requires_grad=False)


def rows_of(reader: Any, x: Tensor) -> Tensor:
    """The reader's input `x` as rows (n, columns) of the matrix of `layer_of`; at most `ROWS` of them."""
    return strided(unrolled(reader, x))


def unrolled(reader: Any, x: Tensor) -> Tensor:
    """As `rows_of`, with every position."""
    import torch
    from torch.nn import functional

    if x.ndim == 4 and not isinstance(reader, torch.nn.Linear) and is_unfolded(reader.weight):
        columns = functional.unfold(x, reader.kernel_size, reader.dilation, reader.padding, reader.stride)
        return columns.transpose(1, 2).flatten(0, 1)
    return channels_last(x)


def channels_last(x: Tensor) -> Tensor:
    """(images, channels, height, width) or (..., channels) as rows (n, channels)."""
    return (x.flatten(2).transpose(1, 2) if x.ndim == 4 else x).reshape(-1, x.shape[1 if x.ndim == 4 else -1])


def strided(rows: Tensor) -> Tensor:
    """At most `ROWS` of them, spread evenly."""
    # A prime stride, so that rows of every image and every column of it are met.
    step = next((p for p in (1, 2, 3, 5, 7, 11, 13, 17, 23, 31, 41, 61, 97, 127) if len(rows) // p <= ROWS), 251)
    return rows[::step]


def is_unfolded(weight: Tensor) -> bool:
    return weight.ndim == 2 or weight[0].numel() <= UNFOLDED


def need(sites: Sequence[Site], component: str, what: str) -> None:
    """Raise StageError when there is nothing to prune."""
    if not sites:
        raise StageError(
            f"{component} has no {what}", "leave this pass out of the recipe for this component (the UNet has them)"
        )
