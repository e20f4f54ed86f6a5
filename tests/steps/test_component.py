"""A component's own source: what its folder is known by, what is refused and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdcompile.bundle import sha256_of
from sdcompile.errors import RecipeError
from sdcompile.spec import Job, say_nothing
from sdcompile.steps import component, fetch
from sdcompile.steps.layout import Source
from tests.steps import layouts

WEIGHTS = "diffusion_pytorch_model.safetensors"


def described(source: str, base: Path = Path("/nowhere")) -> Source:
    return component.describe(source, "vae_decoder", base=base, offline=True, hash_file=sha256_of)


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    folder = tmp_path / "taesd"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    (folder / WEIGHTS).write_bytes(layouts.safetensors(b"weights"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def test_a_folder_is_known_by_its_name_its_licence_and_the_hashes_of_its_files(decoder: Path) -> None:
    part = described("taesd", decoder.parent)
    assert (part.id, part.kind, part.licence) == ("folder:taesd", "folder", "mit")
    assert str(decoder.parent) not in repr(part)
    assert {path: f.sha256 for path, f in part.files.items()} == {
        path: sha256_of(decoder / path) for path in ("config.json", WEIGHTS)
    }
    assert part.configs == {"vae_decoder": {"_class_name": "AutoencoderTiny"}}


def test_it_is_one_more_folder_of_the_model_it_belongs_to(decoder: Path, tmp_path: Path) -> None:
    root = layouts.write(tmp_path / "model")
    model = fetch.describe(
        str(root), base=Path(), source_config=None, folders=layouts.FOLDERS, offline=True, hash_file=sha256_of
    )
    part = described(str(decoder))
    whole = model.with_parts({"vae_decoder": part})
    assert whole.folder_files("vae_decoder") == part.files
    assert whole.folder_files("vae") == model.folder_files("vae")
    assert whole.fp32_bytes("vae_decoder") == 4 * len(b"weights")
    assert whole.locate(("vae_decoder",), say_nothing) == decoder
    assert whole.locate(("vae",), say_nothing) == root

    files = {path: f.sha256 for path, f in part.files.items()}
    job = Job("vae_decoder", {"kind": "folder", "folder": "vae_decoder", "files": files})
    out = tmp_path / "out"
    out.mkdir()
    fetch.run({"source": decoder}, out, job)
    assert {path.name for path in out.iterdir()} == {"config.json", WEIGHTS}


def test_a_half_precision_file_alone_is_taken_under_its_plain_name(decoder: Path, tmp_path: Path) -> None:
    (decoder / WEIGHTS).rename(decoder / "diffusion_pytorch_model.fp16.safetensors")
    part = described(str(decoder))
    assert "fp16 weights only" in part.notes[0]
    out = tmp_path / "out"
    out.mkdir()
    files = {path: f.sha256 for path, f in part.files.items()}
    fetch.run({"source": decoder}, out, Job("vae_decoder", {"kind": "folder", "folder": "vae_decoder", "files": files}))
    assert (out / WEIGHTS).is_file()


def test_the_light_decoder_is_built_in_under_the_licence_of_its_model() -> None:
    part = described("builtin:tiny/vae_light")
    assert part.id == "builtin:tiny/vae_light"
    assert part.licence == "apache-2.0"
    with pytest.raises(RecipeError) as caught:
        described("builtin:tiny/vae_heavy")
    assert caught.value.hint == "built in: builtin:tiny/vae, builtin:tiny/vae_light"


@pytest.mark.parametrize(
    ("break_it", "words", "hint"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json", "AutoencoderTiny.save_pretrained"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"it has no {WEIGHTS}", "expected diffusion_pytorch_model"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"cut"), "is not a whole safetensors file", "copy the file"),
        (
            lambda folder: (folder / WEIGHTS).rename(folder / "x.bin"),
            "it has x.bin but no",
            "import AutoencoderTiny as",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON", ""),
        (
            lambda folder: (folder / "config.json").rename(folder / "model_index.json"),
            "it is a whole model",
            "taesd/vae",
        ),
    ],
)
def test_a_folder_that_is_none_is_refused_with_what_it_lacks(
    decoder: Path, break_it: Any, words: str, hint: str
) -> None:
    break_it(decoder)
    with pytest.raises(RecipeError) as caught:
        described("taesd", decoder.parent)
    assert words in caught.value.message
    assert hint in caught.value.hint


def test_a_path_that_is_no_folder_is_told(decoder: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        described("other", decoder.parent)
    with pytest.raises(RecipeError, match="is no folder"):
        described("taesd/config.json", decoder.parent)
