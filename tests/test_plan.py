"""The plan: which steps a recipe means, what moves their keys, and which combinations are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sdcompile.backends import BACKENDS, Probe
from sdcompile.errors import RecipeError
from sdcompile.families import FAMILIES
from sdcompile.plan import SOURCE, Machine, Plan, resolve
from sdcompile.recipe import load
from sdcompile.spec import STAGES

BASE = """
version: 1
name: base
family: sd
source: ./sd15
backend: openvino
precision: bf16
shapes: {batch: [1, 1, 4], height: [512, 512, 768], width: 512}
components: {vae_decoder: {precision: fp32}}
"""


def machine(**versions: str | None) -> Machine:
    """A machine that has everything, but for what `versions` says."""
    names = (
        "torch",
        "diffusers",
        "transformers",
        "tokenizers",
        "onnx",
        "onnxscript",
        "openvino",
        "onnxruntime",
        "nncf",
    )
    return Machine(
        versions={**dict.fromkeys(names, "1.0"), **versions},
        probes={name: Probe(available=True, version="1.0") for name in BACKENDS},
        identity={"machine": "x86_64", "cpu": "test", "features": "avx2"},
    )


@pytest.fixture
def plan(tmp_path, source):
    """A function: recipe text and --set values -> Plan."""

    def make(*sets: str, text: str = BASE, of=source, on: Machine | None = None) -> Plan:
        path = Path(tmp_path / "recipe.yaml")
        path.write_text(text)
        return resolve(load(path, sets), of, on or machine())

    return make


def moved(before: Plan, after: Plan) -> set[str]:
    """The steps whose keys differ, named without the op."""
    keys = {step.name: step.key for step in before}
    return {step.name for step in after if keys.get(step.name) != step.key}


def test_the_road_of_a_component_is_fetch_export_compile_verify(plan):
    assert [s.name for s in plan() if s.component == "unet"] == [
        "unet.fetch.checkpoint", "unet.export.onnx", "unet.compile.openvino", "unet.verify.engine",
    ]  # fmt: skip


def test_every_input_is_made_before_it_is_used(plan):
    seen = {SOURCE}
    for step in plan():
        assert set(step.inputs.values()) <= seen
        seen.add(step.name)


def test_the_same_recipe_gives_the_same_plan(plan):
    assert plan().steps == plan().steps


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_precision_is_planned_or_refused(plan, family, backend):
    for precision in ("fp32", "fp16", "bf16", "int8"):
        sets = (f"family={family}", f"backend={backend}", f"precision={precision}", "components=")
        if precision in BACKENDS[backend].realises:
            assert f"unet.compile.{backend}" in [s.name for s in plan(*sets)]
        else:
            with pytest.raises(RecipeError, match=f"{backend} cannot make {precision} of unet: it makes"):
                plan(*sets)


DOWNSTREAM_OF_UNET = {
    "unet.compile.openvino",
    "unet.verify.engine",
    "pipeline.verify.images",
    "pipeline.package.bundle",
}
EVERYTHING_BUILT = {"text_encoder", "unet", "vae_decoder"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("name=other", {"pipeline.package.bundle"}),
        ("defaults.negative_prompt=ugly", {"pipeline.package.bundle"}),
        ("components.unet.precision=fp32", DOWNSTREAM_OF_UNET),
        ("verify.unet.min_snr_db=20", {"unet.verify.engine", "pipeline.package.bundle"}),
        ("verify.min_image_psnr_db=10", {"pipeline.verify.images", "pipeline.package.bundle"}),
        ("components.unet.build.shape_mode=static", DOWNSTREAM_OF_UNET),
    ],
)
def test_a_field_moves_exactly_the_keys_downstream_of_it(plan, change, expected):
    assert moved(plan(), plan(change)) == expected


def test_another_opset_moves_every_export_and_what_follows_but_no_recording(plan):
    changed = moved(plan(), plan("opset=21"))
    assert {f"{c}.export.onnx" for c in EVERYTHING_BUILT} <= changed
    assert not {name for name in changed if ".fetch." in name}
    assert "pipeline.verify.record" not in changed


def test_new_weights_move_everything_that_is_made_of_them(plan, source):
    changed = moved(plan(), plan(of=replace(source, weights="other")))
    assert "unet.fetch.checkpoint" in changed
    assert "pipeline.package.bundle" in changed


def test_a_tool_version_is_part_of_the_keys_of_what_it_makes(plan):
    changed = moved(plan(), plan(on=machine(onnxscript="2.0")))
    assert "unet.export.onnx" in changed
    assert "pipeline.compile.samplers" not in changed
    assert "unet.fetch.checkpoint" not in changed


def test_another_processor_moves_only_what_depends_on_it(plan):
    other = replace(machine(), identity={"machine": "x86_64", "cpu": "other", "features": "avx2"})
    changed = moved(plan(), plan(on=other))
    assert "unet.verify.engine" in changed
    assert "unet.export.onnx" not in changed


def test_where_the_source_lies_is_in_no_key(plan):
    assert moved(plan(), plan("source=/elsewhere/sd15")) == set()


def test_stages_are_targets(plan):
    for stage in STAGES:
        part = plan().until(stage)
        assert all(STAGES.index(step.stage) <= STAGES.index(stage) for step in part)
    assert [s.stage for s in plan().until("export", "unet")] == ["fetch", "export"]


def test_one_component_alone_brings_what_its_verification_needs(plan):
    names = {step.name for step in plan().until("package", "unet")}
    assert "unet.verify.engine" in names
    assert "text_encoder.fetch.checkpoint" in names, "the recording needs the whole reference"
    assert "text_encoder.export.onnx" not in names
    assert "pipeline.package.bundle" not in names


def test_the_vae_encoder_is_built_when_listed_and_shares_its_checkpoint(plan):
    names = [step.name for step in plan("components.vae_encoder={}")]
    assert "vae_encoder.export.onnx" in names
    assert names.count("vae.fetch.checkpoint") == 1
    assert "vae_encoder.export.onnx" not in [step.name for step in plan()]


def test_a_missing_library_is_no_crash_but_a_reason(plan):
    absent = replace(
        machine(),
        probes={**machine().probes, "openvino": Probe(False, reason="openvino is not installed", hint="pip install x")},
    )
    step = plan(on=absent)["unet.compile.openvino"]
    assert step.cannot == "openvino is not installed (pip install x)"
    assert plan(on=machine(torch=None))["unet.export.onnx"].cannot.startswith("torch not installed")


def test_faults_of_size_and_precision_come_together(plan):
    with pytest.raises(RecipeError) as caught:
        plan("shapes.height=500", "backend=reference", "precision=int8")
    assert "shapes.height: 500 is not a multiple of 64" in caught.value.message
    assert "reference cannot make int8 of unet" in caught.value.message


def test_a_default_size_outside_the_built_ones_is_refused(plan):
    with pytest.raises(RecipeError, match=r"defaults\.height: 1024 is outside"):
        plan("defaults.height=1024")


def test_the_floor_is_the_precisions_own_unless_the_recipe_sets_one(plan):
    from sdcompile.metrics import FLOORS

    assert plan()["unet.verify.engine"].job.params["floor"]["min_snr_db"] == FLOORS["bf16"].min_snr_db
    assert plan()["vae_decoder.verify.engine"].job.params["floor"]["min_snr_db"] == FLOORS["fp32"].min_snr_db
    own = plan("verify.unet.min_snr_db=31")["unet.verify.engine"].job.params["floor"]
    assert own["min_snr_db"] == 31
    assert own["min_cosine"] == FLOORS["bf16"].min_cosine


def test_stub_engines_are_not_verified(plan):
    stages = {step.stage for step in plan("backend=stub")}
    assert "verify" not in stages
    assert "package" in stages


def test_what_no_compiler_could_build_for_a_target_is_refused_with_the_field_and_the_reason(plan):
    with pytest.raises(RecipeError) as caught:
        plan("backend=tensorrt_rtx", "precision=fp32", "build={compute_capabilities: [portable, sm75]}")
    assert (
        "components.unet.build: fp32 engines cannot be built for sm75: Turing has no FP32 GEMM" in caught.value.message
    )
    plan("backend=tensorrt_rtx", "precision=fp16", "components={}", "build={compute_capabilities: [portable, sm75]}")


def on_gpu(**probe):
    return replace(machine(), probes={**machine().probes, "tensorrt_rtx": Probe(True, version="1.7", **probe)})


@pytest.mark.parametrize(("architecture", "refused"), [("sm75", True), ("sm86", False)])
def test_what_the_gpu_here_cannot_build_is_known_when_it_is_planned(plan, architecture, refused):
    gpu = {"gpu": "RTX 2080", "architecture": architecture, "driver": "CUDA 13.0"}
    here = replace(machine(), probes={**machine().probes, "tensorrt": Probe(True, version="11.4", identity=gpu)})
    steps = [
        plan("backend=tensorrt", "components={}", *options, on=here)["unet.compile.tensorrt"]
        for options in (("precision=bf16",), ("precision=fp16", "build={hardware_compatibility: ampere_plus}"))
    ]
    assert [step.cannot.split(" can be built")[0] for step in steps] == (
        ["bf16", "hardware_compatibility: ampere_plus"] if refused else ["", ""]
    )


def on_ort(**versions):
    gpu = {"gpu": "RTX 4090", "architecture": "sm89", "driver": "CUDA 13.0", "onnxruntime-gpu": "1.31", **versions}
    probe = Probe(True, version="1.31", devices=("cpu", "cuda"), providers={"cuda": gpu})
    return replace(machine(), probes={**machine().probes, "onnxruntime": probe})


@pytest.mark.parametrize(
    "other", [{"gpu": "RTX 3090", "architecture": "sm86"}, {"driver": "CUDA 13.1"}, {"onnxruntime-gpu": "1.32"}]
)
@pytest.mark.parametrize(("provider", "moved"), [("cuda", True), ("cpu", False)])
def test_gpu_and_versions_move_the_keys_of_what_a_provider_other_than_the_cpus_makes(provider, moved, other, plan):
    options = ("backend=onnxruntime", "precision=fp16", f"build={{provider: {provider}}}", "components={}")
    here, there = plan(*options, on=on_ort()), plan(*options, on=on_ort(**other))
    for name in ("unet.compile.onnxruntime", "unet.verify.engine"):
        assert not here[name].cannot
        assert (here[name].key != there[name].key) is moved
    assert here["unet.export.onnx"].key == there["unet.export.onnx"].key


RTX = ("backend=tensorrt_rtx", "precision=fp16", "build={}", "components={}")


def test_an_engine_that_cannot_run_here_is_verified_by_its_onnx_and_its_ranges(plan):
    without = plan(*RTX, on=on_gpu(cannot_run="no driver"))
    step = without["unet.verify.engine"]
    assert step.job.params["stand_in"]["why"] == "no driver"
    assert step.inputs["onnx"] == "unet.quantize.cast_fp16"
    assert step.inputs["exported"] == "unet.export.onnx"
    assert without["pipeline.verify.images"].inputs["onnx.unet"] == "unet.quantize.cast_fp16"
    running = plan(*RTX, on=on_gpu())
    assert "stand_in" not in running["unet.verify.engine"].job.params
    assert "onnx.unet" not in running["pipeline.verify.images"].inputs


def test_a_gpu_moves_the_keys_of_reports_and_not_of_engines_built_ahead_of_time(plan):
    without = plan(*RTX, on=on_gpu(cannot_run="no driver"))
    ada, other = (on_gpu(identity={"gpu": name, "architecture": "sm89"}) for name in ("RTX 4090", "RTX 4080"))
    changed = moved(without, plan(*RTX, on=ada))
    assert {"unet.verify.engine", "pipeline.verify.images"} <= changed
    assert "unet.compile.tensorrt_rtx" not in changed
    assert "unet.verify.engine" in moved(plan(*RTX, on=ada), plan(*RTX, on=other))


def with_decoder(source, **config):
    """`source` with a decoder of another one."""
    taesd = {"_class_name": "AutoencoderTiny", "num_decoder_blocks": [3, 3, 3, 1], **config}
    part = replace(source, id="folder:taesd", configs={"vae_decoder": taesd}, weights="light")
    return replace(source, configs={**source.configs, **part.configs}, parts={"vae_decoder": part})


LIGHT = "components.vae_decoder.source=./taesd"


def test_another_decoder_moves_what_is_made_of_it_and_the_recording_and_nothing_else(plan, source):
    before, after = plan(), plan(LIGHT, of=with_decoder(source))
    assert moved(before, after) == {
        "vae_decoder.fetch.checkpoint", "vae_decoder.export.onnx", "vae_decoder.compile.openvino",
        "vae_decoder.verify.engine", "text_encoder.verify.engine", "unet.verify.engine", "pipeline.verify.record",
        "pipeline.verify.images", "pipeline.package.bundle",
    }  # fmt: skip
    assert after["vae_decoder.export.onnx"].inputs == {"checkpoint": "vae_decoder.fetch.checkpoint"}
    assert set(after["pipeline.verify.record"].inputs) >= {"vae", "vae_decoder"}, "to be compared with the model's own"


def test_what_needs_no_pictures_does_not_depend_on_the_decoder(plan, source):
    text = BASE + (
        "samplers: [dpmpp_2m, {name: few, base: dpmpp_2m, num_inference_steps: 6, fit: {prompts: 3, held_out: 2}}]\n"
    )
    int8 = "components.unet.precision=int8"
    before, after = plan(int8, text=text), plan(int8, LIGHT, text=text, of=with_decoder(source))
    stay = {"pipeline.compile.fit", "pipeline.calibrate.calibrate", "unet.compile.openvino"}
    assert stay <= {step.name for step in after}
    assert not stay & moved(before, after)
    of_decoder = plan(int8, LIGHT, "components.vae_decoder.precision=int8", text=text, of=with_decoder(source))
    assert "vae_decoder" in of_decoder["pipeline.calibrate.calibrate"].inputs


def test_the_floor_of_another_decoder_is_a_field_of_the_recipe(plan, source):
    def floor(*sets, of):
        return plan(*sets, of=of)["pipeline.verify.images"].job.params.get("min_decoder_psnr_db")

    assert floor(of=source) is None
    assert floor(LIGHT, of=with_decoder(source)) == 15
    assert floor(LIGHT, "verify.min_decoder_psnr_db=3", of=with_decoder(source)) == 3


def test_the_manifest_is_told_of_a_decoders_source_and_of_no_path(plan, source):
    told = plan(LIGHT, of=with_decoder(source))["pipeline.package.bundle"].job.params
    assert told["recipe"]["components"]["vae_decoder"]["source"] == "folder:taesd"
    assert told["source"]["components"]["vae_decoder"]["id"] == "folder:taesd"
    assert "components" not in plan()["pipeline.package.bundle"].job.params["source"]


def test_a_decoder_that_does_not_fit_the_model_is_refused_at_its_field(plan, source):
    with pytest.raises(RecipeError) as caught:
        plan(LIGHT, "shapes.width=500", of=with_decoder(source, latent_channels=16))
    assert f"--set {LIGHT}: components.vae_decoder.source: it has 16 latent channels" in caught.value.message
    assert "shapes.width" in caught.value.message


# Casting ------------------------------------------------------------------------------------------


def test_bf16_of_nvidia_engines_is_put_into_the_onnx_by_a_pass_at_opset_22(plan):
    made = plan(*RTX, "precision=bf16")
    assert made["unet.compile.tensorrt_rtx"].inputs["onnx"] == "unet.quantize.cast_bf16"
    assert made["unet.export.onnx"].job.params["opset"] == 22
    assert plan(*RTX)["unet.export.onnx"].job.params["opset"] == 20
    with pytest.raises(RecipeError, match=r"opset: bf16 of unet needs opset 22 or later.* this is 20"):
        plan(*RTX, "precision=bf16", "opset=20")


def test_what_a_component_keeps_in_float32_reaches_its_cast_alone(plan):
    made = plan(*RTX, "components.vae_decoder.cast={keep_fp32: [Softmax, up_blocks.3]}")
    assert made["vae_decoder.quantize.cast_fp16"].job.params["keep_fp32"] == ["Softmax", "up_blocks.3"]
    assert made["unet.quantize.cast_fp16"].job.params["keep_fp32"] == []
    assert not [step for step in made if step.op == "calibrate"]
    assert made["unet.quantize.cast_fp16"].key == plan(*RTX)["unet.quantize.cast_fp16"].key


def test_only_a_cast_that_measures_wants_samples(plan):
    made = plan(*RTX, "components.vae_decoder.cast={from_samples: true}")
    assert made["vae_decoder.quantize.cast_fp16"].inputs["samples"] == "pipeline.calibrate.calibrate"
    assert "samples" not in made["unet.quantize.cast_fp16"].inputs
    assert made["pipeline.calibrate.calibrate"].job.params["record"] == ["vae_decoder"]


def test_the_float_rest_of_an_int8_component_is_cast_as_told(plan):
    made = plan(*RTX, "components.unet={precision: int8, cast: {keep_fp32: [Softmax]}}")
    assert made["unet.quantize.cast_fp16"].job.params["keep_fp32"] == ["Softmax"]


@pytest.mark.parametrize(
    ("sets", "fault"),
    [
        (
            ("precision=fp32",),
            "cast: fp32 is not cast, so that this speaks to nothing; backends that cast: onnxruntime",
        ),
        (("backend=openvino",), "cast: openvino makes fp16 by itself, so that this speaks to nothing"),
        (("precision=bf16",), "cast.from_samples: bf16 has the range of fp32, so that nothing overflows in it"),
    ],
)
def test_a_cast_that_speaks_to_nothing_is_refused(plan, sets, fault):
    with pytest.raises(RecipeError) as refused:
        plan(*RTX, *sets, "components.vae_decoder.cast={from_samples: true}")
    assert f"components.vae_decoder.{fault}" in refused.value.message
