"""Diffusers folders made of a few bytes, for tests that read files and never weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDERS = ("text_encoder", "unet", "vae")

CONFIGS: dict[str, dict[str, Any]] = {
    "model_index.json": {"_class_name": "StableDiffusionPipeline"},
    "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"},
    "unet/config.json": {"_class_name": "UNet2DConditionModel"},
    "vae/config.json": {"_class_name": "AutoencoderKL"},
    "text_encoder/config.json": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
    "tokenizer/tokenizer_config.json": {"model_max_length": 77},
    "tokenizer/vocab.json": {"a": 0},
}
WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


def safetensors(values: bytes, name: str = "weight", dtype: str = "BOOL") -> bytes:
    """A whole safetensors file with one tensor of one byte a value, which no test here computes with."""
    header = json.dumps({name: {"dtype": dtype, "shape": [len(values)], "data_offsets": [0, len(values)]}}).encode()
    return len(header).to_bytes(8, "little") + header + values


def write(root: Path) -> Path:
    """A whole folder: configs, tokenizer, one small safetensors file per component, a model card."""
    for path, config in CONFIGS.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(config), encoding="utf-8")
    (root / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    for path in WEIGHTS:
        (root / path).write_bytes(safetensors(path.encode()))
    (root / "README.md").write_text(
        "---\nlicense: creativeml-openrail-m\ntags:\n- test\n---\n# Model\n", encoding="utf-8"
    )
    return root


def shard(root: Path, stem: str = "diffusion_pytorch_model", infix: str = "") -> tuple[str, str]:
    """Replace the UNet's one file by two shards and an index; returns the shards' names."""
    folder = root / "unet"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = (f"{stem}{infix}-00001-of-00002.safetensors", f"{stem}{infix}-00002-of-00002.safetensors")
    for tensor, name in zip("ab", names, strict=True):
        (folder / name).write_bytes(safetensors(tensor.encode(), tensor))
    index = {"metadata": {"total_size": 2}, "weight_map": dict(zip("ab", names, strict=True))}
    (folder / f"{stem}.safetensors.index{infix}.json").write_text(json.dumps(index), encoding="utf-8")
    return names
