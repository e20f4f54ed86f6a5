"""Experiment documents: layers stand on each other, faults have lines, the front and the pick are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdcompile.errors import RecipeError
from sdcompile.measure import experiment, layers
from sdcompile.recipe import load

ROOT = Path(__file__).parent.parent.parent
SHIPPED = sorted(ROOT.glob("recipes/experiments/*.yaml"))

HEAD = "version: 1\nname: x\nbase: base.yaml\n"


def read(tmp_path: Path, text: str) -> list[layers.Planned]:
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    return layers.load(path)[1]


def test_layers_stand_on_the_one_before_on_a_named_one_or_on_another_recipe(tmp_path):
    planned = read(
        tmp_path,
        HEAD
        + """layers:
  - {name: first, set: [a=1]}
  - {name: second, set: [b=2]}
  - {name: aside, from: first, set: [c=3]}
  - {name: other, base: other.yaml, set: [d=4]}
""",
    )
    assert [layer.sets for layer in planned] == [("a=1",), ("a=1", "b=2"), ("a=1", "c=3"), ("d=4",)]
    assert [layer.recipe.name for layer in planned] == ["base.yaml"] * 3 + ["other.yaml"]
    assert planned[2].bundle == "x-02-aside"


def test_the_source_of_the_experiment_holds_for_every_layer(tmp_path):
    planned = read(tmp_path, HEAD + "source: builtin:tiny\nlayers: [{name: a}, {name: b, base: o.yaml}]\n")
    assert [layer.sets for layer in planned] == [("source=builtin:tiny",)] * 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + "layers: []\n", "experiment.yaml:4: layers: expected at least one entry"),
        (HEAD + "layers: [{nam: a}]\n", "unknown field 'nam', did you mean 'name'?"),
        (HEAD + "layer: []\n", "unknown field 'layer', did you mean 'layers'?"),
        (HEAD + "layers: [{name: a}, {name: a}]\n", "two layers are called 'a'"),
        (HEAD + "layers: [{name: a, from: b}]\n", "stands on 'b'"),
        (HEAD + "pick: {at_least: .nan}\nlayers: [{name: a}]\n", "pick.at_least: nan is not a finite number"),
        (HEAD + "pick: {figure: beauty}\nlayers: [{name: a}]\n", "is not one of alignment"),
        ("- a\n", "expected a mapping"),
        ("a: [\n", "experiment.yaml:"),
    ],
)
def test_faults_are_told_with_their_line(tmp_path, text, words):
    with pytest.raises(RecipeError) as told:
        read(tmp_path, text)
    assert words in told.value.message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_experiment_is_valid_to_its_last_layer(path):
    assert path.read_text(encoding="utf-8").splitlines()[0] == f"# sdcompile experiment {path.relative_to(ROOT)}"
    for layer in layers.load(path)[1]:
        assert load(layer.recipe, (*layer.sets, f"name={layer.bundle}")).name == layer.bundle


def row(name: str, seconds: float, alignment: float) -> dict:
    return {"name": name, "image_s": {"median": seconds}, "quality": {"alignment": {"mean": alignment}}}


ROWS = [row("slow, good", 4, 0.98), row("middle", 2, 0.97), row("worse and slower", 3, 0.9), row("fast, bad", 1, 0.5)]


def test_the_front_leaves_out_what_another_layer_beats():
    assert experiment.pareto(ROWS, "alignment") == {"slow, good", "middle", "fast, bad"}
    assert experiment.pareto([ROWS[0], row("twin", 4, 0.98)], "alignment") == {"slow, good", "twin"}


@pytest.mark.parametrize(("at_least", "name"), [(0.95, "middle"), (0.5, "fast, bad"), (1.0, "slow, good")])
def test_the_fastest_good_enough_layer_is_picked(at_least, name):
    assert experiment.pick(ROWS, layers.Pick(at_least=at_least)) == name


def test_a_change_is_taken_picture_by_picture():
    first = {"pictures": [{"alignment": 1.0}, {"alignment": 0.5}, {"alignment": 0.9}]}
    other = {"pictures": [{"alignment": 0.9}, {"alignment": 0.4}, {"alignment": 0.8}]}
    assert experiment.change(first, other, "alignment") == {"mean": -0.1, "error": 0.0, "min": -0.1}
    assert experiment.change(first, first, "alignment") == {"mean": 0.0, "error": 0.0, "min": 0.0}
    assert experiment.change(first, other, "psnr_db") is None


def test_a_pick_by_something_unmeasured_or_out_of_reach_is_refused():
    with pytest.raises(RecipeError, match="has no ssim to choose by"):
        experiment.pick(ROWS, layers.Pick(figure="ssim"))
    with pytest.raises(RecipeError, match="no layer has alignment"):
        experiment.pick(ROWS, layers.Pick(at_least=1.5))
