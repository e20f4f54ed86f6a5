"""A race of int8 against float: who won, which groups of layers take longer in int8, and what follows from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdcompile.backends import BACKENDS
from sdcompile.spec import ComponentSpec, Job, Range, TensorSpec
from sdcompile.steps import race

# As OpenVINO and ONNX Runtime name what they run (tiny model): kernels in the order of a call.
OPENVINO = [
    ("FakeQuantize_36880", 1.0),
    ("FakeQuantize_36880_abcd_acdb_unet.conv_in/Conv_0/WithoutBiases", 2.0),
    ("unet.conv_in/Conv_0/WithoutBiases,Multiply_32085,unet.conv_in/Conv_0", 4.0),
    ("MVN_36916", 8.0),
    ("unet.down_blocks.0.resnets.0.norm1/Add_0,unet.down_blocks.0.resnets.0.nonlinearity/Mul_0,FakeQuantize_9", 16.0),
    ("root/Split_0", 32.0),
]
ONNXRUNTIME = [
    ("DequantizeLinear_unet.conv_in.weight_1", 1.0),
    ("QuantizeLinear_sample_1", 2.0),
    ("unet.conv_in/Conv_0", 4.0),
    ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q/MatMul_0_quant", 8.0),
    ("unet.mid_block.resnets.0.conv1/Conv_0/QuickGeluFusion/", 16.0),
]


@pytest.mark.parametrize(
    ("rows", "groups"),
    [
        (OPENVINO, {"conv_in": 7.0, "down_blocks.0.resnets.0": 24.0, "": 32.0}),
        (
            ONNXRUNTIME,
            {
                "conv_in": 7.0,
                "down_blocks.1.attentions.0.transformer_blocks.0.attn1": 8.0,
                "mid_block.resnets.0": 16.0,
                "": 0.0,
            },
        ),
        ([], {"": 0.0}),
    ],
)
def test_kernels_belong_to_the_group_they_compute_for(rows, groups):
    assert race.by_group(rows) == groups


@pytest.mark.parametrize(
    ("rows", "wanted", "found"),
    [
        ({"a": (5.0, 9.0), "b": (4.0, 3.0), "c": (1.0, 0.5)}, 1.05, ["b", "c"]),
        ({"a": (5.0, 9.0), "b": (4.0, 3.0)}, 1.05, ["b"]),
        ({"a": (5.0, 9.0), "b": (4.0, 3.0)}, 3.0, []),  # even without b int8 would be far from what is wanted
        ({"a": (5.0, 9.0), "b": (4.0, 3.95)}, 1.05, []),  # half a hundredth of a call is not worth a build
        ({"a": (5.0, 5.05), "b": (4.0, 3.0)}, 1.0, []),  # nor is what would be left in int8
        ({"a": (9.0, 5.0), "b": (4.0, 3.0)}, 1.0, []),  # nothing would
    ],
)
def test_groups_are_left_in_float_where_that_can_pay(rows, wanted, found):
    assert race.slower(rows, 10.0, 12.0, wanted) == found


@pytest.fixture
def engines(tmp_path):
    spec = ComponentSpec("unet", (TensorSpec("x", ("R", 4), "float32"),), (TensorSpec("y", ("R", 4), "float32"),))
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    for role, precision in (("engine", "int8"), ("rival", "bf16")):
        (tmp_path / role).mkdir()
        job = Job("unet", {"family": "sd", "options": {}}, precision, spec, {"R": Range(1, 2, 2)})
        BACKENDS["stub"].build(weights, tmp_path / role, job)
    return {role: tmp_path / role for role in ("engine", "rival")} | {"onnx": quantized(tmp_path / "onnx")}


def quantized(folder: Path) -> Path:
    """Two products in int8, of the groups mid_block.resnets.0 and conv_out."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []
    constants += [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.int8(0), "z")]
    constants += [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")]
    value = "x"
    for number, name in enumerate(("unet.mid_block.resnets.0.conv1", "unet.conv_out")):
        out = "y" if number else "h"
        nodes += [
            helper.make_node("QuantizeLinear", [value, "s", "z"], [f"q{number}"], name=f"q{number}"),
            helper.make_node("DequantizeLinear", [f"q{number}", "s", "z"], [f"d{number}"], name=f"d{number}"),
            helper.make_node("MatMul", [f"d{number}", "w"], [out], name=f"{name}/MatMul_0"),
        ]
        value = out
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 4)) for name in "xy"]
    folder.mkdir()
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)), folder / "model.onnx")
    return folder


def raced(engines, tmp_path, speedup=1e-6, groups=True, of="quantize"):
    race.run(engines, tmp_path, Job("unet", {"backend": "stub", "of": of, "speedup": speedup, "groups": groups}))
    return json.loads((tmp_path / race.RACE).read_text())


@pytest.mark.parametrize(("wanted", "won"), [(1e-6, True), (1e6, False)])
def test_a_race_says_who_won(engines, tmp_path, wanted, won):
    told = raced(engines, tmp_path, wanted)
    assert (told["name"], told["rival"], told["won"]) == ("int8", "bf16", won)
    assert set(told["timings"]) == {"engine", "rival"}
    assert told["groups"] == {}, "the stub does not tell what it spends where"


def test_a_race_of_pruning_names_what_was_raced(engines, tmp_path):
    told = raced(engines, tmp_path, groups=False, of="prune")
    assert (told["of"], told["name"], told["rival"], told["slower"]) == ("prune", "pruned", "unpruned", [])


@pytest.mark.parametrize("asked", [True, False])
def test_a_race_clocks_groups_where_the_engine_tells_and_it_is_asked(engines, tmp_path, monkeypatch, asked):
    from dataclasses import replace

    def profile(folder, feeds, calls):
        slow = folder == engines["engine"]
        return [
            ("unet.mid_block.resnets.0.conv1/MatMul_0", 1.0 if slow else 2.0),
            ("unet.conv_out/MatMul_0", 3.0 if slow else 1.0),
        ]

    monkeypatch.setitem(BACKENDS, "stub", replace(BACKENDS["stub"], profile=profile))
    told = raced(engines, tmp_path, groups=asked)
    if asked:
        assert told["groups"] == {"mid_block.resnets.0": [1000, 2000], "conv_out": [3000, 1000]}
        assert told["slower"] == ["conv_out"]
    else:
        assert (told["groups"], told["slower"]) == ({}, [])
