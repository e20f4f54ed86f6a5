"""Verify: an engine that is off, breaks or lies about its outputs is a finding in a report, never a pass."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

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

    def verified(answer: Callable[[Mapping[str, np.ndarray]], Arrays], floor: metrics.Floor = metrics.FLOORS["fp16"]):
        opened: list[Fake] = []

        def open_fake(folder: Path, host: Host) -> Fake:
            opened.append(Fake(answer))
            return opened[-1]

        monkeypatch.setitem(BACKENDS, "fake", replace(BACKENDS["stub"], name="fake", open=open_fake))
        out = tmp_path / "report"
        out.mkdir()
        params = {"backend": "fake", "floor": {"min_snr_db": floor.min_snr_db, "min_cosine": floor.min_cosine}}
        verify.run({"engine": engine_folder, "samples": recorded}, out, Job("unet", params, "fp16", SPEC, SHAPES))
        assert all(engine.closed for engine in opened)
        assert len(opened) == 1
        return json.loads((out / "report.json").read_text()), out

    return verified


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
