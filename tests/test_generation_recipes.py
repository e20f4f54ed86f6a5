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
        ("profiles: {draft: {num_inference_steps: many}}", "num_inference_steps='many' is no whole number"),
        ("profiles: {draft: {guidance_scale: .nan}}", "guidance_scale=nan is not finite"),
        ("profiles: {draft: {profile: best}}", "a profile cannot name another one"),
        ("profiles: {draft: {sampler: eular}}", "profiles.draft.sampler: 'eular' is not one of samplers, did you mean"),
        ("profiles: {fast: {num_inference_steps: 51}}", "profiles.fast.num_inference_steps: sampler dpmpp_2m is com"),
        ("profiles: {a: {stages: 'ddim:3,unipc'}}", "profiles.a.stages: 'unipc' is not one of samplers"),
        ("defaults: {stages: 'dim:3,euler'}", "defaults.stages: 'dim' is not one of samplers, did you mean 'ddim'?"),
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


def refused(folder: Path, source, text: str) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(RecipeError) as caught:
        planned(folder, source, text)
    return caught.value.message


def test_a_profile_may_only_ask_a_fitted_sampler_for_its_own_number_of_steps(tmp_path: Path, source) -> None:
    few = FITTED + "profiles: {draft: {sampler: few}, other: {sampler: dpmpp_2m, num_inference_steps: 7}}\n"
    assert planned(tmp_path, source, few)
    wrong = few.replace("{sampler: few}", "{sampler: few, num_inference_steps: 8}")
    text = refused(tmp_path, source, wrong)
    assert "profiles.draft.num_inference_steps: sampler few is compiled for 6 steps, not for 8" in text
    # Of two samplers in a row, both are asked for the same number.
    stages = FITTED + "defaults: {stages: 'dpmpp_2m:3,few'}\n"
    assert "sampler few is compiled for 6" in refused(tmp_path, source, stages)


def test_profiles_made_for_a_fitted_default_ask_its_base_for_other_numbers_of_steps(tmp_path: Path, source) -> None:
    params = planned(tmp_path, source, FITTED + "defaults: {sampler: few}\n")["pipeline.package.bundle"].job.params
    assert params["profiles"]["draft"] == {"sampler": "dpmpp_2m", "num_inference_steps": 8}
    assert params["profiles"]["balanced"] == {}


def test_a_profile_of_a_size_that_is_not_built_is_refused_unless_it_is_tiled(tmp_path: Path, source) -> None:
    text = refused(tmp_path, source, BASE + "profiles: {big: {height: 1024}, small: {width: 64, tiling: auto}}\n")
    assert "profiles.big.height: 1024 is outside the built 512 to 768" in text
    assert "profiles.small.width: 64 is outside the built 512 to 512" in text
    assert planned(tmp_path, source, BASE + "profiles: {big: {height: 1024, tiling: auto}}\n")
