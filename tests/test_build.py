"""The whole road, as a person at a terminal walks it: build, build again, change, break, generate."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdcompile.run import prepare
from sdcompile.store import Store

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.tiny

# Plumbing needs no engine that computes: the stub's road is the same, and short.
STUB = """
version: 1
name: plumbing
family: sd
source: builtin:tiny
backend: stub
precision: fp32
samplers: [ddim, euler]
sampler_steps: [1, 3]
defaults: {num_inference_steps: 2}
"""

REAL = """
version: 1
name: real
family: sd
source: builtin:tiny
backend: openvino
precision: fp32
shapes: {batch: [1, 1, 2], height: [64, 64, 80], width: 64}
samplers: [ddim, euler_ancestral]
sampler_steps: [1, 4]
defaults: {num_inference_steps: 4, guidance_scale: 3.0}
verify: {num_inference_steps: 3}
"""


class Place:
    """A folder with a recipe, a store and the command line."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(text)

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "sdcompile", *map(str, arguments)]

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "SDCOMPILE_STORE": str(self.folder / "store"),
            "NO_COLOR": "1",
            "COLUMNS": "160",
            "PYTHONPATH": str(ROOT),
        }

    def run(self, *arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
        made = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == expect, f"exit {made.returncode}\n{made.stdout}\n{made.stderr}"
        return made

    def events(self, *arguments: str | Path, expect: int = 0) -> list[dict]:
        return [json.loads(line) for line in self.run(*arguments, "--json", expect=expect).stdout.splitlines()]

    def build(self, *sets: str, expect: int = 0) -> list[dict]:
        options = [option for change in sets for option in ("--set", change)]
        return self.events("build", self.recipe, "--output", self.folder / "out", *options, expect=expect)

    def bundle(self) -> Path:
        return next((self.folder / "out").glob("*.sdc"))

    def nvidia(self, *sets: str, expect: int = 0) -> list[dict]:
        """Build once more, the VAE decoder for NVIDIA GPUs, into a folder of its own."""
        decoder = "{backend: tensorrt_rtx, precision: fp16, build: {compute_capabilities: [portable, sm89]}}"
        changes = ("name=nvidia", f"components.vae_decoder={decoder}", *sets)
        options = [option for change in changes for option in ("--set", change)]
        return self.events("build", self.recipe, "--output", self.folder / "nvidia", *options, expect=expect)


def made(events: list[dict]) -> set[str]:
    return {event["step"] for event in events if event["event"] == "step_done"}


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Place:
    place = Place(tmp_path_factory.mktemp("stub"), STUB)
    place.build()
    return place


@pytest.fixture
def own(stub, tmp_path) -> Place:
    """A copy of the built place, to break."""
    shutil.copytree(stub.folder, tmp_path / "own", copy_function=shutil.copy2)
    return Place(tmp_path / "own", STUB)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Place:
    pytest.importorskip("openvino")
    place = Place(tmp_path_factory.mktemp("real"), REAL)
    place.build()
    return place


# Incremental --------------------------------------------------------------------------------


def test_a_second_build_makes_nothing_and_keeps_the_bundle(stub):
    before = (stub.bundle() / "manifest.json").read_bytes()
    events = stub.build()
    assert made(events) == set()
    assert (stub.bundle() / "manifest.json").read_bytes() == before


def test_pruning_that_does_not_win_is_left_out_and_the_bundle_says_what_was_measured(own):
    """From the race to the manifest, with engines that compute nothing and a pass that changes no function."""
    prune = "components.unet.prune={sliced_attention: {slices: {1: 4}}, accept_if: {speedup: %s}}"
    lost = own.build(prune % 1e9)
    assert "unet.compile.race-unpruned" in made(lost)
    (warning,) = [event["text"] for event in lost if event["event"] == "warning" and "pruning" in event["text"]]
    assert warning.startswith("unet: pruning is left out, because it does not win here: pruned it is ")
    entry = json.loads((own.bundle() / "manifest.json").read_text())["components"]["unet"]
    assert entry["notes"] == [warning.removeprefix("unet: ")]
    assert not entry["effects"]
    assert "races" not in entry, "it is told by the note; readers that know no races read the rest"
    assert made(own.build(prune % 1e9)) == set(), "what lost is known to have lost"
    own.run("gc")
    assert made(own.build(prune % 1e9)) == set(), "and still is when its engines are gone"
    own.build(prune % 1e-9)
    manifest = json.loads((own.bundle() / "manifest.json").read_text())
    entry = manifest["components"]["unet"]
    assert [effect["pass"] for effect in entry["effects"]] == ["sliced_attention"]
    ((race,), notes) = entry["races"], entry["notes"]
    assert (race["of"], race["name"], race["rival"], race["won"]) == ("prune", "pruned", "unpruned", True)
    assert notes == []
    shown = own.run("inspect", own.bundle()).stdout
    assert "unet: pruned is " in shown
    assert "times as fast as unpruned by processor time (accept_if wants 1e-09)" in shown
    measured = own.build(prune % 0)
    assert "unet.compile.race-unpruned" in made(measured)
    assert "by processor time (kept whatever it is)" in own.run("inspect", own.bundle()).stdout
    # As manifests were before there was a second race.
    entry["race"] = {"precision": "int8", "rival": "bf16", "speedup": 1.25, "wanted": 1.0, "won": True}
    del entry["races"]
    for other in manifest["components"].values():
        other.setdefault("race", {})
    (own.bundle() / "manifest.json").write_text(json.dumps(manifest))
    assert "unet: int8 is 1.25 times as fast as bf16" in own.run("inspect", own.bundle()).stdout


def test_what_each_pass_changed_stands_beside_it_in_the_bundle(own):
    """From plan to manifest, with engines that compute nothing and passes that change no function."""
    passes = "components.unet.prune={sliced_attention: {slices: {1: 4}}}"
    own.build(passes)
    (plain,) = json.loads((own.bundle() / "manifest.json").read_text())["components"]["unet"]["effects"]
    assert not {"cpu_ms", "alignment"} & set(plain)
    assert "unet.verify.each_pass" in made(own.build(passes, "verify.each_pass=true"))
    entry = json.loads((own.bundle() / "manifest.json").read_text())["components"]["unet"]
    (effect,) = entry["effects"]
    assert effect == {**plain, **{key: effect[key] for key in ("call_ms", "cpu_ms", "alignment")}}
    assert min(*effect["call_ms"], *effect["cpu_ms"]) > 0
    told = effect["alignment"]
    assert told["prompts"] > 50
    assert told["after"] == told["before"], "the same function draws the same pictures"
    assert told["change"] == told["error"] == 0
    assert "0.000 ± 0.000" in own.run("inspect", own.bundle()).stdout
    assert made(own.build(passes, "verify.each_pass=true")) == set()


@pytest.mark.parametrize(
    ("sets", "scored"),
    [
        ((), True),
        (("components.vae_encoder={}",), True),
        (("shapes={height: 96, width: 96}",), False),
        (("shapes={height: 64, width: 128}",), False),
        (("components.unet.step_cache={every: 2, depth: 1}",), False),
    ],
)
def test_pictures_are_scored_pass_by_pass_where_the_checker_can_read_them(stub, sets, scored):
    passes = "components.unet.prune={sliced_attention: {slices: {1: 4}}}"
    store = Store(stub.folder / "store")
    plan = prepare(stub.recipe, (passes, "verify.each_pass=true", *sets), store, offline=True).plan
    step = plan["unet.verify.each_pass"]
    assert ("prompts" in step.job.params) is scored
    assert ("tokenizer" in step.inputs) is scored
    assert "vae_encoder" not in step.inputs


def test_passes_are_told_apart_on_every_target_that_can_run(stub):
    sets = (
        "backend=", "targets=[openvino, {backend: onnxruntime, precision: fp16}, stub]", "verify.each_pass=true",
        "components.unet.prune={sliced_attention: {slices: {1: 4}}}",
    )  # fmt: skip
    plan = prepare(stub.recipe, sets, Store(stub.folder / "store"), offline=True).plan
    bundle = plan["pipeline.package.bundle"].inputs
    for target in ("openvino", "onnxruntime", "stub"):
        told = plan[bundle[f"apart.unet@{target}"]]
        assert (told.target, told.job.params["backend"]) == (target, target)
        assert told.inputs["station.1"] == bundle[f"engine.unet@{target}"]
        assert told.inputs["station.0"] != told.inputs["station.1"]


def test_what_a_width_is_built_of_keeps_its_own_names_beside_the_engines_between_passes(stub):
    widths = "components.unet.widths={w75: {heads: {ratio: 0.25}}}"
    passes = "components.unet.prune={heads: {ratio: 0.25}, channels: {ratio: 0.25}}"
    store = Store(stub.folder / "store")
    plan = prepare(stub.recipe, ("backend=openvino", passes, widths, "verify.each_pass=true"), store, offline=True).plan
    stations = plan["unet.verify.each_pass"].inputs
    assert stations["station.1"] == "unet_w75.compile.openvino", "built once, as what it is built for anyway"
    assert stations["station.2"] == "unet.compile.openvino"
    assert "unet_w75.compile.openvino" in [step.name for step in plan.until("compile", "unet_w75")]


def test_a_changed_field_makes_again_only_what_depends_on_it(own):
    assert made(own.build("components.unet.precision=fp16")) == {"unet.compile.stub", "pipeline.package.bundle"}


def test_plan_and_explain_say_what_changed(own):
    rows = own.events("plan", own.recipe, "--set", "components.unet.precision=fp16")[0]["steps"]
    states = {row["step"]: row["state"] for row in rows}
    assert states["unet.compile.stub"] == "make"
    assert states["vae_decoder.compile.stub"] == "hit"
    reason = next(row["reason"] for row in rows if row["step"] == "unet.compile.stub")
    assert reason == "precision: fp32 -> fp16"
    told = own.events("explain", own.recipe, "unet.compile.stub", "--set", "components.unet.precision=fp16")[0]
    assert told["changes"] == ["precision: fp32 -> fp16"]


def test_a_build_that_was_killed_leaves_no_half_artifact_and_goes_on(tmp_path):
    place = Place(tmp_path, STUB)
    with subprocess.Popen(
        place.command("build", place.recipe, "--output", "out", "--json"), cwd=tmp_path, env=place.environment(),
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        for line in process.stdout:
            if json.loads(line)["event"] == "step_start" and json.loads(line)["step"] == "pipeline.compile.samplers":
                break
        process.send_signal(signal.SIGKILL)
    finished = {path.parent.name for path in (tmp_path / "store" / "objects").glob("*/artifact.json")}
    assert finished
    assert finished == {path.name for path in (tmp_path / "store" / "objects").iterdir()}
    events = place.build()
    assert "unet.fetch.checkpoint" not in made(events)
    assert "pipeline.compile.samplers" in made(events)
    place.run("inspect", place.bundle())


def test_ctrl_c_stops_cleanly_with_its_own_exit_code(tmp_path):
    place = Place(tmp_path, STUB)
    with subprocess.Popen(
        place.command("build", place.recipe, "--output", "out", "--json"), cwd=tmp_path, env=place.environment(),
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # A runner started in the background ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        for line in process.stdout:
            if json.loads(line)["event"] == "step_progress" and "Scheduler" in json.loads(line)["text"]:
                break
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 130
    assert "finished steps are kept" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "store" / "making").iterdir())


def test_two_builds_at_once_make_every_step_once(tmp_path):
    place = Place(tmp_path, STUB)
    both = [
        subprocess.Popen(
            place.command("build", place.recipe, "--output", f"out{number}", "--json"), cwd=tmp_path,
            env=place.environment(), stdout=subprocess.PIPE, text=True,
        )
        for number in (1, 2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    artifacts = [json.loads(p.read_text()) for p in (tmp_path / "store" / "objects").glob("*/artifact.json")]
    steps = [artifact["step"] for artifact in artifacts]
    assert len(steps) == len(set(steps))
    assert all(any(json.loads(line)["event"] == "result" for line in text.splitlines()) for text in outputs)


def test_a_damaged_artifact_is_never_built_upon(own):
    engine = next(p for p in (own.folder / "store" / "objects").glob("*/engine.json") if "unet" in p.read_text())
    damaged = next(path for path in engine.parent.rglob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 0xFF
    damaged.unlink()
    damaged.write_bytes(content)
    events = own.build("name=other", expect=4)
    error = next(event for event in events if event["event"] == "error")
    assert "does not match the sha256" in error["message"]
    assert "unet.compile.stub" in made(own.build("name=other")), "it was taken out, so the next build makes it anew"


def test_a_truncated_artifact_is_made_again(own):
    tables = next((own.folder / "store" / "objects").glob("*/euler.npz"))
    tables.write_bytes(tables.read_bytes()[:100])
    assert "pipeline.compile.samplers" in made(own.build("name=other"))


def test_gc_frees_what_no_recipe_used_last(own):
    own.build("components.unet.precision=fp16")
    told = own.events("gc", "--dry-run")[0]
    assert told["artifacts"] >= 1
    assert own.events("gc")[0]["bytes"] == told["bytes"]
    assert made(own.build("components.unet.precision=fp16")) == set()


# Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "code", "words"),
    [
        (["backend=openvinno"], 2, "did you mean 'openvino'"),
        (["precision=int4"], 2, "int4"),
        (["backend=reference", "precision=int8"], 2, "reference cannot make int8 of"),
        (["shapes.height=100"], 2, "shapes.height: 100 is not a multiple of"),
        (["source=nowhere"], 2, "nowhere"),
        (["defaults.num_inference_steps=0"], 2, "num_inference_steps"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_with_its_place(own, sets, code, words):
    events = own.build(*sets, expect=code)
    error = next(event for event in events if event["event"] == "error")
    assert words in error["message"]
    assert "--set" in error["message"]


def test_a_source_on_the_command_line_starts_at_the_current_folder(own):
    (own.folder / "elsewhere").mkdir()
    nested = own.folder / "elsewhere" / "recipe.yaml"
    nested.write_text(STUB)
    shutil.copytree(ROOT / "sdcompile" / "models" / "tiny", own.folder / "mine")
    rows = own.events("plan", nested, "--set", "source=mine")[0]["steps"]
    assert rows


def test_an_output_folder_that_cannot_be_written_is_refused(own):
    (own.folder / "file").write_text("")
    made_ = own.run("build", own.recipe, "--output", own.folder / "file" / "below", expect=3)
    assert "cannot write the bundle" in made_.stderr
    assert "Traceback" not in made_.stderr


def test_a_build_that_does_not_fit_is_refused_before_it_starts(own, monkeypatch):
    from sdcompile import machine, run
    from sdcompile.errors import HostError
    from sdcompile.store import Store

    work = run.prepare(own.recipe, ("backend=openvino",), Store(own.folder / "store"), offline=True)
    monkeypatch.setattr(machine, "memory_bytes", lambda: (1 << 30, 1 << 20))
    with pytest.raises(HostError, match=r"needs about .* GiB of memory"):
        run.check_fit(work.plan, work.store)
    monkeypatch.setattr(machine, "memory_bytes", lambda: (1 << 40, 1 << 40))
    monkeypatch.setattr(machine, "free_disk_bytes", lambda folder: 1000)
    with pytest.raises(HostError, match=r"writes about .* GiB"):
        run.check_fit(work.plan, work.store)


def test_the_commands_that_only_look_need_no_build(own):
    assert "stub" in own.run("doctor").stdout
    assert json.loads(own.run("schema").stdout)["title"] == "sdcompile recipe"
    own.run("init", "fresh.yaml", "--backend", "stub", "--precision", "fp32")
    assert own.run("plan", "fresh.yaml").stdout
    own.run("init", "fresh.yaml", expect=2)


# Real engines -------------------------------------------------------------------------------


def test_every_engine_was_verified_and_the_manifest_says_how(real):
    manifest = json.loads((real.bundle() / "manifest.json").read_text())
    for name in ("text_encoder", "unet", "vae_decoder"):
        entry = manifest["components"][name]
        assert entry["verification"]["passed"] is True
        assert entry["verification"]["worst"]["snr_db"] > 60
        assert entry["facts"]["device"]
    assert manifest["verification"]["images"]["worst"]["psnr_db"] > 45
    assert (real.bundle() / "reports" / "verify.xml").read_text().startswith("<?xml")
    told = real.run("inspect", real.bundle()).stdout
    assert "openvino" in told


def test_images_carry_how_they_were_made_and_come_out_the_same_again(real):
    prompt = "a small red circle above a large blue square on a yellow background"
    for folder in ("one", "two"):
        real.run("generate", real.bundle(), prompt, "--seed", "5", "--steps", "3", "--output", folder)
    one, two = (next((real.folder / folder).glob("*.png")) for folder in ("one", "two"))
    assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(two)))
    assert Image.open(one).text["prompt"] == prompt
    assert Image.open(one).text["seed"] == "5"
    assert len(Image.open(one).text["bundle"]) == 64
    real.run("generate", real.bundle(), prompt, "--seed", "6", "--steps", "3", "--output", "three")
    other = next((real.folder / "three").glob("*.png"))
    assert not np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


def test_the_bundle_gives_the_picture_that_diffusers_gives(real):
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    import sdcompile

    prompt = "a large green star on a white background"
    reference = StableDiffusionPipeline.from_pretrained(ROOT / "sdcompile" / "models" / "tiny", dtype=torch.float32)
    reference.scheduler = DDIMScheduler.from_config(reference.scheduler.config)
    reference.set_progress_bar_config(disable=True)
    wanted = reference(
        prompt,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(11),
        output_type="np",
    ).images
    with sdcompile.load(real.bundle()) as pipe:
        got = pipe(prompt, sampler="ddim", num_inference_steps=4, guidance_scale=3.0, seed=11, output_type="np").images
        other = pipe(
            prompt, sampler="ddim", num_inference_steps=4, guidance_scale=3.0, seed=12, output_type="np"
        ).images
    assert np.abs(got - wanted).max() < 1e-3
    assert np.abs(other - wanted).max() > 0.05


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--steps", "0"], 2, "steps"),
        (["--steps", "-3"], 2, "steps"),
        (["--steps", "49"], 2, "49"),
        (["--guidance-scale", "nan"], 2, "guidance"),
        (["--sampler", "eulre_ancestral"], 2, "euler_ancestral"),
        (["--size", "72x64"], 7, "72"),
        (["--size", "640x640"], 7, "640"),
        (["--size", "banana"], 2, "banana"),
        (["--seed", "-1"], 2, "seed"),
        (["--latents", "missing.npy"], 2, "missing.npy"),
        (["--output", "/proc/nowhere"], 3, "/proc/nowhere"),
    ],
)
def test_a_request_the_bundle_cannot_answer_says_why(real, arguments, code, words):
    made_ = real.run("generate", real.bundle(), "a prompt", *arguments, expect=code)
    assert words in made_.stderr
    assert "Traceback" not in made_.stderr


@pytest.mark.parametrize("prompt", ["", "🎨🐱 一只红色的猫", "word " * 1000])
def test_odd_prompts_give_images(real, prompt):
    made_ = real.run("generate", real.bundle(), prompt, "--seed", "1", "--steps", "1", "--output", "odd")
    cut = "warning: the prompt is longer than the 24 tokens this model reads" in made_.stderr
    assert cut == bool(prompt), "a character outside the tiny vocabulary is several byte tokens"
    assert "Warning:" not in made_.stderr, "told as a line, without the source line that raised it"


def test_a_damaged_bundle_is_refused(real, tmp_path):
    copy = tmp_path / "copy.sdc"
    shutil.copytree(real.bundle(), copy)
    weights = next((copy / "components" / "unet").rglob("*.bin"))
    weights.write_bytes(weights.read_bytes()[:-10])
    told = real.run("generate", copy, "a prompt", expect=7)
    assert "truncated or altered" in told.stderr
    (copy / "manifest.json").write_text(
        (real.bundle() / "manifest.json").read_text().replace('"schema_version": 1', '"schema_version": 9')
    )
    assert "schema 9" in real.run("inspect", copy, expect=7).stderr
    assert "is a file" in real.run("inspect", copy / "manifest.json", expect=7).stderr


def test_verifying_the_bundle_again_passes_and_a_wrong_engine_does_not(real, tmp_path):
    assert real.run("verify", real.bundle()).returncode == 0
    from sdcompile import bundle

    copy = tmp_path / "copy.sdc"
    shutil.copytree(real.bundle(), copy)
    weights = next((copy / "components" / "unet").rglob("*.bin"))
    values = np.fromfile(weights, np.float32)
    weights.unlink()
    middle = slice(
        values.size // 2, values.size // 2 + 5000
    )  # inside a layer; constants that are no weights lie elsewhere
    values[middle] *= 3
    values.tofile(weights)
    manifest = bundle.read(copy)
    entry = bundle.FileEntry(bytes=weights.stat().st_size, sha256=bundle.sha256_of(weights))
    files = {**manifest.files, weights.relative_to(copy).as_posix(): entry}
    bundle.write(copy, manifest.model_copy(update={"files": files}))
    assert "unet" in real.run("verify", copy, expect=5).stderr


def test_a_missed_floor_fails_the_build_and_fallback_rebuilds_in_fp32(real):
    refused = real.build("components.unet.precision=bf16", "verify.unet.min_snr_db=190", "name=strict", expect=5)
    error = next(event for event in refused if event["event"] == "error")
    assert "unet" in error["message"]
    assert "190" in error["message"]
    again = real.build("components.unet.precision=bf16", "verify.unet.min_snr_db=190", "name=strict", expect=5)
    assert made(again) == set(), "a missed floor is a result and is kept like one"
    saved = real.build(
        "components.unet.precision=bf16", "verify.unet.min_snr_db=80", "build.weights=fp16", "name=saved",
        "verify.on_fail=fallback", "components.unet.build.weights=fp16",
        expect=5,
    )  # fmt: skip
    assert [e for e in saved if e["event"] == "warning" and "fp32" in e["text"]], (
        "fp16 weights miss 80 dB, also in fp32"
    )


# Engines that cannot run where they are built ---------------------------------------------------


@pytest.fixture(scope="module")
def nvidia(real) -> Place:
    """The real place once more, its VAE decoder for NVIDIA GPUs; exports and recordings are shared."""
    pytest.importorskip("tensorrt_rtx", reason="needs pip install 'sdcompile[tensorrt-rtx]'")
    from sdcompile.backends.trt import driver

    if not driver.look().reason:
        pytest.skip("this machine has an NVIDIA GPU: its engines run")
    events = real.nvidia()
    assert not {step for step in made(events) if step.startswith(("unet", "text_encoder", "pipeline.verify.record"))}
    return real


def test_a_bundle_with_an_nvidia_engine_is_built_without_a_gpu_and_says_what_was_verified(nvidia):
    bundle = nvidia.folder / "nvidia" / "nvidia.sdc"
    manifest = json.loads((bundle / "manifest.json").read_text())
    entry = manifest["components"]["vae_decoder"]
    assert {path.name for path in (bundle / "components" / "vae_decoder").iterdir()} >= {"portable.plan", "sm89.plan"}
    assert entry["verification"]["stand_in"] == {"backend": "onnxruntime", "why": "no NVIDIA driver was found here"}
    assert entry["verification"]["worst"]["snr_db"] > 35
    assert set(entry["verification"]["proof"]) == {"portable", "sm89"}
    assert all(claim["holds"] for claims in entry["verification"]["proof"].values() for claim in claims)
    assert "the engine was not run" in entry["notes"][0]
    assert "stand_in" not in manifest["components"]["unet"]["verification"]
    assert manifest["verification"]["images"]["stand_in"]["backend"] == "onnxruntime"
    told = nvidia.run("inspect", bundle).stdout
    assert "engine not run" in told
    assert "vae_decoder: the engine was not run (no NVIDIA driver was found here)" in told


def test_such_a_bundle_is_checked_without_loading_it_and_refused_with_a_way_out(nvidia):
    bundle = nvidia.folder / "nvidia" / "nvidia.sdc"
    (event,) = nvidia.events("check", bundle, expect=3)
    runs = {row["component"]: row["runs"] for row in event["components"]}
    assert runs == {"text_encoder": True, "unet": True, "vae_decoder": False}
    refused = nvidia.run("generate", bundle, "a red circle", expect=3).stderr
    assert "vae_decoder (tensorrt_rtx) was built for portable, sm89 and cannot run here" in refused
    assert "--set backend=openvino" in refused
    assert nvidia.events("check", nvidia.folder / "out" / "real.sdc")[0]["runs"]


def test_inspect_shows_the_layers_of_every_engine_and_what_they_prove(nvidia):
    told = nvidia.run("inspect", "--layers", nvidia.folder / "nvidia" / "nvidia.sdc").stdout
    assert "vae_decoder, portable:" in told
    assert "vae_decoder, sm89:" in told
    assert "holds  no matrix product or convolution in float32" in told
    refused = nvidia.run("inspect", "--layers", nvidia.folder / "out" / "real.sdc", expect=7).stderr
    assert "carries no layer table" in refused


def test_a_floor_missed_by_the_onnx_names_it_and_not_the_engine(nvidia):
    decoder = "{backend: tensorrt_rtx, precision: fp16, build: {compute_capabilities: [portable, sm89]}}"
    sets = ("name=nvidia", f"components.vae_decoder={decoder}", "verify.vae_decoder.min_snr_db=200")
    options = [option for change in sets for option in ("--set", change)]
    hint = nvidia.events("verify", nvidia.recipe, *options, expect=5)[-1]["hint"]
    assert f"sdcompile verify {nvidia.recipe} --set name=nvidia --set" in hint
    assert hint.endswith("--polygraphy polygraphy/nvidia --polygraphy-run")
    events = nvidia.events("verify", nvidia.recipe, *options, "--polygraphy", nvidia.folder / "files", expect=5)
    assert "the ONNX (run by onnxruntime, not the engine) of vae_decoder" in events[-1]["message"]
    assert "first layer that diverges" in events[-1]["message"]
    files = {path.name for path in (nvidia.folder / "files" / "vae_decoder").iterdir()}
    assert files == {"inputs.json", "reference.json", "engine.json", "typed", "exported", "commands.sh"}
    (told,) = (event for event in events if event["event"] == "polygraphy")
    assert told["commands"]["vae_decoder"][0].startswith(
        "POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run typed/model.onnx"
    )


# Several targets in one bundle -------------------------------------------------------------------

TARGETS = (
    "[{name: gpu, backend: openvino, components: {vae_decoder: {backend: tensorrt_rtx, precision: fp16, "
    "build: {compute_capabilities: [portable, sm89]}}}}, openvino, "
    "{name: mixed, backend: openvino, components: {vae_decoder: {backend: onnxruntime}}}]"
)


@pytest.fixture(scope="module")
def fat(nvidia) -> tuple[Place, list[dict]]:
    """The real place once more, for three targets, and the events of that build."""
    changes = ("name=fat", "backend=", f"targets={TARGETS}")
    options = [option for change in changes for option in ("--set", change)]
    events = nvidia.events("build", nvidia.recipe, "--output", nvidia.folder / "fat", *options)
    return nvidia, events


def test_a_bundle_of_several_targets_makes_again_only_what_no_other_build_made(fat):
    _, events = fat
    steps = {step for step in made(events) if ".verify." not in step}
    assert steps == {
        "vae_decoder.export.onnx@mixed", "vae_decoder.compile.onnxruntime@mixed", "pipeline.package.bundle",
    }  # fmt: skip
    (result,) = (event for event in events if event["event"] == "result")
    assert {"unet@gpu", "vae_decoder@gpu", "pipeline@gpu", "vae_decoder@mixed", "pipeline@mixed"} <= set(
        result["reports"]
    )
    assert all(report["passed"] for report in result["reports"].values())


def test_what_targets_share_lies_once_in_the_bundle(fat):
    place, _ = fat
    bundle = place.folder / "fat" / "fat.sdc"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["schema_version"] == 2
    folders = {name: row["folders"] for name, row in manifest["targets"].items()}
    assert folders["mixed"] == {
        "text_encoder": "components/gpu/text_encoder", "unet": "components/gpu/unet",
        "vae_decoder": "components/mixed/vae_decoder",
    }  # fmt: skip
    assert sorted(path.name for path in (bundle / "components").iterdir()) == ["gpu", "mixed", "openvino"]
    assert [path.name for path in (bundle / "components" / "openvino").iterdir()] == ["vae_decoder"]
    for name in manifest["targets"]:
        assert json.loads((bundle / "reports" / name / "verify.json").read_text())["passed"]


def drawn(bundle: Path, target: str | None = None) -> np.ndarray:
    import sdcompile

    with sdcompile.load(bundle, target=target) as pipe:
        return np.asarray(pipe("a red circle", seed=1, num_inference_steps=4).images[0], float)


def test_the_target_that_runs_is_taken_and_every_target_draws_the_same_picture(fat):
    place, _ = fat
    bundle = place.folder / "fat" / "fat.sdc"
    told = place.run("generate", bundle, "a red circle", "--seed", "1", "--steps", "4", "-o", "own")
    words = "openvino, the first target that runs here (not gpu: vae_decoder (tensorrt_rtx) was built for portable"
    assert words in told.stderr
    own = np.asarray(Image.open(next((place.folder / "own").glob("*.png"))), float)
    openvino, mixed = drawn(bundle, "openvino"), drawn(bundle, "mixed")
    np.testing.assert_array_equal(own, openvino)
    assert np.abs(mixed - openvino).max() <= 2
    assert "target gpu cannot run here" in place.run("generate", bundle, "x", "--target", "gpu", expect=3).stderr


def test_check_inspect_and_verify_tell_of_every_target(fat):
    place, _ = fat
    bundle = place.folder / "fat" / "fat.sdc"
    (event,) = place.events("check", bundle)
    assert (event["target"], [row["runs"] for row in event["targets"]]) == ("openvino", [False, True, True])
    place.run("check", bundle, "--target", "gpu", expect=3)
    told = place.run("inspect", bundle).stdout
    assert "mixed" in told
    assert "vae_decoder@gpu: the engine was not run (no NVIDIA driver was found here)" in told
    events = place.events("verify", bundle)
    assert any("gpu is not verified" in event.get("text", "") for event in events)
    parts = ("text_encoder", "unet", "vae_decoder", "pipeline")
    assert set(events[-1]["reports"]) == {f"{part}@{name}" for name in ("openvino", "mixed") for part in parts}


def test_one_target_taken_out_is_a_bundle_of_its_own_and_draws_the_same(fat):
    place, _ = fat
    from sdcompile.recipe import Recipe, known_names

    whole = place.folder / "fat" / "fat.sdc"
    (event,) = place.events("extract", whole, "--target", "mixed", "-o", place.folder / "thin")
    bundle = Path(event["bundle"])
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (manifest["name"], manifest["schema_version"], "targets" in manifest) == ("fat-mixed", 1, False)
    assert {name: row["backend"] for name, row in manifest["components"].items()} == {
        "text_encoder": "openvino", "unet": "openvino", "vae_decoder": "onnxruntime",
    }  # fmt: skip
    assert not [path for path in manifest["files"] if path.startswith(("components/gpu", "reports/gpu"))]
    # Its recipe is that of the target alone, so that `verify` and a later build know what it is.
    alone = Recipe.model_validate(manifest["recipe"], context=known_names())
    assert (alone.name, alone.targets, alone.effective("vae_decoder").backend) == ("fat-mixed", None, "onnxruntime")
    assert manifest["verification"]["passed"]
    np.testing.assert_array_equal(drawn(bundle), drawn(whole, "mixed"))
    assert "has no target none" in place.run("extract", whole, "--target", "none", expect=2).stderr
    assert "has one target" in place.run("extract", bundle, "--target", "mixed", expect=2).stderr


def test_a_target_that_misses_its_floor_stops_the_build_and_is_named(fat):
    place, _ = fat
    low = TARGETS.replace("[{name: gpu", "[{name: gpu, verify: {vae_decoder: {min_snr_db: 200}}")
    changes = ("name=fat", "backend=", f"targets={low}")
    options = [option for change in changes for option in ("--set", change)]
    events = place.events("verify", place.recipe, *options, expect=5)
    assert events[-1]["message"].startswith("target gpu: the ONNX (run by onnxruntime, not the engine) of vae_decoder")


# What fp16 cannot hold --------------------------------------------------------------------------

LARGE = """
version: 1
name: large
family: sd
source: ./large
backend: onnxruntime
precision: fp32
shapes: {batch: 1, height: 64, width: 64}
samplers: [ddim]
sampler_steps: [1, 2]
defaults: {num_inference_steps: 2, guidance_scale: 3.0}
calibrate: {images: 4, num_inference_steps: 1, prompts: [a red circle]}
verify: {num_inference_steps: 2, prompts: [a blue square]}
components: {vae_decoder: {backend: tensorrt_rtx, precision: fp16}}
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Place:
    """The tiny model with the values inside its VAE decoder 3000 times as large: norms make the same pictures of them.

    Everything that is added to the stream between the blocks grows; all that reads it is normalised first.
    """
    pytest.importorskip("tensorrt_rtx", reason="needs pip install 'sdcompile[tensorrt-rtx]'")
    from safetensors.numpy import load_file, save_file

    from sdcompile.models import tiny

    folder = tmp_path_factory.mktemp("large")
    shutil.copytree(tiny.path(), folder / "large", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    path = folder / "large" / "vae" / "diffusion_pytorch_model.safetensors"
    grows = (
        r"decoder\.(conv_in|.*\.conv2|.*\.to_out\.0)\.(weight|bias)"
        r"|decoder\..*(conv_shortcut|upsamplers\.\d+\.conv)\.bias"
    )
    weights = load_file(path)
    save_file({k: v * np.float32(3000 if re.fullmatch(grows, k) else 1) for k, v in weights.items()}, path)
    return Place(folder, LARGE)


def test_a_vae_beyond_fp16_stops_the_build_or_is_built_in_fp32_when_asked(large):
    refused = large.build("verify.on_fail=fallback", "verify.on_nan=stop", expect=5)[-1]
    assert "vae_decoder" in refused["message"]
    assert "where the largest fp16 is 65504" in refused["message"]
    assert "cast: {from_samples: true}" in refused["hint"]
    saved = large.build("verify.on_nan=fallback")
    (warning,) = (event["text"] for event in saved if event["event"] == "warning" and "fp32" in event["text"])
    assert warning.startswith("vae_decoder: asked for fp16, built in fp32 because verification failed: the value of")
    entry = json.loads((large.bundle() / "manifest.json").read_text())["components"]["vae_decoder"]
    assert entry["precision"] == "fp32"
    assert "built in fp32 because verification failed" in entry["notes"][0]


def test_a_vae_beyond_fp16_is_fp16_but_for_the_nodes_that_overflow(large):
    large.build("components.vae_decoder.cast={from_samples: true}")
    entry = json.loads((large.bundle() / "manifest.json").read_text())["components"]["vae_decoder"]
    (effect,) = entry["effects"]
    assert entry["precision"] == "fp16"
    assert entry["verification"]["ranges"]["beyond"] == []
    assert 0 < effect["kept_count"] < effect["operators"] / 2
    assert "in float32: decoder." in large.run("inspect", large.bundle()).stdout.replace("\n", " ")
