"""NVIDIA engines where they run, on a GPU that is only played: what is called, in which order, and every refusal.

The played engine computes y = 2x (tests.backends.played_cuda). What it cannot show is what only a GPU can.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sdcompile.backends import Host, Probe, tensorrt_rtx
from sdcompile.backends.base import Card, write_card
from sdcompile.backends.trt import contexts, cuda, engine
from sdcompile.errors import SdcompileWarning, StageError
from sdcompile.spec import ComponentSpec, Range, TensorSpec
from tests.backends.played_cuda import SIZE, Code, FakeCuda, fake_trt

SPEC = ComponentSpec("unet", (TensorSpec("x", ("B", 3), "float32"),), (TensorSpec("y", ("B", 3), "float32"),))
CARD = Card(
    "tensorrt_rtx", "unet", "fp16", SPEC, {"B": Range(1, 2, 4)}, {"options": {}},
    {
        "version": tensorrt_rtx.VERSION,
        "engines": {"portable": {"plan": "portable.plan"}, "sm86": {"plan": "sm86.plan"}},
    },
)  # fmt: skip
ADA = Probe(
    available=True, version=tensorrt_rtx.VERSION, devices=("RTX 4090",),
    identity={"gpu": "RTX 4090", "architecture": "sm89", "driver": "CUDA 13.0"},
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write_card(tmp_path, CARD)
    for target in CARD.measured["engines"]:
        (tmp_path / f"{target}.plan").write_bytes(b"plan")
    return tmp_path


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an RTX 4090; gives the fake driver API."""
    api = FakeCuda()
    monkeypatch.setattr(cuda, "load", lambda: api)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_trt(api))
    return api


def opened(folder, host=None):
    return engine.open_plan("tensorrt_rtx", "tensorrt_rtx", folder, host or Host(cache=folder / "cache"), ADA)


def rows(count, start=0.0):
    return np.arange(start, start + 3 * count, dtype=np.float32).reshape(count, 3)


# --- running ----------------------------------------------------------------------------------


def test_outputs_are_right_belong_to_the_caller_and_feeds_stay_as_they_are(folder, gpu):
    running = opened(folder)
    first = running({"x": rows(2)})["y"]
    np.testing.assert_array_equal(first, 2 * rows(2))
    kept = first.copy()
    other = rows(4, 5)
    np.testing.assert_array_equal(running({"x": other[::1]})["y"], 2 * rows(4, 5))
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(other, rows(4, 5))
    np.testing.assert_array_equal(running({"x": np.asfortranarray(rows(2))})["y"], 2 * rows(2))


def test_a_shape_is_captured_after_its_first_call_and_replayed_from_then_on(folder, gpu):
    running = opened(folder)
    gpu.calls.clear()
    running({"x": rows(2)})
    first = [name for name in gpu.calls if name not in ("cuCtxSetCurrent",)]
    assert first == [
        "cuMemcpyHtoDAsync", "execute", "cuStreamSynchronize", "cuStreamBeginCapture", "execute", "cuStreamEndCapture",
        "cuGraphInstantiate", "cuGraphDestroy", "cuMemcpyDtoHAsync", "cuStreamSynchronize",
    ]  # fmt: skip
    gpu.calls.clear()
    np.testing.assert_array_equal(running({"x": rows(2, 9)})["y"], 2 * rows(2, 9))
    assert gpu.calls == [
        "cuCtxSetCurrent", "cuMemcpyHtoDAsync", "cuGraphLaunch", "cuMemcpyDtoHAsync", "cuStreamSynchronize",
    ]  # fmt: skip
    running({"x": rows(3)})
    assert gpu.calls.count("cuStreamBeginCapture") == 1, "another shape is another graph"


def frozen(array):
    array.setflags(write=False)
    return array


def test_a_constant_is_copied_once_and_whatever_may_have_changed_is_copied_again(folder, gpu):
    running = opened(folder)

    def copies(feed):
        before = gpu.calls.count("cuMemcpyHtoDAsync")
        np.testing.assert_array_equal(running({"x": feed})["y"], 2 * feed)
        return gpu.calls.count("cuMemcpyHtoDAsync") - before

    constant, changing = frozen(rows(2) + 0), rows(2)
    assert [copies(constant), copies(constant), copies(constant)] == [1, 0, 0]
    assert copies(frozen(rows(2, 5) + 0)) == 1, "another array"
    assert copies(constant) == 1, "which took its place"
    assert copies(changing) == 1
    changing[1, 2] = 99
    assert copies(changing) == 1, "changed in place"
    view = frozen(changing[:])
    assert copies(view) == 1
    changing[0, 0] = 7
    assert copies(view) == 1, "read-only, but what it is a view of is not"
    assert [copies(frozen(rows(1) + 0)), copies(constant)] == [1, 1]


def test_a_copy_that_failed_is_made_again(folder, gpu):
    running = opened(folder)
    first, second = frozen(rows(2) + 0), frozen(rows(2, 5) + 0)
    running({"x": first})
    for broken in ("cuMemcpyHtoDAsync", "cuStreamSynchronize"):
        gpu.fail = broken
        with pytest.raises(StageError, match=f"{broken} failed"):
            running({"x": second})
        gpu.fail = ""
    np.testing.assert_array_equal(running({"x": second})["y"], 2 * second)
    np.testing.assert_array_equal(running({"x": first})["y"], 2 * first)


def test_graphs_can_be_turned_off(folder, gpu):
    write_card(folder, replace(CARD, params={"options": {"cuda_graphs": False}}))
    running = opened(folder)
    for _ in range(2):
        np.testing.assert_array_equal(running({"x": rows(1)})["y"], 2 * rows(1))
    assert "cuStreamBeginCapture" not in gpu.calls


def test_no_more_graphs_are_kept_than_planned(folder, gpu, monkeypatch):
    monkeypatch.setattr(engine, "_GRAPHS", 2)
    running = opened(folder)
    for count in (1, 2, 3, 1):
        np.testing.assert_array_equal(running({"x": rows(count)})["y"], 2 * rows(count))
    assert gpu.calls.count("cuGraphExecDestroy") == 2


def test_closing_frees_everything_once(folder, gpu):
    running = opened(folder)
    running({"x": rows(1)})
    assert gpu.memory
    running.close()
    running.close()
    assert not gpu.memory
    assert gpu.calls.count("cuDevicePrimaryCtxRelease") == gpu.calls.count("cuDevicePrimaryCtxRetain") == 1
    assert gpu.calls[-2:] == ["cuStreamDestroy", "cuDevicePrimaryCtxRelease"]


def test_facts_name_the_device_and_which_engine_it_is(folder, gpu):
    facts = opened(folder).facts
    assert (facts["device"], facts["target"], facts["precision"]) == ("RTX 4090", "portable", "fp16")


def test_a_stripped_plan_gets_its_weights_back_before_it_runs(folder, gpu, monkeypatch):
    module = fake_trt(gpu)
    module.Refitter = lambda engine, log: SimpleNamespace(refit_cuda_engine=lambda: gpu.calls.append("refit") or True)
    module.OnnxParserRefitter = lambda refitter, log: SimpleNamespace(
        refit_from_file=lambda path: gpu.calls.append(path) or True
    )
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    write_card(folder, replace(CARD, params={"options": {"strip_plan": True}}))
    np.testing.assert_array_equal(opened(folder)({"x": rows(1)})["y"], 2 * rows(1))
    refitted = gpu.calls.index("refit")
    assert gpu.calls[refitted - 1] == str(folder / "model.onnx")
    assert gpu.calls.index("Runtime") < refitted < gpu.calls.index("execute")


# --- CUDA graphs and their contexts -----------------------------------------------------------


def test_every_graph_has_a_context_of_its_own_and_all_share_one_block_of_memory(folder, gpu, monkeypatch):
    running = opened(folder)
    for count in (2, 3, 2, 3):
        np.testing.assert_array_equal(running({"x": rows(count)})["y"], 2 * rows(count))
    assert gpu.calls.count("context") == gpu.calls.count("cuStreamBeginCapture") == 2
    assert gpu.calls.count("cuGraphLaunch") == 2
    one = opened(folder)
    shared = one._spare.context
    monkeypatch.setattr(one._contexts, "new", lambda: shared)
    for count in (2, 3):
        one({"x": rows(count)})
    assert np.isnan(one({"x": rows(2)})["y"]).any(), "with one context for all, a graph would be undefined"
    # x, y and the activations.
    assert len([size for size in gpu.memory.values() if len(size) == SIZE]) == 2, "one an engine"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"capturable": False}, "tensorrt_rtx cannot capture its work"),
        ({"captures": False}, "unet: the engine does not run: no reason given"),
    ],
)
def test_what_cannot_be_captured_runs_without_graphs_and_says_so_once(fault, why, folder, gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_trt(gpu, **fault))
    running = opened(folder)
    assert running.facts["cuda_graphs"], "so far"
    with pytest.warns(SdcompileWarning, match=f"unet: it runs without CUDA graphs: {why}"):
        first = running({"x": rows(2)})["y"]
    np.testing.assert_array_equal(first, 2 * rows(2))
    for count in (3, 2, 4):  # a second warning would be an error here
        np.testing.assert_array_equal(running({"x": rows(count)})["y"], 2 * rows(count))
    assert (running.facts["cuda_graphs"], running.facts["cuda_graphs_off"]) == (False, why)
    assert "cuGraphLaunch" not in gpu.calls
    assert gpu.calls.count("context") == 2, "that of the shape that was tried, and one for all others"
    running.close()
    assert not gpu.memory


@pytest.mark.parametrize("broken", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_a_driver_that_cannot_capture_is_no_fault_of_the_call(broken, folder, gpu):
    running = opened(folder)
    gpu.fail = broken
    with pytest.warns(SdcompileWarning, match=f"CUDA: {broken} failed"):
        np.testing.assert_array_equal(running({"x": rows(2)})["y"], 2 * rows(2))
    assert broken in running.facts["cuda_graphs_off"]


def test_streamed_weights_run_without_graphs_in_a_context_with_memory_of_its_own(folder, gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_trt(gpu, streams=True))
    write_card(folder, replace(CARD, params={"options": {"weight_streaming": True}}))
    running = opened(folder)
    assert running._engine.weight_streaming_budget_v2 == 7
    for count in (2, 3):
        np.testing.assert_array_equal(running({"x": rows(count)})["y"], 2 * rows(count))
    assert "cuStreamBeginCapture" not in gpu.calls
    assert gpu.calls.count("context") == 1
    assert running.facts["cuda_graphs_off"] == "weights are streamed"


def test_an_engine_without_a_context_is_a_stage_error(folder, gpu, monkeypatch):
    # One built with streamed weights, by its card without: the library gives no context.
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_trt(gpu, streams=True))
    with pytest.raises(StageError, match="unet: no execution context: no reason given") as caught:
        opened(folder)
    assert 'memory="low"' in caught.value.hint
    assert not gpu.memory


# --- kernels of TensorRT-RTX ------------------------------------------------------------------


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_kernels_made_on_the_machine_are_kept_once_a_shape_has_run_and_read_again(folder, gpu, tmp_path):
    host = Host(cache=tmp_path / "kernels")
    running = opened(folder, host)
    running({"x": rows(2)})
    assert len(kept(tmp_path / "kernels")) == 1, "also of a process that is killed now"
    assert kept(tmp_path / "kernels")[0].endswith("-RTX-4090.rtxcache")
    assert not [call for call in gpu.calls if call.startswith("cache:")]
    opened(folder, host)
    assert "cache:kernels" in gpu.calls
    (folder / "portable.plan").write_bytes(b"another")
    gpu.calls.clear()
    opened(folder, host)({"x": rows(2)})
    assert not [call for call in gpu.calls if call.startswith("cache:")], "another model's kernels"
    assert len(kept(tmp_path / "kernels")) == 2
    measured = {**CARD.measured, "engines": {"portable": {"plan": "portable.plan", "sha256": "7" * 64}}}
    write_card(folder, replace(CARD, measured=measured))
    opened(folder, host)({"x": rows(2)})
    assert f"{'7' * 32}-RTX-4090.rtxcache" in kept(tmp_path / "kernels")


def test_kernels_are_kept_where_the_users_caches_are_unless_a_host_names_a_folder(folder, gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    opened(folder, Host())({"x": rows(1)})
    assert len(kept(tmp_path / "xdg" / "sdcompile")) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="XDG is not for Windows")
def test_the_users_cache_is_where_the_platform_has_it(monkeypatch):
    for value, expected in (("/x", "/x/sdcompile"), ("x", "/h/.cache/sdcompile"), ("", "/h/.cache/sdcompile")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", "/h")
        assert contexts.user_cache() == Path(expected)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert contexts.user_cache() is None


def test_a_folder_that_takes_no_kernels_fails_no_call(folder, gpu, tmp_path):
    (tmp_path / "file").write_text("")
    running = opened(folder, Host(cache=tmp_path / "file"))
    np.testing.assert_array_equal(running({"x": rows(2)})["y"], 2 * rows(2))
    running.close()
    assert not gpu.memory


def test_few_files_of_kernels_are_kept_and_none_is_written_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(contexts, "_KEPT", 2)
    for number in range(4):
        contexts.KernelFile(tmp_path, f"{number}" * 64, "L4").write(b"kernels")
        os.utime(tmp_path / f"{str(number) * 32}-L4.rtxcache", (number, number))
    assert kept(tmp_path) == [f"{n * 32}-L4.rtxcache" for n in "23"]
    again = contexts.KernelFile(tmp_path, "3" * 64, "L4")
    assert again.read() == b"kernels"
    monkeypatch.setattr(contexts, "write_whole", lambda *_: pytest.fail("nothing changed"))
    again.write(b"kernels")


# --- failures ---------------------------------------------------------------------------------


def test_a_plan_that_does_not_load_is_a_stage_error_with_the_librarys_words(folder, gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_trt(gpu, loads=False))
    with pytest.raises(StageError, match=r"portable\.plan does not load: serialization assertion failed"):
        opened(folder)
    assert gpu.calls[-1] == "cuDevicePrimaryCtxRelease"


def test_a_launch_that_fails_is_a_stage_error(folder, gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_trt(gpu, runs=False))
    with pytest.raises(StageError, match="unet: the engine does not run"):
        opened(folder)({"x": rows(1)})


def test_a_cuda_fault_is_named_as_cuda_names_it(folder, gpu):
    gpu.fail = "cuMemAlloc"
    with pytest.raises(StageError, match="cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY"):
        opened(folder)


def test_a_shape_it_was_not_built_for_is_refused_before_anything_is_copied(folder, gpu):
    running = opened(folder)
    gpu.calls.clear()
    with pytest.raises(StageError, match=r"x has shape \(5, 3\); the engine was built for \(1, 3\) to \(4, 3\)"):
        running({"x": rows(5)})
    assert gpu.calls == ["cuCtxSetCurrent"]


# --- a driver that is old, and a GPU that is lost -----------------------------------------------


def test_a_driver_that_does_not_know_the_kernels_leaves_the_latents_on_the_host(folder, gpu):
    gpu.fail, gpu.fault = "cuModuleLoadData", Code.CUDA_ERROR_UNSUPPORTED_PTX_VERSION
    with pytest.warns(SdcompileWarning, match="latents come to the host at every step: .*UNSUPPORTED_PTX.*CUDA 12.0"):
        running = opened(folder)
    assert running.arrays is None
    assert not running.facts["device_latents"]
    assert "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in running.facts["device_latents_off"]
    np.testing.assert_array_equal(running({"x": rows(2)})["y"], 2 * rows(2))
    gpu.fail = ""
    assert opened(folder).facts["device_latents"]


@pytest.mark.parametrize(
    ("fault", "hint"),
    [
        (Code.CUDA_ERROR_OUT_OF_MEMORY, "weight_streaming"),
        (Code.CUDA_ERROR_LAUNCH_FAILED, "nvidia-smi"),
        (Code.CUDA_ERROR_NOT_READY, ""),
    ],
)
def test_faults_of_the_driver_come_with_what_to_do(fault, hint, folder, gpu):
    gpu.fail, gpu.fault = "cuMemHostAlloc", fault
    with pytest.raises(StageError, match=fault.name) as caught:
        opened(folder)
    assert hint in caught.value.hint
    assert bool(hint) == bool(caught.value.hint)


def test_a_lost_gpu_is_the_error_of_the_call_and_closing_does_not_hide_it(folder, gpu):
    running = opened(folder)
    running({"x": rows(2)})
    gpu.fail, gpu.fault = "all", Code.CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(StageError, match="CUDA_ERROR_LAUNCH_FAILED"):
        running({"x": rows(2)})
    running.close()
    with pytest.raises(StageError, match="cuInit failed"):
        opened(folder)
