"""What each pass on an engine's way changed: the time of a call, and how well the tiny model's pictures fit.

The component was built once more before the first pass and after each; all of these engines take turns on the same
feeds (or, where they are large, are timed one after the other), and draw the same prompts from the same noise. A pass's
own effect.json, which is the same on every machine, cannot hold this: it is of one target on one processor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sdcompile import metrics
from sdcompile.backends import BACKENDS, Engine, Host, racing
from sdcompile.backends.base import read_card
from sdcompile.files import size_bytes
from sdcompile.models import tiny
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.spec import FULL, Job
from sdcompile.steps.reference import model_of

EACH_PASS = "each_pass.json"

_CALLS = 31
"""Calls of each engine, of which the median counts; fewer where they take long (see `racing.race`)."""


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Write each_pass.json: pass -> {"call_ms", "cpu_ms": (before, after)}, and "alignment" where prompts are given.

    inputs: "station.0", the engine before the first of job.params["passes"], "station.1" after it, and so on. With
    job.params["prompts"] also the other engines by component, tokenizer and tables; job.params then has backends
    {component: name}, seed, and what `model_of` needs. Alignment is {"before", "after"} on average, their
    "change", picture by picture, and its standard "error".
    """
    backend, passes = BACKENDS[job.params["backend"]], job.params["passes"]
    stations = [inputs[f"station.{number}"] for number in range(len(passes) + 1)]
    job.say("timing a call before and after each pass", None)
    timings = racing.race(
        {str(number): partial(backend.open, folder, Host()) for number, folder in enumerate(stations)},
        racing.usual_feeds(read_card(stations[0], backend.name)),
        together=sum(map(size_bytes, stations)) <= racing.TOGETHER_BYTES, calls=_CALLS,
    )  # fmt: skip
    told = [{key: timings[str(number)][key] for key in ("call_ms", "cpu_ms")} for number in range(len(stations))]
    found: dict[str, dict[str, Any]] = {
        name: {key: (before[key], after[key]) for key in before}
        for name, (before, after) in zip(passes, pairwise(told), strict=True)
    }
    if job.params.get("prompts"):
        scores = [_scores(inputs, folder, job, number, len(stations)) for number, folder in enumerate(stations)]
        for name, pair in zip(passes, pairwise(scores), strict=True):
            found[name]["alignment"] = _alignment(*pair)
    (out / EACH_PASS).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _scores(inputs: Mapping[str, Path], station: Path, job: Job, number: int, count: int) -> list[float]:
    """How well a picture of each prompt fits it, drawn with the engine `station` in the component's place."""
    backends: Mapping[str, str] = job.params["backends"]
    prompts: list[str] = job.params["prompts"]

    def open_engine(component: str) -> Engine:
        folder = station if component == job.component else inputs[component]
        return BACKENDS[backends[component]].open(folder, Host())

    found = []
    with Pipeline(model_of(job.params, inputs, job), open_engine) as pipeline:
        for place, prompt in enumerate(prompts):
            done = (number + place / len(prompts)) / count
            job.say(f"pictures of engine {number + 1} of {count}, {place + 1} of {len(prompts)}", done)
            call = {"seed": job.params["seed"] + place, "unet_width": FULL, "output_type": "np"}
            picture = np.asarray(pipeline(prompt, **call).images)[0]
            # A picture of NaN shows nothing of what was asked for; the checker would refuse to look at it.
            found.append(tiny.alignment(picture, prompt) if metrics.is_finite(picture) else 0.0)
    return found


def _alignment(before: list[float], after: list[float]) -> dict[str, Any]:
    change = np.subtract(after, before)
    return {
        "prompts": len(before),
        "before": round(float(np.mean(before)), 4),
        "after": round(float(np.mean(after)), 4),
        "change": round(float(change.mean()), 4),
        "error": round(float(change.std(ddof=1) / len(change) ** 0.5), 4),
    }
