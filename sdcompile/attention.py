"""Attention made cheaper: token merging, pooled keys and values, top-k, linear and sliced attention.

Each is put on a diffusers transformer block or attention in place, without a weight of its own, so that a
state dict, head pruning, training, `torch.export` and every backend behind it see the module they knew.
Sizes may be symbols: nothing here depends on how many tokens there are, only on what they divide by.
The room imports torch; `sdcompile.edits`, which names what it does, imports it when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdcompile.errors import StageError

PARTS = ("attn1", "attn2", "ff")
"""What a transformer block is made of: attention to the picture, attention to the prompt, the feed-forward."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (B, heads, N, d), keys and values (B, heads, M, d) -> (B, heads, N, d)."""


class Grid:
    """Height and width of the tokens that a transformer is running on; its blocks see only their number."""

    def __init__(self) -> None:
        self.height: Any = 0
        self.width: Any = 0

    def look(self, transformer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """A forward pre-hook of a diffusers Transformer2DModel, whose input is (B, C, height, width)."""
        self.height, self.width = (arguments[0] if arguments else keywords["hidden_states"]).shape[-2:]


def grid_of(model: nn.Module, module: str) -> Grid:
    """The grid of the transformer that `module` is in; the first to ask hangs it there."""
    transformer: Any = model.get_submodule(module.partition(".transformer_blocks.")[0])
    if not hasattr(transformer, "transformer_blocks"):
        raise AttributeError(f"{module} is in no transformer")
    if not hasattr(transformer, "token_grid"):
        transformer.token_grid = Grid()
        transformer.register_forward_pre_hook(transformer.token_grid.look, with_kwargs=True)
    grid: Grid = transformer.token_grid
    return grid


def claim(layer: Any, what: str) -> None:
    """Mark `layer` as simplified by `what`. Raises StageError when it has been: two of them do not add up."""
    if hasattr(layer, "simplified"):
        raise StageError(
            f"{what} finds a layer that has {layer.simplified} already", "a layer takes one simplification of these"
        )
    layer.simplified = what


# --- token merging ---


class Merging(NamedTuple):
    """What becomes of the tokens of a block. Of each region one token is a destination, the rest are sources.

    taken   (B, M, S): 1 where a destination takes a source, else 0
    shares  (B, M, 1): the share of each of them, and of the destination itself, in their mean
    kept    (B x (S - r),) the sources that are not merged, as rows of all sources of the batch
    row     (B x N,) for every token of the picture its row among the B x (M + S - r) merged ones
    """

    taken: Tensor
    shares: Tensor
    kept: Tensor
    row: Tensor


class TokenMerge(nn.Module):
    """Which tokens of a block are merged into which: bipartite soft matching.

    Bolya and Hoffman, Token Merging for Fast Stable Diffusion (2023, arXiv:2303.17604), section 4: of every
    `stride` x `stride` region one token is a destination, the others are sources; a source's match is the
    destination of highest cosine similarity; of all tokens the share `ratio`, those with the best matches,
    become one with them, as means. The destination is a region's first token, not a random one: the same input
    always gives the same picture. Means are made by a product, since not every backend adds where it scatters.
    A module of its own, so that what it computes bears its name in a graph.
    """

    def __init__(self, grid: Grid, ratio: float, stride: int) -> None:
        super().__init__()
        self.grid, self.stride = grid, stride
        # Whole thousandths: a product with a float is no size that can be exported.
        self.thousandths = round(1000 * ratio)
        self.merging: Merging | None = None

    def forward(self, tokens: Tensor) -> Merging:
        """`tokens` is the block's input, (B, N, C)."""
        side, batch, count = self.stride, tokens.shape[0], self.grid.height * self.grid.width
        high, wide = self.grid.height // side, self.grid.width // side
        merged = count * self.thousandths // 1000
        destinations, sources = self.split(functional.normalize(tokens.detach(), dim=-1))
        m, s = destinations.shape[1], sources.shape[1]
        best, match = (sources @ destinations.transpose(1, 2)).max(dim=-1)
        gone = torch.zeros_like(match).scatter(1, best.topk(merged, dim=1).indices, 1)
        place = (1 - gone).cumsum(dim=1) - 1
        rows = torch.arange(batch, device=tokens.device)[:, None]
        order = torch.arange(s, device=tokens.device).expand(batch, -1)
        # A permutation: those that stay, in their order, then those that go.
        slots = torch.where(gone > 0, s - merged + order - place - 1, place)
        kept = torch.zeros_like(order).scatter(1, slots, order)[:, : s - merged]
        taken = (torch.where(gone > 0, match, -1)[:, None, :] == order[:, :m, None]).to(tokens.dtype)
        shares = 1 / (1 + taken.sum(dim=-1, keepdim=True))
        row = torch.cat([order[:, :m], torch.where(gone > 0, match, m + place)], dim=1)
        row = row.view(batch, side, side, high, wide).permute(0, 3, 1, 4, 2).reshape(batch, count)
        return Merging(taken, shares, (kept + s * rows).reshape(-1), (row + (m + s - merged) * rows).reshape(-1))

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) in the order of the picture -> destinations (B, M, C) and sources (B, S, C)."""
        side, batch, width = self.stride, tokens.shape[0], tokens.shape[-1]
        high, wide = self.grid.height // side, self.grid.width // side
        planes = tokens.view(batch, high, side, wide, side, width).permute(0, 2, 4, 1, 3, 5)
        planes = planes.reshape(batch, side * side, high * wide, width)
        return planes[:, 0], planes[:, 1:].flatten(1, 2)

    def match(self, block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """A forward pre-hook of the block."""
        self.merging = self(arguments[0] if arguments else keywords["hidden_states"])

    def merge(self, layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        """A forward pre-hook of a layer: it sees the means, and after them the sources that were not merged."""
        assert self.merging is not None
        taken, shares, kept, _ = self.merging
        destinations, sources = self.split(arguments[0])
        batch, width = destinations.shape[0], destinations.shape[-1]
        means = (destinations + taken @ sources) * shares
        rest = sources.reshape(-1, width).index_select(0, kept).view(batch, -1, width)
        return (torch.cat([means, rest], dim=1), *arguments[1:]), keywords

    def unmerge(self, layer: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        """A forward hook of a layer: every token gets the output of the one it became."""
        assert self.merging is not None
        batch, _, width = output.shape
        return output.reshape(-1, width).index_select(0, self.merging.row).view(batch, -1, width)


def merge_tokens(model: nn.Module, module: str, ratio: float, stride: int, parts: Collection[str]) -> None:
    """Let the layers `parts` of the transformer block `module` run on merged tokens.

    Raises StageError when a layer is simplified already, or the block lacks it.
    """
    block: Any = model.get_submodule(module)
    if hasattr(block, "token_merge"):
        raise StageError(f"{module} merges its tokens already", "merge once, with the ratio that is wanted")
    layers = [getattr(block, part) for part in parts]
    matching = block.token_merge = TokenMerge(grid_of(model, module), ratio, stride)
    block.register_forward_pre_hook(matching.match, with_kwargs=True)
    for layer in layers:
        claim(layer, "token_merge")
        layer.register_forward_pre_hook(matching.merge, with_kwargs=True)
        layer.register_forward_hook(matching.unmerge)


# --- other attentions ---


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v."""
    return functional.scaled_dot_product_attention(query, key, value)


def top_k(count: int) -> Attend:
    """Each query attends to the `count` keys it scores highest (all of those that tie with the last)."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = key.shape[2]
        if isinstance(length, int) and count >= length:
            return plain(query, key, value)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        last = scores.topk(count, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < last, -torch.inf).softmax(dim=-1) @ value

    return attend


def linear(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """f(q) (f(k)' v) / (f(q) f(k)' 1) with f(x) = elu(x) + 1: linear in the number of tokens.

    Katharopoulos et al. 2020, arXiv:2006.16236, equation 7; q and k take softmax's 1 / sqrt(d) half each.
    """
    scale = query.shape[-1] ** -0.25
    query, key = (functional.elu(x * scale) + 1 for x in (query, key))
    weight = query @ key.sum(dim=2)[..., None]
    return query @ (key.transpose(2, 3) @ value) / weight


def sliced(count: int) -> Attend:
    """The same attention, `count` equal slices of the queries one after the other, so that scores of one are held."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, width = query.shape
        slices = query.view(batch, heads, count, length // count, width)
        return torch.cat([plain(slices[:, :, i], key, value) for i in range(count)], dim=2)

    return attend


class Processor:
    """A diffusers attention processor: the layer's own projections around `attend`.

    pool    keys and values are projected from the means of pool x pool tokens (attention to the picture)
    """

    def __init__(self, attend: Attend, grid: Grid | None = None, pool: int = 1) -> None:
        self.attend, self.grid, self.pool = attend, grid, pool

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        if attention_mask is not None:
            raise StageError("a simplified attention was given a mask", "Stable Diffusion's UNet needs none")
        told = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if self.pool > 1:
            told = self._pooled(told)
        query, key, value = (
            layer(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, tokens in ((attn.to_q, hidden_states), (attn.to_k, told), (attn.to_v, told))
        )
        output: Tensor = attn.to_out[0](self.attend(query, key, value).transpose(1, 2).flatten(2))
        return output

    def _pooled(self, tokens: Tensor) -> Tensor:
        assert self.grid is not None
        batch, _, width = tokens.shape
        high, wide = self.grid.height // self.pool, self.grid.width // self.pool
        cells = tokens.view(batch, high, self.pool, wide, self.pool, width)
        return cells.mean(dim=(2, 4)).view(batch, high * wide, width)


def attend_with(model: nn.Module, module: str, what: str, attend: Attend, pool: int = 1) -> None:
    """Put `attend` into the attention `module`.

    Raises StageError when the attention is simplified already, or does more than project, attend and project.
    """
    attention: Any = model.get_submodule(module)
    extras = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    found = [name for name in extras if getattr(attention, name) not in (None, False)]
    if found or attention.residual_connection or attention.rescale_output_factor != 1:
        raise StageError(
            f"{module} is no plain attention ({', '.join(found) or 'residual'})", f"leave {what} out for this model"
        )
    claim(attention, what)
    attention.set_processor(Processor(attend, grid_of(model, module) if pool > 1 else None, pool))
