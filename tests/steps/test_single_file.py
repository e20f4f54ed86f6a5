"""Checkpoints that are one file: a small model is written in the original layout and must come back whole.

The names below are stated by hand from the original code, apart from the tables under test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from sdcompile import checkpoint
from sdcompile.bundle import sha256_of
from sdcompile.errors import RecipeError, StageError
from sdcompile.spec import Job, say_nothing
from sdcompile.steps import fetch
from tests.steps import layouts
from tests.steps.layouts import FOLDERS

pytestmark = pytest.mark.tiny

LAYERS, LEVELS = 2, (32, 64, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Stable Diffusion as a diffusers folder, fp32."""
    root = layouts.write(tmp_path_factory.mktemp("sources") / "model")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=LEVELS, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=8, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    text = CLIPTextModel(_text_config(LAYERS))
    unet.save_pretrained(root / "unet")
    vae.save_pretrained(root / "vae")
    text.save_pretrained(root / "text_encoder")
    DDIMScheduler().save_pretrained(root / "scheduler")
    return root


def _text_config(layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=16,
    )  # fmt: skip


def _weights(root: Path, folder: str) -> dict[str, Tensor]:
    return load_file(next((root / folder).glob("*.safetensors")))


def _renamed(name: str, *pairs: tuple[str, str]) -> str:
    for new, old in pairs:
        name = name.replace(new, old)
    return name


def _original_unet(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """input_blocks, middle_block and output_blocks number layers through; a sampler counts as one."""
    resnet = (
        ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
        ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"),
    )  # fmt: skip
    places = {
        "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
        "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
        "mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
    }  # fmt: skip
    number = 1
    for level in range(len(LEVELS)):
        places[f"down_blocks.{level}.resnets.0."] = f"input_blocks.{number}.0."
        places[f"down_blocks.{level}.attentions.0."] = f"input_blocks.{number}.1."
        places[f"down_blocks.{level}.downsamplers.0.conv."] = f"input_blocks.{number + 1}.0.op."
        number += 2
    for level in range(len(LEVELS)):
        for layer in range(2):
            number = 2 * level + layer
            places[f"up_blocks.{level}.resnets.{layer}."] = f"output_blocks.{number}.0."
            places[f"up_blocks.{level}.attentions.{layer}."] = f"output_blocks.{number}.1."
        attended = any(name.startswith(f"up_blocks.{level}.attentions") for name in weights)
        places[f"up_blocks.{level}.upsamplers.0.conv."] = f"output_blocks.{number}.{2 if attended else 1}.conv."
    for name, tensor in weights.items():
        new, old = next((new, old) for new, old in places.items() if name.startswith(new))
        rest = name.removeprefix(new)
        yield "model.diffusion_model." + old + (_renamed(rest, *resnet) if "resnets" in new else rest), tensor


def _original_vae(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The decoder counts its levels from the coarse end; attention is made of 1x1 convolutions."""
    for name, tensor in weights.items():
        old = _renamed(
            name, ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"), ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"),
            ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"), ("resnets", "block"),
            ("down_blocks", "down"), ("up_blocks.0", "up.#"), ("up_blocks.1", "up.0"), ("up.#", "up.1"),
        )  # fmt: skip
        if "attn_1" in old:
            old = _renamed(
                old, ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")
            )
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        yield f"first_stage_model.{old}", tensor


def _original_clip(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.items():
        yield f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}", tensor
    yield "cond_stage_model.transformer.text_model.embeddings.position_ids", torch.arange(16)[None]


def _original_open_clip(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """q, k and v are one matrix; a last layer that Stable Diffusion 2.x does not use is there too."""
    plain = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    whole = {
        "token_embedding.weight": plain["embeddings.token_embedding.weight"],
        "positional_embedding": plain["embeddings.position_embedding.weight"],
        "ln_final.weight": plain["final_layer_norm.weight"],
        "ln_final.bias": plain["final_layer_norm.bias"],
        "text_projection": torch.eye(32),
        "logit_scale": torch.ones(()),
    }
    for layer in range(LAYERS + 1):
        mine, its = f"encoder.layers.{min(layer, LAYERS - 1)}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [plain[f"{mine}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            whole[f"{its}attn.in_proj_{kind}"] = torch.cat(parts)
            whole[f"{its}attn.out_proj.{kind}"] = plain[f"{mine}self_attn.out_proj.{kind}"]
            whole[f"{its}ln_1.{kind}"] = plain[f"{mine}layer_norm1.{kind}"]
            whole[f"{its}ln_2.{kind}"] = plain[f"{mine}layer_norm2.{kind}"]
            whole[f"{its}mlp.c_fc.{kind}"] = plain[f"{mine}mlp.fc1.{kind}"]
            whole[f"{its}mlp.c_proj.{kind}"] = plain[f"{mine}mlp.fc2.{kind}"]
    for name, tensor in whole.items():
        yield f"cond_stage_model.model.{name}", tensor


def write_original(model: Path, file: Path, text: Any = _original_clip, dtype: torch.dtype = torch.float32) -> Path:
    """`model` as one file in the original layout, with what such files carry besides."""
    tensors = {
        **dict(_original_unet(_weights(model, "unet"))),
        **dict(_original_vae(_weights(model, "vae"))),
        **dict(text(_weights(model, "text_encoder"))),
        "alphas_cumprod": torch.linspace(1, 0, 1000),
    }
    stored = {n: (t.to(dtype) if t.is_floating_point() else t).contiguous().clone() for n, t in tensors.items()}
    save_file(stored, file)
    return file


def described(file: Path, config: str | None = "model", folders: tuple[str, ...] = FOLDERS) -> fetch.Source:
    return fetch.describe(
        file.name, base=file.parent, source_config=config, folders=folders, offline=True, hash_file=sha256_of
    )


def fetched(source: fetch.Source, folder: str, out: Path) -> Path:
    out.mkdir(parents=True)
    files = {path: f.sha256 for path, f in source.folder_files(folder).items()}
    root = source.locate((folder,), say_nothing)
    fetch.run({"source": root}, out, Job(folder, {"kind": source.kind, "folder": folder, "files": files}))
    return out


def same(ours: Path, component: str, theirs: Path) -> bool:
    """Do two folders make modules with equal weights?"""
    left = checkpoint.load("sd", component, ours, {}).state_dict()
    right = checkpoint.load("sd", component, theirs, {}).state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


COMPONENTS = [("unet", "unet"), ("vae_decoder", "vae"), ("vae_encoder", "vae"), ("text_encoder", "text_encoder")]


@pytest.mark.parametrize("text", [_original_clip, _original_open_clip])
def test_a_single_file_gives_back_the_modules_it_was_written_from(model: Path, tmp_path: Path, text: Any) -> None:
    file = write_original(model, model.parent / f"{text.__name__}.safetensors", text)
    source = described(file)
    assert (source.id, source.kind) == (f"file:{file.name}", "file")
    assert str(model.parent) not in repr(source)
    for folder in FOLDERS:
        fetched(source, folder, tmp_path / folder)
    for component, folder in COMPONENTS:
        assert same(tmp_path / folder, component, model / folder), component


def test_one_changed_weight_is_seen(model: Path, tmp_path: Path) -> None:
    file = write_original(model, model.parent / "changed.safetensors")
    tensors = load_file(file)
    tensors["model.diffusion_model.middle_block.1.proj_in.bias"][0] += 1e-3
    save_file(tensors, file)
    fetched(described(file), "unet", tmp_path / "unet")
    assert not same(tmp_path / "unet", "unet", model / "unet")


def test_half_precision_is_widened_once_on_disk(model: Path, tmp_path: Path) -> None:
    file = write_original(model, model.parent / "half.safetensors", dtype=torch.float16)
    source = described(file)
    for component, folder in COMPONENTS:
        out = tmp_path / component
        fetched(source, folder, out)
        assert {t.dtype for t in load_file(next(out.glob("*.safetensors"))).values()} == {torch.float32}
        assert {p.dtype for p in checkpoint.load("sd", component, out, {}).parameters()} == {torch.float32}


def test_each_folder_counts_its_own_share_of_the_file(model: Path) -> None:
    source = described(write_original(model, model.parent / "shares.safetensors"))
    shares = {folder: source.folder_files(folder)[fetch.CHECKPOINT].bytes for folder in FOLDERS}
    assert shares["unet"] == sum(t.numel() * 4 for t in _weights(model, "unet").values())
    assert source.fp32_bytes("unet") == shares["unet"]
    assert sum(shares.values()) < source.files[fetch.CHECKPOINT].bytes


def test_what_the_file_lacks_is_an_error_not_noise(model: Path, tmp_path: Path) -> None:
    file = write_original(model, model.parent / "lacking.safetensors")
    tensors = load_file(file)
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, file)
    with pytest.raises(StageError, match=r"the checkpoint has no conv_out.bias") as caught:
        fetched(described(file), "unet", tmp_path / "out")
    assert "source_config" in caught.value.hint


def test_a_config_of_another_model_is_an_error_that_names_the_tensor(model: Path, tmp_path: Path) -> None:
    file = write_original(model, model.parent / "misfit.safetensors")
    for other, key, value, message in (
        ("wide", "cross_attention_dim", 48, "has shape .* in the checkpoint and .* by unet/config.json"),
        ("flat", "layers_per_block", 2, "the checkpoint has no "),
    ):
        root = layouts.write(model.parent / other)
        config = json.loads((model / "unet" / "config.json").read_text(encoding="utf-8")) | {key: value}
        (root / "unet" / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(StageError, match=message):
            fetched(described(file, other), "unet", tmp_path / other)


@pytest.mark.parametrize(
    ("tensors", "guess"),
    [
        (["lora_unet_down_blocks_0.lora_up.weight"], "it is a LoRA"),
        (["conditioner.embedders.0.x", "model.diffusion_model.x"], "it is an SDXL checkpoint"),
        (["down_blocks.0.resnets.0.conv1.weight"], "one component of a diffusers model"),
        (["x.y"], "its tensors are named x.y"),
        (["model.diffusion_model.x", "first_stage_model.x"], "has no text_encoder"),
    ],
)
def test_a_file_that_is_no_whole_checkpoint_is_refused_with_a_guess(
    tmp_path: Path, tensors: list[str], guess: str
) -> None:
    layouts.write(tmp_path / "model")
    save_file({name: torch.zeros(2) for name in tensors}, tmp_path / "x.safetensors")
    with pytest.raises(RecipeError, match=guess):
        described(tmp_path / "x.safetensors")


def test_a_truncated_file_is_refused(model: Path, tmp_path: Path) -> None:
    file = write_original(model, tmp_path / "cut.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(RecipeError, match=r"source cut.safetensors is cut short"):
        described(file, str(model))


def test_stable_diffusion_2_needs_a_source_config_since_the_file_cannot_say_what_it_predicts(model: Path) -> None:
    file = write_original(model, model.parent / "two.safetensors", _original_open_clip)
    with pytest.raises(RecipeError, match=r"does not say which of them") as caught:
        described(file, None)
    assert "source_config" in caught.value.hint


def test_a_source_config_that_is_a_file_or_is_not_there_is_refused(model: Path) -> None:
    file = write_original(model, model.parent / "one.safetensors")
    with pytest.raises(RecipeError, match=r"source_config v1.yaml is a file"):
        described(file, "v1.yaml")
    with pytest.raises(RecipeError, match="source nowhere does not exist"):
        described(file, "nowhere")


def test_the_text_encoder_loads_with_and_without_the_prefix_of_older_files(model: Path, tmp_path: Path) -> None:
    config = (model / "text_encoder" / "config.json").read_text(encoding="utf-8")
    plain = {n.removeprefix("text_model."): t for n, t in _weights(model, "text_encoder").items()}
    old = {f"text_model.{name}": tensor for name, tensor in plain.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    for name, tensors in (("new", plain), ("old", old)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config, encoding="utf-8")
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    assert same(tmp_path / "old", "text_encoder", tmp_path / "new")
    assert same(tmp_path / "old", "text_encoder", model / "text_encoder")


def test_a_half_precision_variant_and_shards_load_as_fp32(model: Path, tmp_path: Path) -> None:
    root = layouts.write(tmp_path / "half")
    unet = UNet2DConditionModel.from_pretrained(model / "unet").half()
    for file in (root / "unet").iterdir():
        file.unlink()
    unet.save_pretrained(root / "unet", variant="fp16", max_shard_size="300KB")
    assert len(list((root / "unet").glob("*.safetensors"))) > 1
    source = fetch.describe("half", base=tmp_path, folders=("unet",), offline=True, hash_file=sha256_of)
    out = fetched(source, "unet", tmp_path / "out")
    loaded = checkpoint.load("sd", "unet", out, {}).unet.state_dict()
    assert {t.dtype for t in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name], t.float()) for name, t in unet.state_dict().items())
