"""How every session of ONNX Runtime is set up here. It opens none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime as ort

_LARGE_BYTES = 500_000_000
"""Graphs of more weights than this are run without memory patterns.

A pattern has all activations of a call lie in one block, found at the second call and kept beside what the first one
took. The UNet of SD 1.5 at 512x512 takes 6.6 GiB without it and 9.3 with it in fp32, 4.4 and 8.2 in int8 beside fp16,
in the same time; the tiny model, which is called in milliseconds, is a hundredth faster with it.
"""


def settings_of(
    path: Path, level: str, threads: int | None, *, optimized: Path | None = None, profile_to: Path | None = None
) -> ort.SessionOptions:
    """Of a session on the graph at `path`: level of optimization by its name in ONNX Runtime, threads (None = its
    choice), where to write the graph as it was rewritten, and with what a file starts that tells of every call."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    settings.enable_mem_pattern = sum(f.stat().st_size for f in path.parent.glob(f"{path.name}*")) < _LARGE_BYTES
    if threads is not None:
        settings.intra_op_num_threads = threads
    if optimized is not None:
        settings.optimized_model_filepath = str(optimized)
        settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    if profile_to is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, str(profile_to)
    # Spinning workers burn whole cores between calls (7x the CPU time of a text encoder call, measured).
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return settings
