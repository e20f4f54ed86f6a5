"""The noise of a seed against torch's CPU generator: recorded values, and torch itself where installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sdcompile.runtime.noise import Generator, randn

RECORDED = json.loads((Path(__file__).parent / "noise_recorded.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"seed {case['seed']}")
def test_successive_draws_equal_those_recorded_from_torch(case: dict) -> None:
    generator = Generator(case["seed"])
    for draw in case["draws"]:
        values = generator.randn(draw["shape"])
        assert values.dtype == np.float32
        assert list(values.shape) == draw["shape"]
        shown = values.reshape(-1)[draw["at"]].view(np.uint32)
        assert [f"{bits:08x}" for bits in shown] == draw["bits"]


def test_another_seed_gives_other_values() -> None:
    assert not np.array_equal(randn((4, 4), 1), randn((4, 4), 2))


def test_only_the_low_32_bits_of_a_seed_matter_as_in_torch() -> None:
    assert np.array_equal(randn((20,), 7), randn((20,), 7 + (1 << 32)))
    assert np.array_equal(randn((20,), -1), randn((20,), (1 << 64) - 1))


def test_values_are_standard_normal() -> None:
    values = randn((1 << 18,), 0).astype(np.float64)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((np.abs(values) > 2).mean() - 0.0455) < 0.002


def test_no_values_are_no_values() -> None:
    assert randn((0, 4), 0).shape == (0, 4)


@pytest.mark.tiny
@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32 + 3, -7])
def test_draws_equal_torch_to_the_last_bit_or_its_neighbour(seed: int) -> None:
    torch = pytest.importorskip("torch")
    theirs, ours = torch.Generator("cpu").manual_seed(seed), Generator(seed)
    for shape in ((1, 4, 64, 64), (3,), (1,), (15,), (16,), (17,), (2, 4, 8, 12), (1, 4, 3, 5), (1, 4, 9, 7), (5,)):
        expected, found = torch.randn(shape, generator=theirs).numpy(), ours.randn(shape)
        # Bit for bit on AVX2; torch's kernels for other instruction sets round otherwise.
        assert np.abs(expected - found).max() <= 2e-6
        if torch.backends.cpu.get_cpu_capability() == "AVX2":
            assert np.array_equal(expected.view(np.int32), found.view(np.int32))
