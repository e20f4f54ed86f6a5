"""What a build makes of timings that do not fit, of Ctrl-C and of a library that fails: the builder is played."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import sdcompile.backends.tensorrt as backend
from sdcompile.backends import Probe
from sdcompile.backends.trt import building, compiling, layers
from sdcompile.backends.trt.compiling import Order
from sdcompile.backends.trt.graph import Promise
from sdcompile.errors import StageError
from tests.backends.played_builder import Builder, Severity
from tests.backends.test_tensorrt import GPU, JOB


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Builds with a played module; gives what was said."""

    def run(module: Builder, **changes):
        monkeypatch.setitem(sys.modules, "played_trt", module)
        order = Order(
            "played_trt", "11.4", tmp_path / "m.onnx", *(tmp_path / f"e.{n}" for n in ("plan", "log", "txt")), {}
        )
        heard = []
        handler = signal.getsignal(signal.SIGINT)
        try:
            compiling.work(replace(order, **changes), lambda text, fraction=None: heard.append((text, fraction)))
        finally:
            signal.signal(signal.SIGINT, handler)
        return heard

    return run


# --- timings ----------------------------------------------------------------------------------


def test_timings_are_kept_and_the_next_build_begins_with_them(build, tmp_path):
    kept = tmp_path / "cache" / "11.4.timings"
    for times in (1, 2):
        build(Builder(), timing_cache=kept)
        assert kept.read_bytes() == b"measured;" * times
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize("fault", ["damaged", "foreign"])
def test_timings_that_do_not_fit_are_replaced_and_do_not_stop_the_build(build, tmp_path, fault):
    kept = tmp_path / "11.4.timings"
    kept.write_bytes(b"other")
    build(Builder(**{fault: (b"other",)}), timing_cache=kept)
    assert kept.read_bytes() == b"measured;"


def test_a_library_without_timings_and_a_folder_that_takes_none_do_not_undo_a_build(build, tmp_path):
    build(Builder(keeps=False), timing_cache=tmp_path / "a.timings")
    build(Builder(damaged=(b"",)), timing_cache=tmp_path / "b.timings")
    (tmp_path / "file").write_text("")
    build(Builder(), timing_cache=tmp_path / "file" / "c.timings")
    assert (tmp_path / "e.plan").read_bytes() == b"plan"
    assert not list(tmp_path.glob("*.timings*"))


@pytest.mark.parametrize("made", [True, False])
def test_timings_go_into_the_bundle_where_there_are_any(tmp_path, monkeypatch, made):
    def built(name, src, out, job, orders, **given):
        (order,) = orders.values()
        if made:
            order.timing_cache.parent.mkdir(parents=True)
            order.timing_cache.write_bytes(b"timings")
        assert given["built_on"] == GPU

    monkeypatch.setattr(backend, "build_engines", built)
    monkeypatch.setattr(backend, "probe", lambda: Probe(True, version="11.4", identity=GPU))
    job = replace(JOB, cache=tmp_path / "store", params={"options": {"timing_cache": "bundle"}})
    backend.build(tmp_path, tmp_path, job)
    assert (tmp_path / "timing.cache").is_file() == made


# --- the table --------------------------------------------------------------------------------


def test_a_version_compatible_plan_is_inspected_by_a_runtime_that_may_run_its_code(build, tmp_path):
    build(Builder(), flags=("VERSION_COMPATIBLE",))
    assert (tmp_path / "e.txt").read_text() == '{"Layers": []}'
    build(Builder())


# --- progress and Ctrl-C ----------------------------------------------------------------------


def test_progress_is_told(build):
    heard = build(Builder(steps=4))
    assert heard == [("building engine", 0.0)]
    module = Builder(steps=2)
    module.during = lambda: module.told_config.progress_monitor.phase_start("Tactics", "Building engine", 9)
    assert build(module) == [("building engine", 0.0), ("tactics", 0.0), ("tactics", 0.5)]


def test_ctrl_c_stops_a_build_after_the_step_it_is_at(build):
    module = Builder(steps=100)
    taken = []

    def press():
        taken.append(1)
        if len(taken) == 3:
            # The handler alone: where tests before have used AMX, a signal's frame is larger than the stack that
            # pytest's faulthandler gives signals, and the kernel ends the process.
            signal.getsignal(signal.SIGINT)(signal.SIGINT, None)

    module.during = press
    with pytest.raises(KeyboardInterrupt):
        build(module)
    assert module.stopped
    assert len(taken) == 3


# --- failures ---------------------------------------------------------------------------------


def test_what_the_library_said_is_on_disk_before_it_fails(build, tmp_path):
    with pytest.raises(StageError, match="does not take this graph: no importer for Odd"):
        build(Builder(parses=False))
    assert (tmp_path / "e.log").read_text() == "[WARNING] an operator is odd\n"
    seen = []
    module = Builder(steps=1, told=((Severity.INFO, "so far"), (Severity.VERBOSE, "not this")))
    module.during = lambda: seen.append((tmp_path / "e.log").read_text())
    build(module)
    assert seen == ["[WARNING] an operator is odd\n[INFO] so far\n"], "a crash in here would leave this"


def test_a_graph_that_cannot_be_captured_is_refused_with_a_way_out(build):
    said = "BuilderFlag::kREQUIRE_USER_ALLOCATION is not compatible with networks that contain data-dependent shapes"
    with pytest.raises(StageError, match="data-dependent") as caught:
        build(Builder(builds=False, told=((Severity.ERROR, said),)))
    assert "cuda_graphs: false" in caught.value.hint
    with pytest.raises(StageError, match="no memory") as caught:
        build(Builder(builds=False, told=((Severity.ERROR, "no memory"),)))
    assert not caught.value.hint


def test_an_error_ends_with_the_last_words_of_the_log_which_goes_with_the_step(tmp_path, monkeypatch):
    def crashes(order, say, name):
        order.log.write_text("".join(f"[INFO] line {n}\n" for n in range(9)) + "[ERROR] said already\n")
        raise StageError(f"{name}: its process was killed by SIGSEGV; said already")

    monkeypatch.setattr(building, "compile_plan", crashes)
    monkeypatch.setattr(building, "promise", lambda path: Promise(frozenset(), frozenset(), frozenset()))
    order = Order("played_trt", "11.4", Path("m"), Path(), Path(), Path(), {})
    with pytest.raises(StageError, match=r"killed by SIGSEGV.*\n  its log ends with:\n  \[INFO\] line 4\n") as caught:
        building.build_engines("tensorrt", tmp_path, tmp_path, JOB, {"sm89": order}, fused_attention=True)
    assert caught.value.message.endswith("[INFO] line 8")


def test_the_card_says_what_was_built_on_which_gpu_and_the_digest_of_the_plan(tmp_path, monkeypatch):
    def makes(order, say, name):
        order.plan.write_bytes(b"plan")
        order.log.write_text("")
        order.table.write_text("{}")
        return 1

    monkeypatch.setattr(building, "compile_plan", makes)
    monkeypatch.setattr(building, "promise", lambda path: Promise(frozenset(), frozenset(), frozenset()))
    monkeypatch.setattr(layers, "parse_inspector", lambda text, log: {"summary": {}, "layers": []})
    order = Order("played_trt", "11.4", Path("m"), Path(), Path(), Path(), {})
    building.build_engines(
        "tensorrt", tmp_path, tmp_path, JOB, {"sm89": order}, fused_attention=False, built_on=GPU
    )  # fmt: skip
    measured = building.json.loads((tmp_path / "engine.json").read_text())["measured"]
    assert measured["built_on"] == GPU
    assert measured["engines"]["sm89"]["sha256"].startswith("64879f7d6b"), "sha256 of b'plan'"
