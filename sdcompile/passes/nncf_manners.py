"""NNCF as it runs in a build: without its progress bars, its telemetry and its memory-hungry sessions."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CHANGED = "model.onnx.changed"
"""Where weights that NNCF changes are put, beside the file of the others."""

_LARGE_BYTES = 1 << 16


@contextmanager
def lean() -> Iterator[None]:
    """Have NNCF hold no copy of a graph's weights.

    NNCF (3.4) takes no session options, makes an output of every tensor it measures, weights among them, which ONNX
    Runtime then copies at every sample, keeps those that SmoothQuant changes in the graph and in copies of it, and at
    the end loads all weights into the graph it returns. Here sessions
    have no arena, no memory plan, no rewriting and no packed copy of weights; weights are measured once, from
    their file; and they stay in it, and those that change in the file `CHANGED`, in the folder of the graph given:
    the graph returned names them there.
    """
    import onnxruntime as ort
    from nncf.onnx import engine
    from nncf.onnx.graph import model_transformer
    from nncf.onnx.quantization import quantize_model
    from nncf.onnx.statistics.aggregator import ONNXStatisticsAggregator as Aggregator

    class Options(ort.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.enable_cpu_mem_arena = self.enable_mem_pattern = False
            self.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            self.add_session_config_entry("session.disable_prepacking", "1")

    theirs = engine.rt, quantize_model.load_external_data_for_model, Aggregator.collect_statistics
    set_initializer = model_transformer.set_initializer
    engine.rt = SimpleNamespace(SessionOptions=Options, InferenceSession=ort.InferenceSession)
    quantize_model.load_external_data_for_model = lambda model, folder: None
    Aggregator.collect_statistics = _collect(Aggregator.collect_statistics)
    model_transformer.set_initializer = _change(set_initializer)
    try:
        yield
    finally:
        model_transformer.set_initializer = set_initializer
        engine.rt, quantize_model.load_external_data_for_model, Aggregator.collect_statistics = theirs


def _collect(theirs: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """`theirs`, an aggregator's method, for all that is measured but weights."""
    from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
    from nncf.onnx.graph.node_utils import get_input_edges_mapping
    from nncf.onnx.graph.onnx_helper import get_array_from_tensor, get_name_to_node_map
    from nncf.tensor import Tensor

    def collect(self: Any, model: Any, graph: Any) -> None:
        everything, run = self.statistic_points, StatisticPointsContainer()
        # As its own method does, for what it registers.
        self.input_edges_mapping, self.node_mapping = get_input_edges_mapping(graph), get_name_to_node_map(model)
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        for point in (point for points in everything.values() for point in points):
            target = point.target_point
            # The port of another kind of point may be one of the node's outputs.
            weight = target.is_weight_target_point()
            name = self.node_mapping[target.target_node_name].input[target.port_id] if weight else None
            if name in weights:
                alone = StatisticPointsContainer({target.target_node_name: [point]})
                self._register_statistics({name: Tensor(get_array_from_tensor(model, weights[name]))}, alone)
            else:
                run.setdefault(target.target_node_name, []).append(point)
        self.statistic_points = run
        theirs(self, model, graph)
        self.statistic_points = everything

    return collect


def _change(theirs: Callable[[str, Any, Any], None]) -> Callable[[str, Any, Any], None]:
    """`theirs`, which puts a value into a graph, for small ones and graphs without external data."""
    import numpy as np
    from nncf.onnx.graph.model_metadata import MetadataKey, get_metadata
    from nncf.onnx.graph.onnx_helper import get_tensor
    from onnx import TensorProto, helper

    def change(name: str, model: Any, value: Any) -> None:
        folder = get_metadata(model, MetadataKey.EXTERNAL_DATA_DIR)
        if not folder or value.nbytes < _LARGE_BYTES:
            theirs(name, model, value)
            return
        tensor = get_tensor(model, name)
        array = np.ascontiguousarray(value, helper.tensor_dtype_to_np_dtype(tensor.data_type))
        with (Path(folder) / CHANGED).open("ab") as file:
            offset = file.tell()
            file.write(array.data)
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
        tensor.data_location = TensorProto.EXTERNAL
        for key, told in (("location", CHANGED), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(told))

    return change


@contextmanager
def quiet() -> Iterator[None]:
    """Import and run NNCF without its progress bars and advice, which would stand among a build's own lines,
    and without its telemetry, which would send what is built to others. What it refuses it raises."""
    os.environ.setdefault("NNCF_CI", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nncf
        from nncf.common.logging import track_progress

        shown = track_progress.track.__init__
        nncf.set_log_level(logging.ERROR)
        track_progress.track.__init__ = lambda self, *rest, **named: shown(self, *rest, **{**named, "disable": True})
        try:
            yield
        finally:
            track_progress.track.__init__ = shown
