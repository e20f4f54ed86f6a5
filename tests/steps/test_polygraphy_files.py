"""Polygraphy files: what is written is what Polygraphy reads, and its bisection finds the broken node."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdcompile.errors import HostError
from sdcompile.steps import polygraphy_files

pytestmark = pytest.mark.tiny
pytest.importorskip("polygraphy", reason="needs pip install 'sdcompile[polygraphy]'")
onnx = pytest.importorskip("onnx")

LAYERS, BROKEN = 3, 1


def save_chain(folder: Path, broken: int | None = None) -> Path:
    """x -> MatMul_0 -> Relu_0 -> ... -> y; the weight of `MatMul_<broken>` is another one."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for layer in range(LAYERS):
        weight = random.standard_normal((8, 8)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight + (layer == broken), f"w{layer}"))
        out = "y" if layer == LAYERS - 1 else f"r{layer}"
        nodes.append(helper.make_node("MatMul", [value, f"w{layer}"], [f"m{layer}"], name=f"MatMul_{layer}"))
        nodes.append(helper.make_node("Relu", [f"m{layer}"], [out], name=f"Relu_{layer}"))
        value = out
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (4, 8)) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder


def answer(folder: Path, feeds) -> dict[str, np.ndarray]:
    import onnxruntime as ort

    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return {"y": session.run(["y"], feeds)[0]}


def written(folder: Path, broken: int | None) -> tuple[Path, list[str]]:
    exported, typed = save_chain(folder / "a"), save_chain(folder / "b", broken)
    feeds = {"x": np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)}
    lines = polygraphy_files.write(
        folder / "out", "onnxruntime", {"typed": typed, "exported": exported}, feeds, answer(exported, feeds),
        answer(typed, feeds), 60,
    )  # fmt: skip
    return folder / "out", lines


def run(line: str, folder: Path) -> int:
    command = shlex.split(line)
    command[0] = str(Path(sys.executable).parent / "polygraphy")
    # `debug reduce` runs its check through the same name.
    command = [command[0] if word == "polygraphy" else word for word in command]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode


def test_the_bisection_finds_the_broken_node(tmp_path):
    folder, (compare, values, bisect) = written(tmp_path, BROKEN)
    assert run(compare, folder) != 0
    assert run(values, folder) == 0
    assert run(bisect, folder) == 0
    reduced = onnx.load(folder / "reduced.onnx").graph.node
    assert reduced[-1].name == f"MatMul_{BROKEN}"


def test_a_graph_that_agrees_passes(tmp_path):
    folder, (compare, _, _) = written(tmp_path, None)
    assert run(compare, folder) == 0


def test_the_files_are_whole_and_polygraphy_reads_them(tmp_path):
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    folder, lines = written(tmp_path, BROKEN)
    assert load_json(str(folder / "inputs.json"))[0]["x"].shape == (4, 8)
    results = [RunResults.load(str(folder / f"{name}.json")) for name in ("reference", "engine")]
    assert [list(found.keys()) for found in results] == [["torch-fp32"], ["sdcompile-onnxruntime"]]
    assert (folder / "commands.sh").read_text().splitlines()[2:] == lines


def test_nvidia_engines_are_run_by_their_own_library_with_the_shapes_of_the_call():
    words = polygraphy_files.compare("tensorrt_rtx", {"x": (2, 4)}, 35)
    assert "--trt" in words
    assert words[words.index("--trt-opt-shapes") + 1] == "x:[2,4]"
    assert "--trt-opt-shapes" not in polygraphy_files.compare("openvino", {"x": (2, 4)}, 35)


def test_a_missing_polygraphy_is_a_host_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    with pytest.raises(HostError, match="polygraphy is not installed"):
        polygraphy_files.write(tmp_path, "openvino", {}, {}, {}, None, 35)
