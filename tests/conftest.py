"""Sources and machines that exist only as values, for tests that read no weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run, and no time limit for one: these tests tell of the code, not of the machine.
settings.register_profile("sdcompile", deadline=None, derandomize=True, database=None)
settings.load_profile("sdcompile")

SD15 = {
    "model_index": {"_class_name": "StableDiffusionPipeline"},
    "unet": {
        "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "sample_size": 64,
        "cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280],
    },
    "vae": {
        "_class_name": "AutoencoderKL", "latent_channels": 4, "out_channels": 3,
        "block_out_channels": [128, 256, 512, 512],
    },
    "text_encoder": {"architectures": ["CLIPTextModel"], "hidden_size": 768, "max_position_embeddings": 77},
    "tokenizer": {"model_max_length": 77},
    "scheduler": {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"},
}  # fmt: skip


@dataclass(frozen=True)
class FakeFile:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class FakeSource:
    """What a plan reads of a source, with the shape of `steps.fetch.Source`."""

    id: str = "folder:sd15"
    kind: str = "folder"
    revision: str | None = None
    licence: str | None = "openrail"
    configs: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(SD15))
    notes: tuple[str, ...] = ()
    weights: str = "w"
    parts: dict[str, Any] = field(default_factory=dict)
    edits: dict[str, Any] = field(default_factory=dict)
    pictures: Any = None
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def kind_of(self, folder: str) -> str:
        return self.parts[folder].kind if folder in self.parts else self.kind

    @property
    def files(self) -> dict[str, FakeFile]:
        return {path: f for folder in self.configs for path, f in self.folder_files(folder).items()}

    def folder_files(self, folder: str) -> dict[str, FakeFile]:
        if folder == "pictures":
            assert self.pictures is not None
            return dict(self.pictures.files)
        return {
            f"{folder}/config.json": FakeFile("c", 1000),
            f"{folder}/model.safetensors": FakeFile(self.weights, 3 << 30),
        }

    def fp32_bytes(self, folder: str) -> int:
        return 3 << 30


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()
