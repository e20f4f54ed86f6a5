"""Step caching at run time: which calls are shallow, whose deep features they get, and when a whole call is forced."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sdcompile.errors import BundleError, RecipeError
from sdcompile.runtime import values
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.runtime.stepcache import DeepFeatures
from sdcompile.spec import DEEP
from tests.runtime.test_pipeline import Engines, _Engine, model_in


class Cached(Engines):
    """A denoiser whose deep features are its own rows' latents, which tells whose they are."""

    def __call__(self, component: str) -> _Engine:
        self.open.append(component)
        self.most_open = max(self.most_open, len(self.open))
        return _CachedEngine(self, component)


class _CachedEngine(_Engine):
    def __call__(self, feeds):
        made = super().__call__(feeds)
        return {**made, DEEP: feeds["sample"] * 2} if self.component == "unet" else made

    def _unet_cached(self, feeds):
        return self._unet(feeds) + feeds[DEEP]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engines():
    return Cached()


def run(model, engines, *prompts, **options):
    pipeline = Pipeline(model, engines, low_memory=options.pop("low_memory", False))
    request = {"num_inference_steps": 4, "seed": 1, "output_type": "latent", "guidance_scale": 1.0, **options}
    return pipeline(list(prompts or ("red",)), **request)


def test_of_every_so_many_calls_the_first_is_whole(model, engines):
    output = run(model, engines, step_cache=3)
    assert output.timings["denoise_shallow"] == [False, True, True, False]
    assert len(engines.feeds["unet"]) == len(engines.feeds["unet_cached"]) == 2
    for feeds in engines.feeds["unet_cached"]:
        np.testing.assert_array_equal(feeds[DEEP], engines.feeds["unet"][0]["sample"] * 2)
    assert output.metadata(0)["step_cache"] == "3"


def test_off_is_the_picture_without(model, engines):
    plain = run(model, Cached()).images
    np.testing.assert_array_equal(run(model, engines, step_cache="off").images, plain)
    assert "unet_cached" not in engines.feeds
    assert not np.array_equal(run(model, engines, step_cache=2).images, plain), "cached steps are another picture"


def test_every_image_and_side_of_guidance_gets_its_own_features_however_rows_are_split(model, engines):
    """Six rows through engines of at most four give what each image gives alone."""
    prompts, seeds = ("red", "blue circle", "circle"), [1, 2, 3]
    together = run(model, engines, *prompts, seed=seeds, guidance_scale=4.0, step_cache=2).images
    for prompt, seed, row in zip(prompts, seeds, together, strict=True):
        alone = run(model, Cached(), prompt, seed=seed, guidance_scale=4.0, step_cache=2).images[0]
        np.testing.assert_allclose(row, alone, rtol=1e-6)


def test_swapped_features_would_be_seen(model, engines, monkeypatch):
    prompts = ("red", "blue circle")
    right = run(model, engines, *prompts, seed=[1, 2], step_cache=2).images
    of = DeepFeatures.of
    monkeypatch.setattr(DeepFeatures, "of", lambda self, rows: of(self, rows)[::-1])
    assert not np.allclose(run(model, Cached(), *prompts, seed=[1, 2], step_cache=2).images, right)


def test_guidance_that_begins_later_forces_a_whole_call(model, engines):
    output = run(model, engines, guidance_scale=4.0, guidance_interval=(0.3, 0.8), step_cache=4)
    assert output.timings["denoise_rows"] == [1, 2, 2, 1]
    assert output.timings["denoise_shallow"] == [False, False, True, True]


def test_features_older_than_the_last_whole_call_are_forgotten():
    features = DeepFeatures(4)
    features.keep([("-", 0), ("+", 0)], np.zeros((2, 1, 1, 1), np.float32))
    features.keep([("+", 0)], np.ones((1, 1, 1, 1), np.float32))
    assert features.serve(1, [("+", 0)])
    assert not features.serve(1, [("-", 0), ("+", 0)])
    assert not features.serve(4, [("+", 0)])


def test_images_that_are_left_when_others_stopped_get_their_own_features(model, engines):
    denoiser = Pipeline(model, engines).denoiser(("red",) * 3, ("",) * 3, (4.0,) * 2, (900.0, 800.0), step_cache=4)
    latents = np.random.default_rng(0).standard_normal((3, 4, 4, 4)).astype(np.float32)
    denoiser(latents, 0, np.arange(3))
    denoiser(latents[2:], 1, np.array([2]))
    (shallow,) = engines.feeds["unet_cached"]
    np.testing.assert_array_equal(shallow[DEEP], np.stack([latents[2] * 2] * 2))


def test_tiles_have_features_of_their_own(model, engines):
    wide = run(model, engines, "red", "blue", width=96, height=64, tiling="auto", step_cache=4, seed=[1, 2])
    for prompt, seed, row in zip(("red", "blue"), (1, 2), wide.images, strict=True):
        alone = run(model, Cached(), prompt, width=96, height=64, tiling="auto", step_cache=4, seed=seed).images[0]
        np.testing.assert_allclose(row, alone, rtol=1e-6)


def test_with_low_memory_the_two_engines_that_take_turns_stay_open(model, engines):
    run(model, engines, step_cache=2, low_memory=True, output_type="np")
    assert engines.most_open == 2
    plain = Cached()
    run(model, plain, low_memory=True, output_type="np")
    assert plain.most_open == 1


def test_warming_up_runs_the_shallow_engine_where_there_is_one(model, engines):
    defaults = model.defaults.model_copy(update={"sampler": "ddim"})
    with_shallow = replace(model, defaults=defaults, components=("text_encoder", "unet", "unet_cached", "vae_decoder"))
    Pipeline(with_shallow, engines).warm_up()
    assert len(engines.rows["unet_cached"]) == 1


def test_a_bundle_without_the_shallow_engine_says_how_to_build_it(model, engines):
    with pytest.raises(BundleError) as caught:
        run(replace(model, components=("text_encoder", "unet", "vae_decoder")), engines, step_cache=3)
    assert "unet_cached" in caught.value.message
    assert "components.unet.step_cache" in caught.value.hint
    run(replace(model, components=("text_encoder", "unet", "vae_decoder")), engines, step_cache="off")


@pytest.mark.parametrize(("value", "found"), [("off", None), (False, None), (1, None), ("3", 3), (5, 5)])
def test_values_of_step_cache(value, found):
    assert values.step_cache(value) == found


@pytest.mark.parametrize("value", [0, -2, 2.5, "often", "every:3", True, None, [3]])
def test_values_that_are_none(value):
    with pytest.raises(RecipeError, match="is no number of calls"):
        values.step_cache(value)
