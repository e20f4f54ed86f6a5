"""ONNX Runtime as a calculator: what a graph gives in float, pairs included, with weights that stay mapped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdcompile.errors import HostError

if TYPE_CHECKING:
    import onnxruntime as ort

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
