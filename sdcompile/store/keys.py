"""Keys and what they are made of: plain JSON parts, their hash, and the differences between two of them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

KEY = re.compile(r"[0-9a-f]{64}")


def key_of(parts: Mapping[str, Any]) -> str:
    """sha256 of `parts` as canonical JSON: 64 hex digits.

    Raises TypeError or ValueError, naming the place, for what JSON cannot hold exactly.
    """
    text = json.dumps(plain(parts, "parts"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def plain(value: Any, place: str) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{place} has the key {key!r}; keys are text")
        return {key: plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{place}.{index}") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}, which JSON cannot hold")
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise TypeError(f"{place} is a {type(value).__name__}, which is not plain JSON data")


class _Absent:
    """Stands for a field that is not there."""


def _shown(value: Any) -> str:
    if value is _Absent:
        return "(absent)"
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def differences(old: Any, new: Any, step_of: Callable[[str], str | None]) -> Iterator[str]:
    """`field.path: old -> new` for each difference. Where both are keys, `step_of` names the step behind."""
    yield from _differences(old, new, (), step_of)


def _differences(old: Any, new: Any, place: tuple[str, ...], step_of: Callable[[str], str | None]) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (*old, *(k for k in new if k not in old)):
            yield from _differences(old.get(key, _Absent), new.get(key, _Absent), (*place, key), step_of)
    elif isinstance(old, list) and isinstance(new, list) and any(isinstance(x, (dict, list)) for x in (*old, *new)):
        for index in range(max(len(old), len(new))):
            was, now = (items[index] if index < len(items) else _Absent for items in (old, new))
            yield from _differences(was, now, (*place, str(index)), step_of)
    elif type(old) is not type(new) or old != new:
        where = ".".join(place)
        if all(isinstance(value, str) and KEY.fullmatch(value) for value in (old, new)):
            step = step_of(new) or step_of(old) or "its content"
            yield f"{where}: {step} changed ({old[:8]} -> {new[:8]})"
        else:
            yield f"{where}: {_shown(old)} -> {_shown(new)}"
