"""Polygraphy files: what is written is what Polygraphy reads, and its bisection finds the broken node."""

from __future__ import annotations

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


def test_the_commands_find_the_broken_node(tmp_path):
    folder, _ = written(tmp_path, BROKEN)
    found = polygraphy_files.run(folder)
    assert (found["agrees"], found["first_node"]) == (False, f"MatMul_{BROKEN}")
    assert "debug reduce" in Path(found["log"]).read_text()


def test_a_graph_that_agrees_is_said_to_and_not_searched(tmp_path):
    folder, _ = written(tmp_path, None)
    (folder / "reduced.onnx").write_bytes(b"of a run before")
    found = polygraphy_files.run(folder)
    assert (found["agrees"], found["first_node"]) == (True, None)
    assert not (folder / "values.json").exists()


def test_the_files_are_whole_and_polygraphy_reads_them(tmp_path):
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    folder, lines = written(tmp_path, BROKEN)
    assert load_json(str(folder / "inputs.json"))[0]["x"].shape == (4, 8)
    results = [RunResults.load(str(folder / f"{name}.json")) for name in ("reference", "engine")]
    assert [list(found.keys()) for found in results] == [["torch-fp32"], ["sdcompile-onnxruntime"]]
    script = (folder / "commands.sh").read_text().splitlines()
    assert all(any(row.startswith(line) for row in script) for line in lines)


def test_nvidia_engines_are_run_by_their_own_library_with_the_shapes_of_the_call():
    words = polygraphy_files.compare("tensorrt_rtx", {"x": (2, 4)}, 35)
    assert "--trt" in words
    assert words[words.index("--trt-opt-shapes") + 1] == "x:[2,4]"
    assert "--trt-opt-shapes" not in polygraphy_files.compare("openvino", {"x": (2, 4)}, 35)


def test_tensorrt_10_is_told_that_the_graphs_types_hold():
    assert "--strongly-typed" in polygraphy_files.compare("tensorrt", {"x": (2, 4)}, 35)
    assert "--trt-opt-shapes" in polygraphy_files.compare("tensorrt", {"x": (2, 4)}, 35)
    assert "--strongly-typed" in polygraphy_files.bisect("tensorrt", {"x": (2, 4)}, 35)
    assert "--strongly-typed" not in polygraphy_files.compare("tensorrt_rtx", {"x": (2, 4)}, 35), "it knows no other"


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_onnx_runtimes_engines_are_run_by_the_provider_they_are_for(provider):
    for command in (polygraphy_files.compare, polygraphy_files.bisect):
        words = command("onnxruntime", {"x": (2, 4)}, 35, provider)
        assert words[words.index("--onnxrt") + 1 :][:2] == ["--providers", provider]
        assert "--providers" not in command("onnxruntime", {"x": (2, 4)}, 35, "auto")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"agrees": True, "first_node": None}, "agrees with the reference"),
        ({"agrees": False, "first_node": "MatMul_1"}, "the first node that leaves it is MatMul_1"),
        ({"agrees": False, "first_node": ""}, "the search failed"),
    ],
)
def test_what_was_found_is_told_with_its_log(found, said):
    from sdcompile.console.pages import commands

    facts = {"folder": "d", "commands": {"unet": ["polygraphy run"]}, "found": {"unet": {**found, "log": "d/log"}}}
    told = str(list(commands(facts))[-1])
    assert said in told
    assert "d/log" in told
    assert len(list(commands({**facts, "found": {}}))) == 2


def test_a_missing_polygraphy_is_a_host_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    with pytest.raises(HostError, match="polygraphy is not installed"):
        polygraphy_files.write(tmp_path, "openvino", {}, {}, {}, None, 35)
