"""Is the quantized or pruned engine the faster one here, and which groups of its layers are?

It is raced against the same component unquantized, or unpruned. Both take turns on the same feeds, so that a busy
machine slows both. Where engines tell what they spend where, groups of layers are compared as well. What follows is
the caller's to say.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.backends import BACKENDS, Backend, Host, racing
from sdcompile.backends.base import read_card
from sdcompile.files import size_bytes
from sdcompile.passes import qdq
from sdcompile.spec import Job

if TYPE_CHECKING:
    import numpy as np

RACE = "race.json"

_CALLS = 5
"""Calls that kernels are clocked in. The least time of each counts, which other work on the machine disturbs least."""

_WORTH = 0.01
"""Share of a call, by the kernels' clocks, that is worth building again."""

_HOPE = 0.95
"""The predicted ratio must come as near as this to what is wanted: predictions are rough."""


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Time `inputs["engine"]` against `inputs["rival"]` and write race.json.

    inputs["onnx"]: the quantized graph, whose groups are told apart. job.params: backend, of ("quantize" or "prune":
    what must win), speedup (the least ratio of the rival's processor time over the engine's), groups (compare them?).
    """
    backend = BACKENDS[job.params["backend"]]
    cards = {role: read_card(inputs[role], backend.name) for role in ("engine", "rival")}
    of = job.params["of"]
    names = {"prune": ("pruned", "unpruned"), "quantize": tuple(card.precision for card in cards.values())}[of]
    job.say(f"timing {' against '.join(names)}", None)
    feeds = racing.usual_feeds(cards["engine"])
    timings = racing.race(
        {role: partial(backend.open, inputs[role], Host()) for role in cards},
        feeds,
        together=sum(size_bytes(inputs[role]) for role in cards) <= racing.TOGETHER_BYTES,
    )
    speedup, wanted = timings["rival"]["cpu_ms"] / timings["engine"]["cpu_ms"], job.params["speedup"]
    told: dict[str, Any] = {
        "component": job.component,
        "of": of,
        "name": names[0],
        "rival": names[1],
        "speedup": round(speedup, 3),
        "wanted": wanted,
        "won": speedup >= wanted,
        "bytes": {role: size_bytes(inputs[role]) for role in cards},
        "timings": timings,
        "groups": {},
        "slower": [],
    }
    if job.params["groups"] and backend.profile is not None:
        told |= _by_group(backend, inputs, feeds, job)
    (out / RACE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _by_group(
    backend: Backend, inputs: Mapping[str, Path], feeds: Mapping[str, np.ndarray], job: Job
) -> dict[str, Any]:
    """{"groups": group -> milliseconds in the engine and in the rival, "slower": those to leave in float}."""
    assert backend.profile is not None
    graph = qdq.load(inputs["onnx"] / "model.onnx").graph
    layers = {qdq.group_of(qdq.module_of(node)) for node in qdq.targets(graph)}
    quantized = [group for group in qdq.groups(graph) if group in layers]
    if not quantized:
        return {}
    spent = {}
    for role in ("engine", "rival"):
        job.say(f"clocking the kernels of the {role}", None)
        spent[role] = by_group(backend.profile(inputs[role], feeds, _CALLS))
    rows = {g: (spent["engine"][g], spent["rival"][g]) for g in quantized if all(g in of for of in spent.values())}
    int8, rest = (sum(of.values()) for of in spent.values())
    return {
        "groups": {g: [round(1000 * seconds, 4) for seconds in row] for g, row in rows.items()},
        "slower": slower(rows, int8, rest, job.params["speedup"]),
    }


def by_group(rows: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Seconds by group of layers (see `passes.qdq`); "" holds what nobody could be found for.

    A kernel belongs to the first operator among those it computes that names its module. One that names none, such
    as a conversion to integers, belongs to the next one that does: it works for that.
    """
    found: dict[str, float] = defaultdict(float)
    waiting = 0.0
    for names, seconds in rows:
        named = _NAMED.search(names)
        waiting += seconds
        if named:
            found[qdq.group_of(named["path"])] += waiting
            waiting = 0.0
    found[""] += waiting
    return dict(found)


_NAMED = re.compile(r"[a-z]\w*\.(?P<path>[\w.]+?)(?:/|\.weight|\.bias|,|$)")
"""A module path in the name of an operator or of its weights, behind the name of the component."""


def slower(rows: Mapping[str, tuple[float, float]], int8: float, rest: float, wanted: float) -> list[str]:
    """Of the groups (seconds in int8, in float) those that take longer in int8, if leaving them in float may pay.

    `int8` and `rest` are the sums of all kernels of the two engines, `wanted` the ratio of the race. It pays where it
    saves a hundredth of a call, and the other groups one more in int8, which may be near enough to what is wanted.
    """
    found = [group for group, (narrow, wide) in rows.items() if narrow > wide]
    lost = sum(rows[group][0] - rows[group][1] for group in found)
    won = sum(wide - narrow for group, (narrow, wide) in rows.items() if group not in found)
    pays = lost >= _WORTH * int8 and won >= _WORTH * rest
    return found if pays and rest / (rest - won) >= _HOPE * wanted else []
