"""Measuring bundles of several widths: one bundle at each of them, peers and the reference at none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from sdcompile import bundle
from sdcompile.errors import RecipeError
from sdcompile.measure import bench
from sdcompile.measure.contenders import Ask, of_bundles, of_peer, require
from sdcompile.measure.evaluate import Asked
from sdcompile.measure.reference import reference_recipe
from sdcompile.models import tiny
from sdcompile.recipe import Recipe, dump, known_names
from tests.measure.test_reference import RECIPE
from tests.measure.test_stepcache import bundle_in


@pytest.fixture
def slim(tmp_path) -> Path:
    return bundle_in(tmp_path / "slim", "unet", "unet_w75")


def test_one_bundle_is_measured_at_each_width(slim):
    (plain,) = of_bundles([slim], Ask(), 1, "auto")
    assert "unet_width" not in plain.job["call"], "the bundle's own default"
    both = of_bundles([slim], Ask(), 1, "auto", ("off",), (), bench.words("full, w75"))
    assert [(c.name, c.job["call"]["unet_width"]) for c in both] == [
        ("slim, step cache off, width full", "full"), ("slim, step cache off, width w75", "w75"),
    ]  # fmt: skip
    assert "unet_width" not in of_peer("diffusers-fp32", both[1], {"source": tiny.path()}, slim).job["call"]


def test_a_bundle_without_the_width_is_refused_before_anything_runs(slim):
    with pytest.raises(RecipeError, match="slim has no width w50, so it cannot take --unet-width w50") as caught:
        of_bundles([slim], Ask(), 1, "auto", widths=("full", "w50"))
    assert "its widths are full, w75" in caught.value.hint
    require(bundle.read(slim), "unet_width", "full")


def test_an_evaluation_is_told_what_is_asked_besides():
    assert Asked(Ask()).options == {}
    assert Asked(Ask(), unet_width="w75").options == {"unet_width": "w75"}


def test_the_reference_has_the_one_width_of_its_source():
    components = {
        **RECIPE["components"],
        "unet": {"widths": {"w75": {"heads": {"ratio": 0.25}}}}, "unet_w75": {"precision": "fp32"},
    }  # fmt: skip
    asked = {**RECIPE, "components": components, "defaults": {"unet_width": "w75", "guidance_scale": 3.0}}
    recipe = dump(Recipe.model_validate(asked, context=known_names()))
    found = reference_recipe(SimpleNamespace(family="sd", name="x", recipe=recipe), recipe)
    assert found.wanted(("unet",)) == ("unet", "text_encoder")
    assert found.defaults.unet_width is None
    assert found.defaults.guidance_scale == 3.0
