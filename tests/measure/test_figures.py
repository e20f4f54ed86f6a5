"""Medians, ratios and regressions: what is said of numbers, with noise and without."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from sdcompile.errors import RecipeError, RegressionError
from sdcompile.measure import baseline, figures


def noisy(middle: float, spread: float, n: int = 30, seed: int = 0) -> list[float]:
    return (middle * (1 + spread * np.random.default_rng(seed).standard_normal(n))).tolist()


def test_a_summary_holds_median_quartiles_and_extremes():
    told = figures.summary([3.0, 1.0, 2.0, 4.0, 5.0])
    assert (told["median"], told["low"], told["high"], told["min"], told["max"], told["n"]) == (3, 2, 4, 1, 5, 5)
    assert figures.summary([]) is None
    assert figures.summary([1.0] * 500)["all"] == []


def test_paired_ratios_do_not_see_what_slows_both():
    drift = np.linspace(1, 5, 30)
    base = np.array(noisy(1.0, 0.01)) * drift
    slow = np.array(noisy(1.5, 0.01, seed=1)) * drift
    ratio = figures.paired_ratio(slow, base)
    assert ratio.median == pytest.approx(1.5, abs=0.02)
    assert 0 < ratio.high - ratio.low < 0.05
    apart = figures.ratio_of_medians([slow.tolist()], [base.tolist()])
    assert apart.high - apart.low > 5 * (ratio.high - ratio.low), "unpaired, the drift is noise"


def test_ratios_of_unequal_rows_are_refused():
    with pytest.raises(ValueError, match="3 values are paired with 2"):
        figures.paired_ratio([1, 2, 3], [1, 2])


@pytest.mark.parametrize(
    ("slower", "spread", "regressed"), [(1.0, 0.02, False), (1.2, 0.02, True), (1.04, 0.001, False), (1.08, 0.6, False)]
)
def test_a_regression_is_more_than_allowed_and_more_than_noise(slower, spread, regressed):
    ratio = figures.ratio_of_medians([noisy(slower, spread)], [noisy(1.0, spread, seed=3)])
    assert figures.is_regression(ratio, 0.05) is regressed


# Baselines


def row(name: str, seconds: float, kind: str = "bundle", peak: int = 1 << 28) -> dict:
    call = {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 64, "width": 64}
    times = {key: figures.summary(noisy(seconds, 0.01, 12)) for key in ("image_s", "cold_start_s")}
    return {"name": name, "kind": kind, "call": call, "sampler": "ddim", "figures": times, "peak_bytes": peak}


def result(*rows: dict) -> dict:
    return {"kind": "bench", "format": 1, "host": {"cpu": "a cpu", "threads": 2}, "contenders": list(rows)}


def regressed(new: dict, old: dict) -> set[str]:
    return {row["figure"] for row in baseline.compare(new, old, 0.05) if row["regressed"]}


def test_a_slower_or_larger_bundle_falls_behind_and_an_equal_one_does_not():
    old = result(row("a", 1.0))
    assert regressed(result(row("a", 1.0)), old) == set()
    assert regressed(result(row("a", 1.2)), old) == {"image_s", "cold_start_s"}
    assert regressed(result(row("a", 1.0, peak=1 << 29)), old) == {"peak_bytes"}
    with pytest.raises(RegressionError, match=r"a: image_s 1\.0\d* -> 1\.2"):
        baseline.require(baseline.compare(result(row("a", 1.2)), old, 0.05), 0.05)


def test_with_a_peer_in_both_a_slower_machine_is_no_regression_and_a_slower_bundle_is():
    old = result(row("a", 1.0), row("diffusers-fp32", 4.0, "peer"))
    slow_machine = result(row("a", 2.0), row("diffusers-fp32", 8.0, "peer"))
    assert regressed(slow_machine, old) == set()
    slow_bundle = result(row("a", 2.4), row("diffusers-fp32", 8.0, "peer"))
    assert regressed(slow_bundle, old) == {"image_s", "cold_start_s"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["host"].update(cpu="another"), "another machine"),
        (lambda r: r["contenders"][0].update(name="b"), "none of these bundles"),
        (lambda r: r["contenders"][0]["call"].update(num_inference_steps=5), "asked something else"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, words):
    old = result(row("a", 1.0))
    changed = copy.deepcopy(old)
    change(changed)
    with pytest.raises(RecipeError, match=words):
        baseline.compare(old, changed, 0.05)


@pytest.mark.parametrize(("text", "words"), [("{", "no bench result"), ('{"kind": "eval", "format": 1}', "kind eval")])
def test_a_file_that_is_no_baseline_is_refused(tmp_path, text, words):
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(RecipeError, match=words):
        baseline.read(tmp_path / "old.json")
    with pytest.raises(RecipeError, match="cannot be read"):
        baseline.read(tmp_path / "none.json")
    (tmp_path / "ok.json").write_text(json.dumps(result(row("a", 1.0))))
    assert baseline.read(tmp_path / "ok.json")["contenders"][0]["name"] == "a"


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.2", 0.2), ("0", 0.0)])
def test_shares_are_read(text, value):
    assert baseline.fraction(text) == pytest.approx(value)
    for wrong in ("much", "-5%", "nan", "2000%"):
        with pytest.raises(RecipeError, match="not a share"):
            baseline.fraction(wrong)
