"""The full-size folders are what they say: right shapes, seeded, loadable, finite. Tried on small ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from scripts import make_full_size as script
from sdcompile import checkpoint
from sdcompile.bundle import sha256_of
from sdcompile.families import FAMILIES
from sdcompile.steps import fetch

pytestmark = pytest.mark.tiny

PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "lcm": {"unet": 859_602_884, "vae": 83_653_863, "text_encoder": 123_060_480},
}
"""As published. LCM's UNet has a (320, 256) projection of the guidance embedding besides."""

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [64, 64, 64, 64], "sample_size": 8, "norm_num_groups": 8},
    "vae": {"block_out_channels": [32, 32, 32, 32], "sample_size": 64},
    "text_encoder": {"num_hidden_layers": 2, "intermediate_size": 64},
}


@pytest.mark.parametrize("model", list(script.MODELS))
def test_the_architectures_have_the_published_number_of_parameters(model: str) -> None:
    for folder, expected in PARAMETERS[model].items():
        skeleton = script.skeleton(folder, dict(script.MODELS[model][folder]))
        assert sum(p.numel() for p in skeleton.parameters()) == expected, folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for model, configs in script.MODELS.items():
        shrunk = {folder: config | SMALL.get(folder, {}) for folder, config in configs.items()}
        if model == "sd21":
            shrunk["unet"]["attention_head_dim"] = [2, 2, 2, 2]
        monkeypatch.setitem(script.MODELS, model, shrunk)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("model", "dtype"), [("sd15", "float16"), ("sd21", "float32"), ("lcm", "float16")])
def test_a_folder_loads_and_its_outputs_are_sane(model: str, dtype: str, tmp_path: Path) -> None:
    script.make(model, tmp_path / model, 0, dtype, None)
    source = fetch.describe(
        model, base=tmp_path, folders=("text_encoder", "unet", "vae"), offline=True, hash_file=sha256_of
    )
    specs = FAMILIES["sd"].components(source.configs)
    stream = torch.Generator().manual_seed(0)
    for name in ("text_encoder", "unet", "vae_decoder"):
        module = checkpoint.load("sd", name, tmp_path / model / FAMILIES["sd"].folders[name], {})
        sizes = {"R": 1, "B": 1, "T": 77, "h": 8, "w": 8, "H": 64, "W": 64}
        feeds = [
            torch.randint(0, 49408, (1, 77), generator=stream)
            if t.dtype == "int64"
            else torch.full((1,), 500.0)
            if t.name == "timestep"
            else torch.randn([sizes.get(str(d), d) for d in t.dims], generator=stream)
            for t in specs[name].inputs
        ]
        with torch.no_grad():
            output = module(*feeds)
        assert output.isfinite().all(), name
        assert 0.3 < output.std() < 3, name
        if name == "unet":
            follows = float(torch.corrcoef(torch.stack([output.flatten(), feeds[0].flatten()]))[0, 1])
            assert (follows > 0.7) == (source.configs["scheduler"]["prediction_type"] == "epsilon")


@pytest.mark.usefixtures("small")
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.make("sd15", tmp_path / name, seed, "float16", None)
    a, b, c = (sha256_of(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_the_made_up_vocabulary_is_one_that_clip_tokenizers_read(tmp_path: Path, pad: str) -> None:
    merges, real = script.merges_from(None)
    if real:
        pytest.skip("open_clip_torch is installed: its vocabulary is used")
    script.write_tokenizer(tmp_path, merges, pad)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(["a red lighthouse, \u706f\u5854 \U0001f30a"], padding="max_length", max_length=77).input_ids[0]
    assert len(json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))) == 49408
    assert ids[0] == 49406
    assert ids[-1] == (49407 if pad != "!" else 0)
    assert np.unique(ids).size > 8
