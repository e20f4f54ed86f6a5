"""A tiny Stable Diffusion model that ships with the package, and a checker of its pictures.

The folder of this module is a whole diffusers model: 64 x 64 pictures of coloured shapes, in a form
of SD 1.x with 5.7 M parameters. `path` says where it is, `prompts` makes prompts for it, and
`alignment` scores how well a picture fits its prompt, without learned weights. Nothing here imports
torch; scipy is imported at the first score.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdcompile.models.tiny import scenes

if TYPE_CHECKING:
    from sdcompile.models.tiny.checker import Parts

__all__ = ["alignment", "alignment_parts", "path", "prompts"]


def path() -> Path:
    """The folder to hand to `StableDiffusionPipeline.from_pretrained` or to a recipe."""
    return Path(__file__).parent


def prompts(n: int, seed: int, split: str = "held_out") -> list[str]:
    """`n` prompts of a split, the same for the same seed.

    "held_out" are compositions never trained on: pairs of (colour, shape), or for one object its
    colour, shape and background, that no training picture had. "train" are the others. Seven in ten
    have two objects. Raises ValueError for any other split.
    """
    rng = np.random.default_rng(seed)
    drawn = (scenes.sample_scene(rng, split) for _ in range(n))
    return [scenes.caption(scene, scenes.sample_wording(rng)) for scene in drawn]


def alignment(image: np.ndarray, prompt: str) -> float:
    """How well a picture fits its prompt, in [0, 1].

    `image` is (H, W, 3), uint8 or floats in [0, 1], or anything numpy reads so, such as a PIL image;
    H and W are 64 or one and the same multiple of it. Raises ValueError for other pictures and for
    prompts the model's grammar does not know.
    """
    return alignment_parts(image, prompt).score


def alignment_parts(image: np.ndarray, prompt: str) -> Parts:
    """The parts of `alignment`: background, count, colour, shape, size, relation, and their score."""
    from sdcompile.models.tiny import checker

    return checker.check(image, prompt)
