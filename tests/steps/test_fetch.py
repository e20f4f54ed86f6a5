"""Folders as sources: what is read of them, what is refused and in which words, what a build links."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdcompile.bundle import sha256_of
from sdcompile.errors import RecipeError, StageError
from sdcompile.spec import Job, say_nothing
from sdcompile.steps import fetch
from tests.steps import layouts
from tests.steps.layouts import FOLDERS


def described(source: str, base: Path, folders: tuple[str, ...] = FOLDERS) -> fetch.Source:
    return fetch.describe(source, base=base, source_config=None, folders=folders, offline=True, hash_file=sha256_of)


def job(source: fetch.Source, *folders: str) -> Job:
    files = {path: f.sha256 for folder in folders for path, f in source.folder_files(folder).items()}
    return Job(folders[0], {"kind": source.kind, "folder": folders[0], "files": files})


def fetched(source: fetch.Source, folder: str, out: Path) -> Path:
    out.mkdir()
    fetch.run({"source": source.locate((folder,), say_nothing)}, out, job(source, folder))
    return out


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return layouts.write(tmp_path / "model")


def test_a_folder_is_known_by_its_name_and_the_hashes_of_what_a_build_reads(root: Path) -> None:
    (root / "safety_checker").mkdir()
    (root / "safety_checker" / "model.safetensors").write_bytes(layouts.safetensors(b"x"))
    source = described("model", root.parent)
    assert (source.id, source.kind, source.revision) == ("folder:model", "folder", None)
    assert str(root.parent) not in repr(source)
    assert source.licence == "creativeml-openrail-m"
    assert set(source.files) == {*layouts.CONFIGS, *layouts.WEIGHTS, "tokenizer/merges.txt"}
    assert source.files["unet/config.json"].sha256 == sha256_of(root / "unet" / "config.json")
    assert source.files["unet/config.json"].bytes == (root / "unet" / "config.json").stat().st_size
    assert set(source.configs) == {"model_index", "scheduler", "tokenizer", *FOLDERS}
    assert source.configs["scheduler"]["prediction_type"] == "epsilon"
    assert set(source.folder_files("unet")) == {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}


def test_only_the_asked_folders_are_read(root: Path) -> None:
    source = described(str(root), Path("/nowhere"), ("unet",))
    assert source.id == "folder:model"
    assert not any(path.startswith("vae") for path in source.files)


def test_edits_of_a_pruned_source_are_part_of_it(root: Path) -> None:
    before = described("model", root.parent)
    (root / "unet" / "edits.json").write_text('{"version": 1, "edits": [{"op": "remove_mid_block"}]}', encoding="utf-8")
    after = described("model", root.parent)
    assert set(after.folder_files("unet")) - set(before.folder_files("unet")) == {"unet/edits.json"}
    assert (before.edits, after.edits) == ({}, {"unet": [{"op": "remove_mid_block"}]})
    (root / "unet" / "edits.json").write_text('{"version": 9, "edits": []}', encoding="utf-8")
    with pytest.raises(RecipeError, match=r"edits\.json has version 9"):
        described("model", root.parent)


def test_the_model_that_ships_with_the_package_is_built_in() -> None:
    source = described("builtin:tiny", Path("/nowhere"))
    assert (source.id, source.kind) == ("builtin:tiny", "builtin")
    assert source.locate(("unet",), say_nothing).joinpath("unet", "config.json").is_file()


def test_another_built_in_name_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="builtin:huge is not built in") as caught:
        described("builtin:huge", tmp_path)
    assert "builtin:tiny" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\ntags: [a]\nlicense:\n- openrail++\n---\n", "openrail++"),
        ("---\nlicense: other\nlicense_name: 'my-terms'\n---\n", "my-terms"),
        ("no front matter\nlicense: mit\n", None),
    ],
)
def test_the_licence_is_what_the_model_card_states(root: Path, text: str, licence: str | None) -> None:
    (root / "README.md").write_text(text, encoding="utf-8")
    assert described("model", root.parent).licence == licence


def test_without_a_card_the_licence_is_the_first_line_of_the_licence_file(root: Path) -> None:
    (root / "README.md").unlink()
    (root / "LICENSE.txt").write_text("\n  CreativeML Open RAIL-M  \nmore", encoding="utf-8")
    assert described("model", root.parent).licence == "CreativeML Open RAIL-M"


def _remove(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def _remove_folder(folder: str) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        for path in (root / folder).iterdir():
            path.unlink()
        (root / folder).rmdir()

    return act


def _write(path: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / path).write_bytes(content) and None


def _rename(path: str, name: str) -> Callable[[Path], None]:
    return lambda root: (root / path).rename((root / path).with_name(name)) and None


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("dtype", ["U8", "I8", "F8_E4M3"])
def test_weights_that_are_quantized_already_are_refused(tmp_path, dtype):
    """Also where no config says so: what bitsandbytes packs is U8, what is called fp8 is F8."""
    root = layouts.write(tmp_path / "model")
    (root / UNET).write_bytes(layouts.safetensors(b"packed", dtype=dtype))
    with pytest.raises(RecipeError, match=rf"{UNET} holds {dtype}: it is quantized already"):
        described("model", tmp_path)


def test_a_source_that_is_pruned_already_is_said_to_be(tmp_path):
    root = layouts.write(tmp_path / "model")
    assert described("model", tmp_path).notes == ()
    (root / "unet" / "edits.json").write_text('{"version": 1, "edits": []}')
    (note,) = described("model", tmp_path).notes
    assert note == "unet: the source is pruned already; what it computes now is what counts as right"


@pytest.mark.parametrize(
    ("damage", "message", "hint"),
    [
        (_remove("model_index.json"), "has no model_index.json, so it is not a diffusers folder", "save_pretrained"),
        (_remove_folder("vae"), r"has no folder vae/ \(with config.json\)", "whole diffusers folder"),
        (_remove("unet/config.json"), "has no unet/config.json", "whole diffusers folder"),
        (_remove("scheduler/scheduler_config.json"), "has no .*scheduler_config.json", "whole diffusers folder"),
        (_remove("tokenizer/merges.txt"), "nor tokenizer/vocab.json with tokenizer/merges.txt", ""),
        (_write("unet/config.json", b"{ not json"), "unet/config.json is not JSON: .*line 1", "write the file again"),
        (_write("unet/config.json", b"\xff\xfe{}"), "unet/config.json is not JSON: .*utf-8", ""),
        (_write("unet/config.json", b"[1]"), "unet/config.json holds a JSON list, not an object", ""),
        (_rename(UNET, "diffusion_pytorch_model.bin"), "has diffusion_pytorch_model.bin but no", "safe_serialization"),
        (_rename(UNET, "other.safetensors"), r"no diffusion_pytorch_model.safetensors \(but other.safetensors\)", ""),
        (_rename(UNET, "diffusion_pytorch_model.non_ema.safetensors"), "but diffusion_pytorch_model.non_ema", ""),
        (_remove(UNET), "unet/ has no diffusion_pytorch_model.safetensors", "shards"),
        (_write(UNET, layouts.safetensors(b"abc")[:-1]), f"{UNET} is cut short", "again"),
        (_write(UNET, b""), f"{UNET} is not a whole safetensors file", "again"),
        (_write(UNET, b"\x02\0\0\0\0\0\0\0[]"), f"{UNET} is not a safetensors file", "again"),
        (_write(UNET, b"PK\x03\x04" + b"x" * 99), f"{UNET} is not a whole safetensors file", "again"),
        (_write(UNET, b"version https://git-lfs.github.com/spec/v1\n"), f"{UNET} is a Git LFS pointer", "git lfs pull"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_in_words(
    root: Path, damage: Callable[[Path], None], message: str, hint: str
) -> None:
    damage(root)
    with pytest.raises(RecipeError, match=message) as caught:
        described("model", root.parent)
    assert hint in caught.value.hint
    assert "source model" in caught.value.message


def test_all_faults_of_a_folder_are_told_at_once(root: Path) -> None:
    for damage in (_remove(UNET), _remove("vae/config.json"), _remove_folder("tokenizer")):
        damage(root)
    with pytest.raises(RecipeError) as caught:
        described("model", root.parent)
    assert len(caught.value.message.splitlines()) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent", "source absent does not exist"),
        ("model/README.md", "neither a folder nor a .safetensors file"),
        ("model/weights.ckpt", "is a pickle, which can run code"),
        ("absent.safetensors", "source absent.safetensors does not exist"),
    ],
)
def test_a_path_that_is_no_source_is_refused(root: Path, source: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        described(source, root.parent)
    assert caught.value.hint


def test_half_precision_weights_that_stand_alone_are_taken_under_the_canonical_name(root: Path, tmp_path: Path) -> None:
    _rename(UNET, "diffusion_pytorch_model.fp16.safetensors")(root)
    source = described("model", root.parent)
    assert any("fp16 weights only" in note for note in source.notes)
    out = fetched(source, "unet", tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_memory_is_planned_for_fp32_whatever_is_stored(root: Path) -> None:
    """The test's weights are bytes, one a parameter."""
    parameters = len(UNET.encode())
    assert described("model", root.parent).fp32_bytes("unet") == 4 * parameters
    layouts.shard(root, infix=".fp16")
    assert described("model", root.parent).fp32_bytes("unet") == 4 * 2


def test_beside_full_weights_a_variant_is_left_alone(root: Path) -> None:
    (root / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(layouts.safetensors(b"half"))
    source = described("model", root.parent)
    assert UNET in source.files
    assert not source.notes
    assert not any("fp16" in path for path in source.files)


@pytest.mark.parametrize("infix", ["", ".fp16"])
def test_shards_are_linked_with_an_index_of_canonical_names(root: Path, tmp_path: Path, infix: str) -> None:
    layouts.shard(root, infix=infix)
    out = fetched(described("model", root.parent), "unet", tmp_path / "out")
    index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text(encoding="utf-8"))
    for shard in index["weight_map"].values():
        assert "fp16" not in shard
        assert (out / shard).is_file()


@pytest.mark.parametrize("target", ["../../secret.safetensors", "diffusion_pytorch_model-00003-of-00003.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused(root: Path, target: str) -> None:
    layouts.shard(root)
    (root.parent / "secret.safetensors").write_bytes(layouts.safetensors(b"x"))
    index = root / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": target}}), encoding="utf-8")
    with pytest.raises(RecipeError, match="which is not in unet/"):
        described("model", root.parent)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map_is_refused(root: Path, content: dict[str, Any]) -> None:
    layouts.shard(root)
    index = root / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RecipeError, match="no weight_map"):
        described("model", root.parent)


def test_weights_are_linked_not_copied(root: Path, tmp_path: Path) -> None:
    out = fetched(described("model", root.parent), "text_encoder", tmp_path / "out")
    assert (out / "model.safetensors").samefile(root / "text_encoder" / "model.safetensors")


def test_assets_keep_their_folders(root: Path, tmp_path: Path) -> None:
    source, out = described("model", root.parent), tmp_path / "out"
    out.mkdir()
    fetch.run_assets({"source": source.locate(fetch.ASSETS, say_nothing)}, out, job(source, *fetch.ASSETS))
    assert (out / "scheduler" / "scheduler_config.json").is_file()
    assert {p.name for p in (out / "tokenizer").iterdir()} == {"merges.txt", "tokenizer_config.json", "vocab.json"}


def test_a_source_that_changed_since_planning_stops_the_build(root: Path, tmp_path: Path) -> None:
    source = described("model", root.parent)
    (root / UNET).write_bytes(layouts.safetensors(b"others, as long as before"))
    with pytest.raises(StageError, match=f"{UNET} of the source changed since the build was planned"):
        fetched(source, "unet", tmp_path / "out")
    (root / UNET).unlink()
    with pytest.raises(StageError, match=f"{UNET} of the source cannot be read"):
        fetched(source, "unet", tmp_path / "out2")


def test_one_changed_byte_changes_the_hash_that_enters_keys(root: Path) -> None:
    before = described("model", root.parent).files[UNET]
    (root / UNET).write_bytes((root / UNET).read_bytes()[:-1] + b"!")
    after = described("model", root.parent).files[UNET]
    assert before.bytes == after.bytes
    assert before.sha256 != after.sha256


def test_describing_a_folder_imports_no_heavy_library(root: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from sdcompile.bundle import sha256_of; from sdcompile.steps import fetch\n"
        "fetch.describe(sys.argv[1], base=Path('.'), folders=('unet',), offline=True, hash_file=sha256_of)\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'huggingface_hub', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or None)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(root)], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert run.returncode == 0, run.stderr
