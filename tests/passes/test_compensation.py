"""Least squares for layers that lose inputs: the closed forms are what a solver finds, and never worse than nothing."""

from __future__ import annotations

import pytest

from sdcompile.errors import StageError

torch = pytest.importorskip("torch")

from sdcompile.passes import compensation  # noqa: E402 - needs torch, as all here does
from sdcompile.passes.compensation import Layer, Moments  # noqa: E402

pytestmark = pytest.mark.tiny


def made(units: int = 6, width: int = 2, rows: int = 400) -> tuple[Layer, Moments, torch.Tensor]:
    """A random layer and correlated inputs with a mean."""
    draw = torch.Generator().manual_seed(0)
    inputs = units * width
    mixing = torch.randn(inputs, inputs, generator=draw) * torch.linspace(0.2, 1.0, inputs)
    x = torch.randn(rows, inputs, generator=draw) @ mixing + torch.randn(inputs, generator=draw)
    weight, bias = torch.randn(5, inputs, generator=draw).double(), torch.randn(5, generator=draw).double()
    moments = Moments(inputs)
    for part in x.split(150):
        moments.add(part)
    return Layer(weight, bias, torch.arange(inputs).view(units, width)), moments, x.double()


def change(layer: Layer, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> float:
    return float((x @ (weight - layer.weight).T + bias - layer.bias).square().sum())


def test_the_quadratic_form_is_the_change_of_the_output():
    layer, moments, x = made()
    weight, bias = compensation.solved(layer, moments, [0, 2, 3, 5], None)
    assert compensation.output_change(layer, moments, weight, bias) == pytest.approx(change(layer, x, weight, bias))
    output = x @ layer.weight.T + layer.bias
    power = float((output - output.mean(0)).square().sum())
    assert compensation.output_power(layer, moments) == pytest.approx(power)


def test_without_ridge_it_is_ordinary_least_squares():
    layer, moments, x = made()
    keep = [1, 2, 4]
    weight, bias = compensation.solved(layer, moments, keep, 0.0)
    columns = layer.columns[keep].reshape(-1)
    left = torch.cat([x[:, columns], torch.ones(len(x), 1).double()], 1)
    expected = torch.linalg.lstsq(left, x @ layer.weight.T + layer.bias).solution
    assert torch.allclose(weight[:, columns], expected[:-1].T, atol=1e-6)
    assert torch.allclose(bias, expected[-1], atol=1e-6)
    gone = layer.columns[[0, 3, 5]].reshape(-1)
    assert not weight[:, gone].any()


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
def test_compensation_never_makes_it_worse(ridge):
    layer, moments, x = made()
    for keep in ([0], [1, 4], [0, 1, 2, 3, 4]):
        plain = change(layer, x, *compensation.solved(layer, moments, keep, None))
        assert change(layer, x, *compensation.solved(layer, moments, keep, ridge)) <= plain * (1 + 1e-9)


def test_wrong_moments_do_make_it_worse():
    """The sibling of the test above: fitted to other inputs, the layer loses more than it would uncompensated."""
    layer, moments, x = made()
    other = Moments(x.shape[1])
    other.add(x.flip(1) * 3)
    plain = change(layer, x, *compensation.solved(layer, moments, [1, 4], None))
    assert change(layer, x, *compensation.solved(layer, other, [1, 4], 1e-3)) > plain


def test_keeping_everything_is_the_identity():
    layer, moments, _ = made()
    weight, bias = compensation.solved(layer, moments, list(range(6)), 1e-3)
    assert weight is layer.weight
    assert bias is layer.bias


def test_a_unit_that_another_repeats_goes_first_and_costs_nothing():
    layer, _, x = made()
    x[:, layer.columns[4]] = 2 * x[:, layer.columns[1]]
    moments = Moments(x.shape[1])
    moments.add(x)
    removal = compensation.removal(layer, moments, 1e-9)
    assert removal.order[0] in (1, 4)
    assert removal.error[0] == 0.0
    assert removal.error[1] < 1e-6
    assert list(removal.error) == sorted(removal.error)
    assert len(removal.order) == 5
    assert removal.kept(2, 6) == sorted(set(range(6)) - set(removal.order[:2]))


def test_the_greedy_order_beats_the_reverse():
    layer, moments, _ = made()
    order = compensation.removal(layer, moments, 1e-6)
    scores = torch.zeros(6).double()
    for rank, unit in enumerate(order.order):
        scores[unit] = -rank
    last = next(unit for unit in range(6) if unit not in order.order)
    scores[last] = -9
    reverse = compensation.removal(layer, moments, 1e-6, scores)
    assert order.error[1] < reverse.error[1]
    assert order.error[3] < reverse.error[3]


@pytest.mark.parametrize("ridge", [None, 1e-9])
def test_the_errors_are_those_of_the_weights_that_come_out(ridge):
    layer, moments, _ = made()
    scores = torch.tensor([3.0, 0.0, 5.0, 1.0, 4.0, 2.0])
    removal = compensation.removal(layer, moments, ridge, scores)
    assert removal.order == (1, 3, 5, 0, 4)
    for count, error in enumerate(removal.error):
        weight, bias = compensation.solved(layer, moments, removal.kept(count, 6), ridge)
        assert compensation.relative_error(layer, moments, weight, bias) == pytest.approx(error, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("ridge", [None, 1e-3])
def test_it_ends_where_no_more_may_go_and_is_the_same_until_there(ridge):
    layer, moments, _ = made(units=100, width=2, rows=1000)
    scores = None if ridge else torch.arange(100.0)
    whole = compensation.removal(layer, moments, ridge, scores)
    part = compensation.removal(layer, moments, ridge, scores, most=30)
    assert len(part.order) == 30
    assert (part.order, part.error) == (whole.order[:30], pytest.approx(whole.error[:31]))
    assert compensation.removal(layer, moments, ridge, scores, most=0).order == ()


def test_wide_layers_lose_several_units_at_once():
    layer, moments, _ = made(units=200, width=1, rows=1000)
    removal = compensation.removal(layer, moments, 1e-3)
    assert sorted(removal.order) == sorted(set(range(200)) - {removal.kept(199, 200)[0]})
    assert len(removal.error) == 200
    assert removal.error[100] < removal.error[199]


def test_nan_in_the_inputs_stops():
    moments = Moments(3)
    with pytest.raises(StageError, match="NaN or infinity"):
        moments.add(torch.tensor([[0.0, float("nan"), 1.0]]))


def test_inputs_of_zeros_say_nothing():
    layer, _, x = made()
    moments = Moments(x.shape[1])
    moments.add(torch.zeros(4, x.shape[1]))
    with pytest.raises(StageError, match="all zero"):
        compensation.solved(layer, moments, [0], 1e-3)
