"""The selftest: one report whatever happens, with every way to run on an NVIDIA GPU in it. Backends are only played."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdcompile import selftest
from sdcompile.backends import BACKENDS, Probe
from sdcompile.console import observer
from sdcompile.errors import HostError, StageError, VerifyError
from sdcompile.measure import bench, contenders, sources
from sdcompile.measure.peers import PEERS
from sdcompile.recipe import Recipe, known_names
from sdcompile.store import Store

PASSED = {"state": "passed", "version": "1", "timings": {"denoiser_call_ms": {"median": 1.0}}}


@pytest.fixture
def played(monkeypatch, tmp_path):
    """Ways whose rows a test decides: played(row of a way) -> a function that runs the selftest into a file."""

    def play(row, source=None):
        monkeypatch.setattr(selftest, "_row", lambda way, model, *_: row(way, model))
        return lambda: selftest.selftest(None, tmp_path / "out" / "report.json", None, source)  # type: ignore[arg-type]

    play.file = tmp_path / "out" / "report.json"
    return play


def test_every_way_makes_a_recipe_that_its_backend_can_build():
    for name, way in selftest.NVIDIA.items():
        model = {**(selftest._full("x") if name in selftest.FULL else selftest._TINY), "name": "x"}
        fields = {"version": 1, "family": "sd", "backend": way.backend, "precision": way.precision, **model}
        Recipe.model_validate({**fields, "build": dict(way.build)}, context=known_names())
        backend = BACKENDS[way.backend]
        assert way.precision in backend.realises
        assert backend.refuses(way.precision, backend.options(**way.build)) == []
    assert set(selftest.FULL) <= set(selftest.NVIDIA)
    assert all(PEERS[name].gpu for name in selftest.PEERS)


def test_a_fault_of_our_own_is_a_row_with_its_traceback_and_the_others_go_on(played, monkeypatch):
    def broken(*_, **__):
        raise AttributeError("'IBuilderConfig' object has no attribute 'x'")

    monkeypatch.setattr(selftest, "NVIDIA", {"stub-fp32": selftest.Way("stub", "fp32", {})})
    monkeypatch.setattr(selftest.run, "lay_out", broken)
    with pytest.raises(VerifyError, match="stub-fp32: AttributeError: 'IBuilderConfig'"):
        selftest.selftest(None, played.file, None)  # type: ignore[arg-type]
    row = json.loads(played.file.read_text())["backends"]["stub-fp32"]
    assert row["state"] == "failed"
    assert "in broken" in row["traceback"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def whole(monkeypatch, tmp_path, kept):
    """The selftest from recipe to report, with a backend that every machine has in the place of NVIDIA's."""
    ways = {"stub-fp32": selftest.Way("stub", "fp32", {})}
    monkeypatch.setattr(selftest, "NVIDIA", ways)
    monkeypatch.setattr(selftest, "FULL", tuple(ways))
    monkeypatch.setattr(selftest, "PEERS", ())
    file = tmp_path / "out" / "report.json"
    return file, lambda source: selftest.selftest(kept, file, observer(json_mode=True), source)


@pytest.mark.tiny
def test_a_way_is_built_placed_timed_and_raced_and_all_of_it_is_in_the_report(whole):
    file, run = whole
    run("builtin:tiny")
    report = json.loads(file.read_text())
    for row in (report["backends"]["stub-fp32"], report["full"]["backends"]["stub-fp32"]):
        assert row["state"] == "passed"
        assert row["timings"]["latents"] == {"on_device": False, "as_on_host": True}
        assert len(row["timings"]["image_s"]) == selftest._IMAGES
        assert row["timings"]["denoiser_call_ms"]["median"] > 0
    (raced,) = report["full"]["bench"]["contenders"]
    assert raced["name"] == "selftest-full-stub-fp32"
    assert report["full"]["bench"]["absent"] == {}
    assert (file.parent / "selftest-stub-fp32.sdc" / "manifest.json").is_file()


@pytest.mark.tiny
def test_latents_that_are_not_the_hosts_fail_the_selftest(whole, monkeypatch):
    timed = {"latents": {"on_device": True, "as_on_host": False}, "denoiser_call_ms": {"median": 1.0}}
    monkeypatch.setattr(selftest, "_timed", lambda bundle: timed)
    with pytest.raises(VerifyError, match="latents that stay on the device are not those of the host's loop"):
        whole[1](None)
    row = json.loads(whole[0].read_text())["backends"]["stub-fp32"]
    assert row["state"] == "failed"
    assert row["timings"] == timed


def test_a_provider_that_cannot_be_here_is_absent_with_the_reason(monkeypatch):
    probe = Probe(True, version="1", devices=("cpu",), missing={"cuda": "no NVIDIA driver was found here"})
    monkeypatch.setattr(selftest, "BACKENDS", {"onnxruntime": SimpleNamespace(probe=lambda: probe)})
    row = selftest._row(selftest.NVIDIA["onnxruntime-cuda-fp16"], {}, None, Path(), None)  # type: ignore[arg-type]
    assert row == {"state": "absent", "error": "provider cuda: no NVIDIA driver was found here"}


def test_what_was_found_before_a_crash_is_in_the_report(played):
    seen = []

    def row(way, model):
        seen.append(way)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return PASSED

    with pytest.raises(KeyboardInterrupt):
        played(row)()
    first, second = list(json.loads(played.file.read_text())["backends"].values())
    assert first["state"] == "passed"
    assert "did not come back" in second["error"]


def test_absent_backends_are_no_failure_and_one_failure_is(played):
    played(lambda way, model: {"state": "absent", "error": "not installed"})()
    with pytest.raises(VerifyError) as failed:
        played(lambda way, model: PASSED if way.backend != "tensorrt" else {"state": "failed", "error": "no kernel"})()
    assert len(failed.value.message.splitlines()) == 3
    assert str(played.file) in failed.value.hint


@pytest.fixture
def raced(monkeypatch):
    """Benchmarks that are only asked for: a list of (bundles, peers), and an error by name of a peer."""
    asked, errors = [], {}

    def ask(bundles, peers, **_):
        asked.append(([path.name for path in bundles], list(peers)))
        for name in peers:
            if name in errors:
                raise StageError(f"{name} failed: {errors[name]}")
        if "bundle" in errors:
            raise StageError("selftest-full-tensorrt-fp16 failed: out of memory")
        return {"contenders": [{"name": "x"}]}

    monkeypatch.setattr(bench, "bench", ask)
    monkeypatch.setattr(contenders, "python_of", lambda name: "python")
    monkeypatch.setattr(sources, "folders", lambda bundle, named: {"source": Path(named[0])})
    return asked, errors


def only_tensorrt(way, model):
    return PASSED if way.backend == "tensorrt" else {"state": "built", "not_run": "no driver"}


def test_full_size_bundles_that_ran_are_timed_beside_torch_on_the_gpu(played, raced):
    report = played(only_tensorrt, "sd15")()
    assert set(report["full"]["backends"]) == set(selftest.FULL)
    assert raced[0] == [(["selftest-full-tensorrt-fp16.sdc"], list(selftest.PEERS))]
    assert report["full"]["bench"] == {"contenders": [{"name": "x"}], "absent": {}}


def test_a_peer_that_fails_leaves_the_others_their_figures(played, raced):
    raced[1]["torch-compile-cuda-fp16"] = "no C compiler"
    told = played(only_tensorrt, "sd15")()["full"]["bench"]
    assert [peers for _, peers in raced[0]] == [list(selftest.PEERS), ["diffusers-cuda-fp16"]]
    assert told["contenders"]
    assert told["absent"] == {"torch-compile-cuda-fp16": "torch-compile-cuda-fp16 failed: no C compiler"}
    raced[1]["bundle"] = "x"
    assert "out of memory" in played(only_tensorrt, "sd15")()["full"]["bench"]["absent"]["bundles"]


def test_without_a_gpu_there_is_nothing_to_time_and_the_report_says_so(played, raced):
    told = played(lambda way, model: {"state": "built", "not_run": "no driver"}, "sd15")()["full"]["bench"]
    assert "no full-size engine ran here" in told["absent"]["bundles"]
    assert not raced[0]


def test_torch_on_the_gpu_cannot_take_part_where_there_is_none(monkeypatch):
    for version, why in (("2.13.0+cpu", "which has no CUDA"), ("2.13.0", "no NVIDIA driver")):
        monkeypatch.setattr(contenders.machine, "version", lambda name, version=version: version)
        monkeypatch.setattr(contenders.driver, "look", lambda: contenders.driver.Driver(reason="no NVIDIA driver"))
        with pytest.raises(HostError, match=why):
            contenders.python_of("diffusers-cuda-fp16")
    assert contenders.python_of("diffusers-fp32")
