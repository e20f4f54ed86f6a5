"""Prompts to fit samplers with, where a recipe names only how many: drawn by seed, apart from those that judge.

Standard library only, so that a plan may list them.
"""

from __future__ import annotations

import random

_SUBJECTS = (
    "an old fisherman", "a lighthouse", "a red fox", "a bowl of fruit", "a mountain lake", "a steam train",
    "a glass teapot", "a city street", "a young woman reading", "a wooden bridge", "a white horse", "a market square",
    "a space station", "a field of tulips", "a sleeping cat", "a stone castle", "a sailing boat", "a robot",
    "a plate of pasta", "a desert road", "an owl", "a kitchen", "a violin", "a waterfall",
)  # fmt: skip
_PLACES = (
    "at sunset", "in the rain", "in a forest", "by the sea", "on a table", "in winter", "under a night sky",
    "in morning fog", "in a small room", "seen from above",
)  # fmt: skip
_STYLES = (
    "photograph, natural light", "oil painting", "watercolour", "pencil sketch", "digital art, high detail",
    "black and white photograph", "flat illustration", "close-up, shallow depth of field",
)  # fmt: skip


def drawn(source: str, count: int, seed: int, *, judging: bool) -> list[str]:
    """`count` prompts for the model `source` (its id). Those for judging share no subject with the others."""
    if source == "builtin:tiny":
        from sdcompile.models import tiny

        return tiny.prompts(count, seed, "held_out" if judging else "train")
    rng = random.Random(f"{seed} {judging}")
    subjects = [s for number, s in enumerate(_SUBJECTS) if (number % 3 == 0) == judging]
    return [f"{rng.choice(subjects)} {rng.choice(_PLACES)}, {rng.choice(_STYLES)}" for _ in range(count)]
