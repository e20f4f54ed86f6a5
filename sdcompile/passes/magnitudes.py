"""The largest magnitude that each value of an ONNX graph reaches on recorded feeds.

The graph is run in fp32 with the largest magnitude of every asked value as a further output: a CPU computes
fp16 graphs in fp32, so that an overflow would not show in theirs. It knows ONNX Runtime as a calculator only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.files import link
from sdcompile.passes import calculator
from sdcompile.passes.casting import MASK
from sdcompile.samples import Samples
from sdcompile.spec import Say

if TYPE_CHECKING:
    import onnx


def largest(
    folder: Path, values: Sequence[str], samples: Samples, names: Sequence[str], scratch: Path, say: Say
) -> dict[str, float]:
    """Value -> its largest magnitude over the samples `names`, as the fp32 graph `folder`/model.onnx computes it.

    Whatever stands for infinity in a mask (from 1e30 on) does not count. NaN counts as infinite. Raises HostError
    where ONNX Runtime is missing.
    """
    import math

    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    found = dict.fromkeys(values, 0.0)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="magnitudes-") as probed:
        session = calculator.session(_probe(graph, values, folder, Path(probed)))
        outputs = [f"largest_{index}" for index in range(len(values))]
        for number, name in enumerate(names):
            say(f"ranges, sample {number + 1} of {len(names)}", number / len(names))
            for feeds in calculator.calls(session, samples[name].feeds):
                for value, answer in zip(values, map(float, session.run(outputs, feeds)), strict=True):
                    if math.isnan(answer):
                        found[value] = math.inf
                    elif answer < MASK:
                        found[value] = max(found[value], answer)
    return found


def spread(samples: Samples) -> list[str]:
    """Names of samples: one call for every timestep region of every shape."""
    first: dict[tuple[Any, Any], str] = {}
    for name, told in samples.rows.items():
        first.setdefault((told["shape"], told["region"]), name)
    return list(first.values())


def _probe(graph: onnx.ModelProto, values: Sequence[str], folder: Path, scratch: Path) -> Path:
    """The graph with the largest magnitudes of `values` as further outputs; its weights are linked."""
    from onnx import TensorProto, helper, save

    for path in folder.glob("model.onnx.*"):
        link(path, scratch / path.name)
    # ONNX Runtime begins with what the last node needs. Were that the last value, every one before it would be
    # computed, and held, until its probe's turn came (the UNet of SD 1.5: more than 22 GiB instead of 2.9).
    for index, value in reversed(list(enumerate(values))):
        graph.graph.node.append(helper.make_node("Abs", [value], [f"magnitude_{index}"], name=f"magnitude_{index}"))
        graph.graph.node.append(
            helper.make_node(
                "ReduceMax", [f"magnitude_{index}"], [f"largest_{index}"], name=f"largest_{index}", keepdims=0
            )
        )
        graph.graph.output.append(helper.make_tensor_value_info(f"largest_{index}", TensorProto.FLOAT, []))
    save(graph, scratch / "model.onnx")
    return scratch / "model.onnx"
