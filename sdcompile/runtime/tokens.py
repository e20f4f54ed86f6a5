"""Prompts to chunks of token ids, as transformers' CLIP tokenizers pad and truncate them.

It knows tokenizer.json and refuses to know what the ids mean to a text encoder.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sdcompile.bundle import TokenizerEntry
from sdcompile.errors import BundleError, RecipeError
from sdcompile.runtime import SdcompileWarning
from sdcompile.runtime.prompts import Piece

if TYPE_CHECKING:
    import tokenizers
    from numpy.typing import NDArray

# A chunk that would end in the middle of a phrase ends at its last comma, if that is at most so many
# tokens back: the web UI's default.
_COMMA_REACH = 20
_COMMA = ",</w>"


class Chunk(NamedTuple):
    """What the text encoder reads at once: ids (max_length,) int64, weights (max_length,) float32."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]


class Word(NamedTuple):
    """A token before it has a place: its id, its weight, and the text it came from."""

    id: int
    weight: float
    text: str


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
        self._comma = self._tokenizer.token_to_id(_COMMA)

    @property
    def room(self) -> int:
        """Tokens of text in one chunk: all but the start and the end."""
        return self._entry.max_length - 2

    def ids(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids (n, max_length) int64. Warns (SdcompileWarning) of the words a prompt is too long for."""
        rows = np.full((len(prompts), self._entry.max_length), self._entry.pad_id, np.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            encoding = self._tokenizer.encode(prompt)
            row[: len(encoding.ids)] = encoding.ids
            if encoding.overflowing:
                self._warn(_cut(prompt, encoding.overflowing[0]), self._entry.max_length)
        return rows

    def plain(self, prompt: str) -> list[Chunk]:
        """The one chunk of a prompt without notation."""
        return [Chunk(self.ids([prompt])[0], np.ones(self._entry.max_length, np.float32))]

    def weighted(self, pieces: Sequence[Piece], most: int) -> list[Chunk]:
        """The chunks of a parsed prompt, at most `most`. Warns of the words that find no place.

        Each chunk holds max_length - 2 tokens between its start and end tokens. Raises RecipeError
        for a weight that is not finite.
        """
        groups = self.groups(pieces)
        if len(groups) > most:
            left_out = "".join(word.text for group in groups[most:] for word in group)
            self._warn(left_out.strip(), most * self._entry.max_length)
        return [self._chunk(group) for group in groups[:most]]

    def groups(self, pieces: Sequence[Piece]) -> list[list[Word]]:
        """The words of each chunk, however many chunks there are."""
        size, groups, current, comma = self.room, [], list[Word](), -1
        for piece in pieces:
            if piece.text is None:
                groups.append(current)
                current, comma = [], -1
                continue
            for word in self._words(piece):
                if word.id == self._comma:
                    comma = len(current)
                elif len(current) == size and comma >= 0 and size - comma <= _COMMA_REACH:
                    groups.append(current[: comma + 1])
                    current, comma = current[comma + 1 :], -1
                if len(current) == size:
                    groups.append(current)
                    current, comma = [], -1
                current.append(word)
        return [*groups, current] if current or not groups else groups

    def _words(self, piece: Piece) -> Iterator[Word]:
        text = piece.text or ""
        if not math.isfinite(piece.weight):
            raise RecipeError(f"the prompt weighs {text.strip()!r} infinitely", "weights are numbers such as 1.3")
        self._tokenizer.no_truncation()
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.enable_truncation(self._entry.max_length)
        before = 0
        for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # With the spaces before it, so that words put together again are the text.
            yield Word(token, piece.weight, text[before:end])
            before = end

    def _chunk(self, words: Sequence[Word]) -> Chunk:
        entry = self._entry
        ids = np.full(entry.max_length, entry.pad_id, np.int64)
        weights = np.ones(entry.max_length, np.float32)
        ids[: len(words) + 2] = [entry.bos_id, *(word.id for word in words), entry.eos_id]
        weights[1 : len(words) + 1] = [word.weight for word in words]
        return Chunk(ids, weights)

    def _warn(self, cut: str, tokens: int) -> None:
        shown = cut if len(cut) <= 200 else f"{cut[:200]}… ({len(cut)} characters)"
        warnings.warn(
            f"the prompt is longer than the {tokens} tokens this model reads; left out: {shown!r}",
            SdcompileWarning,
            stacklevel=2,
        )


def _cut(prompt: str, overflow: tokenizers.Encoding) -> str:
    tokens = zip(overflow.offsets, overflow.special_tokens_mask, strict=True)
    start = min((first for (first, _), special in tokens if not special), default=len(prompt))
    return prompt[start:].strip()
