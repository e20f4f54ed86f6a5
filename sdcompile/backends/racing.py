"""Timing rival engines of one component against each other, for builds that choose by measuring.

Knows no backend: an engine is whatever a thunk opens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sdcompile.backends.base import Card, Engine

if TYPE_CHECKING:
    import numpy as np

TOGETHER_BYTES = 500_000_000
"""Engines of less than this between them are open at the same time; larger ones are timed one after the other."""

_CALLS, _BLOCK_S = 9, 5.0

Timing = dict[str, float]
"""Medians of `calls` calls in milliseconds: `call_ms` by the wall clock, `cpu_ms` of processor time.

`first_cpu_ms` is the processor time of the first call, which holds what compiles lazily. Rivals
are judged by processor time: a build machine is seldom idle, and its load moved wall times
tenfold where processor time moved a fifth (measured).
"""


def race(
    rivals: Mapping[str, Callable[[], Engine]], feeds: Mapping[str, np.ndarray], *, together: bool, calls: int = _CALLS
) -> dict[str, Timing]:
    """Time each rival (name -> how to open it) on `feeds`.

    `together` keeps all of them open and lets them take turns call by call; without it each is
    opened, timed and closed before the next, so that memory holds one at a time. A rival gets so many
    calls, or as many as fit into five seconds.
    """
    first: dict[str, float] = {}
    wall: dict[str, list[float]] = {name: [] for name in rivals}
    cpu: dict[str, list[float]] = {name: [] for name in rivals}
    for group in [list(rivals)] if together else [[name] for name in rivals]:
        engines: dict[str, Engine] = {}
        for name in group:
            begin = time.process_time()
            engines[name] = rivals[name]()
            engines[name](feeds)
            first[name] = 1000 * (time.process_time() - begin)
        start = time.perf_counter()
        for _ in range(calls):
            for name, engine in engines.items():
                wall_ms, cpu_ms = _clocked(engine, feeds)
                wall[name].append(wall_ms)
                cpu[name].append(cpu_ms)
            if time.perf_counter() - start > _BLOCK_S:
                break
        for engine in engines.values():
            engine.close()
    return {
        name: {
            "call_ms": round(statistics.median(wall[name]), 3),
            "cpu_ms": round(statistics.median(cpu[name]), 3),
            "first_cpu_ms": round(first[name], 3),
            "calls": len(cpu[name]),
        }
        for name in rivals
    }


def usual_feeds(card: Card) -> dict[str, np.ndarray]:
    """Seeded normal numbers in the component's usual (`opt`) shapes; whole numbers near zero for integer inputs."""
    import numpy as np

    random = np.random.default_rng(0)
    return {t.name: abs(random.standard_normal(t.shape(card.shapes, "opt"))).astype(t.dtype) for t in card.spec.inputs}


def _clocked(engine: Engine, feeds: Mapping[str, np.ndarray]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    engine(feeds)
    return 1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)
