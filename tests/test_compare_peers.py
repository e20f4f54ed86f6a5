"""The comparison with peers: that it measures what it says, tried with diffusers on the tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import compare_peers as script
from sdcompile import models

TINY = Path(models.__file__).parent / "tiny"


def test_agreement_is_the_peak_signal_to_noise_ratio_of_equal_shapes(tmp_path: Path) -> None:
    picture = np.full((1, 4, 4, 3), 0.5, np.float32)
    for name, values in (("a", picture), ("near", picture + 0.01), ("other", picture[:, :2])):
        np.save(tmp_path / f"{name}.npy", values)
    assert script.psnr_db(tmp_path / "near.npy", tmp_path / "a.npy") == pytest.approx(40.0)
    assert script.psnr_db(tmp_path / "a.npy", tmp_path / "a.npy") is None
    assert script.psnr_db(tmp_path / "other.npy", tmp_path / "a.npy") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--contenders", "sdcompile"], "name the bundle with --bundle"),
        (["--contenders", "nobody"], "unknown: nobody; there are sdcompile"),
        (["--size", "big", "--bundle", "x"], "expected WIDTHxHEIGHT"),
    ],
)
def test_words_that_make_no_comparison_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.arguments([str(TINY), *words])
    assert message in capsys.readouterr().err


def test_a_worker_that_fails_stops_the_comparison_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exit code 3"):
        script.Watched([sys.executable, "-c", "raise SystemExit(3)"], {}, tmp_path / "log")


def test_the_memory_of_a_worker_is_seen(tmp_path: Path) -> None:
    code = "import time; held = bytearray(b'x') * (200 << 20); time.sleep(0.3)"
    watched = script.Watched([sys.executable, "-c", code], {}, tmp_path / "log")
    assert 200 << 20 < watched.anonymous_bytes <= watched.peak_bytes < 300 << 20


@pytest.mark.tiny
def test_diffusers_is_measured_on_the_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        str(TINY),
        "--contenders",
        script.REFERENCE,
        "--size",
        "64x64",
        "--rounds",
        "1",
        "--prompt",
        "a red circle",
    ]
    report = script.compare(script.arguments(words), tmp_path)
    row = json.loads(json.dumps(report))["contenders"][script.REFERENCE]
    assert len(row["image_s_all"]) == 1
    assert row["image_s"] > 4 * row["step_s"] / 2 > 0
    assert np.load(tmp_path / f"{script.REFERENCE}.npy").shape == (1, 64, 64, 3)
    table = script.markdown(report)
    assert f"| {script.REFERENCE} |" in table
    assert report["machine"]["cpu"] in table
