"""Decoded pixels to pictures and PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdcompile.runtime.images import pil_from_pixels, pixels_from_decoded, save_png


def test_pixels_are_clipped_and_channels_come_last() -> None:
    decoded = np.zeros((1, 3, 1, 4), np.float32)
    decoded[0, 0, 0] = (-2.0, -1.0, 0.0, 3.0)
    pixels = pixels_from_decoded(decoded)
    assert pixels.shape == (1, 1, 4, 3)
    assert pixels.dtype == np.float32
    assert pixels[0, 0, :, 0].tolist() == [0.0, 0.0, 0.5, 1.0]


def test_levels_are_rounded_to_the_nearest() -> None:
    pixels = np.array([0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0], np.float32).reshape(1, 1, 5, 1).repeat(3, axis=-1)
    (image,) = pil_from_pixels(pixels)
    assert image.size == (5, 1)
    assert np.asarray(image)[0, :, 1].tolist() == [0, 0, 1, 255, 255]


def test_a_single_channel_becomes_a_grey_picture() -> None:
    (image,) = pil_from_pixels(np.ones((1, 2, 2, 1), np.float32))
    assert image.mode == "L"


def test_a_png_says_how_it_was_made(tmp_path: Path) -> None:
    from PIL import Image

    (image,) = pil_from_pixels(np.zeros((1, 2, 2, 3), np.float32))
    told = {"prompt": "eine Füchsin 🦊\n猫", "seed": "3"}
    save_png(image, tmp_path / "x.png", told)
    with Image.open(tmp_path / "x.png") as read:
        assert read.text == told


@pytest.mark.tiny
def test_pictures_equal_those_of_diffusers() -> None:
    torch = pytest.importorskip("torch")
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor()
    decoded = np.random.default_rng(0).normal(0, 0.7, (2, 3, 8, 8)).astype(np.float32)
    theirs = processor.postprocess(torch.from_numpy(decoded), output_type="np")
    assert np.array_equal(pixels_from_decoded(decoded), theirs)
    for ours, other in zip(pil_from_pixels(theirs), processor.numpy_to_pil(theirs), strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(other))
