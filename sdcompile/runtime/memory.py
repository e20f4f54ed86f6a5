"""Small memories: the entries used longest ago make room for new ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def remembered(memory: OrderedDict[K, V], key: K, most: int, make: Callable[[], V]) -> V:
    """`memory[key]`, made when missing; `memory` keeps the `most` entries used last."""
    if key not in memory:
        memory[key] = make()
    memory.move_to_end(key)
    while len(memory) > most:
        memory.popitem(last=False)
    return memory[key]
