"""Pictures to start from, and masks: what diffusers' image processors make of them, in numpy and pillow.

It knows sizes and value ranges; it refuses to know the model that encodes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile.errors import RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    Floats = NDArray[np.float32]

_FORMS = "a PIL image, a file, an array (H, W, 3) of uint8 or floats in [0, 1], or a list of these"


def size_of(what: str, value: Any) -> tuple[int, int]:
    """(height, width) of the first picture in `value`."""
    image = _opened(what, value)[0]
    return image.height, image.width


def picture(what: str, value: Any, height: int, width: int) -> Floats:
    """(n, 3, H, W) float32 in [-1, 1]; other sizes are resized with Lanczos, as in diffusers."""
    images = (_resized(image.convert("RGB"), height, width) for image in _opened(what, value))
    pixels = np.stack([np.asarray(image, np.float32) / np.float32(255) for image in images])
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) * np.float32(2) - np.float32(1)


def mask(what: str, value: Any, height: int, width: int, factor: int) -> Floats:
    """(n, 1, h, w) float32 of 0 and 1: white is painted anew, black is kept.

    As in diffusers: grey levels are cut at one half, then every `factor`-th pixel stands for a latent.
    """
    images = (_resized(image.convert("L"), height, width) for image in _opened(what, value))
    levels = np.stack([np.asarray(image, np.float32) / np.float32(255) for image in images])
    return np.ascontiguousarray((levels >= 0.5).astype(np.float32)[:, None, ::factor, ::factor])


def _opened(what: str, value: Any) -> list[Image]:
    from PIL import Image

    if isinstance(value, Sequence) and not isinstance(value, str):
        images = [image for one in value for image in _opened(what, one)]
        if not images:
            raise RecipeError(f"{what} is an empty list", _FORMS)
        return images
    if isinstance(value, (str, Path)):
        try:
            with Image.open(value) as opened:
                opened.load()
                return [opened.copy()]
        except (OSError, ValueError) as error:
            raise RecipeError(f"{what} {value}: not a readable picture: {error}", "a PNG or JPEG file") from error
    if isinstance(value, Image.Image):
        return [value]
    return [_from_array(what, array) for array in _arrays(what, value)]


def _arrays(what: str, value: Any) -> NDArray[Any]:
    array = np.asarray(value)
    if array.dtype.kind not in "uf" or array.ndim not in (2, 3, 4):
        raise RecipeError(f"{what} is no picture: {type(value).__name__} {array.shape} {array.dtype}", _FORMS)
    return array if array.ndim == 4 else array[None]


def _from_array(what: str, array: NDArray[Any]) -> Image:
    from PIL import Image

    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise RecipeError(f"{what} holds values outside 0 to 1", _FORMS)
        array = (array * 255).round()
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.shape[-1] != 3:
        raise RecipeError(f"{what} has shape {array.shape}: 3 channels are needed, last", _FORMS)
    return Image.fromarray(array.astype(np.uint8))


def _resized(image: Image, height: int, width: int) -> Image:
    from PIL.Image import Resampling

    return image if image.size == (width, height) else image.resize((width, height), Resampling.LANCZOS)
