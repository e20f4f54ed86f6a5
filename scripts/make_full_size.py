"""Write a full-size Stable Diffusion folder with seeded random weights, to measure with.

    python scripts/make_full_size.py sd15 models/sd15 --seed 0 --dtype fp16
    python scripts/make_full_size.py sd21 models/sd21
    python scripts/make_full_size.py lcm  models/lcm --vocabulary bpe_simple_vocab_16e6.txt.gz

Speed and memory of a compiled model do not depend on what its weights were trained to do, only
on their shapes, and numeric formats can be ranked on any weights whose activations stay sane.
So these have the exact architectures of SD 1.5, SD 2.1 (768, v-prediction) and LCM on SD 1.5,
and no meaning: their pictures are abstract.

Activations: LeCun-normal weights keep variance, branches that are added to a residual stream
have gain 0.4, norm gains are log-normal as trained ones are, and the outputs have std near 1.
In the epsilon models eight channels carry the noisy sample past all layers to the output, so
that the predicted noise follows the sample as a trained model's does; else one over
sqrt(alpha_bar_T) = 15 would be what sampling multiplies all errors by.

Tensors are made and written one at a time, so memory stays at about one gigabyte.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import nn

TOKENS, VOCABULARY = 77, 49408
SIGNAL = 8
"""Channels of the epsilon UNets' first layer that hold plus and minus each latent channel."""

SPREAD = {"text_encoder": 0.6, "unet": 0.2, "vae": 0.2}
"""Std of the logarithm of norm gains, per component."""

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.42.1",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.42.1",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": TOKENS,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": VOCABULARY,
}
SCHEDULE: dict[str, Any] = {
    "_diffusers_version": "0.42.1",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
SD15: dict[str, dict[str, Any]] = {
    "unet": UNET,
    "vae": VAE,
    "text_encoder": TEXT,
    "scheduler": SCHEDULE | {
        "_class_name": "PNDMScheduler", "prediction_type": "epsilon", "set_alpha_to_one": False,
        "clip_sample": False, "skip_prk_steps": True, "steps_offset": 1,
    },
}  # fmt: skip
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": SD15,
    "sd21": {
        "unet": UNET | {
            "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
            "only_cross_attention": False, "sample_size": 96, "upcast_attention": True, "use_linear_projection": True,
        },
        "vae": VAE | {"sample_size": 768},
        "text_encoder": TEXT | {
            "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
            "num_hidden_layers": 23, "projection_dim": 512,
        },
        "scheduler": SCHEDULE | {
            "_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction",
            "set_alpha_to_one": False, "steps_offset": 1,
        },
    },
    "lcm": SD15 | {
        "unet": UNET | {"time_cond_proj_dim": 256},
        "scheduler": SCHEDULE | {
            "_class_name": "LCMScheduler", "clip_sample": False, "original_inference_steps": 50,
            "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "set_alpha_to_one": True,
            "steps_offset": 0, "thresholding": False, "timestep_scaling": 10.0, "timestep_spacing": "leading",
        },
    },
}  # fmt: skip

Draw = Callable[[str, tuple[int, ...]], np.ndarray]
"""(tensor name, shape) -> float32 values."""


def skeleton(folder: str, config: dict[str, Any]) -> nn.Module:
    """The module `config` describes, on torch's meta device: names and shapes, no memory."""
    import torch

    with torch.device("meta"):
        if folder == "text_encoder":
            from transformers import CLIPTextConfig, CLIPTextModel

            return CLIPTextModel(CLIPTextConfig.from_dict(config))
        from diffusers import AutoencoderKL, UNet2DConditionModel

        kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
        module: nn.Module = kinds[folder].from_config(config)
        return module


def random_weights(folder: str, config: dict[str, Any], seed: int, *, follows_sample: bool = False) -> Draw:
    """How the tensors of `folder` are drawn: each from its own stream, so that order does not matter.

    `follows_sample`: let a UNet's output follow its noisy sample (see the top of this file).
    """
    last = len(config.get("block_out_channels", ())) - 1
    depth = config.get("layers_per_block", 0)
    quiet_rows = (f"up_blocks.{last}.resnets.{depth}.conv2.", f"up_blocks.{last}.attentions.{depth}.proj_out.")

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        stream = np.random.Generator(np.random.SFC64([seed, zlib.crc32(f"{folder}/{name}".encode())]))
        values = stream.standard_normal(shape, dtype=np.float32)
        values = _scaled(folder, name, values)
        if follows_sample:
            _carry_sample(name, values, f"up_blocks.{last}.resnets.{depth}.conv_shortcut.", quiet_rows)
        return values

    return draw


def _scaled(folder: str, name: str, values: np.ndarray) -> np.ndarray:
    """Standard-normal `values` turned into what a layer of this name holds."""
    layer, kind = name.rsplit(".", 1)
    if values.ndim == 1:
        norm = "norm" in layer.rsplit(".", 1)[-1] or layer.endswith(".group_norm")
        if kind == "bias":
            return values * np.float32(0.1 if norm else 0.02)
        return np.exp(values * np.float32(SPREAD[folder]))
    if "embedding" in layer and folder == "text_encoder":
        return values * np.float32(0.5 if "position" in layer else 1.0)
    fan_in = int(np.prod(values.shape[1:]))
    added = layer.endswith((".conv2", ".to_out.0", ".ff.net.2", ".proj_out", ".out_proj", ".fc2"))
    gain = 0.4 if added else 1.6 if layer.endswith("conv_out") else 1.0  # 1.6 undoes what SiLU takes of the variance
    return values * np.float32(gain / np.sqrt(fan_in))


def _carry_sample(name: str, values: np.ndarray, shortcut: str, quiet_rows: tuple[str, ...]) -> None:
    """Let the first SIGNAL channels carry +sample and -sample from conv_in to conv_out, in place.

    silu(z) - silu(-z) = z, so the pair gives the sample back after the last SiLU; the skip
    connection that ends in the last block's shortcut brings it there past all other layers.
    """
    rows = np.arange(SIGNAL)
    if name == "conv_in.bias" or name.startswith(quiet_rows) or name == "conv_norm_out.bias":
        values[:SIGNAL] = 0
    elif name == "conv_norm_out.weight":
        values[:SIGNAL] = 1
    elif name == "conv_in.weight":
        values[:SIGNAL] = 0
        values[rows, rows // 2, 1, 1] = np.where(rows % 2, -1, 1)
    elif name == f"{shortcut}bias":
        values[:SIGNAL] = 0
    elif name == f"{shortcut}weight":
        values[:SIGNAL] = 0
        values[rows, values.shape[1] // 2 + rows, 0, 0] = 1
    elif name == "conv_out.weight":
        values *= np.float32(0.3)
        values[:, :SIGNAL] = 0
        values[rows // 2, rows, 1, 1] = np.where(rows % 2, -0.95, 0.95)


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], draw: Draw, dtype: str) -> int:
    """Write the tensors one at a time as float32 or float16; returns how many parameters there are.

    The format: u64 length of a JSON header, the header, then the tensors' bytes in its order.
    """
    width = np.dtype(dtype).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * width
        header[name] = {
            "dtype": {2: "F16", 4: "F32"}[width], "shape": list(shape), "data_offsets": [offset, offset + size],
        }  # fmt: skip
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, shape in shapes.items():
            file.write(draw(name.removeprefix("text_model."), shape).astype(dtype).tobytes())
    return offset // width


def byte_characters() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2 and CLIP vocabularies, in vocabulary order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def merges_from(file: Path | None) -> tuple[list[str], bool]:
    """(CLIP's 48,894 merges, True) from OpenAI's vocabulary file, else (as many made up, False)."""
    if file is None:
        spec = find_spec("open_clip")
        bundled = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz" if spec and spec.origin else None
        file = bundled if bundled and bundled.is_file() else None
    count = VOCABULARY - 512 - 2
    if file is not None:
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
        return lines[1 : count + 1], True
    return list(_made_up_merges(count)), False


def _made_up_merges(count: int) -> Iterator[str]:
    """Pairs, then triples, of letters: valid and unique, and words fall apart into them."""
    letters = "etaoinshrdlcumwfgypbvkxjqz"
    pairs = [(a, b) for a in letters for b in letters]
    wanted = [f"{a} {b}" for a, b in pairs] + [f"{a} {b}</w>" for a, b in pairs]
    wanted += [f"{a + b} {c}" for a, b in pairs for c in letters]
    wanted += [f"{a + b} {c}</w>" for a, b in pairs for c in letters]
    wanted += [f"{a + b} {c + d}" for a, b in pairs for c, d in pairs]
    yield from wanted[:count]


def write_tokenizer(folder: Path, merges: list[str], pad: str) -> None:
    """vocab.json, merges.txt and the two config files of a CLIPTokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = byte_characters()
    words = [*letters, *(f"{c}</w>" for c in letters), *("".join(m.split()) for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    assert len(vocabulary) == VOCABULARY, f"{len(vocabulary)} entries"
    _write_json(folder / "vocab.json", vocabulary, indent=None)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    specials = {
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad, "unk_token": "<|endoftext|>",
    }  # fmt: skip
    _write_json(folder / "special_tokens_map.json", specials)
    _write_json(
        folder / "tokenizer_config.json",
        {**specials, "do_lower_case": True, "model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer"},
    )


def _write_json(path: Path, data: Any, indent: int | None = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def make(model: str, out: Path, seed: int, dtype: str, vocabulary: Path | None) -> str:
    """Write the whole folder; returns a line that says what was made."""
    configs = MODELS[model]
    pipeline = "LatentConsistencyModelPipeline" if model == "lcm" else "StableDiffusionPipeline"
    parameters = 0
    for folder in ("text_encoder", "unet", "vae"):
        config = dict(configs[folder])
        if folder == "text_encoder":
            config["torch_dtype"] = dtype
        _write_json(out / folder / "config.json", config)
        # transformers 4 knows the text encoder's tensors by this prefix only; 5 reads both.
        prefix = "text_model." if folder == "text_encoder" else ""
        tensors = skeleton(folder, dict(configs[folder])).state_dict()
        shapes = {prefix + n.removeprefix("text_model."): tuple(t.shape) for n, t in tensors.items()}
        name = "model.safetensors" if folder == "text_encoder" else "diffusion_pytorch_model.safetensors"
        epsilon = configs["scheduler"]["prediction_type"] == "epsilon"
        draw = random_weights(folder, configs[folder], seed, follows_sample=epsilon and folder == "unet")
        parameters += write_safetensors(out / folder / name, shapes, draw, dtype)
    merges, real = merges_from(vocabulary)
    write_tokenizer(out / "tokenizer", merges, "!" if model == "sd21" else "<|endoftext|>")
    _write_json(out / "scheduler" / "scheduler_config.json", configs["scheduler"])
    scheduler = configs["scheduler"]["_class_name"]
    index = {
        "_class_name": pipeline, "_diffusers_version": "0.42.1", "feature_extractor": [None, None],
        "requires_safety_checker": False, "safety_checker": [None, None], "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    _write_json(out / "model_index.json", index)
    command = (
        f"python scripts/make_full_size.py {model} OUT --seed {seed} --dtype {'fp16' if dtype == 'float16' else 'fp32'}"
    )
    (out / "README.md").write_text(
        f"---\nlicense: cc0-1.0\n---\n"
        f"Random weights in the shapes of {model}, to measure with. Made by:\n\n    {command}\n",
        encoding="utf-8",
    )
    return (
        f"{model}: {parameters / 1e6:.0f} M parameters as {dtype}, {'CLIP' if real else 'made-up'} vocabulary, in {out}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("out", type=Path, help="folder to write; it must be absent or empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument(
        "--vocabulary", type=Path, help="OpenAI's bpe_simple_vocab_16e6.txt.gz (open_clip_torch has it)"
    )
    options = parser.parse_args()
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"{options.out} is not an empty folder")
    started = time.monotonic()
    dtype = {"fp32": "float32", "fp16": "float16"}[options.dtype]
    line = make(options.model, options.out, options.seed, dtype, options.vocabulary)
    sys.stdout.write(f"{line}, in {time.monotonic() - started:.0f} s\n")


if __name__ == "__main__":
    main()
