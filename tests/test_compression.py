"""Passes in recipes and plans: where they are named, what is refused at which line, and which steps they become."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import BaseModel, ConfigDict, Field

from sdcompile.backends import BACKENDS, Probe
from sdcompile.errors import RecipeError
from sdcompile.passes import PASSES, Pass
from sdcompile.passes.base import always
from sdcompile.plan import Machine, Plan, resolve
from sdcompile.recipe import dump, load, schema

BASE = """version: 1
name: base
family: sd
source: ./sd15
backend: reference
shapes: {batch: 1, height: 512, width: 512}
"""
PRUNED = BASE + "components:\n  unet:\n    prune:\n      shorten: {ratio: 0.25}\n"


class Budget(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    min_snr_db: float = 0.0


class Params(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: float = Field(default=0.5, gt=0, lt=1)
    taylor: bool = False
    budget: Budget | None = None


_WANTED = {False: ("teacher", "assets", "pictures"), True: ("teacher",)}


def nothing(inputs: object, out: object, job: object) -> None:
    raise AssertionError("a plan runs nothing")


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    """Two passes of the prune stage; the second wants a teacher and pictures, the first wants samples when told so."""
    shorten = Pass("shorten", "prune", "checkpoint", 1, Params, nothing, calibrates=lambda p: p.taylor)
    heal = Pass("heal", "prune", "checkpoint", 1, Params, nothing, calibrates=always, wants=lambda p: _WANTED[p.taylor])
    monkeypatch.setitem(PASSES, "shorten", shorten)
    monkeypatch.setitem(PASSES, "heal", heal)


@pytest.fixture
def plan(tmp_path, source):
    def make(text: str, *sets: str) -> Plan:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        probes = {name: Probe(available=True) for name in BACKENDS}
        return resolve(load(path, sets), source, Machine({}, probes, {"machine": "x86_64"}))

    return make


def faults(plan, text: str, *sets: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        plan(text, *sets)
    return [line.rpartition("/")[2] for line in caught.value.message.splitlines()]


def test_passes_stand_before_the_engine_in_the_order_of_the_table(plan):
    steps = plan(PRUNED, "components.unet.prune.heal={}")
    road = [s.name for s in steps if s.component == "unet"]
    assert road == [
        "unet.fetch.checkpoint", "unet.prune.shorten", "unet.prune.heal", "unet.compile.reference",
        "unet.verify.engine",
    ]  # fmt: skip
    heal = steps["unet.prune.heal"]
    assert heal.inputs == {
        "checkpoint": "unet.prune.shorten", "samples": "pipeline.calibrate.calibrate",
        "teacher": "unet.fetch.checkpoint", "assets": "pipeline.fetch.assets",
    }  # fmt: skip
    assert steps["unet.compile.reference"].inputs == {"checkpoint": "unet.prune.heal"}


def test_a_pass_is_told_every_parameter_and_the_family(plan):
    told = plan(PRUNED)["unet.prune.shorten"].job.params
    assert told == {"family": "sd", "ratio": 0.25, "taylor": False, "budget": None}


def test_there_is_a_calibration_only_when_a_pass_wants_samples(plan):
    assert not [s for s in plan(PRUNED) if s.stage == "calibrate"]
    (step,) = [s for s in plan(PRUNED, "components.unet.prune.shorten.taylor=true") if s.stage == "calibrate"]
    assert step.job.params["record"] == ["unet"]
    assert len(step.job.params["prompts"]) == 32


def test_a_calibration_has_prompts_for_every_row_and_says_what_it_writes(plan):
    one = plan(PRUNED + "calibrate: {images: 4, max_samples: 10}", "components.unet.prune.shorten.taylor=true")
    step = one["pipeline.calibrate.calibrate"]
    # Latents and answer, one timestep and one prompt of 77 tokens a row; two rows, for guidance.
    assert step.disk_bytes == 10 * 2 * 4 * (2 * 4 * 64 * 64 + 1 + 77 * 768)
    more = plan(PRUNED.replace("batch: 1", "batch: 3") + "calibrate: {images: 4}", "components.unet.prune.heal={}")
    assert len(set(more["pipeline.calibrate.calibrate"].job.params["prompts"])) == 12


def test_verification_compares_with_the_source_whatever_was_pruned(plan):
    before, after = plan(BASE), plan(PRUNED)
    assert before["pipeline.verify.record"].key == after["pipeline.verify.record"].key
    assert before["unet.verify.engine"].job.params["floor"]["min_snr_db"] == 60
    assert after["unet.verify.engine"].job.params["floor"] == {"min_snr_db": 0, "min_cosine": 0}
    assert after["vae_decoder.verify.engine"].job.params["floor"]["min_snr_db"] == 60
    assert after["pipeline.verify.images"].job.params["min_psnr_db"] == 0
    own = plan(PRUNED, "verify.unet.min_snr_db=12")["unet.verify.engine"].job.params["floor"]
    assert own["min_snr_db"] == 12


def memory_gib(plan, prune: str) -> float:
    step = next(
        s for s in reversed(list(plan(BASE + f"components: {{unet: {{prune: {prune}}}}}"))) if s.stage == "prune"
    )
    return step.memory_bytes / 2**30


def test_the_memory_of_gradients_follows_from_rows_and_is_bounded(plan, source):
    one, usual, many = (memory_gib(plan, f"{{recover: {{rows: {rows}}}}}") for rows in (1, 32, 1024))
    assert usual == many == pytest.approx(one + 1.83, abs=0.05)
    assert usual > 7 * 3, "what is known of no weight is all trained"
    source.counts["unet"] = {"conv_out.weight": 10, "mid_block.attentions.0.proj_out.weight": 90}
    some = memory_gib(plan, "{recover: {layers: [conv_out]}}")
    assert usual - some == pytest.approx(5.5 * 3 * 0.9 * 1.15, rel=0.2)
    assert memory_gib(plan, "{recover: {}}") == usual
    source.counts.clear()
    weights = memory_gib(plan, "{heads: {importance: l1}}")
    assert memory_gib(plan, "{heads: {importance: taylor}}") - weights == pytest.approx(1.83, abs=0.05)
    assert memory_gib(plan, "{channels: {importance: taylor}}") - memory_gib(plan, "{channels: {}}") > 1.8


def test_what_a_pruned_source_has_lost_is_refused_where_a_recipe_asks_for_it(plan, source):
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    plain = BASE + "components: {unet: {prune: {heads: {layers: ['mid_block*']}}}}"
    wide = BASE + "components: {unet: {prune: {width: {ratio: 0.1}}}}"
    source.configs["unet"].update(
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), layers_per_block=2,
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, block_out_channels=(320, 640, 1280, 1280),
    )  # fmt: skip
    for text in (plain, wide):
        plan(text)
    source.edits["unet"] = [{"op": "heads", "module": attention, "of": 8, "keep": [0]}]
    (line,) = faults(plan, wide)
    assert "unet.prune.width.ratio: the source has lost heads already" in line
    plan(plain)
    pair = {"op": "remove_pair", "down": "down_blocks.0", "down_index": 0, "up": "up_blocks.3", "up_index": 1}
    source.edits["unet"] = [{"op": "remove_mid_block"}, pair]
    plan(wide)
    (line,) = faults(plan, plain)
    assert "unet.prune.heads.layers: 'mid_block*' matches no layer" in line
    (line,) = faults(plan, BASE + "components: {unet: {prune: {heads: {layers: [down_blocks.0.attentions.1*]}}}}")
    assert "'down_blocks.0.attentions.1*' matches no layer" in line
    plan(
        BASE
        + "components: {unet: {prune: {heads: {layers: [down_blocks.0.attentions.0*, up_blocks.3.attentions.1*]}}}}"
    )


def test_stages_of_passes_are_targets(plan):
    steps = plan(PRUNED, "components.unet.prune.heal={}").until("prune", "unet")
    assert [s.name for s in steps][-3:] == ["pipeline.calibrate.calibrate", "unet.prune.shorten", "unet.prune.heal"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "shorten: {ratio: 1.5}",
            "10: components.unet.prune.shorten.ratio: 1.5 is out of range: it must be less than 1.0",
        ),
        ("shorten: {rato: 0.5}", "10: components.unet.prune.shorten.rato: unknown field 'rato', did you mean 'ratio'?"),
        ("shortn: {}", "10: components.unet.prune.shortn: unknown pass 'shortn', did you mean 'shorten'?"),
        ("shorten: 3", "10: components.unet.prune.shorten: expected a mapping, got 3"),
        (
            "shorten: {budget: {min_snr: 3}}",
            "10: components.unet.prune.shorten.budget.min_snr: unknown field 'min_snr', did you mean 'min_snr_db'?",
        ),
    ],
)
def test_parameters_of_passes_are_checked_at_their_line(plan, text, expected):
    (line,) = faults(plan, PRUNED.replace("shorten: {ratio: 0.25}", text))
    assert line == f"recipe.yaml:{expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("calibrate: {prompts: []}", "7: calibrate.prompts: expected at least one entry"),
        ("calibrate: {prompts: ['  ']}", "7: calibrate.prompts.0: an empty prompt shows calibration nothing"),
        ("calibrate: {images: 1}", "7: calibrate.images: 1 is out of range: it must be at least 4"),
        ("calibrate: {seeds: 1}", "7: calibrate.seeds: unknown field 'seeds', did you mean 'seed'?"),
        ("quantize: {rest: fp8}", "7: quantize.rest: 'fp8' is not one of fp32, fp16, bf16"),
        (
            "quantize: {accept_if: {sped: 1}}",
            "7: quantize.accept_if.sped: unknown field 'sped', did you mean 'speedup'?",
        ),
        ("quantize: {}", "7: quantize: no component is quantized, so that this speaks to nothing; what quantizes: "),
        (
            "components: {unet: {quantize: {}}}",
            "7: components.unet.quantize: unet is built in fp32 on reference, so that this speaks to nothing",
        ),
    ],
)
def test_faults_of_calibration_and_quantization_have_their_line(plan, text, expected):
    lines = faults(plan, BASE + text)
    assert any(line.startswith(f"recipe.yaml:{expected}") for line in lines), lines


TAYLOR = PRUNED.replace("ratio: 0.25", "taylor: true")


def test_prompts_may_come_from_a_file_beside_the_recipe(plan, tmp_path):
    (tmp_path / "mine.txt").write_text("a cat\n\n  a dog  \n")
    step = plan(TAYLOR + "calibrate: {prompts_file: mine.txt}")["pipeline.calibrate.calibrate"]
    assert step.job.params["prompts"] == ["a cat", "a dog"]
    (tmp_path / "mine.txt").write_text("\n")
    (line,) = faults(plan, TAYLOR + "calibrate: {prompts_file: mine.txt}")
    assert line.endswith("mine.txt holds no prompt")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:11: calibrate\.prompts_file: cannot read"):
        plan(TAYLOR + "calibrate: {prompts_file: none.txt}")


def test_pictures_are_encoded_for_the_passes_that_want_them(plan, source):
    from tests.conftest import FakeFile

    healed = PRUNED + "      heal: {}\n" + "calibrate: {pictures: photos}\n"
    without = plan(healed)
    assert not [step for step in without if "pictures" in step.name]
    object.__setattr__(source, "pictures", photos(("a.png", 1000), ("a.txt", 10), ("b.png", 500)))
    steps = plan(healed)
    step, there = steps["pipeline.calibrate.pictures"], steps["pictures.fetch.assets"]
    assert steps["unet.prune.heal"].inputs["pictures"] == step.name
    assert step.inputs["pictures"] == there.name
    assert step.inputs["vae"] == "vae.fetch.checkpoint"
    assert there.job.params["files"] == {"a.png": "0" * 64, "a.txt": "1" * 64, "b.png": "2" * 64}
    # Two pictures, one caption and the empty one.
    assert step.disk_bytes == 4 * (2 * 4 * 64 * 64 + 2 * 77 * 768)
    assert steps["pipeline.calibrate.calibrate"].key == without["pipeline.calibrate.calibrate"].key
    for other in ("defaults.guidance_scale=3", "samplers=[euler]", "shapes.batch=2"):
        assert plan(healed, other)[step.name].key == step.key, "what no latent depends on"
    told = steps["pipeline.package.bundle"].job.params
    assert told["recipe"]["calibrate"]["pictures"] == "folder:photos"
    assert told["source"]["pictures"]["files"] == 3
    source.pictures.files["a.txt"] = FakeFile("3" * 64, 10)
    assert plan(healed)["unet.prune.heal"].key != steps["unet.prune.heal"].key, "another caption is another lesson"


def photos(*files: tuple[str, int]) -> SimpleNamespace:
    from tests.conftest import FakeFile

    made = {name: FakeFile(str(number) * 64, size) for number, (name, size) in enumerate(files)}
    return SimpleNamespace(id="folder:photos", files=made)


def test_pictures_are_left_alone_where_what_learned_on_them_lost_its_race(plan, source, tmp_path):
    """The same recipe without `prune:`, which is what a build goes on with then, is no fault any more."""
    object.__setattr__(source, "pictures", photos(("a.png", 1000)))
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE + "calibrate: {pictures: photos}\n")
    machine = Machine({}, {name: Probe(available=True) for name in BACKENDS}, {"machine": "x86_64"})
    steps = resolve(load(path, ()), source, machine, {"unet": "pruning is left out"})
    assert not [step for step in steps if "pictures" in step.name]


@pytest.mark.parametrize("prune", ["shorten: {}", "heal: {taylor: true}"])
def test_pictures_that_nothing_learns_on_are_refused(plan, source, prune):
    object.__setattr__(source, "pictures", photos(("a.png", 1000)))
    (line,) = faults(plan, BASE + f"components: {{unet: {{prune: {{{prune}}}}}}}\ncalibrate: {{pictures: photos}}\n")
    assert line.startswith("recipe.yaml:8: calibrate.pictures: nothing in this recipe learns on pictures")


def test_verification_and_calibration_share_neither_prompts_nor_seeds(plan):
    (line,) = faults(plan, TAYLOR + "calibrate: {prompts: [a, b]}\nverify: {prompts: [b]}")
    assert line.startswith("recipe.yaml:11: calibrate.prompts: 'b' is also one of verify.prompts")
    (line,) = faults(plan, TAYLOR + "calibrate: {seed: 0}")
    assert "overlap the seeds of verification" in line


def test_bundled_prompts_are_many_and_distinct():
    from sdcompile.models import general_prompts
    from sdcompile.plan.verification import VERIFY_PROMPTS

    prompts = general_prompts()
    assert len(prompts) == len(set(prompts)) >= 128
    assert not set(prompts) & set(VERIFY_PROMPTS)


def test_a_quantized_source_is_refused(tmp_path, source):
    source.configs["unet"]["quantization_config"] = {"quant_method": "bitsandbytes"}
    path = Path(tmp_path / "recipe.yaml")
    path.write_text(BASE)
    probes = {name: Probe(available=True) for name in BACKENDS}
    with pytest.raises(RecipeError, match="its unet is already quantized \\(bitsandbytes\\)"):
        resolve(load(path), source, Machine({}, probes, {"machine": "x86_64"}))


def test_what_a_recipe_says_of_passes_survives_dump_and_shows_in_the_schema(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(PRUNED + "calibrate: {images: 8}\n")
    data = dump(load(path))
    assert data["components"]["unet"]["prune"] == {"shorten": {"ratio": 0.25}}
    assert data["calibrate"]["images"] == 8
    prune = schema()["$defs"]["ComponentRecipe"]["properties"]["prune"]["properties"]
    assert prune["shorten"]["properties"]["ratio"]["exclusiveMaximum"] == 1
    assert "min_snr_db" in str(prune["shorten"]["properties"]["budget"])


def test_pruning_is_for_the_denoiser(plan):
    (line,) = faults(plan, BASE + "components: {vae_decoder: {prune: {shorten: {}}}}\n")
    assert line.startswith("recipe.yaml:7: components.vae_decoder.prune: passes of the prune stage are for unet")


def test_engines_of_all_precisions_share_the_pruning(plan):
    fp32, bf16 = plan(PRUNED), plan(PRUNED, "precision=bf16")
    assert fp32["unet.prune.shorten"].key == bf16["unet.prune.shorten"].key
    assert fp32["unet.compile.reference"].key != bf16["unet.compile.reference"].key


INT8 = BASE.replace("backend: reference", "backend: openvino") + "components: {unet: {precision: int8}}\n"


def test_int8_is_a_pass_on_the_onnx_form_fitted_to_samples(plan):
    steps = plan(INT8)
    assert [s.name for s in steps if s.component == "unet"] == [
        "unet.fetch.checkpoint", "unet.export.onnx", "unet.quantize.nncf_int8", "unet.compile.openvino",
        "unet.verify.engine",
    ]  # fmt: skip
    assert steps["unet.quantize.nncf_int8"].inputs["samples"] == "pipeline.calibrate.calibrate"
    assert steps["unet.compile.openvino"].job.params["rest"] == "bf16"
    own = plan(INT8, "quantize.rest=fp32", "components.unet.quantize.max_samples=7")
    assert own["unet.compile.openvino"].job.params["rest"] == "fp32"
    assert own["unet.quantize.nncf_int8"].job.params["max_samples"] == 7


def test_a_component_s_own_quantization_lies_over_the_recipe_s(plan):
    text = INT8 + "quantize: {max_samples: 5, symmetric: true}\n"
    params = plan(text, "components.unet.quantize.max_samples=9")["unet.quantize.nncf_int8"].job.params
    assert (params["max_samples"], params["symmetric"]) == (9, True)


def test_changing_a_budget_moves_no_sample_and_no_export(plan):
    before, after = plan(INT8), plan(INT8, "components.unet.quantize.budget.min_snr_db=20")
    moved = {step.name for step in after if step.key != before[step.name].key}
    assert "unet.quantize.nncf_int8" in moved
    assert not {name for name in moved if ".export." in name or ".calibrate." in name or ".record" in name}


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (
            ["quantize.budget.min_snr=20"],
            "quantize.budget.min_snr: unknown field 'min_snr', did you mean 'min_snr_db'?",
        ),
        (["quantize.budget.min_snr_db=-3"], "quantize.budget.min_snr_db: -3 is out of range: it must be at least 0"),
        (["quantize.symetric=true"], "quantize.symetric: unknown field 'symetric', did you mean 'symmetric'?"),
        (["quantize.rest=fp16"], "quantize.rest: beside int8, openvino computes in bf16 or fp32, not in fp16"),
        (["components.unet.backend=reference"], "precision: reference cannot make int8 of unet: it makes fp32, bf16"),
    ],
)
def test_faults_of_quantization_are_told_when_a_recipe_is_planned(plan, sets, expected):
    assert any(expected in line for line in faults(plan, INT8, *sets))


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["quantize={mode: dynamic}"], "quantize.mode: openvino has nothing faster for 'dynamic'"),
        (
            ["components.unet.quantize={mode: weights, bits: 4}", "components.unet.backend=tensorrt_rtx"],
            "components.unet.quantize.bits: tensorrt_rtx has no kernels for weights of 4 bits",
        ),
        (["quantize={bits: 4}"], "quantize: bits: 4 is for `mode: weights`"),
        (["quantize={bits: 5}"], "quantize.bits: 5 is not one of 8, 4"),
        (
            ["quantize={mode: weights, bits: 4}", "components.unet.quantize={mode: static}"],
            "components.unet.quantize: bits: 4 is for `mode: weights`",
        ),
    ],
)
def test_ways_of_quantizing_that_nothing_runs_are_refused(plan, sets, expected):
    (line,) = faults(plan, INT8, *sets)
    assert expected in line


UNET = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640), "layers_per_block": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["prune.heads={layers: ['*attn2', '*attn9']}"], "prune.heads.layers: '*attn9' matches no layer that can be"),
        (["prune.channels={layers: ['*ff'], parts: [resnets]}"], "prune.channels.layers: '*ff' matches no layer"),
        (["prune.channels={ratio: 0.9}"], "prune.channels: a ratio of 0.9 cannot be reached where max_ratio is 0.75"),
        (["prune.heads={ratio: 0.9}"], "prune.heads: a ratio of 0.9 cannot be reached where max_ratio is 0.75"),
        (["prune.recover={layers: ['*to_z*']}"], "prune.recover.layers: '*to_z*' matches no weight; they are named"),
        (["prune.blocks={remove: [mid_blok]}"], "prune.blocks.remove.0: 'mid_blok' is no block that can be removed"),
        (["prune.blocks={remove: [mid_block, mid_block]}"], "prune.blocks.remove.1: 'mid_block' is no block"),
        (["prune.blocks={remove: [down_blocks.0.1+up_blocks.1.0]}"], "prune.blocks.remove.0: 'down_blocks.0.1+up_"),
        (["prune.blocks={count: 4}"], "prune.blocks.count: only 3 blocks could be removed at all, not 4"),
        (["quantize={ignore: [conv_in, attn3]}"], "quantize.ignore.1: 'attn3' matches no module that can be quantized"),
        (["quantize={ignore: [norm1]}"], "quantize.ignore.0: 'norm1' matches no module that can be quantized"),
        (["quantize={ignore: ['**']}"], "quantize.ignore: this leaves no layer to quantize"),
    ],
)
def test_patterns_that_fit_nothing_in_the_configs_are_refused(plan, source, sets, expected):
    source.configs["unet"] |= UNET
    (line,) = faults(plan, INT8, *(f"components.unet.{text}" for text in sets))
    assert f"components.unet.{expected}" in line


def test_patterns_are_left_to_the_passes_where_the_modules_are_not_known(plan, source):
    source.configs["unet"] |= {**UNET, "down_block_types": ("OwnBlock",) * 2}
    assert plan(INT8, "components.unet.quantize={ignore: [nothing]}")
    source.configs["unet"] |= UNET
    assert plan(INT8, "components.unet.quantize={ignore: [conv_in, '**.to_q', mid_block, 'down_blocks.*.resnets']}")


@pytest.mark.parametrize(("backend", "quantized"), [("openvino", False), ("onnxruntime", True)])
def test_products_of_attention_are_float_where_the_backend_asks_for_it_and_the_recipe_may_differ(
    plan, backend, quantized
):
    chosen = [f"backend={backend}"] + ["precision=fp32"] * (backend == "onnxruntime")
    assert plan(INT8, *chosen)["unet.quantize.nncf_int8"].job.params["attention_products"] is quantized
    asked = plan(INT8, *chosen, f"components.unet.quantize.attention_products={str(not quantized).lower()}")
    assert asked["unet.quantize.nncf_int8"].job.params["attention_products"] is not quantized


def test_int8_that_must_win_is_raced_against_what_a_plain_build_would_make(plan):
    plain = plan(INT8, "components.unet.precision=bf16")
    steps = plan(INT8, "components.unet.quantize.accept_if.speedup=1.1")
    race = steps["unet.compile.race"]
    assert race.inputs == {
        "engine": "unet.compile.openvino", "rival": "unet.compile.openvino-bf16", "onnx": "unet.quantize.nncf_int8",
    }  # fmt: skip
    assert race.job.params == {"backend": "openvino", "of": "quantize", "speedup": 1.1, "groups": True}
    assert steps["unet.compile.openvino-bf16"].key == plain["unet.compile.openvino"].key, "a lost race repeats no work"
    assert steps["pipeline.package.bundle"].inputs["race.unet.quantize"] == race.name
    assert race.name in [s.name for s in steps.until("compile", "unet")]
    assert "unet.compile.race" not in [s.name for s in plan(INT8)]


@pytest.fixture
def turned(plan, source, monkeypatch, tmp_path):
    """Plan INT8 with some settings, let its races end as told, one after the other, and build: (work, plans, said)."""
    import json
    from contextlib import nullcontext

    from sdcompile import run
    from sdcompile.console import Observer

    class NoStore:
        def using(self, keys):
            return nullcontext()

    def build(outcomes, *sets, text=INT8):
        said, plans, left = [], [], list(outcomes)

        class Quiet(Observer):
            def warn(self, text: str) -> None:
                said.append(text)

        def make_all(work, plan, observer):
            plans.append(plan)
            for step in plan:
                if step.gives == "race":
                    assert left, f"nobody said how {step.name} ends"
                    (tmp_path / "race.json").write_text(json.dumps(RACE | {"of": step.job.params["of"]} | left.pop(0)))
                    run._gate(step, tmp_path)
            return {}

        monkeypatch.setattr(run, "_make_all", make_all)
        first = plan(text, *sets)
        work = run.Build(first.recipe, source, NoStore(), first)
        run.build(work, "package", Quiet(), force=True)
        assert not left, "and every race was run"
        return work, plans, said

    return build


MUST_WIN_INT8 = "components.unet.quantize.accept_if.speedup=1.1"
LOST = {"won": False, "speedup": 0.9}
WON = {"won": True, "speedup": 1.3}
RACE = {
    "component": "unet", "name": "int8", "rival": "bf16", "wanted": 1.1, "slower": [],
    "groups": {"conv_in": [3.0, 1.0], "mid_block.resnets.0": [2.5, 2.0], "conv_out": [1.0, 2.0]},
}  # fmt: skip


def test_a_lost_race_builds_the_component_unquantized_and_says_so(turned):
    work, plans, said = turned([LOST], MUST_WIN_INT8)
    assert work.recipe.effective("unet").precision == "bf16"
    assert "unet.quantize.nncf_int8" not in [s.name for s in plans[1]]
    assert "0.90 times as fast, and accept_if wants 1.1" in work.fallbacks["unet"]
    assert plans[1]["pipeline.package.bundle"].job.params["fallbacks"] == work.fallbacks
    assert said


def test_a_race_that_is_won_changes_nothing(turned):
    work, plans, said = turned([WON], MUST_WIN_INT8)
    assert (len(plans), said, work.fallbacks) == (1, [], {})


SLOWER = {"slower": ["conv_in", "mid_block.resnets.0"]}


def test_groups_that_are_slower_in_int8_stay_in_float_and_are_raced_once_more(turned):
    ignored = "components.unet.quantize.ignore=[conv_out]"
    _, plans, said = turned([LOST | SLOWER, WON], MUST_WIN_INT8, ignored)
    quantize = plans[1]["unet.quantize.nncf_int8"].job.params
    assert quantize["float_groups"] == ["conv_in", "mid_block.resnets.0"]
    assert quantize["ignore"] == ["conv_out"], "what the recipe ignores stays ignored"
    assert plans[1]["unet.compile.race"].job.params["groups"] is False
    rivals = [made["unet.compile.openvino-bf16"] for made in plans]
    assert rivals[0].job == rivals[1].job, "the rival is made once"
    assert said == [
        "unet: 2 of 3 groups of layers stay in bf16, where they take 3 ms of a call and in int8 5.5 here: conv_in, "
        "mid_block.resnets.0"
    ]
    assert plans[1]["pipeline.package.bundle"].job.params["fallbacks"]["unet"] in said[0]


def test_int8_that_loses_even_so_is_given_up(turned):
    work, plans, _ = turned([LOST | SLOWER, LOST | {"speedup": 1.05}], MUST_WIN_INT8)
    assert len(plans) == 3
    assert work.recipe.effective("unet").precision == "bf16"
    assert "1.05 times as fast" in work.fallbacks["unet"]
    assert "groups" not in work.fallbacks["unet"], "what is no longer so is no longer told"


def test_int8_that_had_won_as_a_whole_is_not_given_up_for_what_was_tried_after(turned):
    work, plans, _ = turned([WON | SLOWER, LOST | {"speedup": 1.08}, WON], MUST_WIN_INT8)
    assert len(plans) == 3
    assert plans[2]["unet.quantize.nncf_int8"].job.params["float_groups"] == []
    assert work.recipe.effective("unet").precision == "int8"
    assert work.fallbacks["unet"].startswith(
        "all of it is int8, as it no longer wins here with groups of layers in bf16"
    )


def test_what_was_found_of_the_denoiser_is_not_taken_for_its_widths(turned):
    widths = "components.unet.widths={w75: {channels: {ratio: 0.3}}}"
    _, plans, said = turned([LOST | SLOWER, WON, LOST, WON], MUST_WIN_INT8, widths)
    assert plans[1]["unet.quantize.nncf_int8"].job.params["float_groups"] == SLOWER["slower"]
    assert plans[1]["unet_w75.quantize.nncf_int8"].job.params["float_groups"] == []
    assert plans[1]["unet_w75.compile.race"].job.params["groups"] is True, "its own groups are its own race's to find"
    assert "unet_w75.quantize.nncf_int8" not in [s.name for s in plans[2]]
    assert "unet.quantize.nncf_int8" in [s.name for s in plans[2]]
    assert [line.partition(":")[0] for line in said] == ["unet", "unet_w75"]


def test_a_denoiser_that_loses_leaves_its_widths_to_their_own_race(turned):
    widths = "components.unet.widths={w75: {channels: {ratio: 0.3}}}"
    work, plans, _ = turned([LOST, WON], MUST_WIN_INT8, widths)
    assert work.recipe.effective("unet").precision == "bf16"
    assert work.recipe.effective("unet_w75").precision == "int8"
    assert "unet_w75.quantize.nncf_int8" in [s.name for s in plans[1]]


def test_a_denoiser_that_loses_leaves_its_shallow_stand_in_to_its_own_race(turned, source):
    source.configs["unet"] |= UNET
    cache = "components.unet.step_cache={every: 3}"
    work, plans, _ = turned([LOST, WON], MUST_WIN_INT8, cache)
    assert work.recipe.effective("unet").precision == "bf16"
    assert work.recipe.effective("unet_cached").precision == "int8"
    assert "unet_cached.compile.race" in [s.name for s in plans[1]]


MUST_WIN = "components.unet.prune={channels: {ratio: 0.3}, accept_if: {speedup: 1.2}}"


def test_with_a_speedup_of_0_races_only_measure(plan):
    text = MUST_WIN.replace("1.2", "0")
    steps = plan(INT8, text, "components.unet.quantize.accept_if.speedup=0")
    told = [steps[f"unet.compile.{race}"].job.params for race in ("race", "race-unpruned")]
    assert [(params["speedup"], params["groups"]) for params in told] == [(0, False)] * 2


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_pruning_that_must_win_is_raced_against_the_source_in_one_precision(plan, precision):
    made = f"components.unet.precision={precision}"
    steps, plain = plan(INT8, made, MUST_WIN), plan(INT8, "components.unet.precision=bf16")
    race = steps["unet.compile.race-unpruned"]
    narrow = "unet.compile.openvino-bf16" if precision == "int8" else "unet.compile.openvino"
    assert race.inputs == {"engine": narrow, "rival": "unet.compile.openvino-unpruned"}
    assert race.job.params == {"backend": "openvino", "of": "prune", "speedup": 1.2, "groups": False}
    assert steps[race.inputs["rival"]].key == plain["unet.compile.openvino"].key, "a lost race repeats no work"
    assert steps["pipeline.package.bundle"].inputs["race.unet.prune"] == race.name
    assert "unet.compile.race-unpruned" not in [
        s.name for s in plan(INT8, MUST_WIN.replace("accept_if: {speedup: 1.2}", ""))
    ]


def test_pruning_is_raced_before_anything_is_quantized(plan):
    names = [step.name for step in plan(INT8, MUST_WIN, MUST_WIN_INT8)]
    assert names.index("unet.compile.race-unpruned") < names.index("unet.quantize.nncf_int8")
    assert names.index("unet.quantize.nncf_int8") < names.index("unet.compile.race")


def test_pruning_that_loses_leaves_the_component_as_its_source_has_it(turned):
    work, plans, said = turned([LOST | {"wanted": 1.2}], MUST_WIN)
    assert "unet.prune.channels" in [s.name for s in plans[0]]
    assert "unet.prune.channels" not in [s.name for s in plans[1]]
    assert work.recipe.effective("unet").precision == "int8", "int8 has a race of its own"
    assert said == [
        "unet: pruning is left out, because it does not win here: pruned it is 0.90 times as fast, and accept_if "
        "wants 1.2"
    ]


def test_what_happened_on_the_way_is_told_together(turned):
    work, *_ = turned([LOST, LOST | SLOWER, WON], MUST_WIN, MUST_WIN_INT8)
    assert work.fallbacks["unet"].startswith("pruning is left out, ")
    assert "; 2 of 3 groups of layers stay in bf16" in work.fallbacks["unet"]


def test_a_target_that_fell_back_may_become_another_one(turned):
    """Refused in a recipe as it is written, but no reason to stop a build on its way."""
    text = INT8.replace("backend: openvino\n", "").replace("precision: bf16\n", "")
    targets = "targets=[{name: a, backend: openvino, precision: bf16}, {name: b, backend: openvino, precision: bf16, "
    targets += "components: {unet: {precision: bf16}}}]"
    accept = "components.unet.quantize.accept_if.speedup=1.1"
    work, plans, _ = turned([LOST], targets, accept, text=text)
    assert list(work.fallbacks) == ["unet@a"]
    assert plans[1]["pipeline.package.bundle"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("prune: {accept_if: {speedup: 1.1}}", "no pass is named whose engine could be accepted or not"),
        ("prune: {heads: {}, accept_if: {sped: 1}}", "unknown field 'sped', did you mean 'speedup'?"),
        ("prune: {heads: {}, accept_if: {speedup: -1}}", "must be at least 0"),
        ("quantize: {accept_if: {groups: false}}", "quantize.accept_if: what int8 must bring is not said"),
        ("quantize: {float_groups: [conv_in, attn1]}", "quantize.float_groups.1: 'attn1' is no group of layers"),
        ("prune: {heads: {}, acept_if: {speedup: 1}}", "unknown pass 'acept_if', did you mean 'accept_if'?"),
        ("widths: {w75: {heads: {}, accept_if: {speedup: 1}}}", "a width is built because it is narrow"),
    ],
)
def test_what_cannot_be_asked_of_engines_that_must_win(plan, source, text, fault):
    source.configs["unet"] |= UNET
    with pytest.raises(RecipeError, match=re.escape(fault)):
        plan(INT8, f"components.unet={{precision: int8, {text}}}")


def test_an_accept_if_of_null_is_none_and_fields_of_it_are_inherited(plan):
    steps = plan(INT8, "components.unet.prune={channels: {ratio: 0.3}, accept_if: null}")
    assert "unet.compile.race-unpruned" not in [s.name for s in steps]
    both = plan(INT8, "quantize={accept_if: {speedup: 1.3}}", "components.unet.quantize.accept_if.groups=false")
    assert both["unet.compile.race"].job.params == {
        "backend": "openvino", "of": "quantize", "speedup": 1.3, "groups": False,
    }  # fmt: skip


def test_a_race_of_engines_that_cannot_run_here_is_no_step_that_this_machine_can_take(plan, source):
    first = plan(INT8, "backend=tensorrt_rtx", "precision=fp16", "components.unet.quantize.accept_if.speedup=1.1")
    assert not first["unet.compile.race"].cannot
    probes = {name: Probe(available=True, cannot_run="no driver") for name in BACKENDS}
    steps = resolve(first.recipe, source, Machine({}, probes, {"machine": "x86_64"}))
    assert steps["unet.compile.race"].cannot == "no driver"
    assert not steps["unet.compile.tensorrt_rtx"].cannot


def test_groups_are_not_told_apart_where_the_recipe_does_not_want_it(plan):
    steps = plan(INT8, "components.unet.quantize.accept_if={speedup: 1.1, groups: false}")
    assert steps["unet.compile.race"].job.params["groups"] is False


EACH = "verify.each_pass=true"
PASSES_OF = "components.unet.prune={shorten: {ratio: 0.25}, heal: {}}"


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_each_pass_has_an_engine_before_and_after_it_where_that_is_asked_for(plan, precision):
    asked = f"components.unet.precision={precision}"
    steps, plain = plan(INT8, asked, PASSES_OF, EACH), plan(INT8, "components.unet.precision=bf16")
    told = steps["unet.verify.each_pass"]
    stations = [steps[told.inputs[f"station.{n}"]] for n in range(len(told.inputs))]
    quantizer = ["nncf_int8"] * (precision == "int8")
    assert told.job.params["passes"] == ["shorten", "heal", *quantizer]
    assert len(stations) == 1 + len(told.job.params["passes"])
    assert stations[0].key == plain["unet.compile.openvino"].key, "the source, in the precision of what is not int8"
    assert {step.op for step in stations} == {"openvino"}
    assert len({step.key for step in stations}) == len(stations)
    assert stations[-1].name == "unet.compile.openvino", "at last the engine that is built anyway"
    made_of = [steps[steps[step.inputs["onnx"]].inputs["checkpoint"]].op for step in stations[1:3]]
    assert made_of == ["shorten", "heal"]
    assert "prompts" not in told.job.params, "only of the tiny model is it known what a picture should show"
    assert steps["pipeline.package.bundle"].inputs["apart.unet"] == told.name
    assert "each_pass" not in {step.op for step in plan(INT8, asked, PASSES_OF)}


def test_no_pass_is_told_apart_where_there_is_none_or_engines_cannot_run(plan, source):
    assert "each_pass" not in {step.op for step in plan(INT8, "components.unet.precision=bf16", EACH)}
    first = plan(INT8, "backend=tensorrt_rtx", "precision=fp16", EACH)
    assert "each_pass" in {step.op for step in first}
    assert not first.notes
    probes = {name: Probe(available=True, cannot_run="no driver") for name in BACKENDS}
    steps = resolve(first.recipe, source, Machine({}, probes, {"machine": "x86_64"}))
    assert "each_pass" not in {step.op for step in steps}
    assert steps.notes == ("unet: what each pass changes in time is not measured: no driver",)


EFFECTS = {
    "unet": {
        "passes": [
            {"pass": "shorten", "parameters": [4_000_000, 3_000_000], "bytes": [16 << 20, 12 << 20], "snr_db": {}},
            {
                "pass": "nncf_int8", "parameters": [3_000_000, 3_000_000], "bytes": [12 << 20, 4 << 20],
                "snr_db": {"early": 25.5, "mid": 30.0, "late": 24.0}, "quantized": 90, "operators": 100,
                "left_out": ["conv_in", "a", "b", "c"],
            },
        ],
        "races": [{"name": "int8", "rival": "bf16", "speedup": 1.234, "wanted": 1.1}],
    }
}  # fmt: skip


def test_what_passes_did_is_shown_at_the_end_of_a_build(capsys, monkeypatch):
    from sdcompile import console

    monkeypatch.setenv("COLUMNS", "200")
    console.show_result({"reports": {}, "fallbacks": {}, "bundle": None, "folders": {}, "effects": EFFECTS})
    shown = capsys.readouterr().out
    assert "3.00 M of 4.00" in shown
    assert "4.0 MiB of 12" in shown
    assert "25.5 / 30.0 / 24.0" in shown
    assert "90 of 100 in int8; for the budget in float: conv_in, a, b and 1 more" in shown
    assert "int8 is 1.23 times as fast as bf16" in shown
    assert "alignment" not in shown


def test_what_each_pass_changed_is_shown_beside_it_where_it_was_measured(capsys, monkeypatch):
    from sdcompile import console

    scored = {"prompts": 64, "before": 0.98, "after": 0.95, "change": -0.03, "error": 0.01}
    shorten, int8 = EFFECTS["unet"]["passes"]
    passes = [{**shorten, "cpu_ms": [8.0, 6.0], "alignment": scored}, {**int8, "cpu_ms": [600.0, 660.0]}]
    monkeypatch.setenv("COLUMNS", "200")
    told = {"unet": {"passes": passes, "races": []}}
    console.show_result({"reports": {}, "fallbacks": {}, "bundle": None, "folders": {}, "effects": told})
    first, second = (line for line in capsys.readouterr().out.splitlines() if " unet " in line)
    assert "0.75 of 8.00 ms   0.950 (-0.030 ± 0.010)" in first
    assert "1.10 of 600 ms" in second


def test_sensitivity_is_a_chart_with_the_worst_group_first(capsys, monkeypatch):
    from sdcompile import console

    groups = [
        {"name": "conv_in", "operators": 1, "snr_db": {"early": 20.0, "mid": 30.0}},
        {"name": "mid_block.resnets.0", "operators": 3, "snr_db": {"early": 50.0, "mid": 40.0}},
    ]
    told = {"samples": 12, "all": {"early": 19.0, "mid": 28.0}, "left_out": ["conv_in"], "groups": groups}
    monkeypatch.setenv("COLUMNS", "200")
    console.show_sensitivity({"components": {"unet": told}, "files": {"unet": "sensitivity.json"}})
    lines = capsys.readouterr().out.splitlines()
    first, second = (next(line for line in lines if name in line) for name in ("conv_in (left in float)", "mid_block"))
    assert first.count("█") == 20
    assert "·" in second


def test_the_manifest_carries_what_passes_did(tmp_path):
    from sdcompile.passes.base import write_effect
    from sdcompile.steps import package

    write_effect(tmp_path, parameters=(4, 3), size_bytes=(16, 12), snr_db={"early": 20.0}, heads=2)
    entry = {"backend": "stub", "precision": "fp32", "params": {}, "spec": {}, "passes": ["shorten"]}
    made = package._component("unet", entry, None, {"pass.unet.shorten": tmp_path}, fallback=None)
    (effect,) = made.effects
    assert (effect["pass"], effect["parameters"], effect["heads"]) == ("shorten", [4, 3], 2)
