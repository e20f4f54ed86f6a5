"""What ships with the package as data: the tiny model, and prompts for models of photographs and drawings."""

from __future__ import annotations

from pathlib import Path

TINY = "builtin:tiny"
"""The source whose pictures a checker can score against their prompts."""


def general_prompts() -> tuple[str, ...]:
    """More than 128 varied prompts, for calibrating models that draw anything."""
    lines = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))
