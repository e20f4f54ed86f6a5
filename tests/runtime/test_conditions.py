"""Pictures to start from and masks: forms that are read, and requests that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from sdcompile.errors import BundleError, RecipeError
from sdcompile.runtime.conditions import mask, picture, size_of
from sdcompile.runtime.pipeline import Pipeline
from tests.runtime.test_pipeline import Engines, model_in

LEVELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def test_every_form_of_a_picture_is_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    PIL.Image.fromarray(LEVELS).save(path)
    expected = LEVELS.transpose(2, 0, 1)[None] / np.float32(127.5) - 1
    for form in (LEVELS, LEVELS / 255, PIL.Image.fromarray(LEVELS), path, str(path)):
        np.testing.assert_allclose(picture("image", form, 4, 6), expected, atol=1e-6)
        assert size_of("image", form) == (4, 6)
    assert picture("image", [LEVELS, path], 8, 12).shape == (2, 3, 8, 12)


def test_a_mask_is_one_where_it_is_white() -> None:
    levels = np.zeros((16, 16), np.uint8)
    levels[8:, :] = 128
    assert mask("mask", levels, 16, 16, 8).tolist() == [[[[0, 0], [1, 1]]]]


@pytest.mark.parametrize(
    "bad", ["nowhere.png", [], np.zeros((4, 4, 2), np.uint8), np.full((4, 4, 3), 2.0), np.zeros(3), {"a": 1}]
)
def test_what_is_no_picture_is_refused(bad: Any) -> None:
    with pytest.raises(RecipeError, match="image"):
        picture("image", bad, 4, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_image": LEVELS}, RecipeError, "needs an image"),
        ({"image": LEVELS}, BundleError, "height 4"),
        ({"image": LEVELS, "height": 32, "width": 32}, BundleError, "ddim cannot begin at a later step"),
        ({"image": LEVELS, "height": 32, "width": 32, "strength": 2}, RecipeError, "out of range"),
        ({"image": LEVELS, "height": 32, "width": 32, "strength": 0.1}, RecipeError, "leaves none"),
        ({"image": [LEVELS] * 3, "height": 32, "width": 32}, RecipeError, "3 images were given for 1"),
        (
            {"image": LEVELS, "height": 32, "width": 32, "stages": "ddim:1,euler_ancestral"},
            RecipeError,
            "do not begin from a picture",
        ),
    ],
)
def test_requests_that_cannot_be_are_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Pipeline(model_in(tmp_path), Engines())("red", **options)


def test_a_bundle_without_an_encoder_says_how_to_get_one(tmp_path: Path) -> None:
    model = replace(model_in(tmp_path), components=("text_encoder", "unet", "vae_decoder"))
    with pytest.raises(BundleError, match="no vae_encoder"):
        Pipeline(model, Engines())("red", image=LEVELS, height=32, width=32)
