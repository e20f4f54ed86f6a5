"""Where a call of an OpenVINO engine spends its time: by kind of operator and the precision it runs in.

    sdcompile build recipes/sd15-openvino-bf16.yaml && sdcompile build recipes/sd15-openvino-int8.yaml
    python scripts/operator_times.py artifacts/sd15-openvino-bf16.sdc artifacts/sd15-openvino-int8.sdc

Feeds are normal noise of the usual shapes. Times are those of OpenVINO's own counters (PERF_COUNT), the mean over
calls after the first; bundles take turns. Counting makes a call a little slower, so the sums are no bench.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that a fresh checkout runs without being installed

from sdcompile import bundle  # noqa: E402  (needs the path above)
from sdcompile.backends.base import Card, read_card  # noqa: E402

# Kinds of OpenVINO's CPU plugin -> how they are told together.
KINDS = {
    "Convolution": "convolutions", "FullyConnected": "linear layers", "MatMul": "other products",
    "ScaledDotProductAttention": "attention", "ScaledAttn": "attention", "Softmax": "softmax", "MVN": "norms",
    "Reorder": "reorders", "Convert": "conversions", "FakeQuantize": "quantizing", "Eltwise": "elementwise",
    "Subgraph": "elementwise", "Transpose": "moving", "Concatenation": "moving", "Concat": "moving",
    "Reshape": "moving", "Interpolate": "moving", "Split": "moving",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--component", default="unet")
    parser.add_argument("--calls", type=int, default=4)
    asked = parser.parse_args()
    requests = {path: opened(path, asked.component) for path in asked.bundles}
    spent: dict[Path, dict[tuple[str, str], float]] = {path: defaultdict(float) for path in requests}
    for number in range(asked.calls + 1):
        for path, (request, feeds) in requests.items():
            request.infer(feeds)
            if number:
                attentions = attentions_of(request.get_compiled_model())
                for node in request.profiling_info:
                    kind, precision = KINDS.get(node.node_type, "others"), node.exec_type.rpartition("_")[2]
                    kind = "attention" if node.node_name in attentions else kind
                    spent[path][kind, precision] += node.real_time.total_seconds() / asked.calls
    for path, times in spent.items():
        say(f"{path.name}: {sum(times.values()):.3f} s a call in operators")
        for (kind, precision), seconds in sorted(times.items(), key=lambda item: -item[1]):
            if seconds > 0.002 * sum(times.values()):
                say(f"| {kind} | {precision} | {seconds * 1e3:.0f} ms | {seconds / sum(times.values()):.1%} |")


def opened(path: Path, component: str) -> tuple[ov.InferRequest, Mapping[str, np.ndarray]]:
    """The component's engine, counting, and feeds of its usual shapes."""
    folder = path / bundle.read(path).folder_of(component)
    card, core = read_card(folder, "openvino"), ov.Core()
    feeds = feeds_of(card)
    model = core.read_model(folder / "model.xml")
    model.reshape({name: list(array.shape) for name, array in feeds.items()})
    precision = "f32" if card.precision == "fp32" else "bf16"
    settings: dict[str, Any] = {
        "PERF_COUNT": True, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision,
    }  # fmt: skip
    return core.compile_model(model, "CPU", settings).create_infer_request(), feeds


def attentions_of(compiled: ov.CompiledModel) -> set[str]:
    """The nodes that compute a whole attention; the plugin calls them by the kind of whatever it fuses."""
    names = ((op.get_friendly_name(), op.get_rt_info()) for op in compiled.get_runtime_model().get_ops())
    return {name for name, told in names if "softmax" in str(told["originalLayersNames"].value).lower()}


def feeds_of(card: Card) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {tensor.name: tensor.shape(card.shapes, "opt") for tensor in card.spec.inputs}
    return {
        name: np.full(shape, 500.0, np.float32) if name == "timestep" else random.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
