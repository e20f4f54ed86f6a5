"""How much each unit of a site matters: by weights, by gradients, by output, by likeness to another one.

Every function gives scores (units,) float64; the unit of the least goes first. What least squares
can make up for is not in them: that order comes with `compensation.removal`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sdcompile.passes import pruning
from sdcompile.passes.base import Setting
from sdcompile.passes.compensation import Layer, Moments
from sdcompile.passes.sites import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

Importance = Literal["reconstruction", "taylor", "l1", "l2"]

_POSITIONS = 4096
"""Latent positions whose gradients are kept at once: one row of 64 x 64."""


def norm(model: nn.Module, site: Site, power: float) -> Tensor:
    """Sum of |weight|^power over what writes and reads each unit."""
    import torch

    scores = torch.zeros(site.units, dtype=torch.float64)
    for name in site.writers:
        weight: Any = model.get_submodule(name).weight
        # (halves, units, width, the rest): gated layers and scale-and-shift have two rows per unit
        rows = weight.detach().double().abs().pow(power).flatten(1).sum(1)
        scores += rows.view(-1, site.units, site.width).sum((0, 2))
    weight = model.get_submodule(site.reader).weight
    columns = weight.detach().double().abs().pow(power).transpose(0, 1).flatten(1).sum(1)
    return scores + columns.view(site.units, site.width).sum(1)


def output(layer: Layer, moments: Moments) -> Tensor:
    """What each unit alone adds to the output, squared and summed over the recorded rows."""
    blocks = moments.matrix[layer.columns[:, :, None], layer.columns[:, None, :]]
    mine = layer.weight[:, layer.columns].permute(1, 0, 2)  # (units, outputs, columns)
    return ((mine @ blocks) * mine).sum((1, 2))


def redundancy(layer: Layer, moments: Moments) -> Tensor:
    """Scores by clustering: units whose output another one repeats come first.

    Similarity is the cosine of two units' contributions to the output over the recorded rows. The two
    most similar clusters are joined again and again (average linkage), and of each joined pair the
    unit with the smaller contribution goes; the survivor takes over its part by least squares.
    """
    import torch

    mine = layer.weight[:, layer.columns].permute(1, 0, 2)
    blocks = moments.matrix[layer.columns[:, None, :, None], layer.columns[None, :, None, :]]
    products = torch.einsum("uoa,uvab,vob->uv", mine, blocks, mine)
    power = products.diagonal().clamp(min=1e-300)
    similar = products / (power[:, None] * power).sqrt()
    members = {unit: [unit] for unit in range(layer.units)}
    scores = torch.full((layer.units,), float(layer.units), dtype=torch.float64)
    for turn in range(layer.units - 1):
        pairs = [(a, b) for a in members for b in members if a < b]
        near = max(pairs, key=lambda p: float(similar[members[p[0]]][:, members[p[1]]].mean()))
        loser, winner = sorted(near, key=lambda unit: float(power[unit]))
        scores[loser] = float(turn)
        members[winner] += members.pop(loser)
    return scores


def taylor(
    run: Callable[..., Tensor], model: nn.Module, places: Sequence[Site], calls: Sequence[tuple[Tensor, ...]]
) -> dict[str, Tensor]:
    """First-order change of the model's output when a unit goes: E (sum of x dL/dx)^2 over the calls.

    L is the output's product with random signs, so the expectation is the squared length of the
    Jacobian times the unit's activation (Hutchinson 1990); no target is needed. Gradient times
    activation as in Molchanov et al. 2019, arXiv:1906.10771.
    """
    import torch

    signs = torch.Generator().manual_seed(0)
    scores = {site.module: torch.zeros(site.units, dtype=torch.float64) for site in places}
    units = {site.module: site.units for site in places}
    for call in (part for whole in calls for part in pruning.parts_of(whole, _POSITIONS)):
        kept: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(site.reader).register_forward_pre_hook(_keeper(kept, site.module)) for site in places
        ]
        try:
            with torch.enable_grad():
                answer = run(call[0].clone().requires_grad_(), *call[1:])
        finally:
            for handle in handles:
                handle.remove()
        ones = torch.randint(0, 2, answer.shape, generator=signs).to(answer.dtype) * 2 - 1
        names = list(kept)
        gradients = torch.autograd.grad((answer * ones).sum(), [kept[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            product = (kept[name].detach() * gradient).double()
            axis = 1 if product.ndim == 4 else -1
            rows = product.movedim(axis, -1).flatten(1, -2).sum(1)  # (rows, inputs)
            scores[name] += rows.view(len(rows), units[name], -1).sum(2).square().sum(0)
    return scores


def working_gib(params: Any, setting: Setting) -> float:
    """What choosing by the field `importance` of `params` takes beside weights and moments, in GiB."""
    return pruning.gradients_gib(setting, _POSITIONS, _POSITIONS) if params.importance == "taylor" else 0.0


def _keeper(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(reader: Any, arguments: tuple[Tensor, ...]) -> None:
        kept[name] = arguments[0]

    return keep
