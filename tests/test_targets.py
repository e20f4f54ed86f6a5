"""Several targets in one recipe: what is written, what is refused, and which steps they share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sdcompile.backends import BACKENDS, Probe
from sdcompile.errors import HostError, RecipeError
from sdcompile.plan import Machine, Plan, resolve
from sdcompile.recipe import Recipe, dump, load, schema
from sdcompile.recipe.changes import in_precision, with_float

BASE = """
version: 1
name: fat
family: sd
source: ./sd15
targets:
  - {backend: tensorrt_rtx:sm89, precision: fp16}
  - {backend: tensorrt_rtx:portable, precision: fp16}
  - {backend: openvino, precision: bf16, components: {vae_decoder: {precision: fp32}}}
  - onnxruntime
"""
NAMES = ("tensorrt_rtx:sm89", "tensorrt_rtx:portable", "openvino", "onnxruntime")
MACHINE = Machine({}, {name: Probe(available=True, version="1.0") for name in BACKENDS}, {"machine": "x86_64"})


@pytest.fixture
def plan(tmp_path, source):
    def make(*sets: str, text: str = BASE, on: Machine = MACHINE) -> Plan:
        path = Path(tmp_path / "recipe.yaml")
        path.write_text(text)
        return resolve(load(path, sets), source, on)

    return make


def steps(plan: Plan, *, of: str, op: str = "") -> list[str]:
    return [s.name for s in plan if s.component == of and op in s.name]


def recipe(tmp_path: Path, *sets: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE)
    return load(path, sets)


# What is written --------------------------------------------------------------------------------


def test_a_target_is_a_recipe_of_its_own_with_the_rest_of_the_recipe_under_it(tmp_path):
    found = recipe(tmp_path, "components.unet.precision=int8", "targets.2.components.unet.precision=fp32").by_target()
    assert tuple(found) == NAMES
    sm89, _, openvino, onnxruntime = found.values()
    assert sm89.effective("text_encoder") == ("tensorrt_rtx", "fp16", {}, {"compute_capabilities": ["sm89"]})
    # The nearer word wins: a component's over a target's, a target's own component over the recipe's.
    assert [one.effective("unet").precision for one in found.values()] == ["int8", "int8", "fp32", "int8"]
    assert openvino.effective("vae_decoder").precision == "fp32"
    assert onnxruntime.effective("text_encoder") == ("onnxruntime", "fp32", {}, {})


def test_a_recipe_without_targets_is_its_own_only_target(tmp_path):
    found = recipe(tmp_path, "targets=", "backend=openvino")
    assert found.by_target() == {"": found}


def test_targets_survive_being_written_as_data(tmp_path):
    found = recipe(tmp_path, "targets.0.verify={unet: {min_snr_db: 9}}")
    again = Recipe.model_validate(dump(found))
    assert again == found
    assert again.by_target()["tensorrt_rtx:sm89"].verify.floors["unet"].min_snr_db == 9


def test_floors_of_a_target_are_laid_over_the_recipes(tmp_path):
    sets = ("verify.unet.min_cosine=0.9", "targets.2.verify={unet: {min_snr_db: 50}, min_image_psnr_db: 30}")
    found = recipe(tmp_path, *sets).by_target()
    own, other = found["openvino"].verify, found["onnxruntime"].verify
    assert (own.floors["unet"].min_snr_db, own.floors["unet"].min_cosine, own.min_image_psnr_db) == (50, 0.9, 30)
    assert (other.floors["unet"].min_snr_db, other.floors["unet"].min_cosine, other.min_image_psnr_db) == (
        None, 0.9, None,
    )  # fmt: skip


def test_the_schema_asks_for_a_backend_or_for_targets():
    found = schema()
    assert {"required": ["backend"]} in found["oneOf"]
    assert "tensorrt_rtx" in found["properties"]["targets"]["items"]["anyOf"][0]["pattern"]


@pytest.mark.parametrize(
    ("sets", "fault"),
    [
        (("backend=openvino",), "backend: targets name the backends; leave one of the two fields out"),
        (("targets=",), "backend: missing field 'backend' (or a list of `targets`)"),
        (("targets=[]",), "targets: expected at least one entry"),
        (("build={streams: 2}",), "build: which backend is it for?"),
        (("components.unet.backend=stub",), "components.unet.backend: targets choose backends"),
        (("targets.3=openvino",), "targets.3: target 'openvino' is listed twice; give one of them a name"),
        (("targets.3={name: tensorrt_rtx-sm89, backend: openvino}",), "(as 'tensorrt_rtx:sm89', too)"),
        (("targets.3={name: a/b, backend: openvino}",), "targets.3.name: 'a/b' is no name of a target"),
        (("targets.3=onnxruntme",), "targets.3: unknown backend 'onnxruntme', did you mean 'onnxruntime'?"),
        (("targets.3=onnxruntime:sm89",), "onnxruntime takes no compute capability; tensorrt_rtx does"),
        (("targets.0=tensorrt_rtx:sm88",), "'sm88' is not one of portable, sm75"),
        (
            ("targets.0.build={compute_capabilities: [sm86]}",),
            "are named twice: here and in backend 'tensorrt_rtx:sm89'",
        ),
        (("targets.2.build={streans: 2}",), "targets.2.build.streans: unknown field 'streans'"),
        (("targets.2.components={unett: {}}",), "targets.2.components.unett: unknown component 'unett'"),
        (("targets.2.components.unet={prune: {}}",), "targets.2.components.unet.prune: unknown field 'prune'"),
        (("targets.2.verify={unett: {}}",), "targets.2.verify.unett: unknown field 'unett', did you mean 'unet'?"),
        (("targets.2.components.unet.quantize={mode: static}",), "unet is built in bf16 on openvino, so that this"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(tmp_path, sets, fault):
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, *sets)
    assert fault in caught.value.message


def test_without_a_file_the_same_faults_are_found():
    with pytest.raises(ValueError, match="leave one of the two fields out"):
        Recipe.model_validate({"version": 1, "name": "x", "family": "sd", "source": "builtin:tiny",
                               "backend": "openvino", "targets": ["openvino"]})  # fmt: skip


def test_floors_of_a_target_reach_its_reports_and_no_other(plan):
    found = plan("targets.2.verify={unet: {min_snr_db: 50}, min_image_psnr_db: 30}")
    floors = {s.name: s.job.params["floor"]["min_snr_db"] for s in found if s.op == "engine" and s.component == "unet"}
    assert floors["unet.verify.engine@openvino"] == 50
    assert 50 not in {level for name, level in floors.items() if "openvino" not in name}
    assert found["pipeline.verify.images@openvino"].job.params["min_psnr_db"] == 30


# What is planned ---------------------------------------------------------------------------------


def test_targets_share_what_is_made_of_the_model_alone(plan):
    found = plan()
    assert steps(found, of="unet", op=".fetch.") == ["unet.fetch.checkpoint"]
    # ONNX Runtime asks the exporter for another form of attention; the others share one export.
    assert steps(found, of="unet", op=".export.") == ["unet.export.onnx", "unet.export.onnx@onnxruntime"]
    assert len([s for s in found if s.op == "record"]) == 1
    assert len([s for s in found if s.op == "bundle"]) == 1
    # Both GPU targets take the same fp16 graph.
    assert steps(found, of="unet", op=".quantize.") == ["unet.quantize.cast_fp16@tensorrt_rtx:sm89"]


def test_every_target_is_compiled_and_verified_on_its_own(plan):
    found = plan()
    for name, backend in zip(NAMES, ("tensorrt_rtx", "tensorrt_rtx", "openvino", "onnxruntime"), strict=True):
        for component in ("text_encoder", "unet", "vae_decoder"):
            assert found[f"{component}.compile.{backend}@{name}"].job.params["options"] is not None
            assert found[f"{component}.verify.engine@{name}"].gives == "report"
        assert found[f"pipeline.verify.images@{name}"].gives == "report"
    assert len({s.key for s in found}) == len(found.steps)


def test_a_target_builds_what_a_recipe_of_it_alone_builds(plan):
    alone = plan("targets=", "backend=openvino", "precision=bf16", "components.vae_decoder.precision=fp32")
    among = {s.key for s in plan()}
    assert {s.name for s in alone if s.key not in among} == {"pipeline.package.bundle"}


def test_one_recording_of_samples_serves_every_target_that_quantizes(plan):
    found = plan("components.unet.precision=int8", "targets.2.components.text_encoder.precision=int8")
    (calibrate,) = (s for s in found if s.op == "calibrate")
    assert calibrate.job.params["record"] == ["text_encoder", "unet"]
    ranges = {s.name: s.inputs["samples"] for s in found if s.op == "nncf_int8"}
    assert set(ranges.values()) == {"pipeline.calibrate.calibrate"}
    # One for both GPU targets, which want symmetric ranges, and one each for the others.
    assert sorted(name for name in ranges if name.startswith("unet.")) == [
        "unet.quantize.nncf_int8@onnxruntime", "unet.quantize.nncf_int8@openvino",
        "unet.quantize.nncf_int8@tensorrt_rtx:sm89",
    ]  # fmt: skip


def test_a_change_to_one_target_moves_only_its_own_steps(plan):
    before = {s.name: s.key for s in plan()}
    after = plan("targets.2.components.unet.precision=fp32")
    changed = {s.name for s in after if before.get(s.name) != s.key}
    assert changed == {
        "unet.compile.openvino@openvino", "unet.verify.engine@openvino", "pipeline.verify.images@openvino",
        "pipeline.package.bundle",
    }  # fmt: skip


def test_a_component_that_two_targets_build_alike_is_built_once(plan):
    text = BASE + "  - {name: wide, backend: openvino, precision: bf16, components: {unet: {precision: fp32}}}\n"
    found = plan(text=text.replace("components: {vae_decoder: {precision: fp32}}", "components: {}"))
    assert steps(found, of="vae_decoder", op=".compile.openvino") == ["vae_decoder.compile.openvino@openvino"]
    assert len(steps(found, of="unet", op=".compile.openvino")) == 2
    inputs = found["pipeline.package.bundle"].inputs
    assert inputs["engine.vae_decoder@wide"] == inputs["engine.vae_decoder@openvino"]


def test_what_no_target_can_be_is_refused_for_each_with_its_place(plan):
    with pytest.raises(RecipeError) as caught:
        plan("precision=bf16", "targets.0={backend: tensorrt_rtx:sm75, precision: fp32}")
    lines = caught.value.message.splitlines()
    where = "--set precision=bf16: precision: target onnxruntime: onnxruntime cannot make bf16 of unet"
    assert any(line.startswith(where) for line in lines)
    assert any("targets.0.components.unet.build: fp32 engines cannot be built for sm75" in line for line in lines)
    assert not any("openvino cannot" in line for line in lines)


def test_a_component_that_only_one_target_would_have_is_refused(plan):
    with pytest.raises(RecipeError, match=r"targets\.2\.components\.vae_encoder: every target builds the same"):
        plan("targets.2.components.vae_encoder={}")
    assert "vae_encoder.compile.openvino@openvino" in [s.name for s in plan("components.vae_encoder={}")]


def test_a_target_that_is_another_by_name_only_is_refused(plan):
    with pytest.raises(RecipeError, match=r"targets\.3: twin builds the same engines as openvino"):
        plan("targets.3={name: twin, backend: openvino, precision: bf16, components: {vae_decoder: {precision: fp32}}}")


def test_a_target_this_machine_cannot_build_stops_the_build_before_it_starts(plan, tmp_path):
    from sdcompile.run import check_fit
    from sdcompile.store import Store

    probes = {**MACHINE.probes, "tensorrt_rtx": Probe(False, reason="it is not installed", hint="pip install it")}
    found = plan(on=replace(MACHINE, probes=probes))
    with pytest.raises(HostError) as caught:
        check_fit(found, Store(tmp_path / "store"))
    assert "unet.compile.tensorrt_rtx@tensorrt_rtx:sm89: it is not installed (pip install it)" in caught.value.message
    assert "build without tensorrt_rtx:sm89, tensorrt_rtx:portable" in caught.value.hint


def test_a_provider_this_machine_has_not_is_no_step_that_it_can_take(plan):
    cuda = "targets.3={name: cuda, backend: onnxruntime, build: {provider: cuda}}"
    assert plan(cuda)["unet.compile.onnxruntime@cuda"].cannot == "provider cuda cannot run here: it is not installed"
    there = {**MACHINE.probes, "onnxruntime": Probe(True, version="1.0", devices=("cpu", "cuda"))}
    assert not plan(cuda, on=replace(MACHINE, probes=there))["unet.compile.onnxruntime@cuda"].cannot
    assert not plan()["unet.compile.onnxruntime@onnxruntime"].cannot


def test_falling_back_changes_the_one_target_that_failed(tmp_path):
    found = in_precision(recipe(tmp_path), "unet", "fp32", "tensorrt_rtx:portable").by_target()
    assert [one.effective("unet").precision for one in found.values()] == ["fp16", "fp32", "bf16", "fp32"]
    alone = in_precision(recipe(tmp_path, "targets=", "backend=openvino", "precision=bf16"), "unet", "fp32")
    assert alone.effective("unet").precision == "fp32"


def test_groups_are_left_in_float_in_one_target_alone(tmp_path):
    sets = (
        "components.unet.precision=int8",
        "components.unet.quantize={ignore: [conv_out], accept_if: {speedup: 1.1}}",
    )
    changed = with_float(recipe(tmp_path, *sets), "unet", ["conv_in"], "openvino").by_target()
    quantize = {target: one.quantizing("unet") for target, one in changed.items()}
    assert quantize["openvino"].params["ignore"] == ["conv_out"]
    assert quantize["openvino"].params["float_groups"] == ["conv_in"]
    assert quantize["openvino"].accept_if.speedup == 1.1
    assert not quantize["openvino"].accept_if.groups
    assert quantize["onnxruntime"].params == {"ignore": ["conv_out"]}
    assert quantize["onnxruntime"].accept_if.groups
    alone = with_float(recipe(tmp_path, "targets=", "backend=openvino", "precision=int8"), "unet", ["conv_in"])
    assert alone.quantizing("unet").params == {"float_groups": ["conv_in"]}
    assert alone.quantizing("text_encoder").params == {}
