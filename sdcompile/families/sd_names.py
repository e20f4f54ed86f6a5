"""Names of the torch modules that the configs of an SD model mean, known before any weight is read.

Pure, so that a plan can say that a pattern matches nothing. Held to diffusers and transformers by a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from sdcompile.families.sd_stepcache import SHALLOW

Kind = Literal["conv", "linear", "norm", "embedding"]
Named = Iterator[tuple[str, Kind]]

_DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
_MID = "UNetMidBlock2DCrossAttn"
_VAE = "AutoencoderKL"
_PLAIN = {
    "resnet_time_scale_shift": "default", "only_cross_attention": False, "dual_cross_attention": False,
    "attention_type": "default", "time_embedding_type": "positional", "addition_embed_type": None,
    "class_embed_type": None, "encoder_hid_dim_type": None, "reverse_transformer_layers_per_block": None,
}  # fmt: skip
"""What a UNet's config says where its modules are those named here."""


def modules(component: str, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Kind] | None:
    """Path -> kind of every module of `component` that has weights; None for a model this file does not know.

    Paths are as the passes' patterns write them: without the name of the whole ("unet", "decoder", "text_model").
    """
    named, folder = _NAMED.get(component, (_nothing_known, "unet"))
    # A decoder from a source of its own may be of another class.
    config = configs.get(component, configs[folder])
    if folder == "vae" and config.get("_class_name", _VAE) != _VAE:
        return None
    try:
        return dict(named(config))
    except (_Unknown, KeyError):
        return None


class _Unknown(Exception):  # noqa: N818 - no fault: the config is of a model that nobody named here
    pass


def _nothing_known(config: Mapping[str, Any]) -> Named:
    raise _Unknown


def _per_block(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def _unet(config: Mapping[str, Any]) -> Named:
    downs, ups, widths = config["down_block_types"], config["up_block_types"], config["block_out_channels"]
    if not (set(downs) <= set(_DOWN) and set(ups) <= set(_UP) and config.get("mid_block_type", _MID) in (_MID, None)):
        raise _Unknown
    if any(config.get(name, usual) != usual for name, usual in _PLAIN.items()):
        raise _Unknown
    layers = _per_block(config.get("layers_per_block", 2), len(downs))
    depths = _per_block(config.get("transformer_layers_per_block", 1), len(downs))
    last = len(downs) - 1
    yield from (("conv_in", "conv"), ("time_embedding.linear_1", "linear"), ("time_embedding.linear_2", "linear"))
    if config.get("time_cond_proj_dim"):
        yield "time_embedding.cond_proj", "linear"
    before = widths[0]
    for i, kind in enumerate(downs):
        for j in range(layers[i]):
            yield from _resnet(f"down_blocks.{i}.resnets.{j}", before != widths[i], timed=True)
            before = widths[i]
            if _DOWN[kind]:
                yield from _transformer(f"down_blocks.{i}.attentions.{j}", depths[i])
        if i < last:
            yield f"down_blocks.{i}.downsamplers.0.conv", "conv"
    if config.get("mid_block_type", _MID):
        for j in range(2):
            yield from _resnet(f"mid_block.resnets.{j}", shortcut=False, timed=True)
        yield from _transformer("mid_block.attentions.0", depths[-1])
    for i, kind in enumerate(ups):
        own, below = widths[last - i], widths[max(last - i - 1, 0)]
        count = layers[last - i] + 1
        for j in range(count):
            skip = below if j == count - 1 else own
            yield from _resnet(f"up_blocks.{i}.resnets.{j}", before + skip != own, timed=True)
            before = own
            if _UP[kind]:
                yield from _transformer(f"up_blocks.{i}.attentions.{j}", depths[last - i])
        if i < last:
            yield f"up_blocks.{i}.upsamplers.0.conv", "conv"
    yield from (("conv_norm_out", "norm"), ("conv_out", "conv"))


def _resnet(at: str, shortcut: bool, *, timed: bool = False) -> Named:
    yield from ((f"{at}.norm1", "norm"), (f"{at}.conv1", "conv"), (f"{at}.norm2", "norm"), (f"{at}.conv2", "conv"))
    if timed:
        yield f"{at}.time_emb_proj", "linear"
    if shortcut:
        yield f"{at}.conv_shortcut", "conv"


def _attention(at: str) -> Named:
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        yield f"{at}.{part}", "linear"


def _transformer(at: str, depth: int) -> Named:
    # proj_in and proj_out are linear layers or 1 x 1 convolutions, by `use_linear_projection`: alike to any pattern.
    yield from ((f"{at}.norm", "norm"), (f"{at}.proj_in", "conv"), (f"{at}.proj_out", "conv"))
    for k in range(depth):
        block = f"{at}.transformer_blocks.{k}"
        yield from ((f"{block}.norm{n}", "norm") for n in (1, 2, 3))
        yield from _attention(f"{block}.attn1")
        yield from _attention(f"{block}.attn2")
        yield from ((f"{block}.ff.net.0.proj", "linear"), (f"{block}.ff.net.2", "linear"))


def _vae_mid(config: Mapping[str, Any]) -> Named:
    for j in range(2):
        yield from _resnet(f"mid_block.resnets.{j}", shortcut=False)
    if config.get("mid_block_add_attention", True):
        yield "mid_block.attentions.0.group_norm", "norm"
        yield from _attention("mid_block.attentions.0")


def _check_vae(config: Mapping[str, Any]) -> None:
    kinds = {*config["down_block_types"], *config["up_block_types"]}
    if not kinds <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise _Unknown


def _decoder(config: Mapping[str, Any]) -> Named:
    _check_vae(config)
    widths = list(reversed(config["block_out_channels"]))
    if config.get("use_post_quant_conv", True):
        yield "post_quant_conv", "conv"
    yield "conv_in", "conv"
    yield from _vae_mid(config)
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(config.get("layers_per_block", 1) + 1):
            yield from _resnet(f"up_blocks.{i}.resnets.{j}", before != width)
            before = width
        if i < len(widths) - 1:
            yield f"up_blocks.{i}.upsamplers.0.conv", "conv"
    yield from (("conv_norm_out", "norm"), ("conv_out", "conv"))


def _encoder(config: Mapping[str, Any]) -> Named:
    _check_vae(config)
    widths = config["block_out_channels"]
    if config.get("use_quant_conv", True):
        yield "quant_conv", "conv"
    yield "conv_in", "conv"
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(config.get("layers_per_block", 1)):
            yield from _resnet(f"down_blocks.{i}.resnets.{j}", before != width)
            before = width
        if i < len(widths) - 1:
            yield f"down_blocks.{i}.downsamplers.0.conv", "conv"
    yield from _vae_mid(config)
    yield from (("conv_norm_out", "norm"), ("conv_out", "conv"))


def _text_encoder(config: Mapping[str, Any]) -> Named:
    yield from (("embeddings.token_embedding", "embedding"), ("embeddings.position_embedding", "embedding"))
    for k in range(config.get("num_hidden_layers", 12)):
        at = f"encoder.layers.{k}"
        yield from ((f"{at}.self_attn.{part}_proj", "linear") for part in ("q", "k", "v", "out"))
        yield from ((f"{at}.layer_norm1", "norm"), (f"{at}.layer_norm2", "norm"))
        yield from ((f"{at}.mlp.fc1", "linear"), (f"{at}.mlp.fc2", "linear"))
    yield "final_layer_norm", "norm"


_NAMED: dict[str, tuple[Callable[[Mapping[str, Any]], Named], str]] = {
    "unet": (_unet, "unet"),
    SHALLOW: (_unet, "unet"),
    "text_encoder": (_text_encoder, "text_encoder"),
    "vae_decoder": (_decoder, "vae"),
    "vae_encoder": (_encoder, "vae"),
}
"""Component -> (config -> its modules, folder of that config). The shallow UNet has some of the UNet's."""
