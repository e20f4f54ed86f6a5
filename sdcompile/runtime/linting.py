"""What a prompt becomes: its tokens and chunks, what is cut, and what looks like a slip of the pen.

It reads prompts as the pipeline does and refuses to judge taste.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sdcompile.runtime.prompts import Piece, parse
from sdcompile.runtime.tokens import Tokenizer

# Beyond these the attention to a word breaks pictures more often than it helps.
_WEIGHTS = (0.3, 1.8)
_EMPTY = re.compile(r"(?<!\\)\(\s*(?::[^()\[\]]*)?\)|(?<!\\)\[\s*\]")
_BRACKET = re.compile(r"\\.|[()\[\]]")
_WORD = re.compile(r"\w+(?:['-]\w+)*")
_COMMON = frozenset(["a", "an", "and", "at", "by", "in", "of", "on", "the", "to", "with"])


@dataclass(frozen=True)
class Report:
    """tokens (without start and end), per chunk; the chunks there is room for; the text left out; remarks."""

    tokens: tuple[int, ...]
    chunk_length: int
    chunks: int
    left_out: str
    remarks: tuple[str, ...]


def lint(prompt: str, tokenizer: Tokenizer, weighting: str, chunks: int) -> Report:
    """Look at `prompt` as read with `weighting`, where `chunks` chunks fit the model.

    Without weighting there is one chunk, and brackets are characters like any other.
    """
    pieces = parse(prompt) if weighting == "a1111" else [Piece(prompt)]
    room = chunks if weighting == "a1111" else 1
    groups = tokenizer.groups(pieces)
    left_out = "".join(word.text for group in groups[room:] for word in group).strip()
    remarks = [*_of_weights(prompt, pieces)] if weighting == "a1111" else [*_of_plain(prompt)]
    return Report(
        tuple(len(group) for group in groups), tokenizer.room, room, left_out, (*remarks, *_of_words(prompt, pieces))
    )


def _of_weights(prompt: str, pieces: list[Piece]) -> Iterator[str]:
    for found in dict.fromkeys(_EMPTY.findall(prompt)):
        yield f"{found} weighs nothing"
    for opening, closing in ("()", "[]"):
        brackets = [b for b in _BRACKET.findall(prompt) if b in (opening, closing)]
        if (missing := brackets.count(opening) - brackets.count(closing)) != 0:
            yield f"{abs(missing)} {opening if missing > 0 else closing} without its partner"
    weights: dict[str, set[float]] = {}
    for text, weight in pieces:
        if text is not None and text.strip() and not _WEIGHTS[0] <= weight <= _WEIGHTS[1] and weight != 1:
            yield f"{text.strip()!r} weighs {weight:.3g}: usual weights are {_WEIGHTS[0]:g} to {_WEIGHTS[1]:g}"
        for word in _WORD.findall((text or "").lower()):
            weights.setdefault(word, set()).add(round(weight, 4))
    for word, found_weights in weights.items():
        if len(found_weights) > 1 and word not in _COMMON:
            yield f"{word!r} has several weights: {', '.join(f'{w:g}' for w in sorted(found_weights))}"


def _of_plain(prompt: str) -> Iterator[str]:
    if parse(prompt) != [Piece(prompt)]:
        yield "looks like weights, which are read only with prompt weighting a1111"


def _of_words(prompt: str, pieces: list[Piece]) -> Iterator[str]:
    text = " ".join(piece.text or "," for piece in pieces)
    phrases = [" ".join(phrase.lower().split()) for phrase in text.split(",")]
    repeated = {phrase for phrase in phrases if phrase and phrases.count(phrase) > 1}
    for phrase in dict.fromkeys(phrase for phrase in phrases if phrase in repeated):
        yield f"{phrase!r} is there {phrases.count(phrase)} times"
    if not text.strip(" ,"):
        yield "the prompt is empty"
