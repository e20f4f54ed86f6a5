"""The names that configs mean are those of the modules that torch makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from sdcompile.families import FAMILIES
from sdcompile.models import tiny

pytestmark = pytest.mark.tiny

MODULES = FAMILIES["sd"].modules


def read(folder: str) -> dict[str, Any]:
    import json

    return json.loads((tiny.path() / folder / "config.json").read_text(encoding="utf-8"))


VARIED = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": (2, 1, 3),
    "transformer_layers_per_block": (1, 1, 2), "use_linear_projection": True, "block_out_channels": (32, 32, 64),
    "time_cond_proj_dim": 16, "mid_block_type": None, "norm_num_groups": 16, "cross_attention_dim": 128,
}  # fmt: skip


def made(component: str, configs: dict[str, Any]) -> set[str]:
    """Paths of the modules with weights, without their first name: what patterns are matched with."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from sdcompile.families import sd_torch

    def plain(config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if not key.startswith("_")}

    with torch.device("meta"):
        if component == "unet":
            whole: Any = sd_torch.Denoiser(UNet2DConditionModel(**plain(configs["unet"])))
        elif component == "text_encoder":
            whole = sd_torch.TextEncoder(CLIPTextModel(CLIPTextConfig(**plain(configs["text_encoder"]))), 0)
        else:
            wrap = sd_torch.VaeDecoder if component == "vae_decoder" else sd_torch.VaeEncoder
            whole = wrap(AutoencoderKL(**plain(configs["vae"])))
    paths = [name for name, module in whole.named_modules() if list(module.parameters(recurse=False))]
    return {path.partition(".")[2] or path for path in paths}


@pytest.mark.parametrize(
    ("component", "changes"),
    [
        ("unet", {}),
        ("unet", {"unet": VARIED}),
        ("text_encoder", {}),
        ("vae_decoder", {}),
        ("vae_encoder", {}),
        ("vae_decoder", {"vae": {"layers_per_block": 3, "use_post_quant_conv": False}}),
        ("vae_decoder", {"vae": {"block_out_channels": (16, 16, 32)}}),
        ("vae_encoder", {"vae": {"layers_per_block": 2, "mid_block_add_attention": False, "use_quant_conv": False}}),
    ],
)  # fmt: skip
def test_names_are_those_of_the_modules(component, changes):
    configs = {folder: {**read(folder), **changes.get(folder, {})} for folder in ("unet", "vae", "text_encoder")}
    assert set(MODULES(component, configs) or ()) == made(component, configs)


def test_sd15_has_686_tensors():
    unet = {
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "block_out_channels": (320, 640, 1280, 1280),
    }  # fmt: skip
    named = MODULES("unet", {"unet": unet}) or {}
    # Every module has a weight and a bias, but for to_q, to_k and to_v.
    assert sum(1 if path.endswith(("to_q", "to_k", "to_v")) else 2 for path in named) == 686


@pytest.mark.parametrize(
    "change", [{"down_block_types": ("SimpleCrossAttnDownBlock2D",) * 3}, {"only_cross_attention": True}]
)
def test_a_model_nobody_named_is_left_to_the_passes(change):
    assert MODULES("unet", {"unet": {**read("unet"), **change}}) is None
    assert MODULES("vae_decoder", {"vae": read("vae_light")}) is None
    assert MODULES("unet_cached", {"unet": read("unet")}) == MODULES("unet", {"unet": read("unet")})
