"""The web UI's prompt notation: its documented examples, and what holds for any text."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcompile.runtime.prompts import Piece, escaped, parse

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
NOTATION = st.lists(st.sampled_from([*"ab ()[]:\\.,13-", " BREAK "]), max_size=40).map("".join)


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("[less]", [("less", 1 / 1.1)]),
        ("(word:1.3)", [("word", 1.3)]),
        ("(word : -.5 )", [("word ", -0.5)]),
        ("word:1.3)", [("word:1.3)", 1.0)]),
        ("(word:1.2.3)", [("word:1.2.3", 1.1)]),
        ("[word:1.3]", [("word:1.3", 1 / 1.1)]),
        ("((a:2) b:3)", [("a", 6.0), (" b", 3.0)]),
        ("()(:1.3)[]", [("", 1.0)]),
        ("a \\", [("a ", 1.0)]),
        ("a BREAK b", [("a", 1.0), (None, 1.0), ("b", 1.0)]),
        ("BREAKFAST", [("BREAKFAST", 1.0)]),
        ("(a BREAK b:2)", [("a", 2.0), (None, 1.0), ("b", 2.0)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
             ("sky", 1.4641), (".", 1.1)],
        ),
        ("", [("", 1.0)]),
    ],
)  # fmt: skip
def test_a_prompt_is_read_as_the_web_ui_documents(prompt: str, pieces: list[tuple[str | None, float]]) -> None:
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@given(NOTATION | TEXT)
def test_any_text_can_be_read(prompt: str) -> None:
    pieces = parse(prompt)
    assert pieces
    assert all(math.isfinite(piece.weight) for piece in pieces)
    joined = "".join(piece.text or "" for piece in pieces)
    assert set(joined) <= set(prompt)
    for one, other in itertools.pairwise(pieces):
        assert one.weight != other.weight or one.text is None or other.text is None


@given(TEXT)
def test_escaped_text_is_plain_text(text: str) -> None:
    if "BREAK" not in text:
        assert parse(escaped(text)) == [Piece(text)]


@given(st.text("abc ", min_size=1, max_size=9), st.integers(0, 6), st.integers(0, 6))
def test_nested_brackets_multiply(word: str, round_ones: int, square_ones: int) -> None:
    nested = "[" * square_ones + "(" * round_ones + word + ")" * round_ones + "]" * square_ones
    (piece,) = parse(nested)
    assert piece.text == word
    assert piece.weight == pytest.approx(1.1 ** (round_ones - square_ones))
    assert parse("x " + nested + " y")[-1].text.endswith(" y")  # type: ignore[union-attr]


@given(st.text("abc ", min_size=1, max_size=9), st.floats(-5, 5).map(lambda x: round(x, 3)))
def test_a_weight_is_what_is_written(word: str, weight: float) -> None:
    assert parse(f"({word}:{weight:f})") == [Piece(word, pytest.approx(weight))]
