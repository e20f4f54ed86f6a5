r"""Prompts in the notation of AUTOMATIC1111's web UI: pieces of text with weights, and breaks between chunks.

    (word)        1.1 times the attention        [word]     a 1.1th of it
    (word:1.3)    1.3 times                      \( \) \[ \] \\   the character itself
    BREAK         fill this chunk up and go on with the next one

Brackets nest and their weights multiply; one left open reaches to the end. A lone backslash
vanishes, as there. The room knows text; what a weight does to an embedding is in `embedding`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

ROUND, SQUARE = 1.1, 1 / 1.1

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_TOKEN = re.compile(rf"\\[()\[\]\\]|\\|:\s*(?P<weight>{_NUMBER})\s*\)|[()\[\]]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


class Piece(NamedTuple):
    """A run of text of one weight; text None is a BREAK."""

    text: str | None
    weight: float = 1.0


def parse(prompt: str) -> list[Piece]:
    """The pieces of `prompt`, neighbours of one weight joined; one empty piece for an empty prompt."""
    pieces: list[Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        begin = opened[bracket].pop()
        pieces[begin:] = [Piece(text, weight * factor) for text, weight in pieces[begin:]]

    for found in _TOKEN.finditer(prompt):
        token, weight = found[0], found["weight"]
        if token.startswith("\\"):
            pieces.append(Piece(token[1:]))
        elif token in opened:
            opened[token].append(len(pieces))
        elif weight is not None and opened["("]:
            close("(", float(weight))
        elif token == ")" and opened["("]:
            close("(", ROUND)
        elif token == "]" and opened["["]:
            close("[", SQUARE)
        else:
            for number, part in enumerate(_BREAK.split(token)):
                pieces += [Piece(None)] * (number > 0) + [Piece(part)]
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        while opened[bracket]:
            close(bracket, factor)
    return _joined(pieces) or [Piece("")]


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        if piece.text == "":
            continue
        if piece.text is None:
            joined.append(Piece(None))
        elif joined and joined[-1].text is not None and joined[-1].weight == piece.weight:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.weight)
        else:
            joined.append(piece)
    return joined


def escaped(text: str) -> str:
    """`text` written so that `parse` reads it as plain text (but for the word BREAK)."""
    return re.sub(r"([()\[\]\\])", r"\\\1", text)
