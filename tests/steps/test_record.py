"""Record: what is kept comes from real trajectories, covers regions and shapes, and is the same every time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sdcompile import metrics
from sdcompile.families import FAMILIES
from sdcompile.spec import Job

pytestmark = pytest.mark.tiny

FAMILY = FAMILIES["sd"]
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
PROMPTS = ("a red circle", "a blue square")
WORDS = ["<pad>", "<bos>", "<eos>", "a", "red", "blue", "circle", "square"]
TOKENS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """A tiny random model, its tokenizer and its sampler tables, as the earlier steps leave them."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("inputs")
    UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8, sample_size=16,
    ).save_pretrained(root / "unet")  # fmt: skip
    AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(root / "vae")  # fmt: skip
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=TOKENS, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    ).save_pretrained(root / "text_encoder")  # fmt: skip
    write_tokenizer(root / "tokenizer")
    write_tables(root)
    return {name: root / name for name in ("unet", "vae", "text_encoder", "tokenizer", "tables")}


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    entry = {"max_length": TOKENS, "pad_id": 0, "bos_id": 1, "eos_id": 2}
    (folder / "entry.json").write_text(json.dumps(entry))


def write_tables(root: Path) -> None:
    from sdcompile.steps import sampler

    (root / "assets" / "scheduler").mkdir(parents=True)
    config = {
        "_class_name": "EulerAncestralDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "timestep_spacing": "leading", "steps_offset": 1,
    }  # fmt: skip
    (root / "assets" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    (root / "tables").mkdir()
    rows = [{"name": "euler_ancestral", "scheduler": "EulerAncestralDiscreteScheduler", "config": {}}]
    job = Job("pipeline", {"samplers": rows, "num_inference_steps": [2, 3, 6]})
    sampler.run({"source": root / "assets"}, root / "tables", job)


def recording_job(inputs: dict[str, Path], components: tuple[str, ...] = COMPONENTS, **changes: object) -> Job:
    configs = {name: json.loads((inputs[name] / "config.json").read_text()) for name in ("unet", "vae", "text_encoder")}
    configs["scheduler"] = {}
    request = {"batch": (1, 1, 2), "height": (16, 32, 32), "width": (16, 32, 64)}
    params = {
        "family": "sd", "facts": FAMILY.facts(configs), "components": {name: {} for name in components},
        "prompts": list(PROMPTS), "seed": 5, "num_inference_steps": 6, "guidance_scale": 3.0,
        "sampler": "euler_ancestral", "size": {"height": 32, "width": 32},
    }  # fmt: skip
    return Job("pipeline", {**params, **changes}, shapes=FAMILY.shapes(request, configs))


def record_into(folder: Path, inputs: dict[str, Path], job: Job) -> Path:
    from sdcompile.steps import record

    folder.mkdir()
    record.run(inputs, folder, job)
    return folder


@pytest.fixture(scope="module")
def recorded(inputs, tmp_path_factory) -> Path:
    return record_into(tmp_path_factory.mktemp("recorded") / "samples", inputs, recording_job(inputs))


def index(folder: Path) -> dict:
    return json.loads((folder / "samples.json").read_text())


def test_only_the_samples_form_is_left_behind(recorded):
    assert {path.name for path in recorded.iterdir()} == {*COMPONENTS, "images.safetensors", "samples.json"}
    assert sum(path.stat().st_size for path in recorded.rglob("*.*")) < 4 << 20


def test_denoiser_samples_cover_every_region_shape_and_both_row_counts(recorded):
    from sdcompile.samples import Samples

    rows = [row for row in index(recorded)["samples"] if row["component"] == "unet"]
    assert {row["region"] for row in rows} == {"early", "mid", "late"}
    assert {row["prompt"] for row in rows} >= set(PROMPTS)
    shapes = {s.told["shape"]: s.feeds["sample"].shape for s in Samples(recorded, "unet")}
    assert shapes == {"opt": (2, 4, 16, 16), "min": (1, 4, 8, 8), "max": (4, 4, 16, 32)}


def test_the_first_and_the_last_step_are_among_the_kept_ones(recorded):
    rows = [row for row in index(recorded)["samples"] if row["component"] == "unet" and row["shape"] == "opt"]
    assert {0, 5} <= {row["step"] for row in rows}
    by_trajectory = {(row["trajectory"], row["step"]) for row in rows}
    first, second = ({step for t, step in by_trajectory if t == name} for name in ("00", "01"))
    assert first != second, "another trajectory keeps other steps"


def test_the_told_timestep_is_what_the_denoiser_was_fed(recorded):
    from sdcompile.samples import Samples

    for sample in Samples(recorded, "unet"):
        assert (sample.feeds["timestep"] == np.float32(sample.told["timestep"])).all()


def test_recorded_outputs_are_the_torch_reference_s_own(recorded, inputs):
    import torch

    from sdcompile import checkpoint
    from sdcompile.samples import Samples

    for component in COMPONENTS:
        module = checkpoint.load("sd", component, inputs[FAMILY.folders[component]], {})
        configs = {n: json.loads((inputs[n] / "config.json").read_text()) for n in ("unet", "vae", "text_encoder")}
        spec = FAMILY.components(configs)[component]
        assert len(Samples(recorded, component)) >= 3
        for sample in Samples(recorded, component):
            with torch.inference_mode():
                expected = module(*(torch.tensor(sample.feeds[t.name]) for t in spec.inputs)).numpy()
            assert metrics.snr_db(expected, sample.outputs[spec.outputs[0].name]) > 110


def test_samples_lie_on_one_trajectory_that_ends_in_the_recorded_image(recorded, inputs):
    """The decoder was fed the final latents, and its answer is the image; the encoder was fed that image."""
    from sdcompile.samples import Samples, image_arrays

    rows = {row["id"]: row for row in index(recorded)["samples"] if row["component"] == "vae_decoder"}
    encoder = {s.told["trajectory"]: s for s in Samples(recorded, "vae_encoder")}
    for sample in Samples(recorded, "vae_decoder"):
        trajectory = rows[sample.told["id"]]["trajectory"]
        arrays = image_arrays(recorded, trajectory)
        np.testing.assert_allclose(sample.feeds["latent_sample"] * 0.5, arrays["final"], rtol=1e-6)
        pixels = np.clip(sample.outputs["sample"] / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
        np.testing.assert_allclose(arrays["images"], pixels, atol=1e-6)
        fed = encoder[trajectory].feeds["sample"] / 2 + 0.5
        np.testing.assert_allclose(fed, pixels.transpose(0, 3, 1, 2), atol=1e-6)
        assert arrays["latents"].std() == pytest.approx(1.0, abs=0.1)


def test_recording_again_gives_the_same_bytes_and_another_seed_gives_others(recorded, inputs, tmp_path):
    again = record_into(tmp_path / "again", inputs, recording_job(inputs))
    other = record_into(tmp_path / "other", inputs, recording_job(inputs, seed=6))
    for path in recorded.rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(recorded)).read_bytes(), path.name
    first = Path("unet") / "000.safetensors"
    assert (recorded / first).read_bytes() != (other / first).read_bytes()


def test_static_sizes_are_recorded_once_guided_and_once_unguided(inputs, recorded):
    from dataclasses import replace

    from sdcompile.steps import record, reference

    job = recording_job(inputs)
    static = {letter: type(bounds)(bounds.opt, bounds.opt, bounds.opt) for letter, bounds in job.shapes.items()}
    model = reference.model_of(job.params, inputs, job)
    planned = list(record.trajectories(job.params, replace(job, shapes=static).shapes, model))
    assert [(t.shape, t.guidance_scale > 1) for t in planned] == [("opt", True), ("opt", True), ("min", False)]


def test_an_unguided_recipe_still_has_a_guided_trajectory(inputs):
    from sdcompile.steps import record, reference

    job = recording_job(inputs, guidance_scale=1.0)
    planned = list(record.trajectories(job.params, job.shapes, reference.model_of(job.params, inputs, job)))
    assert {t.guidance_scale > 1 for t in planned} == {True, False}


def test_the_budget_leaves_samples_out_but_never_the_last_of_a_shape(inputs, tmp_path, monkeypatch):
    from sdcompile.steps import record

    monkeypatch.setattr(record, "BUDGET_BYTES", 1)
    components = ("text_encoder", "unet", "vae_decoder")
    folder = record_into(tmp_path / "small", inputs, recording_job(inputs, components))
    told = index(folder)
    assert told["left_out"] > 0
    kept = [(row["component"], row["shape"]) for row in told["samples"]]
    assert sorted(kept) == sorted((c, s) for c in components for s in ("min", "opt", "max"))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_kept_steps_lie_inside_their_regions(count):
    from sdcompile.steps.record import kept_steps

    for trajectory in range(5):
        kept = kept_steps(count, trajectory)
        assert all(0 <= step < count for step in kept)
        assert list(kept) == sorted(kept)
        assert len(kept) == min(count, 3)


def reference_engines(inputs: dict[str, Path], job: Job, folder: Path) -> dict[str, Path]:
    from sdcompile.steps import reference

    folder.mkdir()
    return reference.build_references(FAMILY, inputs, job, folder)


def images_report(engines: dict[str, Path], inputs: dict[str, Path], recorded: Path, job: Job, out: Path) -> dict:
    from sdcompile.steps import verify_images

    out.mkdir()
    params = {**job.params, "backends": dict.fromkeys(engines, "reference"), "min_psnr_db": 45.0}
    roles = {"samples": recorded, "tokenizer": inputs["tokenizer"], "tables": inputs["tables"], **engines}
    verify_images.run(roles, out, Job("pipeline", params, shapes=job.shapes))
    return json.loads((out / "report.json").read_text())


def test_the_reference_reproduces_its_own_images(inputs, recorded, tmp_path):
    job = recording_job(inputs)
    engines = reference_engines(inputs, job, tmp_path / "engines")
    report = images_report(engines, inputs, recorded, job, tmp_path / "out")
    assert report["passed"]
    assert report["worst"]["psnr_db"] > 100
    assert set(report["by_shape"]) == {"min", "opt", "max"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]


def test_images_of_a_perturbed_denoiser_are_refused_and_the_worst_pair_is_kept(inputs, recorded, tmp_path):
    from safetensors.numpy import load_file, save_file

    from sdcompile.steps import report as reports

    job = recording_job(inputs)
    engines = reference_engines(inputs, job, tmp_path / "engines")
    (path,) = (engines["unet"] / "checkpoint").glob("*.safetensors")
    weights = load_file(path)
    path.unlink()  # a hard link: the source's own file must not change
    save_file({k: v * (5 if k == "conv_out.weight" else 1) for k, v in weights.items()}, path)
    report = images_report(engines, inputs, recorded, job, tmp_path / "out")
    assert not report["passed"]
    assert report["worst"]["psnr_db"] < 45
    assert all((tmp_path / "out" / name).is_file() for name in report["kept"])
    error = reports.fault(report, tmp_path / "out")
    assert error.exit_code == 5
    assert "floor 45 dB" in error.message
    assert "worst-engine.png" in error.message
    assert "on_fail: fallback" in error.hint


def test_images_that_hold_nan_are_a_finding_not_a_crash(inputs, recorded, tmp_path):
    from safetensors.numpy import load_file, save_file

    from sdcompile.steps import report as reports

    job = recording_job(inputs)
    engines = reference_engines(inputs, job, tmp_path / "engines")
    (path,) = (engines["unet"] / "checkpoint").glob("*.safetensors")
    weights = load_file(path)
    path.unlink()
    save_file({k: v * (np.float32(np.nan) if k == "conv_out.bias" else 1) for k, v in weights.items()}, path)
    report = images_report(engines, inputs, recorded, job, tmp_path / "out")
    assert not report["passed"]
    assert "NaN" in report["worst"]["error"]
    assert report["kept"] == []
    assert report["blame"] == "unet", "the first component whose output was not finite"
    assert "unet gives NaN" in reports.broken(report)


@pytest.fixture
def bundled(inputs, tmp_path):
    """A bundle of reference engines, never verified, so that the default floors apply."""
    from sdcompile import bundle
    from sdcompile.steps import package

    job = recording_job(inputs)
    engines = reference_engines(inputs, job, tmp_path / "engines")
    cards = {name: json.loads((folder / "engine.json").read_text()) for name, folder in engines.items()}
    params = {
        "recipe": {"name": "small", "family": "sd"}, "source": {"id": "test", "licence": None},
        "facts": job.params["facts"], "fallbacks": {}, "profiles": {},
        "components": {n: {k: c[k] for k in ("backend", "precision", "params", "spec")} for n, c in cards.items()},
        "defaults": {
            "sampler": "euler_ancestral", "num_inference_steps": 6, "guidance_scale": 3.0, "height": 32, "width": 32,
        },
    }  # fmt: skip
    folder = tmp_path / "small.sdc"
    folder.mkdir()
    roles = {"tokenizer": inputs["tokenizer"], "tables": inputs["tables"]}
    roles |= {f"engine.{n}": path for n, path in engines.items()}
    package.run(roles, folder, Job("pipeline", params, shapes=job.shapes))
    return folder, bundle.read(folder)


def test_a_finished_bundle_is_verified_again_by_the_same_comparison(bundled, recorded):
    from sdcompile.steps import verify

    found = verify.recheck(*bundled, recorded)
    assert set(found) == {*COMPONENTS, "pipeline"}
    assert all(report["passed"] for report in found.values())
    assert found["unet"]["floor"]["min_snr_db"] == metrics.FLOORS["fp32"].min_snr_db
    assert found["unet"]["worst"]["snr_db"] > 110


def test_a_bundle_is_refused_when_it_no_longer_agrees_with_the_source(bundled, recorded, tmp_path):
    from safetensors.numpy import load_file, save_file

    from sdcompile.steps import verify

    other = Path(shutil.copytree(recorded, tmp_path / "other"))
    path = other / "unet" / "000.safetensors"
    save_file({k: v * (np.float32(1.01) if k.startswith("out.") else 1) for k, v in load_file(path).items()}, path)
    found = verify.recheck(*bundled, other)
    assert [name for name, report in found.items() if not report["passed"]] == ["unet"]


def calibrate_into(folder: Path, inputs: dict[str, Path], **changes: object) -> Path:
    from sdcompile.steps import calibrate

    job = recording_job(inputs, **{
        "prompts": ["a red square", "a blue circle", "a square", "a circle"], "seed": 1000, "images": 8,
        "max_samples": 20, "record": ["unet", "vae_decoder"], **changes,
    })  # fmt: skip
    folder.mkdir()
    calibrate.run(inputs, folder, job)
    return folder


@pytest.fixture(scope="module")
def calibrated(inputs, tmp_path_factory) -> Path:
    return calibrate_into(tmp_path_factory.mktemp("calibrated") / "samples", inputs)


def test_calibration_keeps_as_many_calls_as_asked_of_every_region_shape_and_guidance(calibrated):
    told = index(calibrated)
    rows = [row for row in told["samples"] if row["component"] == "unet"]
    assert len(rows) == 20
    assert {row["component"] for row in told["samples"]} == {"unet", "vae_decoder"}
    for part in (True, False):
        assert {row["region"] for row in rows if row["held_out"] is part} == {"early", "mid", "late"}
    assert {row["shape"] for row in rows} == {"min", "opt", "max"}
    assert {t["guidance_scale"] > 1 for t in told["trajectories"]} == {True, False}
    held_out = {row["trajectory"] for row in rows if row["held_out"]}
    assert held_out == {"003", "007"}


def test_what_is_held_out_has_every_shape_and_both_kinds_of_guidance(inputs):
    from sdcompile.steps import calibrate, reference

    prompts = [f"a {n}" for n in range(32)]
    job = recording_job(inputs, prompts=prompts, seed=1000, images=16, max_samples=64)
    planned = list(calibrate.trajectories(job.params, job.shapes, reference.model_of(job.params, inputs, job)))
    parts = {held: [t for t in planned if calibrate.held_out(t.number) is held] for held in (True, False)}
    assert len(parts[True]) == 4
    for part in parts.values():
        assert {t.shape for t in part} == {"min", "opt", "max"}
        assert {t.guidance_scale > 1 for t in part} == {True, False}
    assert {t.guidance_scale > 1 for t in planned if t.shape == "max"} >= {True}
    judged, fitted = ({p for t in part for p in t.prompts} for part in parts.values())
    assert not judged & fitted


def test_calibration_sees_no_trajectory_of_verification(calibrated, recorded):
    fitted, verified = index(calibrated)["trajectories"], index(recorded)["trajectories"]
    assert not {p for t in fitted for p in t["prompts"]} & {p for t in verified for p in t["prompts"]}
    assert not {t["seed"] for t in fitted} & {t["seed"] for t in verified}


def test_calibrating_again_gives_the_same_bytes(calibrated, inputs, tmp_path):
    again = calibrate_into(tmp_path / "again", inputs)
    for path in calibrated.rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(calibrated)).read_bytes(), path.name


@pytest.mark.parametrize(
    ("steps", "trajectories", "most"), [(10, 32, 128), (10, 4, 400), (50, 8, 9), (1, 4, 4), (7, 5, 12)]
)
def test_kept_calls_are_spread_over_trajectories_and_time(steps, trajectories, most):
    from sdcompile.steps.calibrate import kept_steps

    kept = [kept_steps(steps, n, trajectories, most, seed=0) for n in range(trajectories)]
    assert sum(map(len, kept)) == min(most, steps * trajectories)
    assert max(map(len, kept)) - min(map(len, kept)) <= 1
    assert all(0 <= step < steps for row in kept for step in row)
    if sum(map(len, kept)) >= 3 * steps:
        assert {step for row in kept for step in row} == set(range(steps))


def test_a_reference_that_gives_nan_is_a_failed_step(inputs, tmp_path):
    """A VAE encoder's answers go through no check of the pipeline's own."""
    from sdcompile.errors import StageError
    from sdcompile.samples import Writer

    writer = Writer(tmp_path)
    with pytest.raises(StageError, match=r"vae_encoder: the fp32 reference has NaN .* in out\.latent"):
        writer.add("vae_encoder", {"step": None, "prompt": "a"}, {}, {"latent": np.array([np.nan], "f")})


def test_pictures_of_the_usual_size_are_scored_where_a_checker_can_read_them():
    from types import SimpleNamespace

    from sdcompile.models.tiny import scenes
    from sdcompile.steps.verify_images import _alignment, _means

    draw = np.random.default_rng(0)
    scene, other = (scenes.sample_scene(draw) for _ in range(2))
    pictures = [scenes.draw(one, draw).astype(np.float32) / 255 for one in (scene, other)]
    told = SimpleNamespace(prompts=(scenes.caption(scene), scenes.caption(other), "a photograph of a dog"))
    references, swapped = np.stack([*pictures, pictures[0]]), np.stack([*reversed(pictures), pictures[0]])
    same, mixed = _alignment(told, references, references), _alignment(told, references, swapped)
    assert len(same) == len(mixed) == 2, "the third prompt is none the checker reads"
    assert _means(same)["built"] == _means(same)["source"] > 0.9
    assert _means(mixed)["built"] < 0.8 < _means(mixed)["source"]


def test_beside_another_decoder_the_images_of_the_sources_own_are_kept(inputs, recorded, tmp_path):
    """The VAE at another scale stands for another decoder: its pictures differ, and only they."""
    from sdcompile.samples import image_arrays
    from sdcompile.steps.verify_images import _own_decoder

    other = tmp_path / "decoder"
    shutil.copytree(inputs["vae"], other)
    job = recording_job(inputs)
    facts = {**job.params["facts"], "decoder": {"scaling_factor": 1.5, "shift_factor": 0.0}}
    both = record_into(tmp_path / "both", {**inputs, "vae_decoder": other}, recording_job(inputs, facts=facts))
    found, before = image_arrays(both, "00"), image_arrays(recorded, "00")
    np.testing.assert_array_equal(found["source_images"], before["images"])
    assert not np.array_equal(found["images"], before["images"])
    told = _own_decoder([found], 5.0)
    assert 5 < told["psnr_db"]["min"] <= told["psnr_db"]["mean"] < 40
    assert told["passed"]
    assert not _own_decoder([found], 40.0)["passed"]
    assert _own_decoder([before], 40.0) == {}
