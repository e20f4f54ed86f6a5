"""Probing the largest magnitudes of a graph's values: in which order ONNX Runtime runs the probes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from sdcompile.passes import magnitudes

ort = pytest.importorskip("onnxruntime")

VALUES = ["v0", "v1", "v2", "v3"]


def ran(values: list[str], scratch: Path) -> list[str]:
    """A chain of four sines, probed at `values`: the nodes in the order they ran."""
    nodes = [helper.make_node("Sin", [f"v{n - 1}" if n else "x"], [f"v{n}"], name=f"sin_{n}") for n in range(4)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 3)) for name in ("x", "v3")]
    (scratch / "probed").mkdir(parents=True)
    graph = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]))
    settings = ort.SessionOptions()
    settings.enable_profiling, settings.profile_file_prefix = True, str(scratch / "profile")
    probed = magnitudes._probe(graph, values, scratch, scratch / "probed")
    session = ort.InferenceSession(probed, settings, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.ones((2, 3), np.float32)})
    rows = json.loads(Path(session.end_profiling()).read_text())
    return [row["name"].removesuffix("_kernel_time") for row in rows if row.get("cat") == "Node"]


def test_a_value_is_probed_before_the_next_one_is_made_so_that_it_need_not_be_held(tmp_path):
    order = ran(VALUES, tmp_path / "a")
    assert [order.index(f"largest_{n}") < order.index(f"sin_{n + 1}") for n in range(3)] == [True] * 3
    # The sibling: named from the last to the first, all values are made before any of these probes runs.
    order = ran(VALUES[::-1], tmp_path / "b")
    assert order.index("largest_3") > order.index("sin_3"), "largest_3 is then that of v0"


def test_the_order_of_probes_does_not_mix_up_their_values(tmp_path):
    nodes = [helper.make_node("Mul", ["x", "x"], ["a"], name="a"), helper.make_node("Neg", ["a"], ["b"], name="b")]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (2,)) for name in ("x", "b")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]))
    (tmp_path / "probed").mkdir()
    session = ort.InferenceSession(magnitudes._probe(model, ["x", "a"], tmp_path, tmp_path / "probed"))
    found = session.run(["largest_0", "largest_1"], {"x": np.array([-3, 2], np.float32)})
    assert [float(value) for value in found] == [3.0, 9.0]
