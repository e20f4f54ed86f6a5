"""The denoiser's conditioning: put together once, in the same read-only arrays, and right for every call."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from sdcompile.runtime.denoising import Denoiser
from sdcompile.runtime.output import Clock
from sdcompile.spec import Range

EIGHT, SCALES = Range(1, 8, 8), (5.0, 5.0, 1.0, 5.0)
POSITIVE = np.arange(24, dtype=np.float32).reshape(4, 3, 2)


def denoiser(fed: list, rows: Range = EIGHT) -> Denoiser:
    def engine(feeds):
        fed.append(feeds)
        return {"out_sample": feeds["sample"] + feeds["encoder_hidden_states"].sum(axis=(1, 2))[:, None, None, None]}

    family = SimpleNamespace(guidance_feeds=lambda facts, scale, count: {})
    return Denoiser(
        engine, family, {}, rows, (9.0,) * len(SCALES), SCALES, 0.0, {"encoder_hidden_states": POSITIVE},
        {"encoder_hidden_states": -POSITIVE}, Clock(),
    )  # fmt: skip


def test_a_prompt_is_fed_as_one_constant_array_at_every_step_of_a_kind():
    fed: list = []
    make, everyone = denoiser(fed), np.arange(4)
    for index in range(4):
        make(np.zeros((4, 1, 2, 2), np.float32), index, everyone)
    arrays = [feeds["encoder_hidden_states"] for feeds in fed]
    assert arrays[0] is arrays[1] is arrays[3]
    assert arrays[2] is not arrays[0]
    np.testing.assert_array_equal(arrays[0], np.concatenate([-POSITIVE, POSITIVE]))
    np.testing.assert_array_equal(arrays[2], POSITIVE)
    assert not any(array.flags.writeable for array in arrays[:3])
    assert POSITIVE.flags.writeable, "the caller's own array stays as it is"


def test_images_that_leave_take_their_rows_along():
    fed: list = []
    make = denoiser(fed)
    for images in ([0, 1, 2, 3], [0, 3], [3], [0, 1, 2, 3]):
        make(np.zeros((len(images), 1, 2, 2), np.float32), 0, np.array(images))
        rows = POSITIVE[images]
        np.testing.assert_array_equal(fed[-1]["encoder_hidden_states"], np.concatenate([-rows, rows]))
    assert len(make.joined) == 2


@pytest.mark.parametrize("rows", [Range(1, 3, 3), Range(9, 9, 9)])
def test_an_engine_of_fewer_or_more_rows_gets_them_in_parts(rows):
    fed: list = []
    make = denoiser(fed, rows=rows)
    result = make(np.zeros((4, 1, 2, 2), np.float32), 0, np.arange(4))
    np.testing.assert_array_equal(result[:, 0, 0, 0], 9 * POSITIVE.sum(axis=(1, 2)))
    assert all(rows.min <= len(feeds["sample"]) <= rows.max for feeds in fed)
