"""Simplified attention against what the papers say, written out slowly: loops over tokens, no tricks."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

from sdcompile import edits
from sdcompile.errors import StageError

pytestmark = pytest.mark.tiny

HIGH, WIDE, WIDTH, WORDS = 8, 4, 16, 7
BLOCK = "transformer_blocks.0"


@pytest.fixture
def holder():
    """A transformer inside a module, where edits name it `at`; its grid is that of HIGH x WIDE tokens."""
    import torch
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    torch.manual_seed(0)
    model = torch.nn.Module()
    model.at = Transformer2DModel(
        2, WIDTH // 2, in_channels=WIDTH, num_layers=1, norm_num_groups=4, cross_attention_dim=24
    )
    return model.eval().requires_grad_(False)


def inputs():
    import torch

    torch.manual_seed(1)
    return torch.randn(2, HIGH * WIDE, WIDTH), torch.randn(2, WORDS, 24)


def edited(holder, *made):
    """The block with the edits, on a grid that has been looked at."""
    import torch

    edits.replay(holder, made)
    if hasattr(holder.at, "token_grid"):
        holder.at.token_grid.look(holder.at, (torch.zeros(2, WIDTH, HIGH, WIDE),), {})
    return holder.at.transformer_blocks[0]


def gap(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


# --- token merging ---


def groups_by_hand(x: np.ndarray, ratio: float, stride: int, *, worst: bool = False) -> list[list[int]]:
    """Tokens (N, C) -> lists of those that become one. `worst` merges what is least alike."""
    count = len(x)
    destinations = [t for t in range(count) if t // WIDE % stride == 0 and t % WIDE % stride == 0]
    best = []
    for source in (t for t in range(count) if t not in destinations):
        likeness = [
            float(x[source] @ x[t]) / (math.sqrt(x[source] @ x[source]) * math.sqrt(x[t] @ x[t])) for t in destinations
        ]
        place = max(range(len(destinations)), key=likeness.__getitem__)
        best.append((likeness[place], source, destinations[place]))
    best.sort(reverse=not worst)
    found = {t: [t] for t in destinations}
    for number, (_, source, destination) in enumerate(best):
        if number < int(count * ratio):
            found[destination].append(source)
        else:
            found[source] = [source]
    return list(found.values())


def merged_by_hand(layer, told, groups: list[list[list[int]]]):
    """`layer` on the means of the groups of each image; every token gets its group's output."""
    import torch

    output = torch.empty_like(told)
    for image, mine in enumerate(groups):
        means = torch.stack([sum(told[image, t] for t in group) / len(group) for group in mine])
        answer = layer(means[None])[0]
        for place, group in enumerate(mine):
            for token in group:
                output[image, token] = answer[place]
    return output


def block_by_hand(block, x, words, groups, parts):
    """What a transformer block computes (diffusers' BasicTransformerBlock with layer norms), some parts merged."""

    def through(part: str, layer, told):
        return merged_by_hand(layer, told, groups) if part in parts else layer(told)

    def to_words(told):
        return block.attn2(told, encoder_hidden_states=words[: len(told)])

    x = x + through("attn1", block.attn1, block.norm1(x))
    x = x + through("attn2", to_words, block.norm2(x))
    return x + through("ff", block.ff, block.norm3(x))


@pytest.mark.parametrize(
    ("ratio", "stride", "parts"),
    [(0.5, 2, ["attn1"]), (0.7, 2, ["attn1", "ff"]), (0.1, 2, ["ff"]), (0.9, 4, ["attn1"]), (0.3, 4, ["attn2"])],
)
def test_tokens_merge_as_the_paper_says(holder, ratio, stride, parts):
    x, words = inputs()
    words[1] = words[0]  # so that a part that runs image by image sees the same words
    whole = copy.deepcopy(holder.at.transformer_blocks[0])
    edit = {"op": "token_merge", "module": f"at.{BLOCK}", "ratio": ratio, "stride": stride, "parts": parts}
    got = edited(holder, edit)(x, encoder_hidden_states=words)
    groups = [groups_by_hand(row.double().numpy(), ratio, stride) for row in x]
    assert {len(mine) for mine in groups} == {HIGH * WIDE - int(HIGH * WIDE * ratio)}
    assert gap(got, block_by_hand(whole, x, words, groups, parts)) < 1e-5
    others = [groups_by_hand(row.double().numpy(), ratio, stride, worst=True) for row in x]
    assert gap(got, block_by_hand(whole, x, words, others, parts)) > 1e-3, "the sibling: other matches are seen"


def test_tokens_that_are_alike_lose_nothing(holder):
    """Squares of equal tokens: merging three of four away leaves what attention computes without one of a kind."""
    x, words = inputs()
    flat = x.view(2, HIGH, WIDE, WIDTH)[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2)
    whole = copy.deepcopy(holder.at.transformer_blocks[0])
    edit = {"op": "token_merge", "module": f"at.{BLOCK}", "ratio": 0.75, "stride": 2, "parts": ["attn1", "ff"]}
    x = flat.reshape(2, HIGH * WIDE, WIDTH)
    assert gap(edited(holder, edit)(x, encoder_hidden_states=words), whole(x, encoder_hidden_states=words)) < 1e-5


# --- other attentions ---


def attention_by_hand(attn, told, keys_of, weigh):
    """Row by row and head by head: `keys_of` makes the tokens keys come from, `weigh` weights of one query's scores."""
    import torch

    output = torch.empty_like(told)
    for image in range(len(told)):
        tokens = keys_of(image)
        q, k, v = attn.to_q(told[image]), attn.to_k(tokens), attn.to_v(tokens)
        size = q.shape[-1] // attn.heads
        rows = torch.empty_like(q)
        for head in range(attn.heads):
            span = slice(head * size, (head + 1) * size)
            for i in range(len(q)):
                weights = torch.tensor(weigh(q[i, span], k[:, span]))
                rows[i, span] = (weights[:, None] * v[:, span]).sum(0)
        output[image] = attn.to_out[0](rows)
    return output


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


def soft(query, keys) -> list[float]:
    return softmax([float(query @ key) / math.sqrt(len(query)) for key in keys])


def strongest(count: int):
    def weigh(query, keys) -> list[float]:
        scores = [float(query @ key) / math.sqrt(len(query)) for key in keys]
        kept = sorted(range(len(scores)), key=scores.__getitem__)[-count:]
        return [dict(zip(kept, softmax([scores[j] for j in kept]), strict=True)).get(j, 0.0) for j in range(len(keys))]

    return weigh


def by_feature_map(query, keys) -> list[float]:
    def features(x) -> list[float]:
        scaled = [float(value) / len(x) ** 0.25 for value in x]
        return [value + 1 if value > 0 else math.exp(value) for value in scaled]

    scores = [sum(a * b for a, b in zip(features(query), features(key), strict=True)) for key in keys]
    return [score / sum(scores) for score in scores]


def pooled(row, side: int):
    import torch

    grid = row.view(HIGH, WIDE, WIDTH)
    return torch.stack([
        sum(grid[i + a, j + b] for a in range(side) for b in range(side)) / side**2
        for i in range(0, HIGH, side)
        for j in range(0, WIDE, side)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "weigh", "other"),
    [
        ({"op": "sliced_attention", "slices": 4}, soft, by_feature_map),
        ({"op": "linear_attention"}, by_feature_map, soft),
        ({"op": "top_k", "k": 5}, strongest(5), strongest(6)),
        ({"op": "top_k", "k": 1}, strongest(1), soft),
        ({"op": "top_k", "k": HIGH * WIDE}, soft, strongest(5)),
    ],
)
def test_attention_weighs_as_its_formula_says(holder, edit, weigh, other):
    x, _ = inputs()
    block = edited(holder, {**edit, "module": f"at.{BLOCK}.attn1"})
    got = block.attn1(x)
    assert gap(got, attention_by_hand(block.attn1, x, lambda image: x[image], weigh)) < 1e-5
    assert gap(got, attention_by_hand(block.attn1, x, lambda image: x[image], other)) > 1e-3, "the sibling"


@pytest.mark.parametrize("side", [2, 4])
def test_keys_and_values_come_from_squares(holder, side):
    x, _ = inputs()
    block = edited(holder, {"op": "kv_pool", "module": f"at.{BLOCK}.attn1", "pool": side})
    got = block.attn1(x)
    assert gap(got, attention_by_hand(block.attn1, x, lambda image: pooled(x[image], side), soft)) < 1e-5
    other = pooled(x[0], 6 - side)
    assert gap(got, attention_by_hand(block.attn1, x, lambda image: other, soft)) > 1e-3, "the sibling"


def test_top_k_works_on_words(holder):
    x, words = inputs()
    block = edited(holder, {"op": "top_k", "module": f"at.{BLOCK}.attn2", "k": 3})
    got = block.attn2(x, encoder_hidden_states=words)
    assert gap(got, attention_by_hand(block.attn2, x, lambda image: words[image], strongest(3))) < 1e-5


def test_slices_hold_a_part_of_the_scores(holder):
    """The largest thing computed while attention is written out: all scores, or those of one slice."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if "softmax" in str(func):
                self.found = max(self.found, result.numel())
            return result

    x, _ = inputs()

    def scores(block) -> int:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), Largest() as seen:
            block.attn1(x)
        return seen.found

    everything = scores(holder.at.transformer_blocks[0])
    block = edited(holder, {"op": "sliced_attention", "module": f"at.{BLOCK}.attn1", "slices": 4})
    assert everything == 2 * 2 * (HIGH * WIDE) ** 2 == 4 * scores(block)


# --- what is refused ---


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ([{"op": "linear_attention", "module": f"at.{BLOCK}.attn1"}] * 2, "has linear_attention already"),
        (
            [
                {"op": "kv_pool", "module": f"at.{BLOCK}.attn1", "pool": 2},
                {"op": "token_merge", "module": f"at.{BLOCK}", "ratio": 0.5, "stride": 2, "parts": ["attn1"]},
            ],
            "has kv_pool already",
        ),
        ([{"op": "token_merge", "module": f"at.{BLOCK}", "ratio": 0.5, "stride": 2, "parts": []}] * 2, "merges its"),
        ([{"op": "kv_pool", "module": "at.norm", "pool": 2}], "does not fit this model"),
        ([{"op": "token_merge", "module": f"at.{BLOCK}", "ratio": 0.5}], "does not fit this model"),
    ],
)
def test_edits_that_do_not_add_up_are_refused(holder, made, words):
    with pytest.raises(StageError, match=words):
        edits.replay(holder, made)


def test_an_attention_that_does_more_is_refused(holder):
    holder.at.transformer_blocks[0].attn1.residual_connection = True
    with pytest.raises(StageError, match="is no plain attention"):
        edits.replay(holder, [{"op": "linear_attention", "module": f"at.{BLOCK}.attn1"}])
