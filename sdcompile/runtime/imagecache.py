"""Finished images on disk, named by bundle and request: the same request again gives the same bytes at once.

Only what a request decides is kept: one whose seed was not given has another picture every time, and one
whose callback may change latents is decided by that callback.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile import __version__
from sdcompile.runtime.diskcache import DiskCache
from sdcompile.runtime.request import Request

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    Floats = NDArray[np.float32]

_ARRAY = "images"
# A profile's name decides nothing besides the options it has set, nor does whether the seed was written or drawn.
_NO_PART = {"profile", "seeded"}


@dataclass(frozen=True)
class ImageCache:
    """Images of the bundle of digest `bundle`."""

    disk: DiskCache
    bundle: str

    def get(self, request: Request) -> list[Image] | Floats | None:
        """The images of `request` as its output_type asks, or None when they are not there or damaged."""
        key = self.key(request)
        found = self.disk.get(key)
        if found is None:
            return None
        array = found.get(_ARRAY)
        levels = request.output_type == "pil"
        if array is None or len(array) != len(request.prompts) or array.dtype != (np.uint8 if levels else np.float32):
            self.disk.drop(key)
            return None
        if not levels:
            return array
        from PIL import Image

        return [Image.fromarray(image) for image in array]

    def put(self, request: Request, images: Sequence[Image] | Floats) -> None:
        """Keep what was made of `request`."""
        self.disk.put(self.key(request), {_ARRAY: np.stack([np.asarray(image) for image in images])})

    def key(self, request: Request) -> str:
        """sha256 of the bundle, every resolved option, and the version of the runtime that reads them."""
        told = {field.name: getattr(request, field.name) for field in fields(request) if field.name not in _NO_PART}
        text = json.dumps([__version__, self.bundle, told], default=_hashed, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _hashed(value: Any) -> Any:
    """An array by shape, type and content. Any other value is refused: it might not tell all of itself."""
    if isinstance(value, np.ndarray):
        content = hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()
        return [list(value.shape), value.dtype.name, content]
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no part of a key")
