"""Pictures for a page: read from a folder of PNGs, shrunk, embedded; and the difference of two."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

_SIDE = 256
GAIN = 8
"""What a difference map is multiplied by, so that an eye sees it."""


def embedded(image: Image.Image) -> tuple[str, bool]:
    """(data URI, is it small enough to be shown pixel by pixel): PNG for small pictures, JPEG for others."""
    small = max(image.size) <= _SIDE // 2
    if not small:
        image = image.copy()
        image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    kind = "png" if small else "jpeg"
    image.save(buffer, kind, **({"optimize": True} if small else {"quality": 86}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}", small


def read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def difference(first: Image.Image, second: Image.Image) -> Image.Image:
    """Absolute difference of two pictures of one size, times GAIN."""
    apart = np.asarray(ImageChops.difference(first, second), np.uint16) * GAIN
    return Image.fromarray(np.minimum(apart, 255).astype(np.uint8))
