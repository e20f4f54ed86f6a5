"""Which channels of each stream go: those whose loss the others of it best make up for, to all that read them.

A layer's view on a stream is the covariance C of what it reads of it (behind norm and activation) and the Gram
matrix G of its weights' columns. Losing channel c costs the layer G_cc / (C^-1)_cc of its output when the others
are refitted, and that over the output's power, summed over the layers, is the score: the optimal brain surgeon of
`compensation`, with several layers and as many from each cell. Inside attention heads no channel has to be chosen:
queries with keys, and values with the output, are first turned to a basis in which the last dimensions matter least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdcompile.passes import sites
from sdcompile.passes.compensation import Moments
from sdcompile.passes.narrowing import RIDGE, play
from sdcompile.passes.streams import Stream, Wiring
from sdcompile.spec import Say

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class View:
    """What one layer reads of a stream and what it makes of it.

    spread  (width, width) covariance of its inputs, or with nothing refitted their second moments
    gram    (width, width) its weights' columns times each other, over the power of its output
    """

    spread: Tensor
    gram: Tensor


def record(run: Callable[..., Any], model: nn.Module, names: Sequence[str], calls: Any, say: Say) -> dict[str, Moments]:
    """Moments of the channels that each of the layers `names` reads, over recorded calls."""
    found: dict[str, Moments] = {}

    def adder(name: str) -> Callable[..., None]:
        def add(layer: Any, arguments: tuple[Tensor, ...]) -> None:
            rows = sites.strided(sites.channels_last(arguments[0]))
            found.setdefault(name, Moments(rows.shape[1])).add(rows)

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(adder(name)) for name in names]
    play(run, calls, handles, say)
    return found


def covariance(moments: Moments) -> Tensor:
    mean = moments.matrix[-1, :-1] / moments.rows
    return moments.matrix[:-1, :-1] / moments.rows - mean[:, None] * mean


def outputs(layer: Any, moments: Moments) -> Tensor:
    """(outputs, outputs) covariance of what a linear layer gives, of its inputs' moments."""
    weight = layer.weight.detach().double()
    spread: Tensor = weight @ covariance(moments) @ weight.T
    return spread


def views_of(
    stream: Stream, model: nn.Module, wiring: Wiring, moments: dict[str, Moments], compensate: bool
) -> list[View]:
    """One view for each time a layer reads `stream`."""
    found = []
    for name, wire in wiring.layers.items():
        start = 0
        for read in wire.reads:
            if read is stream:
                found.append(_view(model.get_submodule(name), moments[name], start, stream.width, compensate))
            start += read.width
    return found


def _view(layer: Any, moments: Moments, start: int, width: int, compensate: bool) -> View:
    whole = covariance(moments) if compensate else moments.matrix[:-1, :-1] / moments.rows
    weight = layer.weight.detach().double()
    if weight.ndim > 2:  # every tap of a convolution is an output of its own
        weight = weight.flatten(2).transpose(1, 2).flatten(0, 1)
    gram = weight.T @ weight
    power = (gram * whole).sum().clamp(min=1e-300)
    part = slice(start, start + width)
    return View(whole[part, part], gram[part, part] / power)


def chosen(stream: Stream, keep: int, views: Sequence[View], compensate: bool) -> list[int]:
    """The `keep` channels of `stream` that stay, rising; every cell loses as many, one at a time.

    With nothing refitted (`compensate` False) the order is that of what each channel alone gives to its readers.
    """
    import torch

    per_cell = stream.width // stream.cells
    left = torch.full((stream.cells,), (stream.width - keep) // stream.cells)
    eliminations = [_Elimination(view, compensate) for view in views]
    there = torch.ones(stream.width, dtype=torch.bool)
    for _ in range(stream.width - keep):
        costs = torch.stack([view.costs() for view in eliminations]).sum(0)
        may_go = there & (left > 0).repeat_interleave(per_cell)
        channel = int(torch.where(may_go, costs, torch.inf).argmin())
        there[channel] = False
        left[channel // per_cell] -= 1
        for view in eliminations:
            view.remove(channel)
    return there.nonzero()[:, 0].tolist()


class _Elimination:
    """One reader's view while channels leave: its inverse and its Gram matrix, as the others' weights take over.

    Channels leave one at a time, each with the costs that those before it left: of two alike one has to stay. Only
    the diagonals are kept up to date at once, and the columns that leave; the matrices follow in blocks.
    """

    _BLOCK = 32

    def __init__(self, view: View, compensate: bool) -> None:
        import torch

        spread = view.spread
        ridged = spread + torch.eye(len(spread), dtype=torch.float64) * (RIDGE * spread.diagonal().mean() + 1e-300)
        self.inverse = torch.linalg.inv(ridged) if compensate else ridged.diagonal().reciprocal().diag()
        self.gram = view.gram.clone()
        self.of_inverse, self.of_gram = self.inverse.diagonal().clone(), self.gram.diagonal().clone()
        # Of each channel that left since the last block: its root column, its share to each other, its products.
        self.roots: list[Tensor] = []
        self.shares: list[Tensor] = []
        self.products: list[Tensor] = []

    def costs(self) -> Tensor:
        """What each channel costs the reader, over the power of its output; of no meaning for those that left."""
        return self.of_gram / self.of_inverse.clamp(min=1e-300)

    def remove(self, channel: int) -> None:
        """W_k becomes W_k - W_c share_k, with share_k = (H^-1)_ck / (H^-1)_cc."""
        column, products = self.inverse[:, channel].clone(), self.gram[:, channel].clone()
        for root, share, product in zip(self.roots, self.shares, self.products, strict=True):
            column -= root[channel] * root
            products -= product[channel] * share + share[channel] * product
        root = column / column[channel].sqrt()
        share = column / column[channel]
        # Half of the square's part goes to each side: share x products + products x share is then the whole change.
        products -= 0.5 * products[channel] * share
        self.of_inverse -= root.square()
        self.of_gram -= 2 * share * products
        self.roots.append(root)
        self.shares.append(share)
        self.products.append(products)
        if len(self.roots) == self._BLOCK:
            self._catch_up()

    def _catch_up(self) -> None:
        import torch

        roots, shares, products = (torch.stack(rows, 1) for rows in (self.roots, self.shares, self.products))
        self.inverse -= roots @ roots.T
        change = shares @ products.T
        self.gram -= change + change.T
        self.roots, self.shares, self.products = [], [], []


# --- attention ---


def turn(attention: Any, queries: Tensor, keys: Tensor, inside: Tensor) -> None:
    """Turn the dimensions of each head, in place, so that the last matter least; the function stays.

    `queries`, `keys` (width, width) are covariances of what to_q and to_k give, `inside` of what to_out reads. With
    q = L a, k = M b and white a and b, scores are a^T (L^T M) b; the singular vectors of that product, and of the
    output's weights times the root of `inside`, are the new dimensions. What keys have in common moves no softmax.
    """
    import torch

    width = attention.to_q.out_features // attention.heads
    out = attention.to_out[0]
    read = out.weight.detach().clone()
    for head in range(attention.heads):
        part = slice(head * width, (head + 1) * width)
        of_q, of_k, of_v = (_root(matrix[part, part]) for matrix in (queries, keys, inside))
        left, values, right = torch.linalg.svd(of_q.T @ of_k)
        root = values.clamp(min=1e-12 * values.max() + 1e-300).sqrt()
        _turn_rows(attention.to_q, part, root[:, None] * torch.linalg.solve(of_q.T, left).T)
        _turn_rows(attention.to_k, part, root[:, None] * torch.linalg.solve(of_k.T, right.T).T)
        reads = read[:, part].double()
        basis = torch.linalg.svd(reads @ of_v, full_matrices=False)[2]
        _turn_rows(attention.to_v, part, torch.linalg.solve(of_v.T, basis.T).T)
        read[:, part] = (reads @ of_v @ basis.T).to(read.dtype)
    out.weight = torch.nn.Parameter(read, requires_grad=False)


def _root(spread: Tensor) -> Tensor:
    """L of L L^T = `spread`, which a little noise keeps regular."""
    import torch

    noise = 1e-6 * spread.diagonal().mean() + 1e-12
    return torch.linalg.cholesky(spread + noise * torch.eye(len(spread), dtype=torch.float64))


def _turn_rows(layer: Any, part: slice, by: Tensor) -> None:
    from torch import nn

    for name in ("weight", "bias"):
        values = getattr(layer, name, None)
        if values is not None:
            turned = values.detach().clone()
            turned[part] = (by @ turned[part].double()).to(turned.dtype)
            setattr(layer, name, nn.Parameter(turned, requires_grad=False))
