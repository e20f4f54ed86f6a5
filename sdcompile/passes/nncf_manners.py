"""NNCF as it runs in a build: without its progress bars, its telemetry and its memory-hungry sessions."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace


@contextmanager
def lean_sessions() -> Iterator[None]:
    """Have NNCF run graphs without ONNX Runtime's arena, its memory plan and its rewriting.

    NNCF (3.4) makes an output of every tensor it measures and takes no session options. Fitting the UNet of SD 1.5
    peaks at 10.9 GiB instead of 15.2, and takes no longer.
    """
    import onnxruntime as ort
    from nncf.onnx import engine

    class Options(ort.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.enable_cpu_mem_arena = self.enable_mem_pattern = False
            self.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL

    theirs = engine.rt
    engine.rt = SimpleNamespace(SessionOptions=Options, InferenceSession=ort.InferenceSession)
    try:
        yield
    finally:
        engine.rt = theirs


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
