"""Prompts to token ids, as transformers' CLIP tokenizers pad and truncate them.

It knows tokenizer.json and refuses to know what the ids mean to a text encoder.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdcompile.bundle import TokenizerEntry
from sdcompile.errors import BundleError
from sdcompile.runtime import SdcompileWarning

if TYPE_CHECKING:
    import tokenizers
    from numpy.typing import NDArray


class Tokenizer:
    """The tokenizer in `file`, padding with `entry.pad_id` to `entry.max_length` tokens.

    Raises BundleError when the file is missing or damaged.
    """

    def __init__(self, file: Path, entry: TokenizerEntry) -> None:
        import tokenizers

        try:
            text = file.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust library raises plain Exception
            hint = "copy the bundle again, or rebuild it"
            raise BundleError(f"{file} is missing or damaged: {error}", hint) from error
        self._entry = entry
        self._tokenizer.enable_truncation(entry.max_length)
        self._tokenizer.no_padding()

    def ids(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids (n, max_length) int64. Warns (SdcompileWarning) of the words a prompt is too long for."""
        rows = np.full((len(prompts), self._entry.max_length), self._entry.pad_id, np.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            encoding = self._tokenizer.encode(prompt)
            row[: len(encoding.ids)] = encoding.ids
            if encoding.overflowing:
                self._warn(prompt, encoding.overflowing[0])
        return rows

    def _warn(self, prompt: str, overflow: tokenizers.Encoding) -> None:
        tokens = zip(overflow.offsets, overflow.special_tokens_mask, strict=True)
        start = min((first for (first, _), special in tokens if not special), default=len(prompt))
        cut = prompt[start:].strip()
        shown = cut if len(cut) <= 200 else f"{cut[:200]}… ({len(cut)} characters)"
        warnings.warn(
            f"the prompt is longer than the {self._entry.max_length} tokens this model reads; left out: {shown!r}",
            SdcompileWarning,
            stacklevel=2,
        )
