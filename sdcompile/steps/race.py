"""Is the quantized engine the faster one here? It is raced against the same component unquantized.

Both take turns on the same feeds, so that a busy machine slows both. What follows from losing is the
caller's to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sdcompile.backends import BACKENDS, Host, racing
from sdcompile.backends.base import read_card
from sdcompile.files import size_bytes
from sdcompile.spec import Job

RACE = "race.json"

_TOGETHER_BYTES = 500_000_000
"""Engines of less than this are open at the same time; larger ones are timed one after the other."""


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Time `inputs["engine"]` against `inputs["rival"]` and write race.json.

    job.params: backend, speedup (the least ratio of the rival's processor time over the engine's).
    """
    backend = BACKENDS[job.params["backend"]]
    cards = {role: read_card(inputs[role], backend.name) for role in ("engine", "rival")}
    job.say(f"timing {cards['engine'].precision} against {cards['rival'].precision}", None)
    timings = racing.race(
        {role: partial(backend.open, inputs[role], Host()) for role in cards},
        racing.usual_feeds(cards["engine"]),
        together=sum(size_bytes(inputs[role]) for role in cards) <= _TOGETHER_BYTES,
    )
    speedup = timings["rival"]["cpu_ms"] / timings["engine"]["cpu_ms"]
    told: dict[str, Any] = {
        "component": job.component,
        "precision": cards["engine"].precision,
        "rival": cards["rival"].precision,
        "speedup": round(speedup, 3),
        "wanted": job.params["speedup"],
        "won": speedup >= job.params["speedup"],
        "bytes": {role: size_bytes(inputs[role]) for role in cards},
        "timings": timings,
    }
    (out / RACE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
