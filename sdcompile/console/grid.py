"""How every table of this room looks. Imports rich."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

Facts = Mapping[str, Any]


def grid(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table of these columns; those in `right` hold numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made
