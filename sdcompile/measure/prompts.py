"""The prompts that bundles are measured with: the same for the same seed."""

from __future__ import annotations

import random
from pathlib import Path

from sdcompile.bundle import Manifest
from sdcompile.errors import RecipeError
from sdcompile.models import TINY, general_prompts, tiny


def prompts_for(manifest: Manifest, count: int, seed: int) -> list[str]:
    """`count` prompts for a model: compositions the tiny model never saw, or general ones, repeated where they end."""
    if is_tiny(manifest):
        return tiny.prompts(count, seed)
    known = list(general_prompts())
    random.Random(seed).shuffle(known)
    return [known[index % len(known)] for index in range(count)]


def prompts_from(path: Path | None) -> list[str]:
    """The lines of a prompt file that are neither empty nor comments (#); [] for no file.

    Raises RecipeError when it cannot be read or holds none.
    """
    if path is None:
        return []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}", "a text file in UTF-8, one prompt a line") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise RecipeError(f"{path} holds no prompt", "one prompt a line; lines that start with # are comments")
    return prompts


def is_tiny(manifest: Manifest) -> bool:
    """Can the tiny model's checker read this bundle's pictures?"""
    return bool(manifest.source["id"] == TINY)
