"""Metrics: known values, and nothing that is not a number ever passes a floor."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from sdcompile import metrics
from sdcompile.spec import PRECISIONS

DRAW = np.random.default_rng(0)
NOT_FINITE = (np.nan, np.inf, -np.inf)


def noisy(reference: np.ndarray, snr_db: float) -> np.ndarray:
    noise = DRAW.standard_normal(reference.shape)
    noise *= np.linalg.norm(reference) / np.linalg.norm(noise) * 10 ** (-snr_db / 20)
    return reference + noise


@pytest.mark.parametrize("db", [5.0, 24.0, 60.0, 110.0])
def test_snr_is_the_ratio_of_signal_to_error_energy(db):
    reference = DRAW.standard_normal((3, 40, 40))
    assert metrics.snr_db(reference, noisy(reference, db)) == pytest.approx(db, abs=1e-6)


def test_psnr_of_a_constant_error_is_known():
    image = np.full((4, 4, 3), 0.5, np.float32)
    assert metrics.psnr_db(image, image + np.float32(0.1)) == pytest.approx(20.0, abs=1e-4)


def test_cosine_ignores_gain_and_sees_direction():
    a = np.array([1.0, 2.0, -3.0])
    assert metrics.cosine(a, 7 * a) == pytest.approx(1.0)
    assert metrics.cosine(a, -a) == pytest.approx(-1.0)
    assert metrics.cosine([1.0, 0.0], [0.0, 1.0]) == 0.0


def test_equal_arrays_have_the_best_figures():
    a = DRAW.standard_normal(50).astype(np.float32)
    assert metrics.snr_db(a, a) == metrics.psnr_db(a, a) == metrics.IDENTICAL_DB
    assert metrics.cosine(a, a) == pytest.approx(1.0)
    assert metrics.max_abs(a, a) == 0.0


def test_a_reference_of_zeros_agrees_with_zeros_only():
    zeros, tiny = np.zeros(8), np.full(8, 1e-30)
    assert metrics.snr_db(zeros, zeros) == metrics.IDENTICAL_DB
    assert metrics.cosine(zeros, zeros) == 1.0
    assert metrics.snr_db(zeros, tiny) == metrics.WORST_DB
    assert metrics.cosine(zeros, tiny) == 0.0
    assert metrics.cosine(tiny, zeros) == 0.0
    assert metrics.snr_db(tiny, zeros) == pytest.approx(0.0)


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("side", ["reference", "value"])
def test_nan_and_infinity_never_pass_any_floor(bad, side):
    good = np.ones(100)
    broken = good.copy()
    broken[17] = bad
    pair = (broken, good) if side == "reference" else (good, broken)
    snr, cosine = metrics.snr_db(*pair), metrics.cosine(*pair)
    assert not any(floor.holds(snr, cosine) for floor in metrics.FLOORS.values())
    assert metrics.psnr_db(*pair) < min(metrics.IMAGE_FLOORS_DB.values())
    assert metrics.max_abs(*pair) == math.inf
    assert not metrics.is_finite(broken)


def test_nan_on_both_sides_is_no_agreement():
    both = np.array([1.0, np.nan])
    assert metrics.snr_db(both, both) == metrics.WORST_DB
    assert metrics.cosine(both, both) == -1.0


def test_figures_are_plain_json_numbers_even_at_the_ends():
    a = np.ones(3, np.float32)
    pairs = [(a, a), (a * 0, a), (a, a * np.nan), (a, a * np.inf)]
    found = [measure(*pair) for pair in pairs for measure in (metrics.snr_db, metrics.psnr_db, metrics.cosine)]
    json.dumps(found, allow_nan=False)


def test_the_extremes_of_float32_do_not_overflow():
    big, small = np.full(10, 3e38, np.float32), np.full(10, 1e-38, np.float32)
    assert metrics.snr_db(big, -big) == pytest.approx(-6.02, abs=0.01)
    assert metrics.snr_db(small, small * np.float32(0.5)) == pytest.approx(6.02, abs=0.01)
    assert metrics.snr_db(small, big) == metrics.WORST_DB


def test_different_shapes_are_refused_not_broadcast():
    for measure in (metrics.snr_db, metrics.psnr_db, metrics.cosine, metrics.max_abs):
        with pytest.raises(ValueError, match=r"shape \(1,\) where the reference has \(4,\)"):
            measure(np.ones(4), np.ones(1))


def test_every_precision_has_floors_and_a_wider_one_is_stricter():
    assert set(metrics.FLOORS) == set(metrics.IMAGE_FLOORS_DB) == set(PRECISIONS)
    order = ("fp32", "fp16", "bf16", "int8")
    for wide, narrow in pairwise(order):
        assert metrics.FLOORS[wide].min_snr_db > metrics.FLOORS[narrow].min_snr_db
        assert metrics.FLOORS[wide].min_cosine > metrics.FLOORS[narrow].min_cosine
        assert metrics.IMAGE_FLOORS_DB[wide] > metrics.IMAGE_FLOORS_DB[narrow]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_cosine_floor_does_not_bind_where_the_snr_floor_holds(precision):
    floor = metrics.FLOORS[precision]
    assert floor.min_cosine <= math.sqrt(1 - 10 ** (-floor.min_snr_db / 10))


MEASURED = [("fp32", 1e-3), ("fp16", 4e-3), ("bf16", 3e-2), ("int8", 0.124)]


@pytest.mark.parametrize(("precision", "relative_error"), MEASURED)
def test_measured_errors_of_sound_engines_pass_and_ten_times_as_much_does_not(precision, relative_error):
    reference = DRAW.standard_normal((2, 4, 64, 64))
    floor = metrics.FLOORS[precision]
    for scale, expected in ((0.99, True), (10, False)):
        value = noisy(reference, -20 * math.log10(scale * relative_error))
        assert floor.holds(metrics.snr_db(reference, value), metrics.cosine(reference, value)) is expected
