"""The reference of a bundle: what it is planned from, and that all it needs is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdcompile.backends import BACKENDS, Probe
from sdcompile.bundle import Defaults
from sdcompile.errors import RecipeError
from sdcompile.measure import contenders
from sdcompile.measure.drawing import Request
from sdcompile.measure.reference import Reference, reference_recipe
from sdcompile.plan import Machine, resolve
from sdcompile.recheck import recipe_of
from sdcompile.recipe import Recipe, dump, known_names
from sdcompile.run import wanted

RECIPE = {
    "version": 1, "name": "x", "family": "sd", "source": "builtin:tiny", "backend": "openvino", "precision": "bf16",
    "samplers": ["ddim", {"name": "f", "base": "ddim", "num_inference_steps": 4, "fit": {"prompts": 2}}],
    "components": {
        "unet": {"precision": "int8", "prune": {"heads": {"ratio": 0.25}}, "quantize": {"max_samples": 5}},
        "text_encoder": {"clip_skip": 1, "backend": "onnxruntime", "precision": "fp32"},
    },
    "quantize": {"max_samples": 7},
}  # fmt: skip


def referred() -> Recipe:
    recipe = Recipe.model_validate(RECIPE, context=known_names())
    manifest = SimpleNamespace(family="sd", name="x", recipe=dump(recipe))
    return reference_recipe(manifest, manifest.recipe)


def test_the_reference_is_the_model_before_anything_was_done_to_it():
    recipe = referred()
    assert (recipe.backend, recipe.precision) == ("reference", "fp32")
    assert recipe.effective("unet").precision == "fp32"
    assert not recipe.pruning("unet")
    assert recipe.effective("text_encoder").params == {"clip_skip": 1}
    assert [sampler.name for sampler in recipe.samplers] == ["ddim", "f"]


def test_a_step_that_others_consumed_is_there_when_it_is_a_goal(source):
    machine = Machine({}, {name: Probe(available=True) for name in BACKENDS}, {"machine": "x86_64"})
    plan = resolve(referred(), source, machine)
    everything_made = SimpleNamespace(get=lambda key: Path())
    assert "pipeline.compile.tokenizer" not in wanted(plan, everything_made)
    with_goal = replace(plan, goals=("pipeline.compile.tokenizer",))
    assert wanted(with_goal, everything_made)["pipeline.compile.tokenizer"] is False
    assert "pipeline.compile.tokenizer" in wanted(with_goal.until("compile"), everything_made)


LIGHT = {**RECIPE, "components": {"vae_decoder": {"source": "builtin:tiny/vae_light", "precision": "int8"}}}


def with_light(**changes: str) -> SimpleNamespace:
    """The manifest of a bundle with another decoder; `changes` are sources as a bundle tells them."""
    recipe = dump(Recipe.model_validate(LIGHT, context=known_names()))
    recipe["components"]["vae_decoder"]["source"] = changes.get("vae_decoder", "builtin:tiny/vae_light")
    return SimpleNamespace(family="sd", name="x", recipe={**recipe, "source": changes.get("source", "builtin:tiny")})


def test_what_passes_were_fitted_to_is_not_looked_for_where_a_bundle_is_verified():
    manifest = with_light()
    manifest.recipe["calibrate"] = {"pictures": "folder:photos", "prompts_file": "mine.txt", "images": 8}
    assert recipe_of(Path("x.sdc"), manifest, ())["calibrate"] == {"images": 8}


def test_the_reference_of_another_decoder_is_drawn_with_it():
    manifest = with_light()
    recipe = reference_recipe(manifest, recipe_of(Path("x.sdc"), manifest, ()))
    assert recipe.component_sources == {"vae_decoder": "builtin:tiny/vae_light"}
    assert recipe.effective("vae_decoder").precision == "fp32"
    assert referred().component_sources == {}


def test_sources_that_only_the_builder_has_are_named_one_by_one():
    folder, manifest = Path("x.sdc"), with_light(source="folder:sd15", vae_decoder="folder:taesd")
    named = recipe_of(folder, manifest, ("/models/sd15", "vae_decoder=/models/taesd"))
    assert named["source"] == "/models/sd15"
    assert named["components"]["vae_decoder"]["source"] == "/models/taesd"
    for given, hint in (((), "--source vae_decoder=FOLDER"), (("vae_decoder=a",), "--source FOLDER")):
        with pytest.raises(RecipeError) as caught:
            recipe_of(folder, manifest, given)
        assert hint in caught.value.hint
    with pytest.raises(RecipeError, match=r"unet of x\.sdc has no source of its own"):
        recipe_of(folder, manifest, ("unet=b",))


def test_peers_get_the_other_decoder_or_are_refused(monkeypatch, tmp_path):
    defaults = SimpleNamespace(options={})
    sampler = SimpleNamespace(fit={}, scheduler="DDIMScheduler", config={})
    manifest = SimpleNamespace(samplers={"ddim": sampler}, defaults=defaults)
    monkeypatch.setattr(contenders.bundle, "read", lambda folder: manifest)
    (tmp_path / "model_index.json").write_text("{}")
    like = contenders.Contender("x", "bundle", {"bundle": "x.sdc", "sampler": "ddim", "call": {}}, (4, 8))
    model = {"source": tmp_path, "vae_decoder": tmp_path / "taesd"}
    assert contenders.of_peer("diffusers-fp32", like, model, tmp_path).job["decoder"].endswith("taesd")
    assert contenders.of_peer("diffusers-fp32", like, {"source": tmp_path}, tmp_path).job["decoder"] is None
    with pytest.raises(RecipeError, match="does not know the decoder x was built with, taesd"):
        contenders.of_peer("optimum-intel", like, model, tmp_path)


def test_options_of_the_defaults_have_reference_pictures_of_their_own():
    """Two bundles of one plan, one of which guides in the first half only, are not compared with the same pictures."""

    def made_of(**options):
        defaults = Defaults(
            sampler="ddim", num_inference_steps=4, guidance_scale=3.0, height=64, width=64, options=options
        )
        reference = Reference(SimpleNamespace(plan=()), {}, SimpleNamespace(defaults=defaults))
        return reference.made_of(["a"], Request.of(defaults, contenders.Ask(), 1))

    assert made_of() == made_of()
    assert made_of(guidance_interval=[0, 0.5]) != made_of()
    assert made_of(early_stop="1e-3:5") != made_of(early_stop="1e-2:5")
    assert made_of(step_cache="3") == made_of(), "what it costs is measured against the picture without"
