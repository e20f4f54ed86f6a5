"""Bound inputs and outputs of an ONNX Runtime session: the arrays of a plain run, and what is sent when.

Run on the CPU, whose memory plays the device's; what CUDA alone can show is not shown.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from sdcompile.backends import onnxruntime_binding
from sdcompile.backends.onnxruntime_binding import Bindings

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


@pytest.fixture
def session(tmp_path):
    """Two outputs of different shapes: y = x * text, and the sum of each row of it."""
    from onnx import TensorProto, helper

    x, text, y, total = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        for name, dims in (("x", ("B", "n")), ("text", ("B", "n")), ("y", ("B", "n")), ("total", ("B", 1)))
    )
    nodes = [
        helper.make_node("Mul", ["x", "text"], ["y"]),
        helper.make_node("ReduceSum", ["y", "axes"], ["total"], keepdims=1),
    ]
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "g", [x, text], [y, total], [axes])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture
def watched(session, monkeypatch):
    """What is sent to the device, and the number of the graph of every run."""
    seen = SimpleNamespace(sent=0, graphs=[], places=[])
    update, run = ort.OrtValue.update_inplace, session.run_with_iobinding

    def updating(value, array):
        seen.sent += 1
        update(value, array)

    def running(binding, options):
        seen.graphs.append(options.get_run_config_entry("gpu_graph_id"))
        bound = [*binding._bound_inputs.values(), *binding._bound_outputs.values()]
        seen.places.append([value.data_ptr() for value in bound if value is not None])
        run(binding, options)

    monkeypatch.setattr(ort.OrtValue, "update_inplace", updating)
    monkeypatch.setattr(session, "run_with_iobinding", running)
    return seen


def feeds(seed, rows=2, columns=3):
    x, text = np.random.default_rng(seed).standard_normal((2, rows, columns)).astype(np.float32)
    return {"x": x, "text": text}


def constant(array):
    made = array.copy()
    made.setflags(write=False)
    return made


def bound(session, *, graphs=False):
    return Bindings(session, ["y", "total"], "cpu", graphs)


def all_right(session, running):
    """Does every call give the bytes of a plain run? Shapes take turns, and a constant stays while `x` changes."""
    text = {rows: constant(feeds(9, rows)["text"]) for rows in (2, 4)}
    right = []
    for seed, rows in enumerate((2, 2, 4, 2, 4, 4)):
        given = {**feeds(seed, rows), "text": text[rows]}
        expected = session.run(["y", "total"], given)
        right.append([a.tobytes() for a in running(given)] == [a.tobytes() for a in expected])
    return all(right)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_bound_run_gives_the_bytes_of_a_plain_one(session, graphs):
    assert all_right(session, bound(session, graphs=graphs))


def test_an_array_that_is_taken_for_constant_is_seen(session, monkeypatch):
    monkeypatch.setattr(onnxruntime_binding, "is_constant", lambda array: True)
    running, given = bound(session), feeds(0)
    running(given)
    given["x"] *= 2
    assert running(given)[0].tobytes() != session.run(["y"], given)[0].tobytes()


def test_outputs_belong_to_the_caller(session):
    running = bound(session)
    first = running(feeds(0))
    kept = [array.copy() for array in first]
    running(feeds(1))
    running(feeds(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(array.flags.writeable and array.flags.owndata for array in first)


def test_a_constant_is_sent_once_and_what_may_have_changed_at_every_call(session, watched):
    running, text = bound(session), constant(feeds(9)["text"])

    def sent(given):
        before = watched.sent
        running(given)
        return watched.sent - before

    assert [sent({**feeds(seed), "text": text}) for seed in range(3)] == [2, 1, 1]
    assert sent({**feeds(3), "text": constant(text)}) == 2, "another array"
    given = {**feeds(4), "text": text}
    assert [sent(given), sent(given)] == [2, 1], "which took its place; `x` can be written to"
    view = text.copy()[:]
    view.setflags(write=False)
    assert [sent({**feeds(5), "text": view}), sent({**feeds(5), "text": view})] == [2, 2]


def test_a_feed_that_is_not_contiguous_is_taken(session):
    given = {name: np.asfortranarray(array) for name, array in feeds(0).items()}
    running = bound(session)
    for _ in range(2):
        assert running(given)[0].tobytes() == session.run(["y"], given)[0].tobytes()


def test_each_shape_is_captured_under_a_number_of_its_own_after_its_first_call(session, watched):
    running = bound(session, graphs=True)
    for rows in (2, 2, 4, 2, 4, 2):
        running(feeds(rows, rows))
    assert watched.graphs == ["-1", "1", "-1", "1", "2", "1"]
    first, second = watched.places[1], watched.places[4]
    assert len(first) == 4, "inputs and outputs"
    assert watched.places[3] == watched.places[5] == first, "addresses stay, for a graph reads and writes there"
    assert not set(first) & set(second)


def test_without_graphs_no_run_is_captured(session, watched):
    running = bound(session)
    for _ in range(3):
        running(feeds(0))
    assert watched.graphs == ["-1"] * 3


def test_shapes_beyond_what_a_session_can_keep_run_without_a_graph(session, watched, monkeypatch):
    monkeypatch.setattr(onnxruntime_binding, "SHAPES", 2)
    running = bound(session, graphs=True)
    for rows in (1, 1, 2, 2, 3, 3, 1, 1):
        given = feeds(rows, rows)
        assert running(given)[0].tobytes() == session.run(["y"], given)[0].tobytes()
    assert watched.graphs == ["-1", "1", "-1", "2", "-1", "-1", "-1", "-1"], "no number is used a second time"
