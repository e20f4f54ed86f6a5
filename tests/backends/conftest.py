"""Random models small enough to build with every backend, in every form a backend takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdcompile.backends import BACKENDS, Engine, Host
from sdcompile.families import FAMILIES
from sdcompile.passes import PASSES
from sdcompile.spec import ComponentSpec, Job, Shapes

FAMILY = FAMILIES["sd"]
CONFIGS: dict[str, Any] = {
    "unet": {
        "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
        "cross_attention_dim": 32, "attention_head_dim": 2, "norm_num_groups": 8, "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "vae": {
        "block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "text_encoder": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99,
        "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    },
    "scheduler": {},
}  # fmt: skip


@dataclass(frozen=True)
class Forms:
    """One random component: its spec and shapes, and where its checkpoint and (made on demand) ONNX are."""

    component: str
    spec: ComponentSpec
    shapes: Shapes
    checkpoint: Path
    export: Callable[[str, str], Path]

    def job(self, precision: str = "fp32", **options: Any) -> Job:
        params = {"family": "sd", "options": options}
        return Job(self.component, params, precision, self.spec, self.shapes)  # type: ignore[arg-type]

    def feeds(self, size: str = "opt", seed: int = 0) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        feeds = {}
        for tensor in self.spec.inputs:
            shape = tensor.shape(self.shapes, size)  # type: ignore[arg-type]
            if tensor.dtype == "int64":
                feeds[tensor.name] = random.integers(0, 99, shape)
            elif len(shape) == 1:
                feeds[tensor.name] = random.integers(0, 1000, shape).astype(np.float32)
            else:
                feeds[tensor.name] = random.standard_normal(shape).astype(np.float32)
        return feeds

    def source(self, backend: str, precision: str = "fp32") -> Path:
        """The folder this backend builds from: passes applied, as the planner would."""
        record = BACKENDS[backend]
        if record.takes == "checkpoint":
            return self.checkpoint
        attention = record.export(record.options()).get("attention", "sdpa")
        return self.export(attention, "+".join(record.realises[precision]))  # type: ignore[index]

    def build(self, backend: str, out: Path, precision: str = "fp32", **options: Any) -> Path:
        out.mkdir(parents=True, exist_ok=True)
        BACKENDS[backend].build(self.source(backend, precision), out, self.job(precision, **options))
        return out

    def engine(self, backend: str, out: Path, precision: str = "fp32", **options: Any) -> Engine:
        return BACKENDS[backend].open(self.build(backend, out, precision, **options), Host(threads=1))


def save_random(component: str, folder: Path, seed: int = 0) -> Path:
    """Seeded random weights of `component` as diffusers and transformers save them."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    if component == "unet":
        model: Any = UNet2DConditionModel(**CONFIGS["unet"])
    elif component == "text_encoder":
        model = CLIPTextModel(CLIPTextConfig(**CONFIGS["text_encoder"]))
    else:
        model = AutoencoderKL(**CONFIGS["vae"])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def forms(tmp_path_factory) -> Callable[[str], Forms]:
    """component -> its forms; each checkpoint, export and pass is made once a session."""
    shapes = FAMILY.shapes({"batch": (1, 1, 2), "height": (16, 32, 48), "width": (16, 32, 48)}, CONFIGS)
    specs = FAMILY.components(CONFIGS)
    made: dict[tuple[str, ...], Any] = {}

    def export(component: str, attention: str, passes: str) -> Path:
        from sdcompile.steps import export_onnx

        key = (component, attention, passes)
        if key not in made:
            folder = tmp_path_factory.mktemp("_".join(filter(None, key)))
            if passes:
                onnx = export(component, attention, "")
                PASSES[passes].run({"onnx": onnx}, folder, get(component).job())
            else:
                multiples = FAMILY.facts(CONFIGS)["multiples"]
                params = {"family": "sd", "opset": 20, "attention": attention, "multiples": multiples}
                job = Job(component, params, spec=specs[component], shapes=shapes)
                export_onnx.run({"checkpoint": get(component).checkpoint}, folder, job)
            made[key] = folder
        return made[key]

    def get(component: str) -> Forms:
        if (component,) not in made:
            checkpoint = save_random(component, tmp_path_factory.mktemp(component))
            made[component,] = Forms(
                component, specs[component], shapes, checkpoint,
                lambda attention, passes: export(component, attention, passes),
            )  # fmt: skip
        return made[component,]

    return get
