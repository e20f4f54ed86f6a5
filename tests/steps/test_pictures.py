"""A folder of pictures: what counts as one, what it becomes, and what is refused in which words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdcompile.bundle import sha256_of
from sdcompile.errors import RecipeError, StageError
from sdcompile.families import FAMILIES
from sdcompile.spec import Job, say_nothing
from sdcompile.steps import fetch, pictures
from tests.steps import layouts
from tests.steps.test_record import inputs  # noqa: F401


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(levels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures of as many formats and places; three have captions, of which two are one."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    noise(32, 32, 0).save(root / "a.png")
    noise(32, 64, 1).save(root / "b.JPG", format="JPEG")
    noise(48, 32, 2).convert("RGBA").save(root / "more" / "a.webp", lossless=True)
    noise(32, 32, 3).convert("L").save(root / "more" / "d.jpeg")
    (root / "a.txt").write_text("a red circle\n", encoding="utf-8-sig")
    (root / "more" / "a.txt").write_text("a blue square")
    (root / "more" / "d.txt").write_text("a red\n  circle")
    (root / "notes.txt").write_text("no caption of any picture")
    (root / ".hidden.png").write_bytes(b"")
    (root / ".thumbnails").mkdir()
    (root / ".thumbnails" / "a.png").write_bytes(b"")
    return root


def test_pictures_and_their_captions_count_and_nothing_else(folder: Path) -> None:
    found = pictures.describe(folder, "photos", sha256_of)
    assert list(found.files) == ["a.png", "a.txt", "b.JPG", "more/a.txt", "more/a.webp", "more/d.jpeg", "more/d.txt"]
    assert found.files["a.png"].sha256 == sha256_of(folder / "a.png")
    assert str(folder.parent) not in repr(found), "no path of the machine gets into keys"
    assert found.notes == ("photos: 1 of 4 pictures have no caption (.txt beside them), so no prompt",)
    (folder / "b.txt").write_text("a blue circle")
    assert pictures.describe(folder, "photos", sha256_of).notes == ()


def test_they_are_one_more_folder_of_the_source(folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    root = layouts.write(tmp_path / "model")
    model = fetch.describe(
        str(root), base=Path(), source_config=None, folders=layouts.FOLDERS, offline=True, hash_file=sha256_of
    )
    whole = replace(model, pictures=pictures.describe(folder, "photos", sha256_of))
    assert whole.kind_of("pictures") == "folder"
    assert whole.locate(("pictures",), say_nothing) == folder
    assert whole.locate(("vae",), say_nothing) == root
    files = {path: f.sha256 for path, f in whole.folder_files("pictures").items()}
    out = tmp_path / "out"
    out.mkdir()
    fetch.run_assets({"source": folder}, out, Job("pictures", {"kind": "folder", "folder": "pictures", "files": files}))
    assert (out / "more" / "a.webp").read_bytes() == (folder / "more" / "a.webp").read_bytes()
    noise(32, 32, 9).save(folder / "a.png")
    with pytest.raises(StageError, match=r"a\.png of the source changed since the build was planned"):
        fetch.run_assets({"source": folder}, out, Job("pictures", {"folder": "pictures", "files": files}))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda root: None, "photos does not exist"),
        (lambda root: root.write_text(""), "photos is no folder"),
        (lambda root: root.mkdir(), "photos holds no picture"),
    ],
)
def test_a_folder_without_pictures_is_refused(tmp_path: Path, made, words: str) -> None:
    made(tmp_path / "photos")
    with pytest.raises(RecipeError, match=words):
        pictures.describe(tmp_path / "photos", "photos", sha256_of)


@pytest.fixture
def encoded(inputs, tmp_path):  # noqa: F811
    def run(root: Path) -> tuple:
        from safetensors.numpy import load_file

        configs = {n: json.loads((inputs[n] / "config.json").read_text()) for n in ("unet", "vae", "text_encoder")}
        specs = FAMILIES["sd"].components({**configs, "scheduler": {}})
        params = {
            "family": "sd", "size": {"height": 32, "width": 32}, "scaling_factor": 0.5, "shift_factor": 0.0,
            "components": {
                name: {"params": {}, "spec": specs[name].as_json()} for name in ("text_encoder", "vae_encoder")
            },
        }  # fmt: skip
        out = tmp_path / "encoded"
        out.mkdir()
        roles = {name: inputs[name] for name in ("text_encoder", "vae", "tokenizer")}
        pictures.run({**roles, "pictures": root}, out, Job("pipeline", params))
        assert [path.name for path in out.iterdir()] == ["pictures.safetensors"]
        found = load_file(out / "pictures.safetensors")
        return found["latents"], found["caption"], {"encoder_hidden_states": found["told.encoder_hidden_states"]}

    return run


@pytest.mark.tiny
def test_latents_and_conditioning_are_those_of_diffusers_and_transformers(inputs, folder, encoded):  # noqa: F811
    import torch
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor
    from transformers import CLIPTextModel

    latents, caption, conditioning = encoded(folder)
    assert latents.shape == (4, 4, 16, 16)
    assert latents.dtype == np.float32
    # In the order of their names: a.png, b.JPG, more/a.webp, more/d.jpeg.
    assert caption.tolist() == [0, 1, 2, 0]
    vae = AutoencoderKL.from_pretrained(inputs["vae"])
    image = VaeImageProcessor(vae_scale_factor=2).preprocess(Image.open(folder / "a.png"))
    with torch.no_grad():
        expected = (vae.encode(image).latent_dist.mean * vae.config.scaling_factor).numpy()
        text = CLIPTextModel.from_pretrained(inputs["text_encoder"])
        told = {
            # <bos> and <eos> around the words, filled with <pad>
            0: [1, 3, 4, 6, 2, 0], 1: [1, 2, 0, 0, 0, 0], 2: [1, 3, 5, 7, 2, 0],
        }  # fmt: skip
        for row, ids in told.items():
            states = text(torch.tensor([ids])).last_hidden_state.numpy()[0]
            np.testing.assert_allclose(conditioning["encoder_hidden_states"][row], states, atol=1e-5)
    np.testing.assert_allclose(latents[0], expected[0], atol=1e-5)
    assert np.abs(latents[1] - expected[0]).max() > 0.01, "the sibling: another picture has other latents"
    assert np.abs(conditioning["encoder_hidden_states"][0] - conditioning["encoder_hidden_states"][2]).max() > 0.01


@pytest.mark.tiny
def test_what_is_longer_than_the_engine_s_proportions_is_cut_at_both_ends(tmp_path, folder, encoded):
    wide = np.asarray(Image.open(folder / "b.JPG"))
    root = tmp_path / "cut"
    root.mkdir()
    Image.fromarray(wide[:, 16:48]).save(root / "middle.png")
    Image.fromarray(wide).save(root / "whole.png")
    latents, _, _ = encoded(root)
    np.testing.assert_allclose(latents[0], latents[1], atol=1e-5)


def test_sixteen_bits_are_made_eight_and_what_is_transparent_white(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "grey.png")
    pixels = pictures._pixels(tmp_path / "grey.png", 64, 64)
    np.testing.assert_allclose(pixels[0, 0], ramp / 32767.5 - 1, atol=1 / 127)
    red = np.zeros((64, 64, 4), np.uint8)
    red[..., 0], red[32:, :, 3] = 255, 255
    Image.fromarray(red).save(tmp_path / "half.png")
    pixels = pictures._pixels(tmp_path / "half.png", 64, 64)[0]
    assert (pixels[:, :32] == 1).all(), "what is hidden below transparent pixels stays hidden"
    assert (pixels[0, 32:] == 1).all()
    assert (pixels[1:, 32:] == -1).all()


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.png", b"no picture", r"a\.png is no picture that can be read: damaged, or another format$"),
        ("a.txt", b"\xff\xfe\xff", r"a\.txt is no UTF-8 text"),
    ],
)
def test_what_cannot_be_read_is_named(folder, encoded, name, content, words):
    (folder / name).write_bytes(content)
    with pytest.raises(StageError) as caught:
        encoded(folder)
    assert re.search(words, caught.value.message)
