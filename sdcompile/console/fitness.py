"""What this machine runs of a bundle, as rich renderables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from sdcompile.console.grid import Facts, grid


def page(facts: Facts) -> Iterator[Any]:
    if "targets" in facts:
        yield from _targets(facts)
        return
    table = grid("component", "backend", "precision", "here", "")
    for row in facts["components"]:
        table.add_row(
            Text(row["component"]),
            Text(row["backend"]),
            Text(row["precision"]),
            Text("runs" if row["runs"] else "cannot", style="green" if row["runs"] else "bold red"),
            Text(row["engine"] or row["reason"]),
        )
    yield table
    yield from dict.fromkeys(row["hint"] for row in facts["components"] if row["hint"])


def _targets(facts: Facts) -> Iterator[Any]:
    """Targets in the order of preference: does each run here, and if not, why its first component does not."""
    table = grid("target", "engines", "here", "")
    for row in facts["targets"]:
        parts = row["components"]
        engines = dict.fromkeys(f"{part['backend']} {part['precision']}" for part in parts)
        taken = row["target"] == facts["target"]
        words = ", ".join(dict.fromkeys(part["engine"] for part in parts if part["engine"]))
        reason = next((part["reason"] for part in parts if not part["runs"]), "")
        table.add_row(
            Text(row["target"]),
            Text(", ".join(engines)),
            Text("runs" if row["runs"] else "cannot", style="green" if row["runs"] else "bold red"),
            Text(reason or ", ".join(filter(None, (words, "what load and generate take" if taken else "")))),
        )
    yield table
    if facts["target"] is None:
        yield "no target can run here"
    yield from facts["hints"]
