"""NVIDIA's bindings for Python between sdcompile and a driver that is played: the arguments arrive as CUDA's C
interface has them.

The driver is a libcuda.so.1 of the tests' own, which is put before any other in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.played_cuda import SOURCE, compiled

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="libcuda.so.1 is Linux's")
def test_sampling_through_the_bindings_gives_the_bytes_of_the_host(tmp_path):
    pytest.importorskip("cuda.bindings.driver")
    shutil.copy(SOURCE, tmp_path)
    library = compiled(tmp_path, "libcuda_on_cpu.cpp", "libcuda.so.1")
    made = subprocess.run(
        [sys.executable, "-m", "tests.backends.through_bindings", tmp_path], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(library.parent), "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    assert found.pop("a missing term") is False, "a wrong sum would show"
    assert len(found) >= 10
    assert [name for name, right in found.items() if not right] == []
