"""Step caching before anything is built: where a UNet is cut, what a recipe may say of it, which steps it means."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdcompile.errors import RecipeError
from sdcompile.families import FAMILIES
from sdcompile.families.sd_stepcache import Cut, cut
from sdcompile.plan import Plan, resolve
from sdcompile.recipe import load
from sdcompile.spec import DEEP, Range
from tests.test_families import configs
from tests.test_plan import BASE, machine, moved

FAMILY = FAMILIES["sd"]
SHAPES = {"R": Range(1, 2, 2), "h": Range(64, 64, 96), "w": Range(64, 64, 64), "T": Range(77, 77, 77)}
CACHED = "components.unet.step_cache={every: 3, depth: 1}"


@pytest.fixture
def plan(tmp_path, source):
    def make(*sets: str) -> Plan:
        path = Path(tmp_path / "recipe.yaml")
        path.write_text(BASE)
        return resolve(load(path, sets), source, machine())

    return make


@pytest.mark.parametrize(
    ("depth", "where", "opt", "highest"),
    [
        (1, Cut(0, 1), (2, 320, 64, 64), (2, 320, 96, 64)),
        (3, Cut(1, 0), (2, 640, 64, 64), (2, 640, 96, 64)),
        (4, Cut(1, 1), (2, 640, 32, 32), (2, 640, 48, 32)),
        (6, Cut(2, 0), (2, 1280, 32, 32), (2, 1280, 48, 32)),
        (11, Cut(3, 2), (2, 1280, 8, 8), (2, 1280, 12, 8)),
    ],
)
def test_the_deep_feature_has_the_width_and_the_size_of_the_place_where_sd15_is_cut(depth, where, opt, highest):
    assert cut(configs()["unet"], depth) == where
    specs = FAMILY.step_cached(configs(), FAMILY.components(configs()), depth)
    deep = specs["unet"].outputs[-1]
    assert deep.name == DEEP
    assert deep.shape(SHAPES, "opt") == opt
    assert deep.shape(SHAPES, "max") == highest
    shallow = specs["unet_cached"]
    assert [t.name for t in shallow.inputs] == ["sample", "timestep", "encoder_hidden_states", DEEP]
    assert shallow.inputs[-1] == deep
    assert shallow.outputs == FAMILY.components(configs())["unet"].outputs


def test_a_guidance_embedding_stays_the_last_input():
    lcm = configs(unet__time_cond_proj_dim=256)
    shallow = FAMILY.step_cached(lcm, FAMILY.components(lcm), 1)["unet_cached"]
    assert [t.name for t in shallow.inputs][-2:] == [DEEP, "timestep_cond"]


@pytest.mark.parametrize(
    ("changes", "depth", "words"),
    [
        ({}, 0, "step_cache.depth: 0 is out of range"),
        ({}, 12, "this UNet has 12 layers on its way up, of which 1 to 11 can be computed anew"),
        ({"unet__layers_per_block": [1, 2, 2, 1]}, 10, "this UNet has 10 layers on its way up"),
        ({"unet__down_block_types": ["AttnDownBlock2D"] * 4}, 1, "this UNet has AttnDownBlock2D"),
    ],
)
def test_a_place_where_nothing_can_be_cut_is_refused(changes, depth, words):
    with pytest.raises(RecipeError) as caught:
        cut(configs(**changes)["unet"], depth)
    assert words in caught.value.message


def test_a_second_engine_is_made_of_the_same_checkpoint(plan):
    found = plan(CACHED)
    names = [step.name for step in found if step.component == "unet_cached"]
    assert names == ["unet_cached.export.onnx", "unet_cached.compile.openvino", "unet_cached.verify.engine"]
    assert found["unet_cached.export.onnx"].inputs == {"checkpoint": "unet.fetch.checkpoint"}
    outputs = [t.name for t in found["unet.compile.openvino"].job.spec.outputs]
    assert outputs == ["out_sample", DEEP]
    assert found["pipeline.package.bundle"].job.params["defaults"]["options"] == {"step_cache": 3}
    assert "unet_cached" in found["pipeline.package.bundle"].job.params["components"]


def test_only_what_step_caching_changes_is_made_again(plan):
    changed = moved(plan(), plan(CACHED))
    assert {"unet.export.onnx", "unet_cached.export.onnx", "pipeline.verify.record"} <= changed
    assert not {name for name in changed if name.startswith(("text_encoder.export", "vae_decoder.export"))}
    again = moved(plan(CACHED), plan("components.unet.step_cache={every: 5, depth: 1}"))
    assert not {name for name in again if ".export." in name or ".compile." in name}, "every is no part of an engine"
    assert "pipeline.verify.record" in again


def test_the_shallow_engine_inherits_from_the_denoiser_and_may_have_settings_of_its_own(plan):
    assert plan(CACHED, "components.unet.precision=fp32")["unet_cached.compile.openvino"].job.precision == "fp32"
    own = plan(CACHED, "components.unet.precision=fp32", "components.unet_cached.precision=bf16")
    assert own["unet_cached.compile.openvino"].job.precision == "bf16"
    assert own["unet.compile.openvino"].job.precision == "fp32"
    other = plan(CACHED, "components.unet_cached.backend=onnxruntime", "components.unet_cached.precision=fp32")
    assert "unet_cached.compile.onnxruntime" in [step.name for step in other]


def test_pruning_happens_once_and_both_engines_are_judged_as_pruned(plan):
    prune = "components.unet.prune={heads: {ratio: 0.25}}"
    found = plan(CACHED, prune)
    names = [step.name for step in found]
    assert names.count("unet.prune.heads") == 1
    assert "unet_cached.prune.heads" not in names
    assert found["unet_cached.export.onnx"].inputs == {"checkpoint": "unet.prune.heads"}
    assert found["unet_cached.verify.engine"].job.params["own_floor"] is not None
    assert found["unet.prune.heads"].key == plan(prune)["unet.prune.heads"].key, "shared with builds without caching"
    assert found["unet.prune.heads"].job.spec.outputs == plan(prune)["unet.prune.heads"].job.spec.outputs


def test_levels_cannot_become_narrower_under_recorded_deep_features(plan):
    narrow = "components.unet.prune={width: {ratio: 0.2}}"
    with pytest.raises(RecipeError, match=r"components.unet.prune.width: with step_cache no level can become narrower"):
        plan(CACHED, narrow)
    assert "unet.prune.width" in [step.name for step in plan(narrow)]


def test_int8_is_fitted_to_recordings_with_cached_steps(plan):
    found = plan(CACHED, "components.unet.precision=int8")
    assert found["pipeline.calibrate.calibrate"].job.params["record"] == ["unet", "unet_cached"]
    assert found["pipeline.calibrate.calibrate"].job.params["step_cache"] == 3
    assert "unet_cached.quantize.nncf_int8" in [step.name for step in found]
    assert found["unet_cached.quantize.nncf_int8"].job.params["inherited"], "patterns of unet may name no module of it"
    assert "inherited" not in found["unet.quantize.nncf_int8"].job.params
    only = plan(CACHED, "components.text_encoder.precision=int8")
    assert "step_cache" not in only["pipeline.calibrate.calibrate"].job.params
    assert "unet_cached" not in only["pipeline.calibrate.calibrate"].job.params["components"]


def test_a_floor_of_the_cost_reaches_the_images_report(plan):
    assert plan(CACHED)["pipeline.verify.images"].job.params["step_cache_min_psnr_db"] is None
    floor = plan(CACHED, "components.unet.step_cache.min_psnr_db=30")
    assert floor["pipeline.verify.images"].job.params["step_cache_min_psnr_db"] == 30
    assert "step_cache_min_psnr_db" not in plan()["pipeline.verify.images"].job.params


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["components.unet.step_cache={every: 1}"], "components.unet.step_cache.every: 1 is out of range"),
        (["components.unet.step_cache={depth: 1}"], "components.unet.step_cache.every: missing field 'every'"),
        (["components.unet.step_cache={every: 3, dept: 1}"], "unknown field 'dept', did you mean 'depth'?"),
        (["components.unet.step_cache={every: 3, depth: 12}"], "components.unet.step_cache.depth: 12 is out of range"),
        (
            ["components.vae_decoder.step_cache={every: 3}"],
            "components.vae_decoder.step_cache: vae_decoder has no steps to cache",
        ),
        (["components.unet_cached={}"], "components.unet_cached: no unet_cached is built"),
        (["defaults.step_cache=3"], "defaults.step_cache: no unet_cached is built"),
        (["defaults.step_cache=often"], "step_cache='often' is no number of calls"),
        (["profiles={draft: {step_cache: 5}}"], "profiles.draft.step_cache: no unet_cached is built"),
        (["verify.unet_cached.min_snr_db=20"], "verify.unet_cached: no unet_cached is built"),
        ([CACHED, "components.unet.prune={blocks: {count: 1}}"], "components.unet.prune.blocks: with step_cache"),
        ([CACHED, "components.unet_cached.prune={heads: {}}"], "components.unet_cached.prune: it is cut from unet"),
    ],
)
def test_what_cannot_be_is_refused_when_planned_with_its_field(plan, sets, words):
    with pytest.raises(RecipeError) as caught:
        plan(*sets)
    assert words in caught.value.message


def test_a_bundle_may_be_built_with_it_and_not_use_it(plan):
    options = plan(CACHED, "defaults.step_cache=off")["pipeline.package.bundle"].job.params["defaults"]["options"]
    assert options["step_cache"] in ("off", False)
