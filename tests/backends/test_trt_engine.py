"""NVIDIA engines where they run, on a GPU that is only played: what is called, in which order, and every refusal.

The played engine computes y = 2x (tests.backends.played_cuda). What it cannot show is what only a GPU can.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from sdcompile.backends import BACKENDS, Host, Probe, tensorrt_rtx
from sdcompile.backends.base import Card, write_card
from sdcompile.backends.trt import cuda, driver, engine, targets
from sdcompile.errors import HostError, StageError
from sdcompile.spec import ComponentSpec, Range, TensorSpec
from tests.backends.played_cuda import FakeCuda, fake_trt

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
    return engine.open_plan("tensorrt_rtx", "tensorrt_rtx", folder, host or Host(), ADA)


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


def test_kernels_made_on_the_machine_are_kept_where_the_host_allows(folder, gpu, tmp_path):
    host = Host(cache=tmp_path / "cache")
    opened(folder, host).close()
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name == "unet-portable-sm89.rtxcache"
    opened(folder, host).close()
    assert "cache:kernels" in gpu.calls


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


# --- refusals ---------------------------------------------------------------------------------


def test_without_a_driver_no_runtime_is_made_and_the_error_says_what_was_built(folder, gpu, monkeypatch):
    monkeypatch.setattr(driver, "look", lambda: driver.Driver(reason="no NVIDIA driver was found here"))
    monkeypatch.setattr("sdcompile.machine.version", lambda name: tensorrt_rtx.VERSION)
    with pytest.raises(HostError, match="was built for portable, sm86 and cannot run here: no NVIDIA driver") as caught:
        tensorrt_rtx.open_engine(folder, Host())
    assert "--set backend=openvino" in caught.value.hint
    assert not gpu.calls


def test_a_gpu_it_was_not_built_for_is_named_with_the_command_that_builds_for_it(folder, gpu):
    hopper = replace(ADA, identity={"gpu": "H100", "architecture": "sm90", "driver": "CUDA 13.0"})
    with pytest.raises(HostError, match=r"built for portable, sm86; the GPU here is H100 \(sm90\)") as caught:
        engine.fits(CARD, hopper)
    assert "--set backend=tensorrt " in caught.value.hint, "TensorRT-RTX has no such target"
    ada = replace(CARD, measured={**CARD.measured, "engines": {"sm86": {}}})
    with pytest.raises(HostError, match=r"built for sm86; the GPU here is RTX 4090 \(sm89\)") as caught:
        engine.fits(ada, ADA)
    assert "--set 'build.compute_capabilities=[sm89]'" in caught.value.hint


def test_another_version_of_the_library_is_refused(folder):
    with pytest.raises(HostError, match=r"built with version 1\.7\.1\.116 .* 1\.8\.0 is installed"):
        engine.fits(CARD, replace(ADA, version="1.8.0"))


def test_a_missing_library_and_missing_bindings_are_host_errors(folder, gpu, monkeypatch):
    with pytest.raises(HostError, match="tensorrt_rtx is not installed"):
        engine.fits(CARD, Probe(available=False, reason="tensorrt_rtx is not installed", hint="pip install x"))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(HostError, match="cuda-bindings is not installed"):
        cuda.load()


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


# --- choosing and looking ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "device", "chosen"),
    [
        (("portable", "sm89"), "sm89", "sm89"),
        (("portable", "sm89"), "sm86", "portable"),
        (("portable",), "sm75", None),
        (("portable",), "sm90", None),
        (("sm86",), "sm89", None),
        (("ampere_plus",), "sm90", "ampere_plus"),
        (("ampere_plus",), "sm75", None),
    ],
)
def test_a_gpu_gets_its_own_engine_else_the_portable_one(built, device, chosen):
    assert targets.choose(built, device) == chosen


class FakeLibrary:
    """libcuda.so.1 as ctypes sees it."""

    def __init__(self, count=1, init=0):
        self.count, self.init = count, init

    def cuInit(self, flags):  # noqa: N802
        return self.init

    def cuDriverGetVersion(self, version):  # noqa: N802
        version._obj.value = 13000
        return 0

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device, index):  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name, size, device):  # noqa: N802
        name.value = b"NVIDIA GeForce RTX 4090"
        return 0

    def cuDeviceTotalMem_v2(self, memory, device):  # noqa: N802
        memory._obj.value = 24 << 30
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0


def test_the_driver_tells_its_devices():
    found = driver.ask(FakeLibrary())
    assert found.devices == (driver.Device("NVIDIA GeForce RTX 4090", "sm89", 24 << 30),)
    assert found.identity == {"gpu": "NVIDIA GeForce RTX 4090", "architecture": "sm89", "driver": "CUDA 13.0"}
    assert found.reason == ""


def test_a_driver_without_a_gpu_and_one_that_does_not_start_are_reasons():
    assert driver.ask(FakeLibrary(count=0)).reason == "no NVIDIA GPU was found here"
    assert "cuInit: CUDA error 100" in driver.ask(FakeLibrary(init=100)).reason


def test_plans_refuse_what_no_compiler_could_build():
    backend = BACKENDS["tensorrt_rtx"]
    said = backend.refuses("fp32", backend.options(compute_capabilities=("sm75", "sm89")))
    assert said == ["fp32 engines cannot be built for sm75: Turing has no FP32 GEMM in TensorRT-RTX"]
    assert backend.refuses("fp16", backend.options(compute_capabilities=("sm75",))) == []
