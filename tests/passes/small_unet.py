"""A small random UNet, recorded calls of it, and a pass run on it as a build would run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sdcompile.families import FAMILIES
from sdcompile.passes import PASSES
from sdcompile.passes.base import read_effect
from sdcompile.samples import Writer
from sdcompile.spec import Job, Say, say_nothing

FAMILY = FAMILIES["sd"]
UNET = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 24,
    "attention_head_dim": 4, "norm_num_groups": 8, "in_channels": 4, "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
VAE = {
    "block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "unet": UNET, "vae": VAE, "scheduler": {},
    "text_encoder": {"hidden_size": 24, "max_position_embeddings": 5},
}  # fmt: skip
SHAPES = FAMILY.shapes({"batch": (1, 1, 1), "height": (16, 16, 16), "width": (16, 16, 16)}, CONFIGS)


def saved(folder: Path) -> Path:
    """The UNet's checkpoint, written to `folder`."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(**UNET).save_pretrained(folder)
    return folder


def recorded(folder: Path, checkpoint: Path) -> Path:
    """Twelve calls of eight rows, a quarter of them held out, answered by the model of `checkpoint`."""
    import torch

    model, writer, draw = opened(checkpoint), Writer(folder), np.random.default_rng(0)
    for number in range(12):
        feeds = {
            "sample": draw.standard_normal((8, 4, 8, 8)).astype(np.float32),
            "timestep": np.full(8, 80.0 * number, np.float32),
            "encoder_hidden_states": draw.standard_normal((8, 5, 24)).astype(np.float32),
        }
        with torch.inference_mode():
            answer = model(*map(torch.from_numpy, feeds.values())).numpy()
        told = {"prompt": "x", "region": ("early", "mid", "late")[number % 3], "held_out": number % 4 == 3}
        writer.add("unet", told, feeds, {"out_sample": answer})
    writer.index([])
    return folder


def opened(folder: Path):
    from sdcompile import checkpoint

    return checkpoint.load("sd", "unet", folder, {})


SCHEDULER = '{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}'


def assets(folder: Path) -> Path:
    """What a plan hands to passes that want the noise schedule."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(SCHEDULER)
    return folder


def run(
    name: str, checkpoint: Path, out: Path, samples: Path, teacher: Path | None = None, state: Path | None = None,
    say: Say = say_nothing, pictures: Path | None = None, **params: Any,
) -> dict:  # fmt: skip
    """Run a pass with the inputs a plan would give it; returns its effect."""
    record = PASSES[name]
    full = record.params.model_validate(params)
    inputs = {"checkpoint": checkpoint}
    if record.calibrates(full):
        inputs["samples"] = samples
    told = {"family": "sd", **full.model_dump(mode="json")}
    known = {"teacher": teacher or checkpoint, "assets": assets(out.parent / "assets"), "pictures": pictures}
    inputs |= {role: folder for role in record.wants(full) if (folder := known[role]) is not None}
    job = Job("unet", told, "fp32", FAMILY.components(CONFIGS)["unet"], SHAPES, say=say, state=state)
    out.mkdir(parents=True)
    record.run(inputs, out, job)
    effect = read_effect(out)
    assert effect is not None
    return effect
