"""Passes: rewritings of a model on its way to an engine, one file each, and the table of them.

A pass takes a folder of one form and writes the same form. Its heavy libraries are imported
inside `run`. It never sees the store, the recipe or a backend.
"""

from __future__ import annotations

from sdcompile.passes import cast_fp16
from sdcompile.passes.base import Pass

__all__ = ["PASSES", "Pass"]

PASSES: dict[str, Pass] = {p.name: p for p in (cast_fp16.PASS,)}
