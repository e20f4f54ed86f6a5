"""Passes of the prune stage on a small random UNet: what they remove and refuse, and what the rest computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdcompile import edits
from sdcompile.errors import RecipeError, StageError
from sdcompile.passes import PASSES, narrowing, pruning, sites
from sdcompile.passes.base import read_effect
from sdcompile.spec import Job, Say, say_nothing
from tests.passes.small_unet import CONFIGS, FAMILY, SHAPES, VAE, assets, opened, run

pytestmark = pytest.mark.tiny


def answer(folder: Path):
    import torch

    torch.manual_seed(3)
    with torch.inference_mode():
        return opened(folder)(torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 24))


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(next(folder.glob("*.safetensors")))


def mean_snr(effect: dict) -> float:
    return sum(effect["mean_snr_db"].values()) / len(effect["mean_snr_db"])


@pytest.mark.parametrize("name", ["heads", "channels"])
def test_a_ratio_of_zero_is_the_identity(small, samples, tmp_path, name):
    effect = run(name, small, tmp_path / "out", samples, ratio=0)
    before, after = tensors(small), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert not (tmp_path / "out" / edits.FILE).exists()
    assert effect["parameters"][0] == effect["parameters"][1]
    assert effect["snr_db"] == dict.fromkeys(("early", "mid", "late"), 200.0)


@pytest.mark.parametrize("uniform", [True, False])
def test_heads_leave_for_good(small, samples, tmp_path, uniform):
    effect = run("heads", small, tmp_path / "out", samples, ratio=0.25, uniform=uniform)
    removed = [row["removed"] for row in effect["layers"]]
    assert len(removed) == 8
    assert sum(removed) == 8 if uniform else sum(removed) > 0
    assert all(count == 1 for count in removed) or not uniform
    model = opened(tmp_path / "out")
    heads = [m.heads for m in model.modules() if hasattr(m, "to_q")]
    assert heads == [4 - count for count in removed]
    for side in ("parameters", "bytes", "macs"):
        assert effect[side][1] < effect[side][0]
    assert sum(p.numel() for p in model.parameters()) == effect["parameters"][1]
    assert min(effect["snr_db"].values()) > 10


@pytest.mark.parametrize("name", ["heads", "channels"])
def test_compensation_brings_the_output_nearer(small, samples, tmp_path, name):
    options = {"ratio": 0.5, "uniform": True, "importance": "l2"}
    if name == "channels":
        options |= {"round_to": 1}
    plain = run(name, small, tmp_path / "a", samples, compensate=False, **options)
    fitted = run(name, small, tmp_path / "b", samples, **options)
    assert mean_snr(fitted) > mean_snr(plain)
    for row, other in zip(fitted["layers"], plain["layers"], strict=True):
        assert row["removed"] == other["removed"]
        assert row["relative_error"] <= other["relative_error"] * (1 + 1e-9)


def test_the_budget_is_spent_where_it_costs_least(small, samples, tmp_path):
    equal = run("heads", small, tmp_path / "a", samples, ratio=0.4, uniform=True)
    chosen = run("heads", small, tmp_path / "b", samples, ratio=0.4)
    assert len({row["removed"] for row in chosen["layers"]}) > 1
    assert mean_snr(chosen) > mean_snr(equal) - 1


def test_the_work_of_a_head_counts_its_products(small, samples, tmp_path):
    layers = ["down_blocks.0.attentions.0.**.attn1", "mid_block.**.attn2"]
    options = {"ratio": 0.25, "uniform": True, "compensate": False}
    alone = [run("heads", small, tmp_path / str(n), samples, layers=[one], **options) for n, one in enumerate(layers)]
    both = run("heads", small, tmp_path / "both", samples, layers=layers, **options)["layers"]
    lost = [effect["macs"][0] - effect["macs"][1] for effect in alone]
    assert both[0]["work"] / both[1]["work"] == pytest.approx(lost[0] / lost[1], rel=1e-6)
    assert sum(row["work"] for row in both) == pytest.approx(0.25)


def test_a_ratio_that_the_layers_cannot_reach_is_refused(small, samples, tmp_path):
    options = {"layers": ["mid_block*"], "max_ratio": 0.45}
    with pytest.raises(StageError, match=r"a ratio of 0\.4 cannot be reached: the layers may lose 0\.25 of their work"):
        run("heads", small, tmp_path / "out", samples, ratio=0.4, **options)
    effect = run("heads", small, tmp_path / "less", samples, ratio=0.25, **options)
    assert sum(row["work"] for row in effect["layers"]) == pytest.approx(0.25)


@pytest.mark.parametrize(("rows", "side", "left"), [(64, 16, 16), (4, 64, 1), (3, 128, 1), (2, 8, 2)])
def test_sensitivity_is_measured_on_few_rows_of_calls_spread_over_all(rows, side, left):
    import torch

    calls = [(torch.full((rows, 1, side, side), float(n)), torch.full((rows,), float(n))) for n in range(12)]
    probes = narrowing.probes_of(calls)
    assert [len(part) for call in probes for part in call] == [left] * 8
    assert [float(part.flatten()[0]) for call in probes for part in call] == [0, 0, 3, 3, 6, 6, 9, 9]


@pytest.mark.parametrize("importance", ["reconstruction", "taylor", "l1", "l2"])
def test_every_importance_chooses_heads(small, samples, tmp_path, importance):
    options = {"ratio": 0.25, "uniform": True, "importance": importance, "layers": ["mid_block*"]}
    effect = run("heads", small, tmp_path / "out", samples, **options)
    assert [row["removed"] for row in effect["layers"]] == [1, 1]
    assert all(row["relative_error"] < 0.5 for row in effect["layers"])


def test_the_same_inputs_give_the_same_bytes(small, samples, tmp_path):
    for name in ("a", "b"):
        run("heads", small, tmp_path / name, samples, ratio=0.25)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["config.json", "diffusion_pytorch_model.safetensors", "edits.json", "effect.json"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_of_two_like_heads_merging_keeps_one(small, samples, tmp_path):
    import torch

    twin = tmp_path / "twin"
    module = opened(small)
    layer = module.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    for name in ("to_q", "to_k", "to_v"):
        weight = getattr(layer, name).weight = torch.nn.Parameter(getattr(layer, name).weight.clone())
        weight.data[24:32] = weight.data[8:16]
    projection = layer.to_out[0]
    projection.weight = torch.nn.Parameter(projection.weight.clone())
    projection.weight.data[:, 24:32] = 0.7 * projection.weight.data[:, 8:16]
    module.unet.save_pretrained(twin)
    options = {"ratio": 0.25, "uniform": True, "layers": ["mid_block.**.attn1"]}
    merged = run("heads", twin, tmp_path / "out", samples, merge=True, **options)
    (edit,) = merged["edits"]
    assert not {1, 3} <= set(edit["keep"])
    assert merged["layers"][0]["relative_error"] < 1e-4
    assert torch.allclose(answer(twin), answer(tmp_path / "out"), atol=1e-3)


def test_channels_keep_whole_groups(small, samples, tmp_path):
    effect = run("channels", small, tmp_path / "out", samples, ratio=0.3, round_to=8)
    model = opened(tmp_path / "out").unet
    resnets = [m for m in model.modules() if hasattr(m, "conv2")]
    assert any(r.norm2.num_groups < 8 for r in resnets)
    for resnet in resnets:
        per_group = resnet.norm2.num_channels // resnet.norm2.num_groups
        assert per_group == resnet.out_channels // 8
        assert resnet.norm2.num_channels % 8 == 0
        assert resnet.conv1.out_channels == resnet.norm2.num_channels == resnet.conv2.in_channels
        assert resnet.time_emb_proj.out_features == resnet.norm2.num_channels
    for module in model.modules():
        if hasattr(module, "net"):
            assert module.net[0].proj.out_features == 2 * module.net[2].in_features
    share = 1 - effect["macs"][1] / effect["macs"][0]
    assert 0.05 < share < 0.3


def test_wide_convolutions_are_fitted_channel_by_channel(small, samples, tmp_path, monkeypatch):
    """Beyond a size the moments are those of channels, not of unfolded inputs: coarser, still better than nothing."""

    options = {"ratio": 0.5, "uniform": True, "round_to": 1, "importance": "l2", "parts": ["resnets"]}
    unfolded = run("channels", small, tmp_path / "a", samples, **options)
    plain = run("channels", small, tmp_path / "b", samples, compensate=False, **options)
    monkeypatch.setattr(sites, "UNFOLDED", 100)
    mixed = run("channels", small, tmp_path / "c", samples, **options)
    assert mean_snr(plain) < mean_snr(mixed) < mean_snr(unfolded)


def test_writing_a_matrix_back_changes_nothing(small, monkeypatch):
    import torch

    for limit in (10_000, 100):
        monkeypatch.setattr(sites, "UNFOLDED", limit)
        model = opened(small).unet
        for site in [*sites.channels_of(model), *sites.heads_of(model), *sites.feed_forwards_of(model)]:
            reader = model.get_submodule(site.reader)
            before = reader.weight.clone(), reader.bias.clone()
            layer = sites.layer_of(model, site)
            sites.assign(model, site, layer.weight, layer.bias)
            assert torch.equal(reader.weight, before[0])
            assert torch.equal(reader.bias, before[1])


def test_passes_compose(small, samples, tmp_path):
    import torch

    run("heads", small, tmp_path / "a", samples, ratio=0.25, uniform=True)
    run("channels", tmp_path / "a", tmp_path / "b", samples, ratio=0.2)
    effect = run("heads", tmp_path / "b", tmp_path / "c", samples, ratio=0.34, uniform=True)
    made = edits.read(tmp_path / "c")
    assert made[: len(edits.read(tmp_path / "b"))] == edits.read(tmp_path / "b")
    assert {edit["of"] for edit in effect["edits"]} == {3}
    model = opened(small).unet
    edits.replay(model, made)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors(tmp_path / "c").items()})


def test_a_pruned_unet_exports_smaller_and_computes_what_torch_does(small, samples, tmp_path):
    import onnxruntime
    import torch

    from sdcompile.steps import export_onnx

    run("heads", small, tmp_path / "a", samples, ratio=0.25)
    run("channels", tmp_path / "a", tmp_path / "b", samples, ratio=0.3)
    params = {"family": "sd", "opset": 20, "attention": "sdpa", "multiples": FAMILY.facts(CONFIGS)["multiples"]}
    job = Job("unet", params, spec=FAMILY.components(CONFIGS)["unet"], shapes=SHAPES)
    (tmp_path / "onnx").mkdir()
    export_onnx.run({"checkpoint": tmp_path / "b"}, tmp_path / "onnx", job)
    weights = (tmp_path / "onnx" / "model.onnx.data").stat().st_size
    assert weights < 0.9 * next(small.glob("*.safetensors")).stat().st_size
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    torch.manual_seed(3)
    feeds = (torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 24))
    names = [t.name for t in job.spec.inputs]  # type: ignore[union-attr]
    got = session.run(None, {n: f.numpy() for n, f in zip(names, feeds, strict=True)})[0]

    def gap(folder: Path) -> float:
        return float(np.abs(got - answer(folder).numpy()).max() / np.abs(got).max())

    assert gap(tmp_path / "b") < 1e-5
    assert gap(small) > 1e-3, "the sibling: the whole model does not compute what the pruned one does"


def test_the_work_is_counted_with_attention(small, samples, tmp_path):
    """Linear layers and convolutions by hand; attention adds 2 x tokens x tokens x width per layer."""
    import torch

    job = Job("unet", {"family": "sd"}, "fp32", FAMILY.components(CONFIGS)["unet"], SHAPES)
    subject = pruning.open_subject(small, job)
    seen = 0

    def count(layer: Any, arguments: Any, output: Any) -> None:
        nonlocal seen
        seen += layer.weight.numel() * output.numel() // layer.weight.shape[0]

    def attend(layer: Any, arguments: Any, keywords: Any, output: Any) -> None:
        nonlocal seen
        told = keywords.get("encoder_hidden_states")
        keys = (arguments[0] if told is None else told).shape[1]
        seen += 2 * output.shape[0] * output.shape[1] * keys * layer.to_v.out_features

    for layer in subject.model.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            layer.register_forward_hook(count)
        elif hasattr(layer, "to_q"):
            layer.register_forward_hook(attend, with_kwargs=True)
    feeds = [torch.zeros(t.shape(SHAPES, "opt")) for t in job.spec.inputs]  # type: ignore[union-attr]
    with torch.no_grad():
        subject.module(*feeds)
    assert pruning.macs(pruning.open_subject(small, job), job) == seen


# --- blocks ---


def test_blocks_are_chosen_by_what_the_output_misses(small, samples, tmp_path):
    import torch

    effect = run("blocks", small, tmp_path / "out", samples, count=2)
    assert [row["relative_error"] > 0 for row in effect["blocks"]] == [True, True]
    assert effect["macs"][1] < effect["macs"][0]
    assert effect["parameters"][1] < effect["parameters"][0]
    assert torch.isfinite(answer(tmp_path / "out")).all()


def test_named_blocks_are_removed_and_others_refused(small, samples, tmp_path):
    effect = run("blocks", small, tmp_path / "a", samples, remove=["mid_block"])
    assert effect["diffusers"] == "an ordinary diffusers folder"
    assert json.loads((tmp_path / "a" / "config.json").read_text())["mid_block_type"] is None
    effect = run("blocks", tmp_path / "a", tmp_path / "b", samples, remove=["down_blocks.0.0+up_blocks.1.1"])
    assert effect["diffusers"] == "a block without layers has no place in layers_per_block"
    with pytest.raises(RecipeError, match=r"'down_blocks.9.1' is no block that can be removed"):
        run("blocks", small, tmp_path / "c", samples, remove=["down_blocks.9.1"])
    with pytest.raises(RecipeError, match="'mid_block' is no block"):
        run("blocks", tmp_path / "a", tmp_path / "d", samples, remove=["mid_block"])
    with pytest.raises(StageError, match="blocks can be removed, not 60"):
        run("blocks", small, tmp_path / "e", samples, count=60)


# --- recovery ---


def test_recovery_brings_the_output_nearer_and_repeats_itself(small, samples, tmp_path):
    pruned = tmp_path / "pruned"
    lost = run("heads", small, pruned, samples, ratio=0.5, uniform=True, importance="l1", compensate=False)
    options = {"steps": 16, "rows": 16, "learning_rate": 2e-4}
    found = run("recover", pruned, tmp_path / "a", samples, teacher=small, **options)
    run("recover", pruned, tmp_path / "b", samples, teacher=small, **options)
    assert mean_snr(found) > mean_snr(lost) + 1
    assert found["parameters"][0] == found["parameters"][1]
    assert edits.read(tmp_path / "a") == edits.read(pruned)
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(np.array_equal(first[key], second[key]) for key in first)


class Killed(BaseException):
    """What a kill is to a step: nothing catches it."""


def killing(at: int) -> Say:
    """Listens to a recovery and kills it when it tells of step `at`."""

    def say(text: str, fraction: float | None = None) -> None:
        if text.startswith(f"step {at} "):
            raise Killed

    return say


@pytest.fixture
def saved_often(monkeypatch):
    """The state is saved after every step, not once a minute."""
    monkeypatch.setattr("sdcompile.passes.recover._is_due", lambda since_s, took_s: True)


RECOVERY: dict[str, Any] = {"steps": 6, "rows": 4, "learning_rate": 2e-4, "patience": 20}


@pytest.fixture(scope="module")
def crude(small, samples, tmp_path_factory) -> Path:
    """Half of the heads gone, nothing made up for."""
    folder = tmp_path_factory.mktemp("crude") / "out"
    run("heads", small, folder, samples, ratio=0.5, uniform=True, importance="l1", compensate=False)
    return folder


@pytest.fixture(scope="module")
def whole(small, samples, crude, tmp_path_factory) -> Path:
    """What a recovery of `crude` comes to that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run("recover", crude, folder, samples, teacher=small, **RECOVERY)
    return folder


@pytest.mark.parametrize("stops", [(1,), (3, 4, 6)])
def test_a_killed_recovery_goes_on_to_the_same_bytes(small, samples, crude, whole, tmp_path, saved_often, stops):
    state, said = tmp_path / "state", []
    for number, stop in enumerate(stops):
        with pytest.raises(Killed):
            run("recover", crude, tmp_path / f"{number}", samples, small, state, killing(stop), **RECOVERY)
    out = tmp_path / "out"
    run("recover", crude, out, samples, small, state, lambda text, _: said.append(text), **RECOVERY)
    last = stops[-1] - 1
    assert (f"going on after step {last} of 6" in said) == (last > 0)
    assert not any(text.startswith(f"step {last} ") for text in said), "no step is done twice"
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def distilled(small: Path, crude: Path, samples: Path, state: Path, say: Say = say_nothing) -> list[dict]:
    """The exams of a recovery alone, which are all that the next tests look at."""
    from sdcompile.passes import recover, renoising
    from sdcompile.samples import Samples

    job = Job("unet", {"family": "sd"}, "fp32", FAMILY.components(CONFIGS)["unet"], SHAPES)
    student, teacher = (pruning.open_subject(folder, job) for folder in (crude, small))
    training, held_out = (Samples(samples, "unet", held_out=which) for which in (False, True))
    calls, questions = pruning.calls_of(training, job), recover._questions(held_out, job)
    params, schedule = recover.Params.model_validate(RECOVERY), renoising.schedule_of(assets(state.parent / "assets"))
    return recover.distil(student, teacher, calls, questions, params, "recover", say, state, schedule)


def test_rows_beyond_a_bound_are_learned_in_parts(small, samples, crude, tmp_path, monkeypatch):
    from sdcompile.passes import lessons, recover

    learned, plain = [], lessons.loss

    def loss(student, teacher, call, features):
        learned.append(len(call[0]))
        return plain(student, teacher, call, features)

    monkeypatch.setattr(lessons, "loss", loss)
    whole = distilled(small, crude, samples, tmp_path / "whole")
    assert learned == [4] * 6, "up to the bound a step is one part"
    learned.clear()
    monkeypatch.setattr(recover, "POSITIONS", 3 * 8 * 8)
    parts = distilled(small, crude, samples, tmp_path / "parts")
    assert learned == [3, 1] * 6
    gained = [exams[-1]["snr_db"] - exams[0]["snr_db"] for exams in (whole, parts)]
    assert gained[0] > 0
    assert gained[1] == pytest.approx(gained[0], rel=0.3)


def test_held_out_rows_say_when_to_stop_and_none_of_them_is_learned(small, samples, crude, tmp_path, monkeypatch):
    from sdcompile.passes import lessons, pruning, recover
    from sdcompile.samples import Samples

    job = Job("unet", {"family": "sd"}, "fp32", FAMILY.components(CONFIGS)["unet"], SHAPES)
    held_out = np.concatenate([s.feeds["sample"] for s in Samples(samples, "unet", held_out=True)])
    asked = np.concatenate(
        [call[0].numpy() for call, _ in recover._questions(Samples(samples, "unet", held_out=True), job)]
    )
    rows = {row.tobytes() for row in held_out}
    assert {row.tobytes() for row in asked} == rows
    monkeypatch.setattr(recover, "_EXAM_ROWS", 6)
    monkeypatch.setattr(pruning, "POSITIONS", 1)
    few = recover._questions(Samples(samples, "unet", held_out=True), job)
    assert [len(answers) for _, answers in few] == [1] * 6, "also where a call is one row"
    learned, plain = set(), lessons.loss

    def loss(student, teacher, call, features):
        learned.update(row.numpy().tobytes() for row in call[0])
        return plain(student, teacher, call, features)

    monkeypatch.setattr(lessons, "loss", loss)
    run("recover", crude, tmp_path / "out", samples, small, **{**RECOVERY, "renoise": 0.0, "rows": 32})
    fit = {row.tobytes() for s in Samples(samples, "unet", held_out=False) for row in s.feeds["sample"]}
    assert learned <= fit
    assert len(learned) > 0.9 * len(fit)
    assert not learned & rows


def test_a_calibration_that_holds_nothing_out_is_refused(samples, crude, tmp_path):
    import shutil

    some = tmp_path / "some"
    shutil.copytree(samples, some)
    index = json.loads((some / "samples.json").read_text())
    for row in index["samples"]:
        row["held_out"] = False
    (some / "samples.json").write_text(json.dumps(index))
    with pytest.raises(StageError, match="no sample is held out, so nothing says when to stop"):
        run("recover", crude, tmp_path / "out", some, crude, **RECOVERY)


@pytest.mark.parametrize("renoise", [1.0, 0.0])
def test_a_recovery_learns_on_pictures_where_there_are_some(small, samples, crude, tmp_path, monkeypatch, renoise):
    from sdcompile.passes import lessons
    from sdcompile.samples import write_pictures

    draw = np.random.default_rng(3)
    latents, told = (draw.standard_normal(size).astype(np.float32) for size in ((5, 4, 8, 8), (2, 5, 24)))
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_pictures(folder, latents, np.array([0, 1, 1, 0, 1]), {"encoder_hidden_states": told})
    calls, plain = [], lessons.loss

    def loss(student, teacher, call, features):
        calls.append([column.clone() for column in call])
        return plain(student, teacher, call, features)

    monkeypatch.setattr(lessons, "loss", loss)
    options = {**RECOVERY, "renoise": renoise, "mix": 0.0}
    run("recover", crude, tmp_path / "out", samples, small, pictures=folder, **options)
    rows = [row.numpy() for call in calls for row in call[2]]
    shown = [any(np.array_equal(row, caption) for caption in told) for row in rows]
    assert shown == [renoise > 0] * 24, "all rows, or none, are pictures with their captions"


def test_what_is_recorded_is_held_once(small, samples):
    import torch

    from sdcompile.passes import pruning
    from sdcompile.samples import Samples

    job = Job("unet", {"family": "sd"}, "fp32", FAMILY.components(CONFIGS)["unet"], SHAPES)
    fit = Samples(samples, "unet", held_out=False)
    pairs = pruning.pairs_of(fit, job)
    order = torch.randperm(72, generator=torch.Generator().manual_seed(0))
    whole = torch.from_numpy(np.concatenate([sample.feeds["sample"] for sample in fit]))[order]
    assert torch.equal(torch.cat([call[0] for call, _ in pairs]), whole)
    parts = pruning.parts_of(pairs[0][0], 8 * 8 * 5)
    assert [len(part[0]) for part in parts][:2] == [5, 5]
    assert len({part[0].untyped_storage().data_ptr() for part in parts}) == 1, "parts are views"


@pytest.fixture
def killed(small, samples, crude, tmp_path, saved_often) -> Path:
    """What a recovery leaves that is killed in its fourth step."""
    with pytest.raises(Killed):
        distilled(small, crude, samples, tmp_path / "state", killing(4))
    return tmp_path / "state"


@pytest.mark.parametrize("part", ["weight/", "average/", "exp_avg/", "exp_avg_sq/", "random"])
def test_every_part_of_the_saved_state_counts(small, samples, crude, whole, killed, part):
    """The sibling: with any part of the state altered it comes out different."""
    import torch

    from sdcompile.passes import resuming

    tensors, told = resuming.restore(killed) or ({}, {})
    for name, tensor in tensors.items():
        if name.startswith(part):
            tensors[name] = torch.Generator().manual_seed(5).get_state() if name == "random" else tensor * 1.5
    resuming.save(killed, tensors, told)
    found = distilled(small, crude, samples, killed)
    wanted = (read_effect(whole) or {})["steps"]
    assert found[:4] == wanted[:4]
    assert found[4:] != wanted[4:]


@pytest.mark.parametrize("bytes_left", [0, 1000])
def test_a_state_that_cannot_be_read_is_as_none(small, samples, crude, whole, killed, bytes_left):
    """Cut short by a power cut, say: the recovery starts anew, and comes out the same."""
    (file,) = killed.iterdir()
    file.write_bytes(file.read_bytes()[:bytes_left])
    assert distilled(small, crude, samples, killed) == (read_effect(whole) or {})["steps"]


def test_saving_takes_a_twentieth_of_the_time_at_most():
    from sdcompile.passes.recover import _is_due

    assert not _is_due(59, 0)
    assert _is_due(60, 0)
    assert not _is_due(60, 10)
    assert _is_due(200, 10)


def test_recovery_that_brings_nothing_keeps_the_weights(small, samples, tmp_path):
    run("heads", small, tmp_path / "pruned", samples, ratio=0.25, uniform=True)
    found = run(
        "recover", tmp_path / "pruned", tmp_path / "out", samples, teacher=small, steps=20, rows=2,
        learning_rate=0.5, patience=2, ema=0,
    )  # fmt: skip
    before, after = tensors(tmp_path / "pruned"), tensors(tmp_path / "out")
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert [row["step"] for row in found["steps"]] == [0, 2, 4], "stopped by patience"


def test_where_nothing_was_lost_nothing_is_trained(small, samples, tmp_path):
    found = run("recover", small, tmp_path / "out", samples, teacher=small)
    (exam,) = found["steps"]
    assert exam["step"] == 0
    assert exam["snr_db"] > 100
    before, after = tensors(small), tensors(tmp_path / "out")
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_recovery_can_train_some_weights_only(small, samples, tmp_path):
    run("heads", small, tmp_path / "pruned", samples, ratio=0.5, uniform=True, compensate=False)
    run("recover", tmp_path / "pruned", tmp_path / "a", samples, teacher=small, steps=10, rows=8, layers=["*to_out*"])
    before, after = tensors(tmp_path / "pruned"), tensors(tmp_path / "a")
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert changed
    assert all("to_out" in key for key in changed)
    with pytest.raises(RecipeError, match=r"'\*nothing\*' matches no weight"):
        run("recover", tmp_path / "pruned", tmp_path / "b", samples, teacher=small, layers=["*nothing*"])


# --- what is refused ---


def test_patterns_that_match_nothing_are_refused(small, samples, tmp_path):
    with pytest.raises(RecipeError, match=r"^heads\.layers: '\*attn9' matches no layer"):
        run("heads", small, tmp_path / "a", samples, layers=["*attn1", "*attn9"])


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_ratios_that_are_no_share_are_refused(ratio):
    for name in ("heads", "channels"):
        with pytest.raises(ValueError, match=r"ratio"):
            PASSES[name].params.model_validate({"ratio": ratio})


def test_merging_without_least_squares_is_refused():
    with pytest.raises(ValueError, match="needs compensate"):
        PASSES["heads"].params.model_validate({"merge": True, "compensate": False})


def test_groups_that_cannot_be_kept_legal_are_refused(small, samples, tmp_path):
    with pytest.raises(StageError, match="smallest legal step of every layer is larger"):
        run("channels", small, tmp_path / "a", samples, ratio=0.3, round_to=64, parts=["resnets"])


def test_a_component_without_heads_is_refused(samples, tmp_path):
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(**VAE).save_pretrained(tmp_path / "vae")
    record = PASSES["heads"]
    full = record.params().model_dump(mode="json")
    job = Job("vae_decoder", {"family": "sd", **full}, "fp32", FAMILY.components(CONFIGS)["vae_decoder"], SHAPES)
    with pytest.raises(StageError, match="vae_decoder has no attention heads"):
        record.run({"checkpoint": tmp_path / "vae", "samples": samples}, tmp_path, job)


def test_nan_in_the_samples_stops(small, samples, tmp_path):
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(samples, tmp_path / "samples")
    path = tmp_path / "samples" / "unet" / "000.safetensors"
    arrays = load_file(path)
    arrays["in.sample"][0, 0, 0, 0] = np.nan
    save_file(arrays, path)
    with pytest.raises(StageError, match="NaN"):
        run("heads", small, tmp_path / "out", tmp_path / "samples")
