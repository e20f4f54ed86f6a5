"""Passes in recipes and plans: where they are named, what is refused at which line, and which steps they become."""

from __future__ import annotations

from pathlib import Path

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


def nothing(inputs: object, out: object, job: object) -> None:
    raise AssertionError("a plan runs nothing")


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    """Two passes of the prune stage; the second wants a teacher, the first wants samples when told so."""
    shorten = Pass("shorten", "prune", "checkpoint", 1, Params, nothing, calibrates=lambda p: p.taylor)
    heal = Pass("heal", "prune", "checkpoint", 1, Params, nothing, calibrates=always, teacher=True)
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
        "teacher": "unet.fetch.checkpoint",
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


def test_verification_compares_with_the_source_whatever_was_pruned(plan):
    before, after = plan(BASE), plan(PRUNED)
    assert before["pipeline.verify.record"].key == after["pipeline.verify.record"].key
    assert before["unet.verify.engine"].job.params["floor"]["min_snr_db"] == 60
    assert after["unet.verify.engine"].job.params["floor"] == {"min_snr_db": 0, "min_cosine": 0}
    assert after["vae_decoder.verify.engine"].job.params["floor"]["min_snr_db"] == 60
    assert after["pipeline.verify.images"].job.params["min_psnr_db"] == 0
    own = plan(PRUNED, "verify.unet.min_snr_db=12")["unet.verify.engine"].job.params["floor"]
    assert own["min_snr_db"] == 12


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
        ("quantize: {}", "7: quantize: no component is quantized; what quantizes: "),
        ("components: {unet: {quantize: {}}}", "7: components.unet.quantize: unet is quantized with fp32 on reference"),
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
