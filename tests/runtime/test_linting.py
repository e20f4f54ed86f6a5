"""The prompt linter, on the toy tokenizer: six tokens a chunk, four of them text."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdcompile.runtime.linting import Report, lint
from sdcompile.runtime.tokens import Tokenizer
from tests.runtime.test_pipeline import model_in


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    model = model_in(tmp_path)
    return Tokenizer(model.tokenizer_file, model.tokenizer)


def test_tokens_and_what_is_left_out(tokenizer: Tokenizer) -> None:
    assert lint("red circle", tokenizer, "off", 3) == Report((2,), 4, 1, "", ())
    assert lint("red red blue blue circle", tokenizer, "off", 3).left_out == "circle"
    assert lint("red red blue blue circle", tokenizer, "a1111", 2) == Report((4, 1), 4, 2, "", ())


@pytest.mark.parametrize(
    ("prompt", "weighting", "remark"),
    [
        ("() red", "a1111", "() weighs nothing"),
        ("(:1.3) red", "a1111", "(:1.3) weighs nothing"),
        ("((red)", "a1111", "1 ( without its partner"),
        ("red]", "a1111", "1 ] without its partner"),
        ("(red:3)", "a1111", "'red' weighs 3: usual weights are 0.3 to 1.8"),
        ("(red:1.2) red", "a1111", "'red' has several weights: 1, 1.2"),
        ("red, blue, Red", "off", "'red' is there 2 times"),
        ("(red:1.2)", "off", "looks like weights, which are read only with prompt weighting a1111"),
        (" ", "off", "the prompt is empty"),
    ],
)
def test_slips_are_remarked(tokenizer: Tokenizer, prompt: str, weighting: str, remark: str) -> None:
    assert remark in lint(prompt, tokenizer, weighting, 1).remarks


def test_escaped_brackets_are_no_slip(tokenizer: Tokenizer) -> None:
    assert lint(r"red \(blue\) circle", tokenizer, "a1111", 1).remarks == ()
