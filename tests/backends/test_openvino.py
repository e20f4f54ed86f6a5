"""OpenVINO: shapes, choices made by measuring, and facts that tell what really runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sdcompile import machine
from sdcompile.backends import Host, openvino
from sdcompile.backends.base import read_card
from sdcompile.errors import HostError, StageError

pytestmark = pytest.mark.tiny
pytest.importorskip("openvino")


def test_static_and_dynamic_models_agree_at_every_shape(forms, tmp_path):
    model = forms("unet")
    static = model.engine("openvino", tmp_path / "static", shape_mode="static")
    dynamic = model.engine("openvino", tmp_path / "dynamic", shape_mode="dynamic")
    for size in ("min", "opt", "max"):
        feeds = model.feeds(size)
        np.testing.assert_allclose(static(feeds)["out_sample"], dynamic(feeds)["out_sample"], rtol=1e-4, atol=1e-5)
    assert (static.facts["shape_mode"], dynamic.facts["shape_mode"]) == ("static", "dynamic")


def test_auto_writes_its_choice_and_the_figures_behind_it(forms, tmp_path):
    model = forms("unet")
    measured = read_card(model.build("openvino", tmp_path), "openvino").measured
    timings = measured["timings"]["shape_mode"]
    assert measured["shape_mode"] == openvino.choose_shape_mode(timings)
    assert all(row["calls"] >= 1 and row["cpu_ms"] > 0 for row in timings.values())


def test_a_component_of_fixed_shapes_is_static_without_measuring(forms, tmp_path):
    from dataclasses import replace

    from sdcompile.spec import Range

    model = forms("unet")
    fixed = replace(model, shapes={letter: Range(r.opt, r.opt, r.opt) for letter, r in model.shapes.items()})
    measured = read_card(fixed.build("openvino", tmp_path), "openvino").measured
    assert measured == {"weights": "fp32", "shape_mode": "static", "hint": "fp32"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_facts_tell_what_openvino_says_it_compiled(precision, forms, tmp_path):
    import openvino as ov

    engine = forms("vae_decoder").engine("openvino", tmp_path, precision, shape_mode="static", half="asked")
    units = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    native = precision.upper() in units
    # A CPU with bf16 units and no fp16 units computes fp16 in bf16.
    others = {"fp32", "bf16"} if "BF16" in units else {"fp32"}
    assert engine.facts["precision"] in ({precision} if native else others)
    assert engine.facts["asked"] == precision
    assert engine.facts["streams"] == 1
    assert engine.facts["threads"] == 1


@pytest.mark.parametrize(("there", "pinned"), [(1, True), (2, False)])
def test_threads_are_pinned_only_where_they_are_all_there_are(there, pinned, forms, tmp_path, monkeypatch):
    # Those of two processes would be pinned to the same processors, and two workers be as slow as one.
    folder = forms("vae_decoder").build("openvino", tmp_path, shape_mode="static")
    monkeypatch.setattr(machine, "threads", lambda: there)
    assert openvino.open_engine(folder, Host(threads=1)).facts["pinned"] is pinned


def test_half_weights_are_stored_for_half_precisions_only(forms, tmp_path):
    sizes = {}
    for precision in ("fp32", "bf16"):
        folder = forms("vae_decoder").build("openvino", tmp_path / precision, precision, shape_mode="static")
        sizes[precision] = (folder / "model.bin").stat().st_size
        assert read_card(folder, "openvino").measured["weights"] == {"fp32": "fp32", "bf16": "fp16"}[precision]
    assert sizes["bf16"] < 0.6 * sizes["fp32"]


def test_weights_beyond_the_range_of_fp16_are_stored_in_fp32(forms, tmp_path):
    import onnx
    from onnx import numpy_helper

    model = forms("vae_decoder")
    graph = onnx.load(model.source("openvino") / "model.onnx")
    weight = next(w for w in graph.graph.initializer if w.data_type == onnx.TensorProto.FLOAT and len(w.dims) == 4)
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = 1e6
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    (tmp_path / "onnx").mkdir()
    onnx.save(graph, tmp_path / "onnx" / "model.onnx")
    (tmp_path / "engine").mkdir()
    openvino.build(tmp_path / "onnx", tmp_path / "engine", model.job("bf16", shape_mode="static"))
    assert read_card(tmp_path / "engine", "openvino").measured["weights"] == "fp32"


def test_only_the_last_shapes_stay_compiled(forms, tmp_path, monkeypatch):
    model = forms("vae_decoder")
    folder = model.build("openvino", tmp_path, shape_mode="static")
    monkeypatch.setattr(openvino, "_COMPILED_BYTES", 0)
    engine = openvino.open_engine(folder, Host(threads=1))
    first = engine(model.feeds("min"))["sample"]
    engine(model.feeds("max"))
    assert len(engine._requests) == 1
    np.testing.assert_array_equal(engine(model.feeds("min"))["sample"], first)


def test_a_cache_folder_holds_compiled_models_and_changes_no_number(forms, tmp_path):
    model = forms("vae_decoder")
    folder = model.build("openvino", tmp_path / "engine", shape_mode="dynamic")
    plain = openvino.open_engine(folder, Host(threads=1))(model.feeds())["sample"]
    for _ in range(2):
        cached = openvino.open_engine(folder, Host(threads=1, cache=tmp_path / "cache"))
        np.testing.assert_array_equal(cached(model.feeds())["sample"], plain)
    assert list((tmp_path / "cache").iterdir())


def test_large_models_are_not_cached_as_that_would_double_them(forms, tmp_path, monkeypatch):
    folder = forms("vae_decoder").build("openvino", tmp_path / "engine", shape_mode="dynamic")
    monkeypatch.setattr(openvino, "_COMPILED_BYTES", 0)
    openvino.open_engine(folder, Host(threads=1, cache=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_the_ir_names_no_path_of_the_machine_that_built_it(forms, tmp_path):
    model = forms("vae_decoder")
    folder = model.build("openvino", tmp_path, shape_mode="dynamic")
    text = (folder / "model.xml").read_text() + (folder / "engine.json").read_text()
    assert str(tmp_path) not in text
    assert str(model.source("openvino")) not in text


def test_a_damaged_engine_and_a_missing_library_are_told_in_words(forms, tmp_path, monkeypatch):
    folder = forms("vae_decoder").build("openvino", tmp_path, shape_mode="static")
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(HostError, match=r"backend openvino cannot run here") as missing:
        openvino.open_engine(folder, Host())
    assert "sdcompile[openvino]" in missing.value.hint
    monkeypatch.undo()
    (folder / "model.xml").write_text("<net")
    with pytest.raises(StageError, match="no whole OpenVINO model"):
        openvino.open_engine(folder, Host())
    (folder / "engine.json").write_text(json.dumps({"backend": "openvino"}))
    with pytest.raises(StageError, match="no whole engine"):
        openvino.open_engine(folder, Host())


def test_a_graph_openvino_does_not_take_is_a_stage_error(forms, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nothing of the kind")
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match=r"OpenVINO refuses model\.onnx"):
        openvino.build(tmp_path, tmp_path / "out", forms("unet").job())


def test_a_shape_the_model_cannot_take_is_a_stage_error(forms, tmp_path):
    model = forms("unet")
    engine = model.engine("openvino", tmp_path, shape_mode="static")
    feeds = {**model.feeds(), "encoder_hidden_states": np.zeros((2, 8, 5), np.float32)}
    with pytest.raises(StageError, match="unet: OpenVINO cannot"):
        engine(feeds)


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (("avx2",), "no bf16 or fp16 units"),
        (("avx2", "avx512_bf16", "amx_bf16"), "no fp16 units"),
        (("avx512_bf16", "avx512_fp16"), ""),
    ],
)
def test_the_probe_says_which_half_types_this_cpu_only_pretends_to(flags, note, monkeypatch):
    monkeypatch.setattr(machine, "cpu_features", lambda: flags)
    notes = " ".join(openvino.probe().notes)
    assert note in notes if note else not notes
