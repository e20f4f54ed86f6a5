"""The two streams: JSON events and text on stdout, text on stderr. NO_COLOR is honoured by rich."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


PIPE_COLUMNS = 200


def stdout() -> Console:
    return _console(stderr=False)


def stderr() -> Console:
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # A pipe or a log has no width of its own: rows stay whole there, so that they can be searched.
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_COLUMNS
    return Console(stderr=stderr, highlight=False, emoji=False, width=width)


def is_live() -> bool:
    """May stderr be redrawn?"""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def to_stdout(text: str, style: str = "") -> None:
    stdout().print(text, style=style, markup=False, soft_wrap=True)


def to_stderr(text: str, style: str = "") -> None:
    stderr().print(text, style=style, markup=False, soft_wrap=True)


def emit(event: str, **facts: Any) -> None:
    """Write one JSON event as one line on stdout. A reader that went away ends the events, not the build."""
    line = json.dumps(
        {"event": event, "time": round(time.time(), 3), **plain(facts)}, ensure_ascii=True, allow_nan=False
    )
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - replaces stdout until the end


def plain(value: Any) -> Any:
    """`value` as strict JSON: numbers JSON lacks become null, anything else its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return str(value)


def size(count: float | None) -> str:
    """Bytes for people: 3.4 GiB."""
    if not count:
        return "-" if count is None else "0"
    number, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1023.5:
            break
        number, unit = number / 1024, larger
    return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people, at most six characters: 0.4s, 42s, 3m07s, 2h05m."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
