"""Trained parts to the folder that ships: diffusers' layout, weights in fp16."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from tiny_training import diffusion

SHIPPED = ("tokenizer", "text_encoder", "unet", "vae", "vae_light", "scheduler", "model_index.json")


def write(
    destination: Path,
    tokenizer: CLIPTokenizer,
    tokenizer_folder: Path,
    encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    light: AutoencoderTiny,
) -> None:
    """Replace the model in `destination`; files that are not of the model stay."""
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".making-") as name:
        made, old = Path(name) / "made", Path(name) / "old"
        old.mkdir()
        _save(made, tokenizer, encoder, unet, vae, light)
        # As written by hand: every reader of vocab.json and merges.txt finds CLIP's layout.
        shutil.rmtree(made / "tokenizer")
        shutil.copytree(tokenizer_folder, made / "tokenizer")
        for part in SHIPPED:
            if (destination / part).exists():
                (destination / part).rename(old / part)
            (made / part).rename(destination / part)


def _save(made: Path, tokenizer, encoder, unet, vae, light) -> None:
    parts = {"text_encoder": encoder, "unet": unet, "vae": vae}
    halves = {name: _half(part) for name, part in parts.items()}
    pipeline = StableDiffusionPipeline(
        tokenizer=tokenizer,
        scheduler=diffusion.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **halves,
    )
    pipeline.save_pretrained(made, safe_serialization=True)
    _half(light).save_pretrained(made / "vae_light", safe_serialization=True)
    # diffusers 0.42 with transformers 5 loads the text encoder in the type its config names and the
    # rest in fp32, and the two then refuse to meet. Until they agree, the config names fp32.
    path = made / "text_encoder" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    _prefix(made / "text_encoder" / "model.safetensors")
    for path in made.rglob("*.json"):
        config = json.loads(path.read_text("utf-8"))
        config.pop("_name_or_path", None)
        if path.parent.name == "vae_light":
            config.pop("block_out_channels")  # diffusers 0.42 writes it and then warns of it
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _prefix(path: Path) -> None:
    """Name the text encoder's weights as every published one does: transformers 4 knows no other names, and 5 both."""
    weights = load_file(path)
    named = {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in weights.items()}
    save_file(named, path, metadata={"format": "pt"})


def _half(module: torch.nn.Module) -> torch.nn.Module:
    """A copy in fp16: training goes on in fp32."""
    twin = (
        type(module)(module.config) if isinstance(module, CLIPTextModel) else (type(module).from_config(module.config))
    )
    twin.load_state_dict(module.state_dict())
    return twin.half().eval()
