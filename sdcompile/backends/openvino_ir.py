"""An ONNX graph as OpenVINO IR on disk: weights as narrow as they may be, quantized activations in OpenVINO's form."""

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
    fuse_quantization(model)
    with mapped.pages_released(source.parent):
        if weights == "auto":
            weights = "fp32" if precision == "fp32" or not fits_fp16(model) else "fp16"
        import_openvino().save_model(model, out / "model.xml", compress_to_fp16=weights == "fp16")
    del model
    mapped.trim()
    return weights


def fuse_quantization(model: ov.Model) -> int:
    """Turn the QuantizeLinear and DequantizeLinear pairs of activations into one FakeQuantize each; how many.

    A pair comes out of ONNX as FakeQuantize to integers, Convert there and back, Subtract of the zero point, Multiply
    by the scale. OpenVINO (2026.4) reads it as it stands, and has no convolution for int8 with a zero point where a
    CPU has AMX: fp32 ones run instead. A FakeQuantize from floats to floats, which is what its own quantizer writes,
    says the same and leaves it to choose unsigned integers.
    """
    opset = import_openvino().opset13
    count = 0
    for quantize in [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]:
        scaled = [node for integer in _readers(quantize, "Convert") for node in _dequantized(integer)]
        if not scaled:
            continue
        data, low, high = (quantize.input_value(k) for k in range(3))
        fused = opset.fake_quantize(data, low, high, low, high, quantize.get_attributes()["levels"])
        fused.set_friendly_name(quantize.get_friendly_name())
        for node in scaled:
            node.output(0).replace(fused.output(0))
        count += 1
    if count:
        model.validate_nodes_and_infer_types()
    return count


def _dequantized(integer: ov.Node) -> list[ov.Node]:
    """The last node of every DequantizeLinear that reads `integer`, with a zero point or without."""
    floats = _readers(integer, "Convert")
    shifted = [node for f in floats for node in _readers(f, "Subtract")]
    return [node for f in (*floats, *shifted) for node in _readers(f, "Multiply")]


def _readers(node: ov.Node, kind: str) -> list[ov.Node]:
    readers = [reader.get_node() for reader in node.output(0).get_target_inputs()]
    return [reader for reader in readers if reader.get_type_name() == kind]


def reason(error: Exception) -> str:
    """The last telling line of an OpenVINO error, which starts with its source position."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
