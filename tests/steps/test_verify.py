"""Verify: an engine that is off, breaks or lies about its outputs is a finding in a report, never a pass."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sdcompile import metrics
from sdcompile.backends import BACKENDS, Host
from sdcompile.backends.base import card_from_job, write_card
from sdcompile.errors import StageError, VerifyError
from sdcompile.samples import Writer
from sdcompile.spec import ComponentSpec, Job, Range, TensorSpec
from sdcompile.steps import report as reports
from sdcompile.steps import verify

pytestmark = pytest.mark.tiny

Arrays = dict[str, np.ndarray]
SPEC = ComponentSpec(
    "unet",
    (TensorSpec("sample", ("R", 4, "h", "w"), "float32"), TensorSpec("timestep", ("R",), "float32")),
    (TensorSpec("out_sample", ("R", 4, "h", "w"), "float32"),),
)
SHAPES = {"R": Range(1, 2, 4), "h": Range(8, 8, 16), "w": Range(8, 8, 16)}
RECORDED = [
    ("opt", "early", 0, 981.0, (2, 4, 8, 8)),
    ("opt", "mid", 5, 481.0, (2, 4, 8, 8)),
    ("opt", "late", 9, 1.0, (2, 4, 8, 8)),
    ("min", "mid", 1, 500.0, (1, 4, 8, 8)),
    ("max", "late", 2, 1.0, (4, 4, 16, 16)),
]


def truth(feeds: Mapping[str, np.ndarray]) -> Arrays:
    return {"out_sample": np.tanh(feeds["sample"]) + feeds["timestep"][:, None, None, None] / 1000}


class Fake:
    """An engine whose answers are a function of its feeds."""

    def __init__(self, answer: Callable[[Mapping[str, np.ndarray]], Arrays]) -> None:
        self.inputs, self.outputs, self.facts = SPEC.inputs, SPEC.outputs, {"device": "fake", "precision": "fp32"}
        self.answer = answer
        self.closed = False

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        assert not self.closed
        return self.answer(feeds)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def recorded(tmp_path) -> Path:
    folder = tmp_path / "samples"
    folder.mkdir()
    draw = np.random.default_rng(1)
    writer = Writer(folder)
    for shape, region, step, timestep, size in RECORDED:
        feeds = {"sample": draw.standard_normal(size).astype("f"), "timestep": np.full(size[0], timestep, "f")}
        told = {
            "trajectory": "00", "prompt": "a red circle", "negative_prompt": "", "step": step, "timestep": timestep,
            "region": region, "shape": shape,
        }  # fmt: skip
        writer.add("unet", told, feeds, truth(feeds))
    writer.index([])
    return folder


@pytest.fixture
def verified(tmp_path, recorded, monkeypatch):
    """verified(answer) -> (report, its folder) of an engine that answers so."""
    engine_folder = tmp_path / "engine"
    engine_folder.mkdir()
    write_card(engine_folder, card_from_job("fake", Job("unet", {"family": "sd"}, "fp16", SPEC, SHAPES)))

    def verified(
        answer: Callable[[Mapping[str, np.ndarray]], Arrays],
        floor: metrics.Floor = metrics.FLOORS["fp16"],
        pruned: Callable[[Mapping[str, np.ndarray]], Arrays] | None = None,
    ):
        opened: list[Fake] = []

        def open_fake(folder: Path, host: Host) -> Fake:
            opened.append(Fake(answer))
            return opened[-1]

        monkeypatch.setitem(BACKENDS, "fake", replace(BACKENDS["stub"], name="fake", open=open_fake))
        out = tmp_path / "report"
        out.mkdir()
        params = {"backend": "fake", "floor": {"min_snr_db": floor.min_snr_db, "min_cosine": floor.min_cosine}}
        if pruned:
            params |= {"family": "sd", "own_floor": asdict(metrics.FLOORS["fp16"])}
            monkeypatch.setattr(verify.checkpoint, "load", lambda *_: module_of(pruned))
        inputs = {"engine": engine_folder, "samples": recorded, "checkpoint": tmp_path}
        verify.run(inputs, out, Job("unet", params, "fp16", SPEC, SHAPES))
        assert all(engine.closed for engine in opened)
        assert opened
        return json.loads((out / "report.json").read_text()), out

    return verified


def module_of(answer: Callable[[Mapping[str, np.ndarray]], Arrays]):
    """`answer` as the torch module of a checkpoint."""
    import torch

    def module(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(answer({"sample": sample.numpy(), "timestep": timestep.numpy()})["out_sample"])

    return module


def off_by(relative: float, where: Callable[[Mapping[str, np.ndarray]], bool] = lambda feeds: True):
    def answer(feeds: Mapping[str, np.ndarray]) -> Arrays:
        out = truth(feeds)["out_sample"]
        noise = np.random.default_rng(0).standard_normal(out.shape).astype("f")
        noise *= relative * np.linalg.norm(out) / np.linalg.norm(noise) if where(feeds) else 0
        return {"out_sample": out + noise}

    return answer


def broken_at(timestep: float, act: Callable[[Arrays], Arrays]):
    def answer(feeds: Mapping[str, np.ndarray]) -> Arrays:
        good = truth(feeds)
        return act(good) if feeds["timestep"][0] == timestep else good

    return answer


def test_an_engine_within_the_floor_passes_and_keeps_no_file(verified):
    report, out = verified(off_by(4e-3))
    assert report["passed"]
    assert report["worst"]["snr_db"] == pytest.approx(47.96, abs=0.01)
    assert report["facts"] == {"device": "fake", "precision": "fp32"}
    assert {name: row["samples"] for name, row in report["by_region"].items()} == {"early": 1, "mid": 2, "late": 2}
    assert {name: row["samples"] for name, row in report["by_shape"].items()} == {"opt": 3, "min": 1, "max": 1}
    assert [path.name for path in out.iterdir()] == ["report.json"]


def test_one_bad_sample_of_many_fails_and_is_the_one_kept(verified):
    report, out = verified(off_by(0.1, lambda feeds: feeds["timestep"][0] == 481))
    assert not report["passed"]
    assert (report["worst"]["id"], report["worst"]["region"], report["worst"]["step"]) == ("001", "mid", 5)
    assert [row["passed"] for row in report["samples"]] == [True, False, True, True, True]
    assert not report["by_region"]["mid"]["passed"]
    assert report["by_region"]["late"]["passed"]
    kept = np.load(out / "worst.npz")
    assert set(kept) == {"in.sample", "in.timestep", "ref.out_sample", "got.out_sample"}
    assert metrics.snr_db(kept["ref.out_sample"], kept["got.out_sample"]) == pytest.approx(20, abs=0.01)


def test_a_gain_that_is_off_meets_the_cosine_floor_but_not_the_snr_floor(verified):
    report, _ = verified(lambda feeds: {"out_sample": 1.1 * truth(feeds)["out_sample"]})
    assert not report["passed"]
    assert report["worst"]["cosine"] > 0.99999
    assert report["worst"]["snr_db"] == pytest.approx(20, abs=0.01)


def test_the_cosine_floor_alone_can_refuse(verified):
    report, _ = verified(off_by(0.1), metrics.Floor(min_snr_db=0.0, min_cosine=0.9999))
    assert not report["passed"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_value_that_is_not_finite_fails_even_under_no_floor(verified, bad):
    def spoil(good: Arrays) -> Arrays:
        good["out_sample"][0, 0, 0, 0] = bad
        return good

    report, out = verified(broken_at(981.0, spoil), metrics.Floor(min_snr_db=-1000.0, min_cosine=-2.0))
    assert not report["passed"]
    assert report["worst"]["finite"] is False
    error = reports.fault(report, out)
    assert "NaN or infinite" in error.message
    assert "worst.npz" in error.message


def test_an_engine_that_raises_is_a_miss_with_its_words(verified):
    def explode(_good: Arrays) -> Arrays:
        raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED at layer 7")

    report, out = verified(broken_at(500.0, explode))
    assert not report["passed"]
    assert report["worst"]["id"] == "003"
    assert "CUDNN_STATUS_EXECUTION_FAILED" in report["worst"]["error"]
    assert set(np.load(out / "worst.npz")) == {"in.sample", "in.timestep", "ref.out_sample"}
    assert "CUDNN_STATUS_EXECUTION_FAILED" in reports.fault(report, out).message


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda good: {"out_sample": good["out_sample"][:1]}, "shape (1, 4, 8, 8)"),
        (lambda good: {"other": good["out_sample"]}, "no output out_sample"),
    ],
)
def test_an_output_that_is_missing_or_of_another_shape_is_a_miss(verified, act, words):
    report, _ = verified(broken_at(981.0, act))
    assert not report["passed"]
    assert words in report["worst"]["error"]


def test_a_backend_without_onnx_says_why_no_layer_is_named(verified):
    report, _ = verified(off_by(0.5))
    assert report["divergence"]["module"] is None
    assert "takes no ONNX" in report["divergence"]["reason"]


def test_nothing_recorded_is_an_error_not_a_pass(verified, recorded):
    Writer(recorded).index([])
    with pytest.raises(StageError, match="nothing was recorded"):
        verified(truth)


def test_the_error_tells_value_floor_input_and_what_to_type(verified):
    report, out = verified(off_by(0.1))
    error = reports.fault(report, out)
    assert isinstance(error, VerifyError)
    for part in ("unet (fake, fp16)", "SNR 20.0 dB (floor 35)", "a red circle", str(out / "worst.npz")):
        assert part in error.message
    for part in ("on_fail: fallback", "precision", "min_snr_db"):
        assert part in error.hint


def image_report(psnr_db: float) -> dict:
    row = {
        "id": "00", "prompt": "a \x00 blue square & <b>", "shape": "opt", "psnr_db": psnr_db, "finite": True,
        "error": None, "passed": psnr_db >= 30,
    }  # fmt: skip
    return {
        "component": "pipeline", "backend": "fake", "precision": "fp16", "passed": row["passed"], "facts": {},
        "floor": {"min_psnr_db": 30.0}, "worst": row, "samples": [row], "kept": [], "divergence": None,
        "by_shape": {"opt": {"samples": 1, "passed": row["passed"], "min_psnr_db": psnr_db}},
    }  # fmt: skip


def test_combined_reports_have_a_test_case_per_component_shape_and_image(verified):
    engine, _ = verified(off_by(0.1, lambda feeds: len(feeds["sample"]) == 4))
    summary, junit = reports.reports({"unet": engine, "pipeline": image_report(25.0)})
    assert summary["passed"] is False
    assert set(summary["reports"]) == {"unet", "pipeline"}
    suites = {suite.get("name"): suite for suite in ET.fromstring(junit)}
    assert (suites["unet"].get("tests"), suites["unet"].get("failures")) == ("3", "1")
    (failure,) = suites["unet"].iter("failure")
    assert "SNR 20.0 dB (floor 35)" in failure.get("message")
    (image,) = suites["pipeline"].iter("failure")
    assert "PSNR 25.0 dB, floor 30 dB" in image.text


def test_reports_that_passed_have_no_failures(verified):
    engine, _ = verified(truth)
    summary, junit = reports.reports({"unet": engine, "pipeline": image_report(40.0)})
    assert summary["passed"] is True
    assert "<failure" not in junit


def half(feeds: Mapping[str, np.ndarray]) -> Arrays:
    """What is left of the truth when half of it was pruned away."""
    return {"out_sample": truth(feeds)["out_sample"] / 2}


def test_a_pruned_engine_must_first_compute_what_it_was_made_of(verified):
    report, _ = verified(half, metrics.PRUNED, pruned=half)
    assert report["passed"]
    assert report["own"]["worst"]["snr_db"] == 200
    assert report["worst"]["snr_db"] == pytest.approx(6.02, abs=0.01)


def test_a_fault_of_compiling_does_not_hide_behind_the_floor_of_pruning(verified):
    """The sibling: nearer to the source than the pruned module is, and still not what was built."""
    report, out = verified(off_by(4e-3), metrics.PRUNED, pruned=half)
    assert not report["passed"]
    assert report["against"] == "checkpoint"
    assert "does not agree with the pruned torch module it was made of" in reports.fault(report, out).message


def test_the_cost_of_pruning_is_told_from_faults_of_compiling(verified):
    report, out = verified(half, metrics.Floor(20, 0), pruned=half)
    assert not report["passed"]
    fault = reports.fault(report, out)
    assert "does not agree with its fp32 reference: SNR 6.0 dB (floor 20)" in fault.message
    assert "computes what it was made of (200.0 dB): this is what pruning cost" in fault.hint


# NaN and pictures of one colour ------------------------------------------------------------------


def wide(feeds: Mapping[str, np.ndarray]) -> bool:
    """Is it the shape nobody recorded?"""
    return feeds["sample"].shape == (4, 4, 16, 16)


@pytest.fixture
def unrecorded(verified, recorded):
    """`verified`, with nothing recorded at the max shape."""
    index = json.loads((recorded / "samples.json").read_text())
    index["samples"] = [row for row in index["samples"] if row["shape"] != "max"]
    (recorded / "samples.json").write_text(json.dumps(index))
    return verified


def test_shapes_that_were_recorded_are_not_swept_again(verified):
    found, _ = verified(truth)
    assert found["passed"]
    assert found["sweep"] == {"shapes": [], "calls": 0, "faults": []}


def test_a_sound_engine_passes_the_sweep_of_a_shape_nobody_recorded(unrecorded):
    found, _ = unrecorded(truth)
    assert found["passed"]
    assert found["sweep"] == {"shapes": ["max"], "calls": 2, "faults": []}
    assert reports.broken(found) == ""
    assert "max shape, finite and not all one value" in reports.reports({"unet": found})[1]


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        (lambda y: np.where(y > 0.9, np.nan, y), "nan", "NaN or infinite values"),
        (lambda y: np.zeros_like(y), "flat", "all one value, as a black picture is"),
        # One image of a batch that is black is black.
        (lambda y: np.concatenate([y[:1] * 0, y[1:]]), "flat", "all one value"),
    ],
)
def test_a_shape_at_which_the_engine_breaks_is_found_though_nobody_recorded_it(wrong, kind, words, unrecorded):
    def breaking(feeds: Mapping[str, np.ndarray]) -> Arrays:
        right = truth(feeds)["out_sample"]
        return {"out_sample": wrong(right) if wide(feeds) else right}

    found, out = unrecorded(breaking)
    assert not found["passed"]
    assert all(row["passed"] for row in found["samples"])
    assert {fault["kind"] for fault in found["sweep"]["faults"]} == {kind}
    assert found["sweep"]["faults"][0]["dims"] == {"sample": [4, 4, 16, 16], "timestep": [4]}
    assert words in reports.broken(found)
    error = reports.fault(found, out)
    assert f"not so at its max shape: {found['sweep']['faults'][0]['what']}" in error.message
    assert "sample 4x4x16x16" in error.message
    for part in ("on_nan: fallback", "cast: {from_samples: true}"):
        assert part in error.hint
    assert words in reports.reports({"unet": found})[1]


def test_an_engine_that_fails_at_a_legal_shape_fails_but_is_no_nan(unrecorded):
    def raising(feeds: Mapping[str, np.ndarray]) -> Arrays:
        if wide(feeds):
            raise RuntimeError("out of memory")
        return truth(feeds)

    found, _ = unrecorded(raising)
    assert not found["passed"]
    assert reports.broken(found) == ""
    assert "the engine failed: RuntimeError: out of memory" in reports.fault(found).message


def test_a_recorded_call_that_comes_out_black_is_said_to_be(verified):
    found, _ = verified(lambda feeds: {"out_sample": np.full_like(feeds["sample"], 0.25)}, metrics.PRUNED)
    assert not found["passed"], "0 dB would let it pass"
    assert "all one value" in reports.broken(found)
    assert "all one value" in reports.fault(found).message


def test_an_inexact_engine_is_not_broken(verified):
    found, _ = verified(lambda feeds: {"out_sample": truth(feeds)["out_sample"] * 1.5})
    assert not found["passed"]
    assert reports.broken(found) == ""


@pytest.mark.parametrize(("passed", "rebuilt"), [(True, "unet"), (False, None)])
def test_rows_that_depend_on_each_other_do_so_in_every_precision(passed, rebuilt):
    from sdcompile import run

    chosen = SimpleNamespace(effective=lambda _: SimpleNamespace(precision="fp16", backend="onnxruntime"))
    recipe = SimpleNamespace(
        verify=SimpleNamespace(on_fail="fallback", on_nan=None), family="sd", by_target=lambda: {"": chosen}
    )
    row = {"error": None, "finite": True, "passed": False}
    report = {"component": "unet", "samples": [row], "worst": row, "whole": {"passed": passed}}
    missed = run._Missed(SimpleNamespace(of="unet", component="unet", target=""), None, report)  # type: ignore[arg-type]
    assert run._fallback_component(SimpleNamespace(recipe=recipe), missed) == rebuilt  # type: ignore[arg-type]


def test_a_decoder_of_other_latents_is_told_as_what_it_is():
    from sdcompile.steps.report import fault

    report = {
        "component": "pipeline", "floor": {"min_psnr_db": 20.0},
        "own_decoder": {"psnr_db": {"min": 8.0, "mean": 9.3}, "floor": {"min_psnr_db": 15.0}, "passed": False},
    }  # fmt: skip
    found = fault(report, None)
    assert "mean PSNR 9.3 dB, floor 15 dB" in found.message
    assert "another model's latents" in found.hint
    assert "min_decoder_psnr_db" in found.hint
