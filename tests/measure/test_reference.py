"""The reference of a bundle: what it is planned from, and that all it needs is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from sdcompile.backends import BACKENDS, Probe
from sdcompile.measure.reference import reference_recipe
from sdcompile.plan import Machine, resolve
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
