"""Energy counters, on a made-up sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdcompile.measure import energy


@pytest.fixture
def rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(energy, "_RAPL", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    return tmp_path


def domain(root: Path, name: str, microjoules: int) -> Path:
    (root / name).mkdir()
    path = root / name / "energy_uj"
    path.write_text(f"{microjoules}\n")
    return path


def test_packages_are_counted_and_the_parts_below_them_are_not(rapl):
    first = domain(rapl, "intel-rapl:0", 5_000_000)
    domain(rapl, "intel-rapl:0:0", 1_000_000)
    domain(rapl, "intel-rapl:1", 2_000_000)
    meter = energy.meter()
    before = meter.read()
    assert before == {"cpu0": 5.0, "cpu1": 2.0}
    first.write_text("8000000\n")
    assert energy.joules(before, meter.read()) == {"cpu0": 3.0, "cpu1": 0.0}


def test_a_counter_that_wrapped_says_nothing(rapl):
    path = domain(rapl, "intel-rapl:0", 5_000_000)
    meter = energy.meter()
    before = meter.read()
    path.write_text("100\n")
    assert energy.joules(before, meter.read()) == {}


def test_without_counters_the_reason_is_told(rapl):
    assert "this machine shows none" in energy.meter().reason
    (rapl / "intel-rapl:0").mkdir()
    assert "root only" in energy.meter().reason
    assert energy.meter().read() == {}
