"""Measuring bundles with cached steps: one bundle with each of several values, peers and the reference without."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from sdcompile import bundle
from sdcompile.errors import RecipeError
from sdcompile.measure import bench
from sdcompile.measure.contenders import Ask, of_bundles, of_peer, require
from sdcompile.measure.reference import reference_recipe
from sdcompile.models import tiny
from sdcompile.recipe import Recipe, dump, known_names
from tests.measure.test_reference import RECIPE


def bundle_in(folder: Path, *components: str) -> Path:
    """A manifest without engines."""
    folder.mkdir()
    entry = bundle.ComponentEntry(backend="stub", precision="fp32", spec={})
    bundle.write(
        folder,
        bundle.Manifest(
            name=folder.name, family="sd", sdcompile="0", built_at="", recipe={}, source={}, tools={}, host={},
            facts={"latent_channels": 4, "vae_scale_factor": 4}, shapes={}, components=dict.fromkeys(components, entry),
            tokenizer=bundle.TokenizerEntry(file="t", max_length=1, pad_id=0, bos_id=0, eos_id=0),
            samplers={"ddim": bundle.SamplerEntry(file="d", scheduler="DDIMScheduler", num_inference_steps=(2,))},
            defaults=bundle.Defaults(
                sampler="ddim", num_inference_steps=2, guidance_scale=2, height=64, width=64, options={"step_cache": 3}
            ),
            verification={}, files={},
        ),
    )  # fmt: skip
    return folder


@pytest.fixture
def cached(tmp_path) -> Path:
    return bundle_in(tmp_path / "cached", "unet", "unet_cached")


def test_one_bundle_is_measured_with_each_value(cached):
    (plain,) = of_bundles([cached], Ask(), 1, "auto")
    assert "step_cache" not in plain.job["call"], "the bundle's own default"
    both = of_bundles([cached], Ask(), 1, "auto", bench.step_caches("off, 3"))
    assert [(c.name, c.job["call"]["step_cache"]) for c in both] == [
        ("cached, step cache off", "off"), ("cached, step cache 3", "3"),
    ]  # fmt: skip


def test_a_peer_is_asked_for_the_same_picture_without(cached, tmp_path):
    (like,) = of_bundles([cached], Ask(), 1, "auto", ("3",))
    assert "step_cache" not in of_peer("diffusers-fp32", like, {"source": tiny.path()}, tmp_path).job["call"]


def test_a_bundle_without_the_shallow_engine_is_refused_before_anything_runs(tmp_path):
    plain = bundle_in(tmp_path / "plain", "unet")
    with pytest.raises(RecipeError, match="plain has no unet_cached, so it cannot take --step-cache 3"):
        of_bundles([plain], Ask(), 1, "auto", ("off", "3"))
    require(bundle.read(plain), "step_cache", "off")
    with pytest.raises(RecipeError, match="is no number of calls"):
        bench.step_caches("off,often")


def test_the_reference_reuses_nothing():
    components = {**RECIPE["components"], "unet": {"step_cache": {"every": 3}}, "unet_cached": {"precision": "fp32"}}
    asked = {**RECIPE, "components": components, "defaults": {"step_cache": 5, "guidance_scale": 3.0}}
    recipe = dump(Recipe.model_validate(asked, context=known_names()))
    found = reference_recipe(SimpleNamespace(family="sd", name="x", recipe=recipe), recipe)
    assert "unet_cached" not in found.wanted(("unet",))
    assert found.defaults.step_cache is None
    assert found.defaults.guidance_scale == 3.0
