"""Distances of whole sets of pictures (FID, KID) and to prompts (CLIP score), by a model the user gives.

The model is a transformers folder or hub id with safetensors weights: any vision model for FID and
KID, a CLIP model for the CLIP score too. FID and KID are torchmetrics' own; features of models
other than Inception v3 give figures that compare only with others of the same model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile.errors import HostError, RecipeError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

# What CLIP's own image processor uses, for models that state nothing.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BATCH = 16


class Features:
    """A vision model as a function of pictures. `dimensions` is the length of a feature."""

    def __init__(self, model: str, *, offline: bool) -> None:
        """Raises HostError where libraries are missing, RecipeError when `model` is no usable model."""
        try:
            import torch
            import torchmetrics  # noqa: F401 - asked for now, so that nothing is computed in vain
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise HostError(f"{error}", "pip install 'sdcompile[compile,eval]'") from error
        name = model.removeprefix("hf://")
        local = offline or not model.startswith("hf://")
        try:
            self._model: Any = AutoModel.from_pretrained(
                name, local_files_only=local, use_safetensors=True, dtype=torch.float32
            ).eval()
            self.is_clip = self._model.config.model_type == "clip"
            self._tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local) if self.is_clip else None
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"--features {model}: no vision model can be loaded from it: {error}",
                "name a transformers folder with config.json and safetensors weights (CLIP, DINOv2, ...), or hf://org/name",
            ) from error
        vision = getattr(self._model.config, "vision_config", self._model.config)
        self.size = int(vision.image_size)
        self._mean, self._std = (torch.tensor(side).view(1, 3, 1, 1) for side in _normalisation(name))

    def of_pictures(self, pictures: NDArray[np.floating]) -> torch.Tensor:
        """(N, H, W, 3) in [0, 1] -> features (N, D)."""
        import torch
        from torch.nn import functional as F

        rows = []
        for first in range(0, len(pictures), _BATCH):
            part = torch.from_numpy(np.ascontiguousarray(pictures[first : first + _BATCH], np.float32))
            sized = F.interpolate(part.permute(0, 3, 1, 2), (self.size, self.size), mode="bicubic", antialias=True)
            pixels = (sized.clamp(0, 1) - self._mean) / self._std
            with torch.inference_mode():
                rows.append(self._embedded(pixels))
        return torch.cat(rows)

    def _embedded(self, pixels: torch.Tensor) -> torch.Tensor:
        if not self.is_clip:
            told = self._model(pixel_values=pixels)
            pooled = getattr(told, "pooler_output", None)
            return told.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)
        return _tensor(self._model.get_image_features(pixel_values=pixels))

    def of_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Features (N, D) of texts, of a CLIP model."""
        import torch

        assert self._tokenizer is not None, "only CLIP models have a text side"
        words = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            return _tensor(self._model.get_text_features(**words))


def _tensor(told: Any) -> Any:
    """transformers 5 wraps features in an output object; 4 gave the tensor."""
    return getattr(told, "pooler_output", told)


def _normalisation(folder: str) -> tuple[Sequence[float], Sequence[float]]:
    try:
        stated = json.loads((Path(folder) / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stated = {}
    return stated.get("image_mean", _MEAN), stated.get("image_std", _STD)


def set_distances(real: torch.Tensor, made: torch.Tensor) -> dict[str, float]:
    """{"fid", "kid"} between two sets of features (N, D).

    FID (Heusel et al. 2017) is biased when there are fewer pictures than feature dimensions; KID
    (Binkowski et al. 2018) is not. Raises RecipeError for fewer than two pictures a side.
    """
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    if min(len(real), len(made)) < 2:
        raise RecipeError("FID and KID need at least two pictures on each side", "evaluate more prompts")
    # The features are there already; torchmetrics wants a network to get them from.
    given: Any = torch.nn.Identity()
    given.num_features = real.shape[1]
    fid = FrechetInceptionDistance(feature=given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces that it keeps all features
        kid = KernelInceptionDistance(feature=given, subsets=20, subset_size=min(50, len(real), len(made)))
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(made, real=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # KID draws subsets
        return {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}


def clip_score(pictures: torch.Tensor, prompts: torch.Tensor) -> float:
    """Mean of 100 max(cos, 0) between pictures and their prompts (Hessel et al. 2021)."""
    from torch.nn import functional as F

    return float(100 * F.cosine_similarity(pictures, prompts).clamp(min=0).mean())
