"""Latents on a GPU that is only played: the kernels against numpy bit for bit, and what is asked of the driver."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import inspect
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sdcompile.backends.trt.arrays import KERNELS, MOST_TERMS, DeviceArrays, Terms
from sdcompile.backends.trt.cuda import Gpu
from sdcompile.errors import StageError
from sdcompile.runtime.arrays import NUMPY
from sdcompile.runtime.guidance import guided
from tests.backends.played_cuda import SOURCE, FakeCuda, kernels

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")

# More than one block, and not a whole number of them.
SHAPE = (2, 3, 17, 11)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return kernels(tmp_path_factory.mktemp("kernels"))


def played(library):
    api = FakeCuda(library)
    arrays = DeviceArrays(Gpu(api), run=lambda feeds: {})
    arrays.begin()
    return api, arrays


@pytest.fixture
def arrays(library):
    return played(library)[1]


def some(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Values of many sizes, with zeros of both signs and numbers below the smallest normal one."""
    source = np.random.default_rng(seed)
    values = (source.standard_normal(shape) * 10.0 ** source.integers(-12, 12, shape)).astype(np.float32)
    values.flat[:6] = [0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38]
    return values


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


def all_sums(arrays: DeviceArrays) -> list[tuple[str, bool]]:
    """Every kernel, and whether it gives numpy's bytes."""
    three = [some(seed) for seed in range(3)]
    there = [arrays.put(array) for array in three]
    values = [0.7071067811865476, -1.3, 1 / 3]
    many = [(there[k % 3], (-1.1) ** k) for k in range(MOST_TERMS)]
    told = np.zeros(SHAPE, np.float32)
    told.flat[[0, 5, 300, -1]] = [np.nan, np.inf, -np.inf, np.nan]
    counters = arrays.counters(3)
    arrays.count_bad(arrays.put(told), counters, 1)
    arrays.count_bad(there[0], counters, 2)
    pairs = {
        "scaled": (arrays.scaled(there[0], 0.0682), NUMPY.scaled(three[0], 0.0682)),
        "weighted": (
            arrays.weighted(list(zip(there, values, strict=True))),
            NUMPY.weighted(list(zip(three, values, strict=True))),
        ),
        "weighted by all": (
            arrays.weighted(many),
            NUMPY.weighted([(three[k % 3], w) for k, (_, w) in enumerate(many)]),
        ),
        "guided": (arrays.guided(there[1], there[2], 7.3), guided(three[1], three[2], 7.3)),
        "rows": (arrays.joined(there)[1:5], np.concatenate(three)[1:5]),
    }
    sums = [(name, same(arrays.get(found), expected)) for name, (found, expected) in pairs.items()]
    return [*sums, ("count_bad", arrays.counted(counters).tolist() == [0, 4, 0])]


def test_every_kernel_gives_the_bytes_of_numpy(arrays):
    assert [name for name, right in all_sums(arrays) if not right] == []


def test_kernels_that_round_or_count_otherwise_are_seen(tmp_path):
    source = SOURCE.read_text()
    for written, broken in (
        ("(double)array[i], factor", "(double)array[i], (float)factor"),
        ("double total = 0.0", "float total = 0.0f"),
        # Contracted: the product is not rounded before it is added.
        (
            "__fadd_rn(negative[i], __fmul_rn(scale, __fsub_rn(positive[i], negative[i])))",
            "(float)(negative[i] + (double)scale * __fsub_rn(positive[i], negative[i]))",
        ),
        ("== 0x7f800000u", "> 0x7f800000u"),
    ):
        assert written in source
        source = source.replace(written, broken)
    red = {name for name, right in all_sums(played(kernels(tmp_path, source))[1]) if not right}
    assert red == {"scaled", "weighted", "weighted by all", "guided", "count_bad"}


def test_a_parameter_of_another_width_is_seen(library, monkeypatch):
    monkeypatch.setattr("sdcompile.backends.trt.arrays.ctypes.c_double", ctypes.c_float)
    assert not dict(all_sums(played(library)[1]))["scaled"]


# --- the PTX that is shipped --------------------------------------------------------------------


def test_the_ptx_was_made_from_this_source():
    first = KERNELS.read_text().splitlines()[0]
    assert first == f"// kernels.cu, sha256 {hashlib.sha256(SOURCE.read_bytes()).hexdigest()}", "run: make kernels"


def test_the_ptx_runs_from_turing_on_and_rounds_every_product_and_sum_by_itself():
    text = KERNELS.read_text()
    assert re.findall(r"^\.target (\w+)", text, re.MULTILINE) == ["sm_75"]
    assert re.findall(r"\.entry (\w+)\(", text) == ["scaled", "weighted", "guided", "count_bad"]
    floats = set(re.findall(r"^\s(\w+(?:\.\w+)*\.f(?:32|64))\s", text, re.MULTILINE))
    arithmetic = {name for name in floats if not name.startswith(("ld.", "st.", "mov.", "cvt."))}
    assert arithmetic == {"mul.rn.f64", "add.rn.f64", "sub.rn.f32", "mul.rn.f32", "add.rn.f32"}, "and no fma"
    assert ".ftz" not in text


def test_the_terms_have_the_size_the_kernel_reads():
    size = re.search(r"weighted_param_0\[(\d+)\]", KERNELS.read_text())
    assert size
    assert int(size[1]) == ctypes.sizeof(Terms)
    assert f"#define MOST_TERMS {MOST_TERMS}\n" in SOURCE.read_text()


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no ptxas here: the PTX is not assembled")
@pytest.mark.parametrize("target", ["sm_75", "sm_120"])
def test_the_ptx_assembles(target, tmp_path):
    subprocess.run(["ptxas", f"-arch={target}", "-o", tmp_path / "kernels.cubin", KERNELS], check=True)


def test_compiling_again_gives_the_same_ptx():
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("compile_kernels", root / "scripts" / "compile_kernels.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = KERNELS.read_text()
    if (found := script.version()) is None or f"// NVRTC {found} " not in made:
        pytest.skip(f"NVRTC here: {found}; the PTX was made by the one that `make kernels` installs")
    assert script.compiled() == made


# --- what is asked of the driver ----------------------------------------------------------------


def test_nothing_waits_but_reading(library):
    api, arrays = played(library)
    here = arrays.put(some(0))
    result = arrays.weighted([(arrays.scaled(here, 2.0), 1.0)])
    assert "cuStreamSynchronize" not in api.calls
    assert same(arrays.get(result), NUMPY.weighted([(NUMPY.scaled(some(0), 2.0), 1.0)]))


def test_pinned_memory_is_not_written_over_before_it_was_read(library, monkeypatch):
    arrays = played(library)[1]
    there = [arrays.put(some(seed)) for seed in range(3)]
    assert all(same(arrays.get(array), some(seed)) for seed, array in enumerate(there))
    monkeypatch.setattr(Gpu, "wait_for", lambda self, event: None)
    there = [arrays.put(some(seed)) for seed in range(3)]
    assert not same(arrays.get(there[0]), some(0)), "which takes waiting"


def test_sending_waits_for_no_more_than_the_copy_before(library):
    api, arrays = played(library)
    arrays.put(some(0))
    for seed in range(1, 4):
        arrays.scaled(arrays.put(some(seed)), 2.0)
    assert len(api.queue) == 4, "a kernel, the last copy, its event, and another kernel"
    assert "cuStreamSynchronize" not in api.calls


def test_blocks_are_used_again_and_views_keep_theirs(library):
    api, arrays = played(library)
    array = arrays.put(some(0))
    for _ in range(20):
        array = arrays.scaled(array, 1.0)
    assert api.calls.count("cuMemAlloc") == 2
    view = arrays.joined([array, array])[2:]
    del array
    other = arrays.scaled(view, 3.0)
    arrays.joined([other, other])
    assert same(arrays.get(view), some(0))


def test_laps_are_the_seconds_between_marks_of_this_run(library):
    api, arrays = played(library)
    for count in (4, 2):
        arrays.begin()
        for _ in range(count):
            arrays.mark()
        arrays.wait()
        np.testing.assert_allclose(arrays.laps(), [1e-3] * (count - 1))
    assert api.calls.count("cuEventCreate") == 4


@pytest.mark.parametrize("broken", ["cuLaunchKernel", "cuMemcpyDtoDAsync", "cuMemsetD32Async"])
def test_a_call_that_fails_is_named_as_cuda_names_it(library, broken):
    api, arrays = played(library)
    api.fail = broken
    with pytest.raises(StageError, match=f"CUDA: {broken} failed: CUDA_ERROR_OUT_OF_MEMORY"):
        all_sums(arrays)


def test_closing_the_gpu_frees_blocks_staging_kernels_and_events(library):
    api = FakeCuda(library)
    gpu = Gpu(api)
    arrays = DeviceArrays(gpu, run=lambda feeds: {})
    arrays.mark()
    kept = arrays.scaled(arrays.put(some(0)), 2.0)
    arrays.get(kept)
    gpu.close()
    assert not api.memory
    assert api.calls.count("cuModuleUnload") == api.calls.count("cuModuleLoadData") == 1
    assert api.calls.count("cuEventDestroy") == api.calls.count("cuEventCreate") == 2
    del kept


def test_the_bindings_have_these_functions_with_so_many_parameters(library):
    driver = pytest.importorskip("cuda.bindings.driver")
    api, arrays = played(library)
    arrays.mark()
    arrays.mark()
    all_sums(arrays)
    arrays.laps()
    arrays._gpu.capture(lambda: None)
    arrays._gpu.replay([])
    arrays._gpu.forget([])
    arrays._gpu.close()
    assert {"cuLaunchKernel", "cuMemcpyDtoDAsync", "cuEventElapsedTime", "cuModuleGetFunction"} <= set(api.arity)
    taken = {name: {len(inspect.signature(getattr(driver, name)).parameters)} for name in api.arity}
    assert taken == dict(api.arity)
