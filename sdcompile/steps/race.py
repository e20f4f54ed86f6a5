"""Is the quantized or pruned engine the faster one here, and which groups of its layers are?

It is raced against the same component unquantized, or unpruned. Both take turns on the same feeds, so that a busy
machine slows both. Where engines tell what they spend where, groups of layers are compared as well. What follows is
the caller's to say.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
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

_TOGETHER_BYTES = 500_000_000
"""Engines of less than this are open at the same time; larger ones are timed one after the other."""

_CALLS = 5
"""Calls that kernels are clocked in. The least time of each counts, which other work on the machine disturbs least."""

_WORTH = 0.01
"""Share of a call that leaving groups in float must save, by the kernels' clocks, for a build to be made again."""

_HOPE = 0.95
"""Where int8 lost, the predicted ratio must come as near as this to what is wanted: predictions are rough."""


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
        together=sum(size_bytes(inputs[role]) for role in cards) <= _TOGETHER_BYTES,
    )
    speedup, wanted = timings["rival"]["cpu_ms"] / timings["engine"]["cpu_ms"], job.params["speedup"]
    told: dict[str, Any] = {
        "component": job.component,
        "of": of,
        "precision": names[0],
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
        told |= _by_group(backend, inputs, feeds, speedup, job)
    (out / RACE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _by_group(
    backend: Backend, inputs: Mapping[str, Path], feeds: Mapping[str, np.ndarray], speedup: float, job: Job
) -> dict[str, Any]:
    """{"groups": group -> milliseconds in the engine and in the rival, "slower": those to leave in float}."""
    assert backend.profile is not None
    quantized = qdq.groups(qdq.load(inputs["onnx"] / "model.onnx").graph)
    if not quantized:
        return {}
    spent = {}
    for role in ("engine", "rival"):
        job.say(f"clocking the kernels of the {role}", None)
        spent[role] = by_group(backend.profile(inputs[role], feeds, _CALLS))
    rows = {g: (spent["engine"][g], spent["rival"][g]) for g in quantized if all(g in of for of in spent.values())}
    return {
        "groups": {g: [round(1000 * seconds, 4) for seconds in row] for g, row in rows.items()},
        "slower": slower(rows, sum(spent["engine"].values()), speedup, job.params["speedup"]),
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


def slower(rows: Mapping[str, tuple[float, float]], call: float, speedup: float, wanted: float) -> Collection[str]:
    """Of the groups (seconds in int8, in float) those that take longer in int8, if leaving them in float may pay.

    `call` is the sum of all kernels in int8, `speedup` what the race has measured.
    """
    found = [group for group, (int8, rest) in rows.items() if int8 > rest]
    saved = sum(rows[group][0] - rows[group][1] for group in found) / call
    hopeless = speedup / (1 - saved) < _HOPE * wanted
    return [] if saved < _WORTH or hopeless or len(found) == len(rows) else found
