"""Modules named by pattern."""

from __future__ import annotations

import pytest

from sdcompile.passes import patterns

PATHS = (
    "conv_in", "down_blocks.0.attentions.0.proj_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q", "down_blocks.10.resnets.0.conv1", "mid_block.conv_in",
)  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("conv_in", {0, 5}),  # it may start anywhere
        ("attn2", {3}),  # and means what lies under it
        ("down_blocks.*", {1, 2, 3, 4}),
        ("down_blocks.1", set()),  # but no part of a name
        ("down_blocks.1*", {4}),
        ("attn*.to_q", {2, 3}),
        ("down_blocks.*.attn1", set()),  # one star stays within a name
        ("down_blocks.**.attn1", {2}),
        ("*", {0, 1, 2, 3, 4, 5}),
        ("Conv_in", set()),
        ("conv.in", set()),
    ],
)
def test_a_pattern_names_what_lies_at_or_under_it(pattern, found):
    assert patterns.covered(PATHS, pattern) == {PATHS[place] for place in found}


def test_what_matches_nothing_is_told_with_the_names_there_are():
    assert patterns.fault_of(PATHS, ["attn1", "conv_in"], "layer") == ""
    told = patterns.fault_of(PATHS, ["attn9", "conv_in", "x"], "layer")
    assert told.startswith(
        "'attn9', 'x' matches no layer; they are named as conv_in, down_blocks.0.attentions.0.proj_in"
    )
    assert patterns.named(PATHS, ["attn1", "conv_in"]) == {PATHS[0], PATHS[2], PATHS[5]}
