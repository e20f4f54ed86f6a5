"""Recipes and plans of generation features: defaults, profiles, fitted samplers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sdcompile.errors import RecipeError
from sdcompile.plan import Plan, resolve
from sdcompile.recipe import load
from sdcompile.runtime.options import BUILT_IN, NAMES, Options
from sdcompile.runtime.values import CHECKS
from sdcompile.steps.fit_prompts import drawn
from tests.test_plan import BASE, machine

FITTED = BASE + (
    "samplers:\n"
    "  - dpmpp_2m\n"
    "  - {name: few, base: dpmpp_2m, num_inference_steps: 6, fit: {prompts: 3, held_out: [a dog], seed: 1}}\n"
)


def planned(folder: Path, source, text: str, *sets: str) -> Plan:  # type: ignore[no-untyped-def]
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return resolve(load(path, sets), source, machine())


def test_defaults_of_a_recipe_reach_the_bundle_as_they_were_written(tmp_path: Path, source) -> None:
    text = BASE + "defaults: {guidance_interval: [0, 0.5], early_stop: 1e-3:5, prompt_weighting: a1111}\n"
    params = planned(tmp_path, source, text)["pipeline.package.bundle"].job.params
    assert params["defaults"]["options"] == {
        "guidance_interval": [0, 0.5], "early_stop": "1e-3:5", "prompt_weighting": "a1111",
    }  # fmt: skip
    assert params["profiles"]["draft"] == {"num_inference_steps": 8}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("defaults: {guidance_interval: [0.9, 0.1]}", "guidance_interval=[0.9, 0.1] is no interval"),
        ("defaults: {guidance_schedule: square}", "guidance_schedule='square' is unknown"),
        ("defaults: {stages: dpmpp_2m}", "stages='dpmpp_2m': at least two"),
        ("defaults: {hires: {factor: 2}}", "is no scale"),
        ("profiles: {draft: {steps: 3}}", "no option is called 'steps'"),
        ("profiles: {draft: {tiling: some}}", "tiling='some' is unknown"),
        ("samplers: [{name: few, base: ddim}]", "a fitted sampler has base, num_inference_steps and fit"),
        ("samplers: [{name: few, base: ddim, num_inference_steps: 6, fit: {}, eta: 1}]", "from its base"),
        ("samplers: [ddim, {name: few, base: dimm, num_inference_steps: 6, fit: {}}]", "did you mean 'ddim'"),
        ("samplers: [ddim, {name: few, base: ddim, num_inference_steps: 6, fit: {teacher: 3}}]", "teacher"),
    ],
)
def test_a_fault_is_found_when_the_recipe_is_read(tmp_path: Path, line: str, fault: str) -> None:
    (tmp_path / "r.yaml").write_text(BASE + line + "\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "r.yaml")
    assert fault in caught.value.message
    assert "r.yaml:10" in caught.value.message


def test_a_fitted_sampler_is_a_step_between_tables_and_what_reads_them(tmp_path: Path, source) -> None:
    plan = planned(tmp_path, source, FITTED)
    step = plan["pipeline.compile.fit"]
    (row,) = step.job.params["fits"]
    assert (row["scheduler"], row["num_inference_steps"], row["guidance_scale"]) == (
        "DPMSolverMultistepScheduler",
        6,
        7.5,
    )
    assert len(row["prompts"]) == 3
    assert row["held_out"] == ["a dog"]
    assert step.inputs["tables"] == "pipeline.compile.samplers"
    for reader in ("pipeline.verify.record", "pipeline.verify.images", "pipeline.package.bundle"):
        assert plan[reader].inputs["tables"] == "pipeline.compile.fit"
    again = planned(tmp_path, source, FITTED.replace("seed: 1", "seed: 2"))
    assert again["pipeline.compile.fit"].key != step.key
    assert again["pipeline.compile.samplers"].key == plan["pipeline.compile.samplers"].key
    assert planned(tmp_path, replace(source, weights="x"), FITTED)["pipeline.compile.fit"].key != step.key


def test_prompts_to_fit_to_are_drawn_by_seed_and_share_no_subject_with_those_that_judge() -> None:
    for model in ("folder:sd15", "builtin:tiny"):
        assert drawn(model, 4, 0, judging=False) == drawn(model, 4, 0, judging=False)
        assert drawn(model, 4, 0, judging=False) != drawn(model, 4, 1, judging=False)
        assert not set(drawn(model, 40, 0, judging=False)) & set(drawn(model, 40, 0, judging=True))


def test_every_option_has_one_name_everywhere() -> None:
    assert set(CHECKS) <= set(NAMES)
    assert Options(seed=1).over(BUILT_IN).output_type == "pil"
    assert BUILT_IN.over(Options(tiling="auto")).tiling == "off"
