"""An ONNX graph as OpenVINO IR on disk, with weights stored as narrow as they may be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.backends import mapped
from sdcompile.backends.openvino_graphs import fits_fp16
from sdcompile.errors import HostError, StageError

if TYPE_CHECKING:
    import openvino as ov

HINT = "pip install 'sdcompile[openvino]'"


def import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise HostError(f"backend openvino cannot run here: {error}", HINT) from error
    return openvino


def convert(core: ov.Core, source: Path, out: Path, precision: str, weights: str) -> str:
    """Write `out/model.xml` and `out/model.bin`; returns how weights are stored, "fp32" or "fp16".

    fp32 recipes keep fp32 weights. For fp16 and bf16, "auto" stores fp16 (half the disk and half
    the mapped memory, 11 bits of mantissa where bf16 has 8) unless a weight leaves fp16's range.
    """
    try:
        model = core.read_model(source)
    except RuntimeError as error:
        raise StageError(f"OpenVINO refuses {source.name}: {reason(error)}") from error
    with mapped.pages_released(source.parent):
        if weights == "auto":
            weights = "fp32" if precision == "fp32" or not fits_fp16(model) else "fp16"
        import_openvino().save_model(model, out / "model.xml", compress_to_fp16=weights == "fp16")
    del model
    mapped.trim()
    return weights


def reason(error: Exception) -> str:
    """The last telling line of an OpenVINO error, which starts with its source position."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
