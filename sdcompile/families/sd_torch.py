"""The torch half of family `sd`: diffusers and transformers modules with tensors in, tensor out.

Imported only by `families.sd.load_module`, so that the runtime never meets torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from sdcompile import edits
from sdcompile.families import sd_stepcache_torch
from sdcompile.families.sd_stepcache import SHALLOW

# low_cpu_mem_usage keeps fp32 safetensors memory-mapped instead of copying them.
_DIFFUSERS = {"dtype": torch.float32, "low_cpu_mem_usage": True, "local_files_only": True, "use_safetensors": True}


class TextEncoder(nn.Module):
    """input_ids (R, T) -> hidden states (R, T, D) of the layer `clip_skip` counts back to.

    As diffusers does: the skipped layers' input goes through the final layer norm.
    """

    def __init__(self, model: Any, clip_skip: int) -> None:
        super().__init__()
        self.text_model = getattr(model, "text_model", model)
        self.clip_skip = clip_skip

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.clip_skip == 0:
            return self.text_model(input_ids=input_ids, return_dict=True).last_hidden_state
        states = self.text_model(input_ids=input_ids, output_hidden_states=True, return_dict=True).hidden_states
        return self.text_model.final_layer_norm(states[-(self.clip_skip + 1)])


class Denoiser(nn.Module):
    """sample (R, C, h, w), timestep (R,), encoder_hidden_states (R, T, D)[, timestep_cond (R, E)] -> (R, C, h, w)."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> Tensor:
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            timestep_cond=timestep_cond,
            return_dict=False,
        )[0]


class VaeDecoder(nn.Module):
    """latent_sample (B, C, h, w), already unscaled -> pixels (B, 3, H, W) in [-1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        if self.post_quant_conv is not None:
            latent_sample = self.post_quant_conv(latent_sample)
        return self.decoder(latent_sample)


class TinyDecoder(nn.Module):
    """latent_sample (B, C, h, w), unscaled by its own factor (usually 1) -> pixels (B, 3, H, W) in [-1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.decoder(latent_sample)


class VaeEncoder(nn.Module):
    """sample (B, 3, H, W) in [-1, 1] -> mean and log-variance of the latents, (B, 2C, h, w)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.quant_conv, self.encoder = vae.quant_conv, vae.encoder

    def forward(self, sample: Tensor) -> Tensor:
        moments = self.encoder(sample)
        return moments if self.quant_conv is None else self.quant_conv(moments)


def _text_encoder(folder: Path, params: Mapping[str, Any]) -> nn.Module:
    model = CLIPTextModel.from_pretrained(
        folder, dtype=torch.float32, low_cpu_mem_usage=True, local_files_only=True, use_safetensors=True
    )
    return TextEncoder(model, int(params.get("clip_skip") or 0))


def _model(kind: Any, folder: Path) -> Any:
    """The diffusers model in `folder`; one with edits is shaped empty, then given the weights that are left."""
    made = edits.read(folder)
    if not made:
        return kind.from_pretrained(folder, **_DIFFUSERS)
    with torch.device("meta"):
        model = kind.from_config(kind.load_config(folder, local_files_only=True))
    edits.replay(model, made)
    weights = {
        name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }
    model.load_state_dict(weights, assign=True)
    return model


def _unet(folder: Path, params: Mapping[str, Any]) -> nn.Module:
    unet, depth = _model(UNet2DConditionModel, folder), params.get("step_cache_depth")
    return Denoiser(unet) if depth is None else sd_stepcache_torch.WithDeep(unet, depth)


def _unet_cached(folder: Path, params: Mapping[str, Any]) -> nn.Module:
    return sd_stepcache_torch.Shallow(_model(UNet2DConditionModel, folder), params["step_cache_depth"])


_DECODERS: dict[str, tuple[Any, Callable[[Any], nn.Module]]] = {
    "AutoencoderKL": (AutoencoderKL, VaeDecoder),
    "AutoencoderTiny": (AutoencoderTiny, TinyDecoder),
}


def _vae_decoder(folder: Path, params: Mapping[str, Any]) -> nn.Module:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind, wrap = _DECODERS[config.get("_class_name", "AutoencoderKL")]
    return wrap(_model(kind, folder))


def _vae_encoder(folder: Path, params: Mapping[str, Any]) -> nn.Module:
    return VaeEncoder(_model(AutoencoderKL, folder))


LOADERS: dict[str, Callable[[Path, Mapping[str, Any]], nn.Module]] = {
    "text_encoder": _text_encoder,
    "unet": _unet,
    SHALLOW: _unet_cached,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
}
