"""Is a bundle slower than it was? Two bench results of one machine, compared beyond noise.

Where both results hold the same peer, ratios to that peer are compared, in which the state of the
machine drops out; else seconds are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdcompile.errors import RecipeError, RegressionError
from sdcompile.measure import figures
from sdcompile.measure.bench import FORMAT

Result = Mapping[str, Any]

_TIMES = ("image_s", "cold_start_s")
_MEMORY = "peak_bytes"
_MACHINE = ("cpu", "threads")


def read(path: Path, kind: str = "bench", version: int = FORMAT) -> dict[str, Any]:
    """A result that was written earlier. Raises RecipeError when `path` holds none of this kind."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = (data["kind"], data["format"])
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} holds no {kind} result", f"sdcompile {kind} ... --output FILE writes one") from error
    if found != (kind, version):
        raise RecipeError(f"{path} holds a result of kind {found[0]}, format {found[1]}; expected {kind}, {version}")
    result: dict[str, Any] = data
    return result


def compare(new: Result, old: Result, allowed: float) -> list[dict[str, Any]]:
    """One row per bundle and figure that both hold: {"name", "figure", "by", "old", "new", "ratio", "regressed"}.

    Raises RecipeError when they are of different machines or requests, or have no bundle in common.
    """
    for key in _MACHINE:
        if new["host"][key] != old["host"][key]:
            raise RecipeError(
                f"the baseline was measured on another machine: {key} {old['host'][key]}, here {new['host'][key]}",
                "measure the baseline here: sdcompile bench BUNDLE --output baseline.json",
            )
    before = {row["name"]: row for row in old["contenders"]}
    pairs = [(row, before[row["name"]]) for row in new["contenders"] if row["name"] in before]
    bundles = [(now, was) for now, was in pairs if now["kind"] == "bundle"]
    if not bundles:
        raise RecipeError(
            f"the baseline has none of these bundles: it has {', '.join(before)}",
            "bundles are matched by name; measure the baseline with the same ones",
        )
    for now, was in bundles:
        if (now["call"], now["sampler"]) != (was["call"], was["sampler"]):
            raise RecipeError(
                f"{now['name']} was asked something else in the baseline: {was['sampler']}, {was['call']}",
                f"ask the same now: {now['sampler']}, {now['call']}; or measure a new baseline",
            )
    peers = [(now, was) for now, was in pairs if now["kind"] == "peer"]
    return [row for now, was in bundles for row in _rows(now, was, peers, allowed)]


def _rows(now: Result, was: Result, peers: list[tuple[Result, Result]], allowed: float) -> Iterator[dict[str, Any]]:
    by = f"seconds over those of {peers[0][0]['name']}" if peers else "seconds"
    for figure in _TIMES:
        over, under = [now["figures"][figure]["all"]], [was["figures"][figure]["all"]]
        if peers:
            # The peer slowed as much as the machine did: now's goes below the line, the old one above it.
            over.append(peers[0][1]["figures"][figure]["all"])
            under.append(peers[0][0]["figures"][figure]["all"])
        old, new = was["figures"][figure]["median"], now["figures"][figure]["median"]
        yield _row(now, figure, by, old, new, figures.ratio_of_medians(over, under), allowed)
    ratio = figures.exact(now[_MEMORY] / was[_MEMORY])
    yield _row(now, _MEMORY, "bytes", was[_MEMORY], now[_MEMORY], ratio, allowed)


def _row(
    now: Result, figure: str, by: str, old: float, new: float, ratio: figures.Ratio, allowed: float
) -> dict[str, Any]:
    return {
        "name": now["name"], "figure": figure, "by": by, "old": old, "new": new, "ratio": ratio.as_json(),
        "regressed": figures.is_regression(ratio, allowed),
    }  # fmt: skip


def require(rows: list[dict[str, Any]], allowed: float) -> None:
    """Raise RegressionError naming every figure that fell behind."""
    fallen = [
        f"{row['name']}: {row['figure']} {row['old']:.4g} -> {row['new']:.4g}, x{row['ratio']['median']:.3f} "
        f"({row['ratio']['low']:.3f} to {row['ratio']['high']:.3f}, by {row['by']})"
        for row in rows
        if row["regressed"]
    ]
    if fallen:
        raise RegressionError(
            "\n".join(fallen),
            f"allowed was x{1 + allowed:.3f}; measure again on a quiet machine, or accept it by writing a new baseline",
        )


def fraction(text: str) -> float:
    """ "5%" or "0.05" -> 0.05. Raises RecipeError for anything else."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise RecipeError(f"--max-regression {text}: not a share", "as in 5% or 0.05")
    return value
