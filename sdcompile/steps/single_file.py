"""One `.safetensors` file in the layout of the original Stable Diffusion code (CompVis, A1111).

Such a file holds all weights and no configs: those come from `source_config`. Names are mapped
by diffusers' own tables, on the tensors alone: no module is built with random weights, so what
the file lacks is an error, never noise, and dtypes stay as stored.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.errors import RecipeError, StageError
from sdcompile.spec import Say
from sdcompile.steps.layout import CHECKPOINT, HashFile, Source, SourceFile, Tree, check_safetensors, read_tree

if TYPE_CHECKING:
    from torch import Tensor, nn

PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.transformer.", "cond_stage_model.model."),
}
"""folder -> how the names of its tensors begin (for the text encoder: OpenAI's CLIP, or OpenCLIP)."""

DEFAULT_CONFIG = "hf://stable-diffusion-v1-5/stable-diffusion-v1-5"


def describe(
    source: str,
    path: Path,
    source_config: str | None,
    open_tree: Callable[[str], Tree],
    folders: tuple[str, ...],
    hash_file: HashFile,
) -> Source:
    """The Source of the single file at `path`, its configs and tokenizer taken from `source_config`.

    Raises RecipeError when the file is none of these checkpoints, or lacks one of `folders`.
    """  # fmt: skip
    if not path.is_file():
        raise RecipeError(f"source {source} does not exist", "a relative path starts at the recipe's folder")
    header = check_safetensors(path, f"source {source}")
    shares = {
        folder: sum(
            end - begin
            for name, entry in header.items() if name.startswith(PREFIXES[folder])
            for begin, end in [entry["data_offsets"]]
        )
        for folder in folders if folder in PREFIXES
    }  # fmt: skip
    # Under the old names, which are not those that recipes name weights by.
    counts = {
        folder: {"": sum(math.prod(e["shape"]) for name, e in header.items() if name.startswith(PREFIXES[folder]))}
        for folder in shares
    }
    lacking = [folder for folder in folders if not shares.get(folder)]
    if lacking:
        raise RecipeError(f"source {source} has no {', '.join(lacking)}: {_guess(header)}", _REMEDY)
    notes: tuple[str, ...] = ()
    if source_config is None:
        if any(name.startswith("cond_stage_model.model.") for name in header):
            raise RecipeError(
                f"source {source} has Stable Diffusion 2.x weights, and its file does not say which of them",
                "name the model it was trained from, as in source_config: hf://org/name (its scheduler says "
                "epsilon or v-prediction)",
            )
        source_config = DEFAULT_CONFIG
        notes = (f"source_config is not set; configs and tokenizer are those of {DEFAULT_CONFIG}",)
    if source_config.lower().endswith((".safetensors", ".yaml", ".json")):
        raise RecipeError(
            f"source_config {source_config} is a file",
            "name a diffusers folder or hf://org/name, for its configs and tokenizer",
        )
    tree = open_tree(source_config)
    configs = read_tree(tree, folders, hash_file, weights=False)
    whole = SourceFile(hash_file(path), path.stat().st_size)
    return replace(
        configs,
        id=f"file:{path.name}",
        kind="file",
        revision=None,
        notes=(*notes, *configs.notes),
        licence=None,  # the configs' licence says nothing of these weights
        files={CHECKPOINT: whole, **configs.files},
        shares=shares,
        counts=counts,
        place=_Staging(path.resolve(), tree.get),
    )


_REMEDY = "expected a whole Stable Diffusion 1.x or 2.x checkpoint (UNet, VAE and text encoder in one file)"


def _guess(header: Mapping[str, Any]) -> str:
    """What a safetensors file that is no checkpoint seems to be."""
    if any("lora" in name.lower() for name in header):
        return "it is a LoRA, which needs a model to be applied to"
    if any(name.startswith("conditioner.") for name in header):
        return "it is an SDXL checkpoint"
    if any(name.startswith(("down_blocks.", "encoder.", "decoder.", "text_model.")) for name in header):
        return "it is one component of a diffusers model; name the folder above it"
    return f"its tensors are named {', '.join(sorted(header)[:2]) or 'nothing'} ..."


class _Staging:
    """A folder of symbolic links that looks like the source: the checkpoint, and the configs beside it."""

    def __init__(self, checkpoint: Path, get: Callable[[str], Path]) -> None:
        self.checkpoint, self.get = checkpoint, get
        self.root: Path | None = None

    def __call__(self, paths: tuple[str, ...], say: Say) -> Path:
        if self.root is None:
            self.root = Path(tempfile.mkdtemp(prefix="sdcompile-source-"))
            weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)
        for path in paths:
            link = self.root / path
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(self.checkpoint if path == CHECKPOINT else self.get(path).resolve())
        return self.root


def convert(checkpoint: Path, config_file: Path, folder: str, out: Path, say: Say) -> None:
    """Write the tensors of `folder` in `checkpoint` as diffusers and transformers read them.

    Raises StageError when they do not fit `config_file`, naming the first that does not.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads(config_file.read_text(encoding="utf-8"))
    say(f"reading {folder} from the checkpoint", None)
    with safe_open(checkpoint, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys() if name.startswith(PREFIXES[folder])}  # noqa: SIM118
    expected = _module(folder, config).state_dict()
    mapped = _mapped(folder, stored, config)
    del stored
    tensors = {}
    for name, like in expected.items():
        if name not in mapped:
            raise StageError(
                f"{folder}: the checkpoint has no {name}, which {folder}/config.json of source_config asks for", _MISFIT
            )
        # Old VAEs keep attention as 1x1 convolutions, SD 1.x as such what SD 2.x has as linear layers.
        tensor = mapped.pop(name)
        if tensor.ndim != like.ndim and tensor.numel() == like.numel():
            tensor = tensor.reshape(like.shape)
        if tensor.shape != like.shape:
            raise StageError(
                f"{folder}: {name} has shape {tuple(tensor.shape)} in the checkpoint and "
                f"{tuple(like.shape)} by {folder}/config.json of source_config", _MISFIT,
            )  # fmt: skip
        tensors[name] = tensor.contiguous()
    if mapped:
        raise StageError(f"{folder}: the checkpoint has {next(iter(mapped))}, which its config does not know", _MISFIT)
    say(f"writing {folder}", None)
    stem = "model" if folder == "text_encoder" else "diffusion_pytorch_model"
    save_file(tensors, out / f"{stem}.safetensors", metadata={"format": "pt"})
    shutil.copyfile(config_file, out / "config.json")


_MISFIT = "name the model the checkpoint was trained from as source_config"


def _module(folder: str, config: Mapping[str, Any]) -> nn.Module:
    """The module `config` describes, without memory for weights: it only tells names and shapes."""
    import torch

    with torch.device("meta"):
        if folder == "text_encoder":
            from transformers import CLIPTextConfig, CLIPTextModel

            return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
        from diffusers import AutoencoderKL, UNet2DConditionModel

        kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
        module: nn.Module = kinds[folder].from_config(dict(config))
        return module


def _mapped(folder: str, stored: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Original name -> tensor to diffusers name -> tensor, by the tables that `from_single_file` uses."""
    from diffusers.loaders import single_file_utils as tables

    if folder == "unet":
        return dict(tables.convert_ldm_unet_checkpoint(stored, config=dict(config)))
    if folder == "vae":
        # The mapping counts levels by the config's lists, which configs of some exports leave to defaults.
        return dict(tables.convert_ldm_vae_checkpoint(stored, config=dict(config)))
    if any(name.startswith("cond_stage_model.transformer.") for name in stored):
        mapped = tables.convert_ldm_clip_checkpoint(stored)
    else:
        mapped = _from_open_clip(stored, config)
    plain = {name.removeprefix("text_model."): tensor for name, tensor in mapped.items()}
    prefix = "text_model." if any(n.startswith("text_model.") for n in _module(folder, config).state_dict()) else ""
    # SD 2.x reads the last layer but one, so its config has one layer fewer than the file.
    layers = tuple(f"encoder.layers.{i}." for i in range(config["num_hidden_layers"]))
    return {
        prefix + name: tensor
        for name, tensor in plain.items()
        if name not in ("embeddings.position_ids", "text_projection.weight", "logit_scale")
        and (not name.startswith("encoder.layers.") or name.startswith(layers))
    }


def _from_open_clip(stored: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """OpenCLIP's text tower in transformers' names: q, k and v are one matrix there."""
    prefix = "cond_stage_model.model."
    names = {
        "positional_embedding": "embeddings.position_embedding.weight",
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
    parts = {
        "attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    mapped: dict[str, Tensor] = {}
    for full, tensor in stored.items():
        name = full.removeprefix(prefix)
        if name in names:
            mapped[names[name]] = tensor
        elif name.startswith("transformer.resblocks."):
            layer, part = name.removeprefix("transformer.resblocks.").split(".", 1)
            if part.startswith("attn.in_proj_"):
                kind = part.removeprefix("attn.in_proj_")
                for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                    mapped[f"encoder.layers.{layer}.self_attn.{letter}_proj.{kind}"] = piece
            else:
                base, kind = part.rsplit(".", 1)
                mapped[f"encoder.layers.{layer}.{parts.get(base, base)}.{kind}"] = tensor
    return mapped
