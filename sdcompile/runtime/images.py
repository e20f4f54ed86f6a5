"""Decoded pixels to pictures, and pictures to PNG files that say how they were made.

It knows no model and no sampler. The formulas are those of diffusers' VaeImageProcessor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image


def pixels_from_decoded(decoded: NDArray[np.float32]) -> NDArray[np.float32]:
    """The VAE's (N, 3, H, W) in [-1, 1] -> (N, H, W, 3) float32 in [0, 1], out-of-range values clipped."""
    pixels = (decoded.astype(np.float32, copy=False) * np.float32(0.5) + np.float32(0.5)).clip(0.0, 1.0)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def pil_from_pixels(pixels: NDArray[np.float32]) -> list[Image]:
    """(N, H, W, C) in [0, 1] -> one PIL image each, rounded to the nearest of 256 levels; C is 1 or 3."""
    from PIL import Image

    levels = (pixels * 255).round().astype(np.uint8)
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in levels]


def save_png(image: Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Write `image` with `metadata` as PNG text (UTF-8 iTXt where Latin-1 does not do)."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in metadata.items():
        info.add_text(key, value)
    image.save(path, format="PNG", pnginfo=info)
