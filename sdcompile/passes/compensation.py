"""Least squares for a layer that loses inputs: which to take, and what the others must become.

A linear layer y = W x + b (a convolution over unfolded inputs is one) loses some of its inputs.
Over the recorded inputs the change of its output is a quadratic form of the change of W, whose
matrix is the inputs' second moments; so everything here follows from one matrix per layer,
summed in float64 while the samples stream by, and from W itself. No output is ever stored.

    min over D of |D x|^2 + ridge * mean |x|^2 * |D|^2   with the columns of W + D that go equal to zero

Removing one unit costs tr(W_u [(H^-1)_uu]^-1 W_u^T), and the others' new weights follow from the
same inverse: the optimal brain surgeon (Hassibi and Stork 1993) with units of several columns, as in
ZipLM (Kurtic et al. 2023, arXiv:2302.04089). The room knows matrices, not models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdcompile.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor


class Moments:
    """Sum over rows x of [x 1]^T [x 1], (columns + 1, columns + 1) float64; the one stands for the bias."""

    def __init__(self, columns: int) -> None:
        import torch

        self.matrix = torch.zeros(columns + 1, columns + 1, dtype=torch.float64)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add rows (n, columns). Raises StageError when they hold a NaN or an infinity."""
        import torch

        x = x.double()
        if not torch.isfinite(x).all():
            raise StageError("the recorded inputs hold NaN or infinity", "record the calibration samples again")
        total = x.sum(0)
        self.matrix[:-1, :-1].addmm_(x.T, x)
        self.matrix[-1, :-1] += total
        self.matrix[:-1, -1] += total
        self.matrix[-1, -1] += len(x)
        self.rows += len(x)


@dataclass(frozen=True)
class Layer:
    """weight (outputs, columns) and bias (outputs,), float64, and which columns each unit owns.

    columns   (units, columns per unit), the places of each unit
    """

    weight: Tensor
    bias: Tensor
    columns: Tensor

    @property
    def units(self) -> int:
        return len(self.columns)


@dataclass(frozen=True)
class Removal:
    """The order in which units go, and the layer's relative squared output error after each.

    order   units, the first to go first; those that always stay, the last one at least, are not among them
    error   (len(order) + 1,): |y' - y|^2 / |y - mean y|^2 after 0, 1, 2, ... units are gone
    """

    order: tuple[int, ...]
    error: tuple[float, ...]

    def kept(self, count: int, units: int) -> list[int]:
        """The units left after `count` have gone, rising."""
        gone = set(self.order[:count])
        return [unit for unit in range(units) if unit not in gone]


def removal(
    layer: Layer, moments: Moments, ridge: float | None, scores: Tensor | None = None, most: int | None = None
) -> Removal:
    """The order in which units go: by rising `scores` (units,), or always those whose loss the others best make up for.

    `ridge` None: nothing is made up for; it takes scores. One unit goes at a time, of more than 64 a
    sixty-fourth at once, so that wide layers stay affordable; errors between are on the line between. It ends when
    `most` are gone (None: all but one).
    """
    import numpy as np

    if ridge is None:
        assert scores is not None
        steps = _dropping(layer, moments, scores)
    else:
        steps = _eliminating(layer, moments, ridge, scores)
    order: list[int] = []
    counts, costs = [0], [0.0]
    while len(order) < (layer.units - 1 if most is None else most):
        units, cost = next(steps)
        order += units
        counts.append(len(order))
        costs.append(cost)
    errors = np.array(costs) / max(output_power(layer, moments), 1e-300)
    return Removal(tuple(order), tuple(np.interp(range(len(order) + 1), counts, errors).tolist()))


def _eliminating(
    layer: Layer, moments: Moments, ridge: float, scores: Tensor | None
) -> Iterator[tuple[list[int], float]]:
    """(units that go together, cost of all that are gone) until one unit is left; costs include the ridge's part.

    The inverse of the moments is kept up to date block by block, and with it the others' weights; both shrink.
    """
    import torch

    inverse = torch.linalg.inv(_ridged(moments, ridge))
    weights = torch.cat([layer.weight, layer.bias[:, None]], 1)
    left, at = torch.arange(layer.units), torch.arange(len(inverse))
    cost = 0.0
    while len(left) > 1:
        places = at[layer.columns[left]]
        if scores is None:
            own = inverse[places[:, :, None], places[:, None, :]]
            mine = weights[:, places].permute(1, 2, 0)  # (units, columns, outputs)
            ranks = (mine * torch.linalg.solve(own, mine)).sum((1, 2))
        else:
            ranks = scores[left]
        going = torch.argsort(ranks, stable=True)[: min(_at_once(layer), len(left) - 1)]
        gone = places[going].reshape(-1)
        there = torch.ones(len(inverse), dtype=torch.bool)
        there[gone] = False
        inside, lost = torch.linalg.inv(inverse[gone[:, None], gone]), weights[:, gone]
        cost += float(((lost @ inside) * lost).sum())
        shares = inside @ inverse[gone][:, there]
        weights = weights[:, there].addmm_(lost, shares, alpha=-1)
        inverse = inverse[there][:, there].addmm_(inverse[there][:, gone], shares, alpha=-1)
        yield left[going].tolist(), cost
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[going] = False
        left, at = left[stays], (there.cumsum(0) - 1)[at]


def _dropping(layer: Layer, moments: Moments, scores: Tensor) -> Iterator[tuple[list[int], float]]:
    """As `_eliminating`, with nothing made up for."""
    import torch

    order = torch.argsort(scores, stable=True).tolist()[:-1]
    for start in range(0, len(order), _at_once(layer)):
        going = order[start : start + _at_once(layer)]
        keep = sorted(set(range(layer.units)) - set(order[: start + len(going)]))
        yield going, output_change(layer, moments, *solved(layer, moments, keep, None))


def _at_once(layer: Layer) -> int:
    return max(1, layer.units // 64)


def solved(layer: Layer, moments: Moments, keep: list[int], ridge: float | None) -> tuple[Tensor, Tensor]:
    """(weight, bias) with the columns of all units but `keep` zero, and the others as near as can be.

    `ridge` None leaves the others as they are. Keeping everything returns the layer's own tensors.
    """
    import torch

    gone = sorted(set(range(layer.units)) - set(keep))
    if not gone:
        return layer.weight, layer.bias
    lost = layer.columns[gone].reshape(-1)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    weight[:, lost] = 0.0
    if ridge is not None:
        mask = torch.ones(layer.weight.shape[1] + 1, dtype=torch.bool)
        mask[lost] = False
        left = mask.nonzero()[:, 0]
        matrix = _ridged(moments, ridge)
        # (H_KK) D_K^T = H_KR W_R^T: the least change of what stays that makes up for what goes.
        change = torch.linalg.solve(matrix[left[:, None], left], matrix[left[:, None], lost] @ layer.weight[:, lost].T)
        weight[:, left[:-1]] += change[:-1].T
        bias += change[-1]
    return weight, bias


def relative_error(layer: Layer, moments: Moments, weight: Tensor, bias: Tensor) -> float:
    """`output_change` over `output_power`."""
    return output_change(layer, moments, weight, bias) / max(output_power(layer, moments), 1e-300)


def output_change(layer: Layer, moments: Moments, weight: Tensor, bias: Tensor) -> float:
    """Sum over the recorded rows of |(weight x + bias) - (layer.weight x + layer.bias)|^2."""
    import torch

    change = torch.cat([weight - layer.weight, (bias - layer.bias)[:, None]], 1)
    return float(((change @ moments.matrix) * change).sum().clamp(min=0.0))


def output_power(layer: Layer, moments: Moments) -> float:
    """Sum over the recorded rows of the output's squared distance from its mean."""
    mean = moments.matrix[-1, :-1] / moments.rows
    spread = moments.matrix[:-1, :-1] - moments.rows * mean[:, None] * mean
    return float(((layer.weight @ spread) * layer.weight).sum().clamp(min=0.0))


def _ridged(moments: Moments, ridge: float) -> Tensor:
    """The moments with `ridge` times their mean square on the diagonal; never so little that they stay singular."""
    import torch

    matrix = moments.matrix.clone()
    diagonal = matrix.diagonal()
    diagonal[:-1] += (ridge + 1e-12) * matrix.diagonal()[:-1].mean()
    if not torch.isfinite(matrix).all() or diagonal[:-1].max() <= 0.0:
        raise StageError("the recorded inputs of a layer are all zero or not finite")
    return matrix
