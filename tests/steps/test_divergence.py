"""Divergence: a fault put into an ONNX graph is named by the torch module it sits in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sdcompile import metrics
from sdcompile.families import FAMILIES
from sdcompile.spec import Job, Range

pytestmark = pytest.mark.tiny

FLOOR_DB = metrics.FLOORS["fp32"].min_snr_db
FAMILY = FAMILIES["sd"]
CONV = "unet.up_blocks.1.resnets.0.conv1"
LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"


def configs() -> dict:
    return {
        "unet": {
            "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
            "cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 8, "sample_size": 16,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        "vae": {"block_out_channels": (8, 8), "latent_channels": 4},
        "text_encoder": {"hidden_size": 32, "max_position_embeddings": 8},
        "scheduler": {},
    }  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("unet")
    UNet2DConditionModel(**configs()["unet"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def work() -> Job:
    shapes = FAMILY.shapes({"batch": (1, 1, 2), "height": (32, 32, 32), "width": (32, 32, 32)}, configs())
    return Job("unet", {"family": "sd"}, spec=FAMILY.components(configs())["unet"], shapes=shapes)


@pytest.fixture(scope="module")
def onnx_folder(checkpoint, work, tmp_path_factory) -> Path:
    from sdcompile.steps import export_onnx

    folder = tmp_path_factory.mktemp("onnx")
    params = {"family": "sd", "opset": 20, "attention": "sdpa", "multiples": FAMILY.facts(configs())["multiples"]}
    export_onnx.run({"checkpoint": checkpoint}, folder, Job("unet", params, spec=work.spec, shapes=work.shapes))
    return folder


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(3)
    return {
        "sample": draw.standard_normal((2, 4, 16, 16)).astype(np.float32),
        "timestep": np.full(2, 500, np.float32),
        "encoder_hidden_states": draw.standard_normal((2, 8, 32)).astype(np.float32),
    }


def damaged(folder: Path, out: Path, module: str, spoil) -> Path:
    """A copy of the ONNX in `folder` whose weight of `module` went through `spoil`."""
    import onnx
    from onnx import numpy_helper

    # onnx refuses to read weights through a file with several hard links, which engines built here have made.
    copy = Path(shutil.copytree(folder, out.with_name(out.name + "-copy")))
    model = onnx.load(copy / "model.onnx")
    shutil.rmtree(copy)
    mine = [n for n in model.graph.node if any((p.key, p.value) == ("module", module) for p in n.metadata_props)]
    names = {name for node in mine for name in node.input}
    weight = next(t for t in model.graph.initializer if t.name in names and len(t.dims) >= 2)
    weight.CopyFrom(numpy_helper.from_array(spoil(numpy_helper.to_array(weight)), weight.name))
    out.mkdir()
    onnx.save(model, out / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    return out


def one_weight_off(weight: np.ndarray) -> np.ndarray:
    changed = weight.copy()
    changed.flat[7] += np.float32(20 * np.abs(weight).max())
    return changed


def not_a_number(weight: np.ndarray) -> np.ndarray:
    changed = weight.copy()
    changed.flat[0] = np.nan
    return changed


def suspect(backend: str, checkpoint: Path, onnx_folder: Path, work: Job):
    pytest.importorskip(backend)
    from sdcompile.backends import BACKENDS
    from sdcompile.backends.base import card_from_job
    from sdcompile.steps import divergence

    return divergence.Suspect(BACKENDS[backend], card_from_job(backend, work), checkpoint, onnx_folder)


def test_every_comparable_module_of_a_sound_graph_agrees_with_torch(checkpoint, onnx_folder, work, feeds, tmp_path):
    import onnx

    from sdcompile import checkpoint as checkpoints
    from sdcompile.steps import divergence

    module = checkpoints.load("sd", "unet", checkpoint, {})
    graph = onnx.load(onnx_folder / "model.onnx", load_external_data=False)
    places = divergence.comparable(graph, divergence.executed(module, work.spec, feeds))
    doubtful = suspect("onnxruntime", checkpoint, onnx_folder, work)
    got = divergence._engine_values(doubtful, graph, places, feeds, tmp_path)
    rows = divergence.compare(module, work.spec, feeds, {p.module: v for p, v in zip(places, got, strict=True)})
    wrong = {name: row for name, row in rows.items() if row["snr_db"] < 80}
    assert not wrong
    with_weights = {name for name, part in module.named_modules() if any(True for _ in part.parameters(recurse=False))}
    assert with_weights <= set(rows), "every layer that has weights can be looked at"


@pytest.mark.parametrize(("backend", "module"), [("onnxruntime", CONV), ("onnxruntime", LINEAR), ("openvino", LINEAR)])
def test_a_perturbed_weight_is_named_by_its_module(backend, module, checkpoint, onnx_folder, work, feeds, tmp_path):
    from sdcompile.steps import divergence

    broken = damaged(onnx_folder, tmp_path / "onnx", module, one_weight_off)
    found = divergence.search(suspect(backend, checkpoint, broken, work), feeds, FLOOR_DB, tmp_path)
    assert found["module"] == module
    assert found["node"].startswith(module + "/")
    assert found["snr_db"] < FLOOR_DB <= found["previous"]["snr_db"]
    assert [p.name for p in tmp_path.iterdir()] == ["onnx"], "the probes are removed"


def test_the_search_goes_from_blocks_to_layers_when_few_values_fit(
    checkpoint, onnx_folder, work, feeds, tmp_path, monkeypatch
):
    from sdcompile.steps import divergence

    monkeypatch.setattr(divergence, "OUTPUTS_AT_ONCE", 12)
    said = []
    broken = damaged(onnx_folder, tmp_path / "onnx", CONV, one_weight_off)
    found = divergence.search(
        suspect("onnxruntime", checkpoint, broken, work), feeds, FLOOR_DB, tmp_path, lambda text, _: said.append(text)
    )
    assert found["module"] == CONV
    assert any("round 2" in text for text in said)
    assert len(found["table"]) < 30


def test_nan_in_a_weight_is_named_by_its_module(checkpoint, onnx_folder, work, feeds, tmp_path):
    from sdcompile.steps import divergence

    broken = damaged(onnx_folder, tmp_path / "onnx", CONV, not_a_number)
    found = divergence.search(suspect("onnxruntime", checkpoint, broken, work), feeds, FLOOR_DB, tmp_path)
    assert found["module"] == CONV
    assert found["finite"] is False
    json.dumps(found, allow_nan=False)


def test_a_sound_graph_has_no_layer_to_blame(checkpoint, onnx_folder, work, feeds, tmp_path):
    from sdcompile.steps import divergence

    found = divergence.search(suspect("onnxruntime", checkpoint, onnx_folder, work), feeds, FLOOR_DB, tmp_path)
    assert found["module"] is None
    assert "fuses" in found["reason"]


def test_weights_are_linked_into_the_probe_not_copied(checkpoint, onnx_folder, work, feeds, tmp_path, monkeypatch):
    from dataclasses import replace

    from sdcompile.steps import divergence

    real = suspect("onnxruntime", checkpoint, onnx_folder, work)
    links = []

    def build(src: Path, out: Path, job: Job) -> None:
        links.append((src / "model.onnx.data").stat().st_nlink)
        assert (src / "model.onnx.data").samefile(onnx_folder / "model.onnx.data")
        real.backend.build(src, out, job)

    watched = replace(real, backend=replace(real.backend, build=build))
    divergence.search(watched, feeds, FLOOR_DB, tmp_path)
    assert links
    assert min(links) >= 2


def test_a_missed_floor_is_a_report_that_names_the_layer(checkpoint, onnx_folder, work, feeds, tmp_path):
    """End to end: verify on a damaged engine says passed: false, keeps the worst input and names the module."""
    from sdcompile.backends import BACKENDS
    from sdcompile.backends.base import Host, card_from_job, write_card
    from sdcompile.samples import Writer
    from sdcompile.steps import report, verify

    reference = tmp_path / "reference"
    (reference / "checkpoint").mkdir(parents=True)
    for path in checkpoint.iterdir():
        (reference / "checkpoint" / path.name).hardlink_to(path)
    write_card(reference, card_from_job("reference", work))
    engine = BACKENDS["reference"].open(reference, Host())
    recorded = tmp_path / "samples"
    recorded.mkdir()
    told = {
        "prompt": "a red circle", "negative_prompt": "", "step": 3,
        "timestep": 500.0, "region": "mid", "shape": "opt",
    }  # fmt: skip
    writer = Writer(recorded)
    writer.add("unet", told, feeds, engine(feeds))
    writer.index([])

    reports = {}
    forms = {"sound": onnx_folder, "broken": damaged(onnx_folder, tmp_path / "onnx", CONV, one_weight_off)}
    for name, onnx_form in forms.items():
        built, out = tmp_path / f"{name}-engine", tmp_path / f"{name}-report"
        built.mkdir()
        out.mkdir()
        BACKENDS["onnxruntime"].build(onnx_form, built, work)
        floor = {"min_snr_db": FLOOR_DB, "min_cosine": metrics.FLOORS["fp32"].min_cosine}
        verify.run(
            {"engine": built, "samples": recorded, "checkpoint": checkpoint, "onnx": onnx_form}, out,
            Job("unet", {"family": "sd", "backend": "onnxruntime", "floor": floor}, spec=work.spec, shapes=work.shapes),
        )  # fmt: skip
        reports[name] = json.loads((out / "report.json").read_text())

    assert reports["sound"]["passed"]
    assert reports["sound"]["divergence"] is None
    broken = reports["broken"]
    assert not broken["passed"]
    assert broken["divergence"]["module"] == CONV
    kept = np.load(tmp_path / "broken-report" / broken["kept"])
    np.testing.assert_array_equal(kept["in.sample"], feeds["sample"])
    snr_db = metrics.snr_db(kept["ref.out_sample"], kept["got.out_sample"])
    assert snr_db == pytest.approx(broken["worst"]["snr_db"], abs=0.01)
    error = report.fault(broken, tmp_path / "broken-report")
    assert error.exit_code == 5
    for part in ("unet (onnxruntime, fp32)", CONV, "a red circle", "worst.npz", "timestep 500", "floor 60"):
        assert part in error.message
    assert "backend" in error.hint


def test_static_and_dynamic_ranges_are_both_probed(checkpoint, onnx_folder, work, feeds, tmp_path):
    """The probe keeps the built ranges; a feed of one row in a dynamic graph works too."""
    from sdcompile.steps import divergence

    assert work.shapes["R"] == Range(1, 2, 4)
    one = {name: array[:1] for name, array in feeds.items()}
    broken = damaged(onnx_folder, tmp_path / "onnx", CONV, one_weight_off)
    found = divergence.search(suspect("onnxruntime", checkpoint, broken, work), one, FLOOR_DB, tmp_path)
    assert found["module"] == CONV
