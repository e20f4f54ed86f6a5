"""A bf16 graph that runs where there are no bf16 kernels: computed in fp32, every value still rounded to bf16.

ONNX Runtime's CPU provider casts bf16 but computes nothing in it (1.32 refuses a Conv or MatMul of bf16).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdcompile.files import link

if TYPE_CHECKING:
    import onnx


def widen(folder: Path, out: Path) -> None:
    """Write the wide form of `folder`/model.onnx to the new folder `out`; weights stay bf16 and are linked."""
    import onnx
    from onnx import TensorProto, helper

    out.mkdir(parents=True)
    for path in folder.glob("model.onnx.*"):
        link(path, out / path.name)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    graph = model.graph
    narrow = {w.name for w in graph.initializer if w.data_type == TensorProto.BFLOAT16} | {
        v.name for v in graph.value_info if v.type.tensor_type.elem_type == TensorProto.BFLOAT16
    }
    nodes: list[onnx.NodeProto] = []
    wide: set[str] = set()
    for node in graph.node:
        if node.op_type == "Cast":
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if name not in narrow:
                continue
            if name not in wide:
                wide.add(name)
                nodes.append(helper.make_node("Cast", [name], [_wide(name)], name=_wide(name), to=TensorProto.FLOAT))
            node.input[index] = _wide(name)
        _retype(node)
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in narrow:
                exact = f"{name}/exact"
                node.output[index] = exact
                nodes.append(helper.make_node("Cast", [exact], [name], name=exact, to=TensorProto.BFLOAT16))
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, out / "model.onnx")


def _wide(name: str) -> str:
    return f"{name}/wide"


def _retype(node: onnx.NodeProto) -> None:
    """ConstantOfShape says its output's type by an attribute."""
    from onnx import TensorProto, helper, numpy_helper

    for attribute in node.attribute:
        if node.op_type == "ConstantOfShape" and attribute.t.data_type == TensorProto.BFLOAT16:
            value = float(numpy_helper.to_array(attribute.t).reshape(-1)[0])
            attribute.t.CopyFrom(helper.make_tensor("value", TensorProto.FLOAT, [1], [value]))
