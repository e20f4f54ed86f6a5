"""Results to files, with a user's errors told in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdcompile.errors import HostError


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Raises HostError when `path` cannot be written."""
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Raises HostError when `path` cannot be written."""
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def append(path: Path, text: str) -> None:
    """Add `text` at the end of `path`, as step summaries are written. Raises HostError when it cannot be."""
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)


@contextmanager
def told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}", "choose another place") from error
