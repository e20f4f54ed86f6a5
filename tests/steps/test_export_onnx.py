"""Export: the ONNX file computes what torch does, at every size it promises, and says which module is where."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdcompile.families import FAMILIES
from sdcompile.spec import Job, Range

pytestmark = pytest.mark.tiny

FAMILY = FAMILIES["sd"]
REQUEST = {"batch": (1, 1, 2), "height": (64, 64, 128), "width": (64, 64, 96)}
# Relative to the largest value: fp32 in another order of operations.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A source folder with the features SD 1.x and 2.x differ in: v2's head list and linear projections, LCM's
    guidance embedding, a GELU text encoder."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source")
    UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, attention_head_dim=(2, 4),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=True, norm_num_groups=16, sample_size=16, time_cond_proj_dim=32,
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8, scaling_factor=0.4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    ).save_pretrained(folder / "vae")  # fmt: skip
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=600, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
            max_position_embeddings=20, hidden_act="gelu", eos_token_id=599, bos_token_id=598,
        )
    ).save_pretrained(folder / "text_encoder")  # fmt: skip
    return folder


def configs(source: Path) -> dict:
    read = {name: json.loads((source / name / "config.json").read_text()) for name in ("unet", "vae", "text_encoder")}
    return {**read, "scheduler": {"prediction_type": "v_prediction"}}


def job(source: Path, component: str, attention: str = "sdpa", **params: object) -> Job:
    facts = FAMILY.facts(configs(source))
    return Job(
        component,
        {"family": "sd", "opset": 20, "attention": attention, "multiples": facts["multiples"], **params},
        spec=FAMILY.components(configs(source))[component],
        shapes=FAMILY.shapes(REQUEST, configs(source)),
    )


def export(source: Path, out: Path, work: Job) -> Path:
    from sdcompile.steps import export_onnx

    out.mkdir(parents=True, exist_ok=True)
    export_onnx.run({"checkpoint": source / FAMILY.folders[work.component]}, out, work)
    return out


def feeds(work: Job, which: str) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(7)
    made = {}
    for tensor in work.spec.inputs:
        shape = tensor.shape(work.shapes, which)
        made[tensor.name] = (
            draw.integers(0, 590, shape) if tensor.dtype == "int64" else draw.standard_normal(shape).astype(np.float32)
        )
    return made


def worst_error(source: Path, onnx_folder: Path, work: Job, which: str) -> float:
    """Largest difference between ONNX Runtime and torch, relative to torch's largest value."""
    import onnxruntime
    import torch

    from sdcompile import checkpoint

    arrays = feeds(work, which)
    session = onnxruntime.InferenceSession(onnx_folder / "model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, arrays)[0]
    module = checkpoint.load("sd", work.component, source / FAMILY.folders[work.component], work.params)
    with torch.inference_mode():
        wanted = module(*(torch.from_numpy(array) for array in arrays.values())).numpy()
    assert got.shape == wanted.shape == work.spec.outputs[0].shape(work.shapes, which)
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="module")
def unet(source, tmp_path_factory) -> Path:
    return export(source, tmp_path_factory.mktemp("unet"), job(source, "unet"))


@pytest.fixture(scope="module")
def text_encoder(source, tmp_path_factory) -> Path:
    return export(source, tmp_path_factory.mktemp("text"), job(source, "text_encoder"))


@pytest.mark.parametrize("which", ["min", "opt", "max"])
def test_the_unet_in_onnx_computes_what_torch_does(source, unet, which):
    assert worst_error(source, unet, job(source, "unet"), which) < TOLERANCE


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
def test_the_vae_in_onnx_computes_what_torch_does(source, tmp_path, component):
    work = job(source, component)
    folder = export(source, tmp_path, work)
    for which in ("min", "max"):
        assert worst_error(source, folder, work, which) < TOLERANCE


def test_the_text_encoder_in_onnx_computes_what_torch_does(source, text_encoder):
    assert worst_error(source, text_encoder, job(source, "text_encoder"), "max") < TOLERANCE


def test_a_changed_weight_is_seen(source, unet, tmp_path):
    import onnx

    model = onnx.load(unet / "model.onnx")
    weight = next(w for w in model.graph.initializer if w.name.endswith("conv_in.weight"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0, 0, 0] += 1.0
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    assert worst_error(source, tmp_path, job(source, "unet"), "opt") > 10 * TOLERANCE


def test_fused_attention_computes_the_same(source, tmp_path):
    import onnx

    work = job(source, "unet", attention="mha")
    folder = export(source, tmp_path, work)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    fused = [node for node in model.graph.node if node.op_type == "MultiHeadAttention"]
    assert len(fused) == 8, "a self- and a cross-attention in each of four transformer blocks"
    assert not any(node.op_type == "Softmax" for node in model.graph.node)
    for which in ("min", "max"):
        assert worst_error(source, folder, work, which) < TOLERANCE


def test_the_file_says_which_sizes_it_takes(unet):
    import onnx

    model = onnx.load(unet / "model.onnx", load_external_data=False)
    dims = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    assert dims["sample"] == ["R", 4, "2*h2", "2*w2"]
    assert dims["encoder_hidden_states"] == ["R", 20, 64]


def test_every_node_tells_its_torch_module(unet):
    import onnx

    model = onnx.load(unet / "model.onnx", load_external_data=False)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert any(name.startswith("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k/") for name in names)
    for node in model.graph.node:
        assert [entry.key for entry in node.metadata_props] == ["module"]
        assert node.name.startswith(f"{node.metadata_props[0].value or 'root'}/")


def test_the_file_holds_no_path_of_the_machine_that_wrote_it(unet):
    text = (unet / "model.onnx").read_bytes()
    for trace in (b"site-packages", b'File "', str(Path.home()).encode()):
        assert trace not in text


def test_exporting_again_in_another_process_gives_the_same_bytes(source, text_encoder, tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]);"
        "from test_export_onnx import export, job; source = Path(sys.argv[1]);"
        "export(source, Path(sys.argv[2]), job(source, 'text_encoder'))"
    )
    subprocess.run(
        [sys.executable, "-c", code, source, tmp_path, Path(__file__).parent], check=True, capture_output=True
    )
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / name).read_bytes() == (text_encoder / name).read_bytes()


def test_clip_skip_leaves_out_the_last_layers_as_diffusers_does(source):
    import torch
    from transformers import CLIPTextModel

    from sdcompile import checkpoint

    ids = torch.arange(20)[None]
    model = CLIPTextModel.from_pretrained(source / "text_encoder").eval()
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True).hidden_states
        inner = getattr(model, "text_model", model)
        wanted = inner.final_layer_norm(states[-2])
        skipped = checkpoint.load("sd", "text_encoder", source / "text_encoder", {"clip_skip": 1})(ids)
        whole = checkpoint.load("sd", "text_encoder", source / "text_encoder", {})(ids)
    assert torch.equal(skipped, wanted)
    assert not torch.allclose(whole, skipped)


def test_static_letters_become_constants():
    from sdcompile.spec import ComponentSpec, TensorSpec
    from sdcompile.steps.export_onnx import dynamic_shapes

    spec = ComponentSpec("x", (TensorSpec("a", ("R", 4, "h"), "float32"),), ())
    (axes,) = dynamic_shapes(spec, {"R": Range(2, 2, 2), "h": Range(8, 8, 64)}, {"h": 8})
    assert list(axes) == [2]
