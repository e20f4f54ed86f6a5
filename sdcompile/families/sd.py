"""Stable Diffusion 1.x and 2.x (and their LCM distillations), as diffusers lays them out.

Knows the component inputs and outputs, which sizes are legal, and how prompts condition the
denoiser. Sizes, widths, scaling factors and prediction type all come from the source's
configs; nothing is assumed of a particular checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.errors import RecipeError
from sdcompile.families import sd_stepcache
from sdcompile.families.sd_names import modules as modules
from sdcompile.families.sd_stepcache import SHALLOW
from sdcompile.spec import ComponentSpec, Range, Shapes, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

name = "sd"
folders = {
    "text_encoder": "text_encoder", "unet": "unet", SHALLOW: "unet", "vae_decoder": "vae", "vae_encoder": "vae",
}  # fmt: skip
required = ("text_encoder", "unet", "vae_decoder")
denoiser = "unet"
shallow = SHALLOW
step_cached = sd_stepcache.step_cached
params = {"text_encoder": ("clip_skip",)}

_CLASSES = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}

# UNet2DConditionModel options that change the forward signature: each belongs to another family.
_FOREIGN = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "cross_attention_norm",
)


def components(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, ComponentSpec]:
    """The components' inputs and outputs, with every width filled in from `configs`.

    Raises RecipeError when the configs are not those of a text-to-image SD 1.x/2.x model.
    """
    _check(configs)
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    width, tokens = unet["cross_attention_dim"], text.get("max_position_embeddings", 77)
    latent = vae.get("latent_channels", 4)
    denoiser_inputs = [
        TensorSpec("sample", ("R", unet["in_channels"], "h", "w"), "float32"),
        TensorSpec("timestep", ("R",), "float32"),
        TensorSpec("encoder_hidden_states", ("R", "T", width), "float32"),
    ]
    if unet.get("time_cond_proj_dim"):
        denoiser_inputs.append(TensorSpec("timestep_cond", ("R", unet["time_cond_proj_dim"]), "float32"))
    pixels = TensorSpec("sample", ("B", vae.get("out_channels", 3), "H", "W"), "float32")
    specs = (
        ComponentSpec(
            "text_encoder",
            (TensorSpec("input_ids", ("R", tokens), "int64"),),
            (TensorSpec("last_hidden_state", ("R", tokens, width), "float32"),),
        ),
        ComponentSpec(
            "unet",
            tuple(denoiser_inputs),
            (TensorSpec("out_sample", ("R", unet["out_channels"], "h", "w"), "float32"),),
        ),
        ComponentSpec("vae_decoder", (TensorSpec("latent_sample", ("B", latent, "h", "w"), "float32"),), (pixels,)),
        ComponentSpec(
            "vae_encoder", (pixels,), (TensorSpec("latent_parameters", ("B", 2 * latent, "h", "w"), "float32"),)
        ),
    )
    return {spec.name: spec for spec in specs}


def _check(configs: Mapping[str, Mapping[str, Any]]) -> None:
    for folder, expected in _CLASSES.items():
        config = configs[folder]
        found = config.get("_class_name") or next(iter(config.get("architectures") or [expected]))
        if found != expected:
            raise RecipeError(
                f"the source's {folder} is a {found}; family sd takes a {expected}",
                "check that the source is a Stable Diffusion 1.x or 2.x model",
            )
    unet, vae = configs["unet"], configs["vae"]
    foreign = [f for f in _FOREIGN if unet.get(f) not in (None, False)]
    if foreign:
        values = ", ".join(f"{f}={unet[f]!r}" for f in foreign)
        raise RecipeError(
            f"the source's UNet has {values}: it is not a Stable Diffusion 1.x or 2.x model",
            "SDXL and class-conditional UNets need a family of their own",
        )
    latent = vae.get("latent_channels", 4)
    if unet["in_channels"] != latent:
        raise RecipeError(
            f"the source's UNet takes {unet['in_channels']} channels but the VAE makes {latent}: "
            "an inpainting or image-conditioned model",
            "family sd builds text-to-image models only",
        )
    if not isinstance(unet["cross_attention_dim"], int):
        raise RecipeError(
            "the source's UNet has a different cross_attention_dim per block, which family sd does not take"
        )
    if configs["text_encoder"].get("hidden_size") != unet["cross_attention_dim"]:
        raise RecipeError(
            f"the text encoder is {configs['text_encoder'].get('hidden_size')} wide but the UNet attends to "
            f"{unet['cross_attention_dim']}: they do not belong together"
        )


_DECODERS = {"AutoencoderKL": 0.18215, "AutoencoderTiny": 1.0}
"""Class of a decoder -> the scaling_factor that diffusers registers for configs without the field."""


def _faults_of_decoder(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why the decoder of `configs["vae_decoder"]` cannot stand in for the VAE's own.

    It must turn the same latents into pictures of the same size; that its latents mean the same, only
    its pictures can tell.
    """
    decoder, vae = configs["vae_decoder"], configs["vae"]
    found = decoder.get("_class_name")
    if found not in _DECODERS:
        return [f"it holds a {found}; a decoder is an {' or an '.join(_DECODERS)}"]
    pairs = (
        ("latent channels", decoder.get("latent_channels", 4), vae.get("latent_channels", 4)),
        ("pixels a latent along each side", _factor(decoder), _factor(vae)),
        ("channels of a picture", decoder.get("out_channels", 3), vae.get("out_channels", 3)),
    )
    return [f"it has {has} {what}, where this model has {wants}" for what, has, wants in pairs if has != wants]


replaceable = {"vae_decoder": _faults_of_decoder}


def facts(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the runtime must know of the model, as JSON.

    A missing `scaling_factor` or `shift_factor` takes the default that diffusers registers for configs
    older than the field (for AutoencoderKL 0.18215 and none). `decoder` has both of a decoder from a
    source of its own: TAESD's format, for one, takes latents as the denoiser leaves them.
    """
    unet, vae, decoder = configs["unet"], configs["vae"], configs.get("vae_decoder")
    factor, multiple = vae_factor(configs), denoiser_multiple(configs)
    tokens = configs["text_encoder"].get("max_position_embeddings", 77)
    return {
        "latent_channels": vae.get("latent_channels", 4),
        "vae_scale_factor": factor,
        "multiples": {"h": multiple, "w": multiple, "H": factor * multiple, "W": factor * multiple, "T": tokens},
        "size_multiple": factor * multiple,
        **_scale(vae),
        **({} if decoder is None else {"decoder": _scale(decoder)}),
        "tokens": tokens,
        "prediction_type": configs["scheduler"].get("prediction_type", "epsilon"),
        "time_cond_proj_dim": unet.get("time_cond_proj_dim"),
    }


def _scale(vae: Mapping[str, Any]) -> dict[str, float]:
    default = _DECODERS.get(vae.get("_class_name", ""), _DECODERS["AutoencoderKL"])
    return {"scaling_factor": vae.get("scaling_factor", default), "shift_factor": vae.get("shift_factor") or 0.0}


def vae_factor(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """Pixels per latent along one side."""
    return _factor(configs["vae"])


def _factor(vae: Mapping[str, Any]) -> int:
    """Each level of a VAE but the last halves the picture (AutoencoderTiny says by how much)."""
    if vae.get("_class_name") == "AutoencoderTiny":
        levels = len(vae.get("num_decoder_blocks", (3, 3, 3, 1)))
        return int(vae.get("upsampling_scaling_factor", 2)) ** (levels - 1)
    return 2 ** (len(vae.get("block_out_channels", (0,))) - 1)


def denoiser_multiple(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """What latent sides must be divisible by: each UNet level but the last halves them, and the
    exported graph has no odd-size upsampling."""
    return 2 ** (len(configs["unet"]["block_out_channels"]) - 1)


def shapes(request: Mapping[str, tuple[int, int, int] | None], configs: Mapping[str, Mapping[str, Any]]) -> Shapes:
    """Bind every shape letter; sides a recipe leaves open take the model's own size, static.

    Raises RecipeError naming each size that is not divisible by what the model needs.
    """
    factor, multiple = vae_factor(configs), vae_factor(configs) * denoiser_multiple(configs)
    own_size = configs["unet"].get("sample_size") or 64
    own_h, own_w = own_size if isinstance(own_size, (list, tuple)) else (own_size, own_size)
    own_tokens = configs["text_encoder"].get("max_position_embeddings", 77)
    batch = Range(*(request.get("batch") or (1, 1, 1)))
    height = Range(*(request.get("height") or (own_h * factor,) * 3))
    width = Range(*(request.get("width") or (own_w * factor,) * 3))
    tokens = Range(*(request.get("tokens") or (own_tokens,) * 3))
    faults = [
        f"shapes.{side}: {value} is not a multiple of {multiple} "
        f"(nearest: {', '.join(map(str, nearest(value, multiple)))})"
        for side, sizes in (("height", height), ("width", width))
        for value in dict.fromkeys(sizes)
        if value % multiple
    ]
    faults += [
        f"shapes.tokens: {value} is not a multiple of the text encoder's {own_tokens}"
        for value in dict.fromkeys(tokens)
        if value % own_tokens
    ]
    if faults:
        raise RecipeError("\n".join(faults), f"this model needs image sides divisible by {multiple} px")
    return {
        "B": batch,
        # Guided sampling denoises two rows an image (prompt and negative prompt), unguided one.
        "R": Range(batch.min, 2 * batch.opt, 2 * batch.max),
        "T": tokens,
        "H": height,
        "W": width,
        "h": Range(*(side // factor for side in height)),
        "w": Range(*(side // factor for side in width)),
    }


def nearest(value: int, multiple: int) -> tuple[int, ...]:
    """The multiples of `multiple` just below and above `value` (never 0)."""
    below = value // multiple * multiple
    return tuple(v for v in (below, below + multiple) if v > 0)


def embed(run: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]], ids: np.ndarray) -> dict[str, np.ndarray]:
    """Token ids (n, T) int64 -> {"encoder_hidden_states": (n, T, D) float32}."""
    return {"encoder_hidden_states": run({"input_ids": ids})["last_hidden_state"]}


def guidance_feeds(model_facts: Mapping[str, Any], guidance_scale: float, rows: int) -> dict[str, np.ndarray]:
    """Extra denoiser inputs: LCM's sinusoidal embedding of the guidance scale, (rows, time_cond_proj_dim).

    Same formula as diffusers' `get_guidance_scale_embedding` with w = guidance_scale - 1
    (Luo et al., Latent Consistency Models, arXiv:2310.04378, section 4.2).
    """
    import numpy as np

    dim = model_facts.get("time_cond_proj_dim")
    if not dim:
        return {}
    half = dim // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10000.0) / (half - 1)))
    angles = np.float32((guidance_scale - 1.0) * 1000.0) * frequencies
    row = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(dim % 2, np.float32)]).astype(np.float32)
    return {"timestep_cond": np.tile(row, (rows, 1))}


def load_module(component: str, folder: Path, module_params: Mapping[str, Any]) -> nn.Module:
    """The torch module of `component` in fp32, weights memory-mapped from `folder` where they are fp32.

    Its forward takes the spec's inputs in order and returns a tensor.
    """
    from sdcompile.families import sd_torch

    return sd_torch.LOADERS[component](folder, module_params)
