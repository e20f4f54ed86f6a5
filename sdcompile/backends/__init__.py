"""Backends: what turns a component into an engine, and an engine into arrays.

A backend is one file with one `BACKEND` record and one row in the table below. Its heavy
library is imported inside `build` and `open`; `probe` reads package metadata only, so that
`plan` and `doctor` work where the library is missing and can say how to get it. A backend
knows no recipe and no store.
"""

from __future__ import annotations

from sdcompile.backends import onnxruntime, openvino, reference, stub, tensorrt, tensorrt_rtx
from sdcompile.backends.base import Arrays, Backend, Device, Engine, Host, Probe

__all__ = ["BACKENDS", "STAND_IN", "Arrays", "Backend", "Device", "Engine", "Host", "Probe"]

BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        stub.BACKEND,
        reference.BACKEND,
        onnxruntime.BACKEND,
        openvino.BACKEND,
        tensorrt.BACKEND,
        tensorrt_rtx.BACKEND,
    )
}

STAND_IN = "onnxruntime"
"""What verification runs the ONNX with, on the CPU, where the engine built from it cannot run."""
