"""Profiles and the rules that choose one, as people edit them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdcompile.errors import BundleError, RecipeError
from sdcompile.runtime.offer import Offer
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.runtime.profiles import FILE, Profiles, power_state, read
from tests.runtime.test_pipeline import Engines, model_in

CONTENT = {
    "profiles": {"draft": {"num_inference_steps": 2, "guidance_scale": 2}, "quality": {"num_inference_steps": 4}},
    "policy": [
        {"battery_below": 0.2, "profile": "draft"},
        {"thermal": "throttling", "profile": "draft"},
        {"battery_above": 0.8, "profile": "quality"},
    ],
}


@pytest.fixture
def profiles(tmp_path: Path) -> Profiles:
    (tmp_path / FILE).write_text(json.dumps(CONTENT), encoding="utf-8")
    return read(tmp_path)


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ({"battery": 0.1}, "draft"),
        ({"battery": 0.9, "thermal": "throttling"}, "draft"),
        ({"battery": 0.9, "thermal": "nominal"}, "quality"),
        ({"battery": 0.5}, None),
        ({}, None),
    ],
)
def test_the_first_rule_that_holds_chooses(profiles: Profiles, state: dict[str, Any], name: str | None) -> None:
    assert profiles.chosen(state) == name


def test_a_profile_lies_between_the_call_and_the_defaults(tmp_path: Path, profiles: Profiles) -> None:
    pipe = Pipeline(replace(model_in(tmp_path), profiles=profiles), Engines())
    made = pipe("red", profile="draft", guidance_scale=3.0, seed=1)
    assert (made.num_inference_steps, made.request.guidance_scale) == (2, 3.0)
    assert made.metadata(0)["profile"] == "draft"
    pipe.power_state = lambda: {"battery": 0.15}
    assert pipe("red").request.guidance_scale == 2
    assert pipe("red", profile="quality").num_inference_steps == 4
    with pytest.raises(RecipeError, match="profile 'best' is not in this bundle"):
        pipe("red", profile="best")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": "dimd"}, "profile draft: sampler: 'dimd' is not one of samplers, did you mean 'ddim'?"),
        ({"num_inference_steps": 9}, "profile draft: num_inference_steps: sampler ddim is compiled for 1-4 steps, not"),
        ({"stages": "ddim:2,euler"}, "profile draft: stages: 'euler' is not one of samplers"),
        ({"stages": "ddim"}, "profile draft: stages='ddim': at least two"),
    ],
)
def test_a_profile_that_asks_for_what_is_not_compiled_is_told_when_it_is_read(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    offer = Offer({"ddim": (1, 2, 3, 4)}, "ddim", 4)
    (tmp_path / FILE).write_text(json.dumps({"profiles": {"draft": options}}), encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        read(tmp_path, offer)
    assert words in caught.value.message
    (tmp_path / FILE).write_text(json.dumps({"profiles": {"draft": {"num_inference_steps": 3}}}), encoding="utf-8")
    assert read(tmp_path, offer).named("draft").num_inference_steps == 3


def test_a_bundle_without_the_file_has_none(tmp_path: Path) -> None:
    assert read(tmp_path) == Profiles()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"profiles": {"draft": {"steps": 3}}}', "profile draft: no option is called 'steps'"),
        ('{"profiles": {"draft": {}}, "policy": [{"battery_below": 0.2, "profile": "x"}]}', "is no rule"),
        ('{"profiles": {"draft": {}}, "policy": [{"moon": "full", "profile": "draft"}]}', "is no rule"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        read(tmp_path)


def test_the_emptiest_battery_counts(tmp_path: Path) -> None:
    assert power_state(tmp_path) == {}
    for name, level in (("BAT0", "81\n"), ("BAT1", "17\n"), ("AC", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "capacity").write_text(level, encoding="ascii")
    assert power_state(tmp_path) == {"battery": 0.17}
