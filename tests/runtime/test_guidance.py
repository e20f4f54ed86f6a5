"""Guidance scales of every call, rescaling, and what guiding less often saves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdcompile.errors import RecipeError
from sdcompile.runtime.guidance import guided, scales
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.runtime.values import Interval, Schedule, guidance_interval, guidance_schedule
from tests.runtime.test_pipeline import Engines, model_in

TEN = tuple(range(900, -1, -100))


def test_schedules_give_every_call_its_scale() -> None:
    assert scales(7, Schedule("constant"), None, TEN) == (7.0,) * 10
    assert scales(7, Schedule("phases"), None, TEN) == pytest.approx((5, 5, 5, 7, 7, 7, 9, 9, 9, 9))
    assert scales(3, Schedule("phases", (2, 4, 6)), None, TEN) == (2, 2, 2, 4, 4, 4, 6, 6, 6, 6)
    assert scales(3, Schedule("linear", (2, 11)), None, TEN) == pytest.approx(range(2, 12))
    cosine = scales(4, Schedule("cosine"), None, TEN)
    assert (cosine[0], cosine[-1]) == pytest.approx((2, 6))
    assert np.mean(cosine) == pytest.approx(4)
    assert np.diff(cosine).min() > 0
    assert scales(5, Schedule("cosine", (2, 8)), None, (1.0,)) == (2.0,)


def test_outside_the_interval_there_is_no_guidance() -> None:
    assert scales(5, Schedule("constant"), Interval(0, 0.5), TEN) == (5.0,) * 5 + (1.0,) * 5
    assert scales(5, Schedule("constant"), Interval(200, 700, True), TEN) == (1, 1, 5, 5, 5, 5, 5, 5, 1, 1)
    assert scales(1, Schedule("linear", (2, 9)), None, TEN) == (1,) * 10


def test_forms_of_values() -> None:
    assert guidance_interval("0.2..0.8") == guidance_interval([0.2, 0.8]) == Interval(0.2, 0.8)
    assert guidance_interval("t200..800") == guidance_interval({"timesteps": (200, 800)}) == Interval(200, 800, True)
    assert guidance_schedule("phases:5,7,9") == guidance_schedule({"kind": "phases", "scales": [5, 7, 9]})
    for interval in ("0.8..0.2", (0, 2), 3, "x..1", {"steps": (0, 1)}):
        with pytest.raises(RecipeError):
            guidance_interval(interval)
    for schedule in ("phases:1", "quadratic", "linear:1,x", 7):
        with pytest.raises(RecipeError):
            guidance_schedule(schedule)


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def pipe(tmp_path: Path, engines: Engines) -> Pipeline:
    return Pipeline(model_in(tmp_path), engines)


def test_a_step_without_guidance_denoises_one_row_an_image(pipe: Pipeline, engines: Engines) -> None:
    made = pipe(["red", "blue"], guidance_interval=(0.3, 0.7), seed=1)
    assert engines.rows["unet"] == [2, 4, 4, 2]
    assert made.timings["denoise_rows"] == [2, 4, 4, 2]
    assert made.metadata(0)["guidance_interval"] == "0.3..0.7"


def test_an_interval_of_everything_changes_nothing_and_one_of_nothing_is_unguided(pipe: Pipeline) -> None:
    plain = pipe("red", seed=1, output_type="latent").images
    assert np.array_equal(pipe("red", seed=1, guidance_interval=(0, 1), output_type="latent").images, plain)
    none = pipe("red", seed=1, guidance_interval={"timesteps": (1e4, 1e5)}, output_type="latent").images
    assert np.array_equal(none, pipe("red", seed=1, guidance_scale=1, output_type="latent").images)
    assert not np.array_equal(none, plain)


@pytest.mark.tiny
@pytest.mark.parametrize("rescale", [0.0, 0.35, 1.0])
def test_rescaling_is_that_of_diffusers(rescale: float) -> None:
    torch = pytest.importorskip("torch")
    rescale_noise_cfg = pytest.importorskip(
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
    ).rescale_noise_cfg
    negative, positive = np.random.default_rng(0).standard_normal((2, 3, 4, 8, 8)).astype(np.float32)
    plain = torch.from_numpy(negative + np.float32(7) * (positive - negative))
    expected = rescale_noise_cfg(plain, torch.from_numpy(positive), rescale).numpy()
    np.testing.assert_allclose(guided(negative, positive, 7, rescale), expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(guided(negative, positive, 7, rescale + 0.1), expected, atol=1e-3)
