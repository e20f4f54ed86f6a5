"""ONNX Runtime as a calculator: what a graph gives in float, pairs included, with weights that stay mapped."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.errors import HostError

if TYPE_CHECKING:
    import onnxruntime as ort
    from numpy.typing import NDArray

POSITIONS = 4096
"""Latent positions that are computed at once: 16 rows of 16 x 16, one of 64 x 64. Two of these take 1.4 GiB more in
fp32, the scores of attention most of it, and no less time than one after the other."""

_HINT = "pip install 'sdcompile[onnxruntime]'"


def session(path: Path) -> ort.InferenceSession:
    """The graph at `path`, with quantize and dequantize pairs computed as float arithmetic.

    Raises HostError where ONNX Runtime is missing.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise HostError(f"graphs are measured with ONNX Runtime, which is missing: {error}", _HINT) from error

    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    # Packed and reordered weights are copies of those in the file, and an arena keeps what it ever held. On the UNet of
    # SD 1.5 they take 3 GiB and no call is faster for them (two threads, fp32: 18 to 20 s of processor time).
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.enable_cpu_mem_arena = settings.enable_mem_pattern = False
    settings.add_session_config_entry("session.disable_prepacking", "1")
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def rows_at_once(shapes: Collection[Sequence[int]]) -> int:
    """How many rows of a call, whose inputs have these shapes (rows first), `POSITIONS` allow; one at least."""
    return max(1, POSITIONS // max((math.prod(shape[2:]) for shape in shapes if len(shape) == 4), default=1))


def parts(shapes: Collection[Sequence[int]], inputs: Collection[Sequence[Any]]) -> list[slice]:
    """The rows of such a call in parts to compute one after the other; all at once where the graph, whose `inputs` have
    these dimensions (symbolic ones are no int), takes one number of rows alone."""
    total = next(iter(shapes))[0]
    fixed = any(isinstance(dims[0], int) for dims in inputs)
    rows = total if fixed else rows_at_once(shapes)
    return [slice(first, first + rows) for first in range(0, total, rows)]


def calls(session: ort.InferenceSession, feeds: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
    """`feeds` in parts (see `parts`)."""
    for rows in parts([array.shape for array in feeds.values()], [tensor.shape for tensor in session.get_inputs()]):
        yield {name: array[rows] for name, array in feeds.items()}
