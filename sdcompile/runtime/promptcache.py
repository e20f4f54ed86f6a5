"""Prompt embeddings on disk, named by text encoder, weighting and prompt."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdcompile.runtime.diskcache import DiskCache

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class PromptCache:
    """Embeddings made by the text encoder of digest `encoder`."""

    disk: DiskCache
    encoder: str

    def get(self, prompt: str, weighting: str) -> Rows | None:
        """The arrays of a prompt, or None when they are not there or damaged."""
        return self.disk.get(self._key(prompt, weighting))

    def put(self, prompt: str, weighting: str, arrays: Rows) -> None:
        """Keep the arrays of a prompt."""
        self.disk.put(self._key(prompt, weighting), arrays)

    def _key(self, prompt: str, weighting: str) -> str:
        text = "\0".join((self.encoder, weighting, prompt))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
