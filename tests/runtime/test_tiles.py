"""Tiles and second passes: what is done pointwise comes out as if done at once, and memory stays with the tile."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcompile.errors import BundleError, RecipeError
from sdcompile.runtime.model import Model
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.runtime.tables import Start, load, save
from sdcompile.runtime.tiles import OVERLAP, Tiling, over_tiles, ramp, upscaled
from sdcompile.spec import Range
from tests.runtime.test_pipeline import Engines, model_in


@given(st.integers(8, 70), st.integers(8, 70), st.integers(8, 24), st.integers(8, 24))
def test_tiles_cover_everything_and_overlap(height: int, width: int, tile_height: int, tile_width: int) -> None:
    tiling = Tiling(height, width, min(tile_height, height), min(tile_width, width))
    seen = np.zeros((height, width), int)
    for top, left in tiling.corners():
        assert 0 <= top <= height - tiling.tile_height
        seen[top : top + tiling.tile_height, left : left + tiling.tile_width] += 1
    assert seen.min() >= 1
    tops = sorted({top for top, _ in tiling.corners()})
    assert all(b - a <= tiling.tile_height * (1 - OVERLAP) + 1 for a, b in itertools.pairwise(tops))


def test_what_is_done_pointwise_comes_out_as_if_done_at_once() -> None:
    array = np.random.default_rng(0).standard_normal((2, 3, 20, 33)).astype(np.float32)
    rows: list[tuple[int, ...]] = []

    def double(part: np.ndarray) -> np.ndarray:
        rows.append(part.shape)
        return part.repeat(2, axis=2).repeat(2, axis=3)

    tiling = Tiling(20, 33, 8, 16)
    np.testing.assert_allclose(over_tiles(double, array, tiling, up=2), double(array), atol=1e-5)
    assert rows[0] == (2 * tiling.count, 3, 8, 16)
    half = over_tiles(lambda part: part[..., ::2, ::2], array[..., :32], Tiling(20, 32, 8, 16), down=2)
    np.testing.assert_allclose(half, array[..., ::2, :32:2], atol=1e-5)
    assert ramp(16).min() > 0


def test_upscaling_keeps_planes_and_the_mean() -> None:
    plane = (np.mgrid[0:4, 0:6][0] + 2.0 * np.mgrid[0:4, 0:6][1]).astype(np.float32)[None, None]
    large = upscaled(plane, 8, 12)
    np.testing.assert_allclose(np.diff(large[0, 0, 2, 1:-1]), 1.0, atol=1e-5)
    assert large.mean() == pytest.approx(plane.mean(), rel=1e-5)
    assert np.array_equal(upscaled(plane, 4, 6), plane)


def test_sizes_beyond_the_built_ones_are_made_of_tiles_when_asked(tmp_path: Path) -> None:
    engines = Engines()
    pipe = Pipeline(model_in(tmp_path), engines)
    with pytest.raises(BundleError, match="height 160") as caught:
        pipe("red", height=160, width=64)
    assert "tiling auto" in caught.value.hint
    made = pipe("red", height=160, width=64, seed=1, tiling="auto", output_type="np")
    assert made.images.shape == (1, 160, 64, 3)
    assert {feeds["sample"].shape[2:] for feeds in engines.feeds["unet"]} == {(8, 8)}
    assert {feeds["latent_sample"].shape[2:] for feeds in engines.feeds["vae_decoder"]} == {(8, 8)}
    assert made.timings["denoise_rows"] == [6] * 4


def test_a_model_that_works_pointwise_gives_the_same_picture_in_tiles_and_whole(tmp_path: Path) -> None:
    model = model_in(tmp_path)
    large = {**model.shapes, "H": replace_max(model, "H", 160), "h": replace_max(model, "h", 20)}
    options = {"height": 160, "width": 64, "seed": 1, "output_type": "np"}
    whole = Pipeline(replace(model, shapes=large), Engines())("red", **options).images
    np.testing.assert_allclose(Pipeline(model, Engines())("red", tiling="auto", **options).images, whole, atol=1e-5)


def replace_max(model: Model, letter: str, value: int) -> Range:
    return model.shapes[letter]._replace(max=value)


def test_a_second_pass_goes_on_from_the_first_at_a_larger_size(tmp_path: Path) -> None:
    engines = Engines()
    model = model_in(tmp_path)
    starts = tuple(Start(i, 0.8, 0.6) for i in range(4))
    save(tmp_path, "ddim", [replace(load(tmp_path, "ddim", 4), starts=starts)])
    made = Pipeline(model, engines)("red", height=32, width=32, hires="2@0.5", seed=1, output_type="np")
    assert made.images.shape == (1, 64, 64, 3)
    assert [feeds["sample"].shape[2] for feeds in engines.feeds["unet"]] == [4, 4, 4, 4, 8, 8]
    assert made.timings["steps"] == [6]
    with pytest.raises(BundleError, match="height 128"):
        Pipeline(model, engines)("red", height=64, width=64, hires=2)
    with pytest.raises(RecipeError, match="leaves none"):
        Pipeline(model, engines)("red", height=32, width=32, hires="2@0.1")
    with pytest.raises(RecipeError, match="hires"):
        Pipeline(model, engines)("red", hires="large")
