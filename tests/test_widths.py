"""Several widths of one denoiser before anything is built: what a recipe may say, and which steps it means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdcompile.errors import RecipeError
from sdcompile.families import FAMILIES
from sdcompile.plan import Plan, resolve
from sdcompile.recipe import dump, load, schema
from tests.test_plan import BASE, machine

FAMILY = FAMILIES["sd"]
SLIM = "components.unet.widths={w75: {channels: {ratio: 0.25}}, w50: {heads: {ratio: 0.5}, recover: {steps: 10}}}"


@pytest.fixture
def plan(tmp_path, source):
    def make(*sets: str, text: str = BASE) -> Plan:
        path = Path(tmp_path / "recipe.yaml")
        path.write_text(text)
        return resolve(load(path, sets), source, machine())

    return make


def keys(plan: Plan) -> dict[str, str]:
    return {step.name: step.key for step in plan}


def test_the_names_of_widths_and_of_components_are_told_apart():
    components = ("text_encoder", "unet_w50", "unet_cached", "unet", "unet_w75")
    assert FAMILY.widths(components) == ("full", "w50", "w75")
    assert [FAMILY.width(name) for name in components] == [None, "w50", None, "full", "w75"]
    assert [FAMILY.plain(name) for name in components] == ["text_encoder", "unet", "unet_cached", "unet", "unet"]


def test_each_width_is_cut_from_the_source_by_its_own_passes(plan):
    found = plan(SLIM)
    assert [step.name for step in found if step.component == "unet_w50"] == [
        "unet_w50.prune.heads", "unet_w50.prune.recover", "unet_w50.export.onnx", "unet_w50.compile.openvino",
        "unet_w50.verify.engine",
    ]  # fmt: skip
    assert found["unet_w50.prune.heads"].inputs["checkpoint"] == "unet.fetch.checkpoint"
    assert found["unet_w50.prune.recover"].inputs["teacher"] == "unet.fetch.checkpoint"
    assert found["unet_w75.prune.channels"].inputs["samples"] == "pipeline.calibrate.calibrate"
    assert found["pipeline.calibrate.calibrate"].job.params["record"] == ["unet"], "widths answer what the full one is"
    assert not [step for step in found if step.component == "unet" and step.stage == "prune"]
    assert {"unet", "unet_w75", "unet_w50"} < set(found["pipeline.package.bundle"].job.params["components"])
    assert found["pipeline.package.bundle"].inputs["pass.unet_w50.heads"] == "unet_w50.prune.heads"


def test_nothing_that_is_there_is_made_again_when_widths_are_added(plan):
    before, after = keys(plan()), keys(plan(SLIM))
    assert {name for name in before if after[name] != before[name]} == {"pipeline.package.bundle"}
    pruned = "components.unet.prune={heads: {ratio: 0.25}}"
    before, after = keys(plan(pruned)), keys(plan(SLIM, pruned))
    assert {name for name in before if after[name] != before[name]} == {"pipeline.package.bundle"}
    assert "widths" not in str(dump(load(Path("recipes/tiny-openvino-bf16.yaml")))), "nor is its bundle packed again"


def test_a_width_is_the_unet_of_a_recipe_that_prunes_it_so(plan):
    alone = keys(plan("components.unet.prune={heads: {ratio: 0.5}, recover: {steps: 10}}"))
    slim = keys(plan(SLIM))
    for stage in ("prune.heads", "prune.recover", "export.onnx", "compile.openvino", "verify.engine"):
        assert slim[f"unet_w50.{stage}"] == alone[f"unet.{stage}"]
    assert slim["unet_w75.compile.openvino"] != slim["unet.compile.openvino"]


def test_passes_that_widths_begin_with_alike_are_run_once(plan):
    found = plan("components.unet.widths={a: {heads: {ratio: 0.5}}, b: {heads: {ratio: 0.5}, recover: {}}}")
    assert "unet_b.prune.heads" not in [step.name for step in found]
    assert found["unet_b.prune.recover"].inputs["checkpoint"] == "unet_a.prune.heads"
    assert found["pipeline.package.bundle"].inputs["pass.unet_b.heads"] == "unet_a.prune.heads"


def test_whole_images_are_verified_with_the_full_width_at_its_own_floor(plan):
    images = plan(SLIM)["pipeline.verify.images"]
    assert not [role for role in images.inputs if role.startswith("unet_")]
    assert images.job.params["min_psnr_db"] == plan()["pipeline.verify.images"].job.params["min_psnr_db"]
    assert images.key == plan()["pipeline.verify.images"].key


def test_a_width_is_held_to_its_own_module_and_to_the_floor_that_is_asked_for_it(plan):
    found = plan(SLIM, "verify.unet={min_snr_db: 40}", "verify.unet_w50={min_snr_db: 9}")
    assert found["unet.verify.engine"].job.params["floor"]["min_snr_db"] == 40
    assert found["unet_w50.verify.engine"].job.params["floor"]["min_snr_db"] == 9
    assert found["unet_w75.verify.engine"].job.params["floor"]["min_snr_db"] == 0, "told, and stops nothing"
    own = found["unet_w50.verify.engine"].job.params["own_floor"]
    assert own["min_snr_db"] == plan()["unet.verify.engine"].job.params["floor"]["min_snr_db"]
    assert found["unet.verify.engine"].job.params["own_floor"] is None


def test_a_width_inherits_from_the_full_one_and_may_have_settings_of_its_own(plan):
    inherited = plan(SLIM, "components.unet.precision=fp32", "components.unet.build={streams: 2}")
    step = inherited["unet_w50.compile.openvino"]
    assert (step.job.precision, step.job.params["options"]["streams"]) == ("fp32", 2)
    own = plan(SLIM, "components.unet_w50={backend: onnxruntime, precision: fp32}")
    assert "unet_w50.compile.onnxruntime" in keys(own)
    assert own["unet_w75.compile.openvino"].job.precision == "bf16"
    quantized = plan(SLIM, "components.unet={precision: int8, quantize: {ignore: [conv_in]}}", SLIM)
    assert quantized["unet_w75.quantize.nncf_int8"].job.params["ignore"] == ["conv_in"]
    assert quantized["unet_w75.quantize.nncf_int8"].job.params["inherited"], "a pass may have taken what it names"
    assert "inherited" not in quantized["unet.quantize.nncf_int8"].job.params


def test_every_target_has_every_width(plan):
    fat = BASE.replace("backend: openvino", "targets: [openvino, {backend: onnxruntime, precision: fp32}]")
    found = plan(SLIM, "targets.1.components.unet_w50={precision: fp16}", text=fat)
    names = keys(found)
    assert "unet_w50.prune.recover" in names, "cut once, for all targets"
    assert {"unet_w50.compile.openvino@openvino", "unet_w50.compile.onnxruntime@onnxruntime"} <= set(names)
    assert found["unet_w50.compile.onnxruntime@onnxruntime"].job.precision == "fp16"
    assert found["unet_w75.compile.onnxruntime@onnxruntime"].job.precision == "fp32"


def test_the_draft_profile_takes_the_last_width_unless_the_recipe_has_profiles(plan):
    def profiles(*sets):
        return plan(*sets)["pipeline.package.bundle"].job.params["profiles"]

    assert profiles(SLIM)["draft"]["unet_width"] == "w50"
    assert "unet_width" not in profiles()["draft"]
    assert "unet_width" not in profiles(SLIM)["quality"]
    assert profiles(SLIM, "profiles={fast: {unet_width: w75}}") == {"fast": {"unet_width": "w75"}}
    options = plan(SLIM, "defaults.unet_width=w75")["pipeline.package.bundle"].job.params["defaults"]["options"]
    assert options == {"unet_width": "w75"}


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["components.unet.widths={w-75: {heads: {}}}"], "components.unet.widths: 'w-75' is no name of a width"),
        (["components.unet.widths={full: {heads: {}}}"], "'full' is the name of the denoiser as it is"),
        (["components.unet.widths={cached: {heads: {}}}"], "'cached' is the name of the shallow stand-in"),
        (["components.unet.widths={a: {heads: {}}, A: {heads: {}}}"], "'A' is listed twice, but for upper and lower"),
        (["components.unet.widths={w75: {}}"], "'w75' names no pass, so that it would be full"),
        (["components.unet.widths=[w75]"], "components.unet.widths: expected a mapping"),
        (["components.unet.widths={w75: {hedas: {}}}"], "widths.w75.hedas: unknown pass 'hedas', did you mean 'hea"),
        (["components.unet.widths={w75: {heads: {ratio: 2}}}"], "components.unet.widths.w75.heads.ratio: 2 is out"),
        (["components.unet.widths={w75: {channels: {layers: [nothing]}}}"], "unet.widths.w75.channels.layers: "),
        (["components.vae_decoder.widths={w75: {heads: {}}}"], "components.vae_decoder.widths: vae_decoder has no wid"),
        ([SLIM, "components.unet_w75.widths={w50: {heads: {}}}"], "components.unet_w75.widths: unet_w75 has no widths"),
        ([SLIM, "components.unet_w75.prune={heads: {}}"], "components.unet_w75.prune: its passes are those of comp"),
        ([SLIM, "components.unet.step_cache={every: 3}"], "components.unet.widths.w50: with step_cache each width"),
        ([SLIM, "components.unet_w60={}"], "components.unet_w60: unknown component 'unet_w60', did you mean 'unet_w"),
        (["components.unet_w75={}"], "components.unet_w75: unknown component 'unet_w75'"),
        ([SLIM, "verify.unet_w60={min_snr_db: 9}"], "verify.unet_w60: unknown field 'unet_w60', did you mean"),
        ([SLIM, "defaults.unet_width=w60"], "defaults.unet_width: 'w60' is not one of its widths (full, w75, w50)"),
        ([SLIM, "defaults.unet_width=75"], "defaults.unet_width: unet_width=75 is no name of a width"),
        (["defaults.unet_width=w75"], "defaults.unet_width: 'w75' is not one of its widths (full)"),
        ([SLIM, "profiles={draft: {unet_width: w5}}"], "profiles.draft.unet_width: 'w5' is not one of its widths"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_when_planned_with_its_field(plan, source, sets, words):
    source.configs["unet"] |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    with pytest.raises(RecipeError) as caught:
        plan(*sets)
    assert words in caught.value.message


def test_editors_are_told_of_widths():
    found = schema()
    named = found["properties"]["components"]["propertyNames"]["anyOf"]
    assert {"pattern": "^(unet)_[A-Za-z0-9]+$"} in named
    widths = found["$defs"]["ComponentRecipe"]["properties"]["widths"]["anyOf"]
    passes = next(branch for branch in widths if branch["type"] == "object")["additionalProperties"]
    assert "channels" in passes["properties"]


def test_a_floor_that_one_width_misses_is_told_by_its_name(plan, tmp_path):
    """Its engine is a unet's, and so is the report of it: which width it is, only the plan knows."""
    from sdcompile import run

    worst = {
        "id": "0", "prompt": "red", "step": 1, "timestep": 500.0, "region": "mid", "shape": "opt", "snr_db": 3.0,
        "cosine": 0.9, "max_abs": 1.0, "finite": True, "flat": False, "error": None, "passed": False,
    }  # fmt: skip
    report = {"component": "unet", "passed": False, "precision": "bf16", "backend": "openvino", "worst": worst}
    report |= {
        "floor": {"min_snr_db": 9.0, "min_cosine": 0.0},
        "against": "reference",
        "kept": None,
        "own": {"worst": worst},
        "samples": [worst],
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(run._Missed) as caught:
        run._gate(plan(SLIM)["unet_w50.verify.engine"], tmp_path)
    assert caught.value.component == "unet_w50"
    assert "unet_w50" in caught.value.error.message
    assert "verify: {unet_w50:" in caught.value.error.hint
