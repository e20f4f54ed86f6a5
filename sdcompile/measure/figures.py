"""What repeated measurements say: medians, their spread, ratios with intervals, and regressions.

Numpy only. It knows numbers and not what they measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_RESAMPLES = 2000
_CONFIDENCE = 0.95
_KEEP = 100


def summary(values: Sequence[float]) -> dict[str, Any] | None:
    """Median, quartiles and extremes of `values`, and up to 100 values themselves; None for none."""
    if not values:
        return None
    low, middle, high = np.percentile(values, [25, 50, 75])
    kept = values if len(values) <= _KEEP else ()
    return {
        "median": _short(middle), "low": _short(low), "high": _short(high), "min": _short(min(values)),
        "max": _short(max(values)), "n": len(values), "all": [_short(value) for value in kept],
    }  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """A ratio of two measured things and its 95 % interval."""

    median: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        return {"median": _short(self.median), "low": _short(self.low), "high": _short(self.high)}


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> Ratio:
    """Median of values[i] / base[i], measured in turns, with a bootstrap interval (Efron 1979, percentiles).

    Pairs share a moment of the machine, so what slows both drops out. Raises ValueError when the lengths differ.
    """
    if len(values) != len(base):
        raise ValueError(f"{len(values)} values are paired with {len(base)}")
    quotients = np.asarray(values, float) / np.asarray(base, float)
    rows = np.random.default_rng(0).integers(len(quotients), size=(_RESAMPLES, len(quotients)))
    return _interval(float(np.median(quotients)), np.median(quotients[rows], axis=1))


def ratio_of_medians(over: Sequence[Sequence[float]], under: Sequence[Sequence[float]]) -> Ratio:
    """Product of the medians of `over` by that of `under`, each measured apart, with a bootstrap interval."""
    random = np.random.default_rng(0)
    middle, resampled = 1.0, np.ones(_RESAMPLES)
    for sides, power in ((over, 1), (under, -1)):
        for side in sides:
            values = np.asarray(side, float)
            middle *= float(np.median(values)) ** power
            resampled *= np.median(random.choice(values, (_RESAMPLES, len(values))), axis=1) ** power
    return _interval(middle, resampled)


def exact(value: float) -> Ratio:
    """The ratio of two things that have no spread."""
    return Ratio(value, value, value)


def is_regression(ratio: Ratio, allowed: float) -> bool:
    """Is new/old worse than 1 + `allowed`, and worse than 1 beyond what noise explains?"""
    return ratio.median > 1 + allowed and ratio.low > 1


def _interval(middle: float, resampled: np.ndarray) -> Ratio:
    tail = 100 * (1 - _CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Ratio(middle, float(low), float(high))


def _short(value: float) -> float:
    """Six significant digits: more than any clock here is worth."""
    return float(f"{value:.6g}")
