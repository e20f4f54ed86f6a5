"""Opening bundles: whole ones run, damaged ones and ones for other machines are refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sdcompile
from sdcompile import bundle, machine
from sdcompile.backends import BACKENDS, Probe
from sdcompile.backends.base import Card, write_card
from sdcompile.errors import BundleError, HostError, RecipeError
from sdcompile.families import FAMILIES
from sdcompile.runtime import SdcompileWarning
from sdcompile.runtime.tables import STATE, Call, Table, Term, save

CONFIGS = {
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 8,
        "block_out_channels": [8, 8],
        "sample_size": 8,
    },
    "vae": {"latent_channels": 4, "out_channels": 3, "block_out_channels": [8, 8]},
    "text_encoder": {"hidden_size": 8, "max_position_embeddings": 6},
    "scheduler": {},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle of stub engines."""
    import tokenizers
    from tokenizers import models, processors

    family = FAMILIES["sd"]
    specs, shapes = family.components(CONFIGS), family.shapes({}, CONFIGS)
    folder = tmp_path / "toy.sdc"
    for name in family.required:
        engine = folder / "components" / name
        (engine / "checkpoint").mkdir(parents=True)
        (engine / "checkpoint" / "config.json").write_text("{}", encoding="utf-8")
        write_card(engine, Card("stub", name, "fp32", specs[name], shapes))
    for extra in ("samplers", "tokenizer"):
        (folder / extra).mkdir()
    save(folder / "samplers", "ddim", [Table("ddim", 2, 1.0, (Call(9.0, 1.0, 0, (Term(STATE, 0, 0.5),)),) * 2)])
    made = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2}, unk_token="?"))
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    made.save(str(folder / "tokenizer" / "tokenizer.json"))
    bundle.write(
        folder,
        bundle.Manifest(
            name="toy",
            family="sd",
            sdcompile="0",
            built_at="now",
            recipe={},
            source={},
            tools={},
            host={},
            facts=family.facts(CONFIGS),
            shapes={letter: tuple(bounds) for letter, bounds in shapes.items()},
            components={
                name: bundle.ComponentEntry(backend="stub", precision="fp32", spec=specs[name].as_json())
                for name in family.required
            },
            tokenizer=bundle.TokenizerEntry(
                file="tokenizer/tokenizer.json", max_length=6, pad_id=1, bos_id=0, eos_id=1
            ),
            samplers={"ddim": bundle.SamplerEntry(file="samplers/ddim.npz", scheduler="X", num_inference_steps=(2,))},
            defaults=bundle.Defaults(sampler="ddim", num_inference_steps=2, guidance_scale=5.0, height=16, width=16),
            verification={},
            files={
                path.relative_to(folder).as_posix(): bundle.FileEntry(
                    bytes=path.stat().st_size, sha256=bundle.sha256_of(path)
                )
                for path in folder.rglob("*")
                if path.is_file()
            },
        ),
    )
    return folder


def altered(folder: Path, **fields: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def test_a_bundle_opens_and_makes_a_picture_that_names_it(folder: Path) -> None:
    made = sdcompile.load(folder)("red", seed=1)
    assert made.images[0].size == (16, 16)
    assert made.metadata(0)["bundle"] == bundle.digest(folder)


@pytest.mark.parametrize("file", ["samplers/ddim.npz", "tokenizer/tokenizer.json", "components/unet/engine.json"])
def test_a_truncated_altered_or_missing_file_is_refused(folder: Path, file: str) -> None:
    whole = (folder / file).read_bytes()
    for content, message in ((whole[:-1], "truncated"), (whole[:-1] + b"?", "sha256"), (None, "missing")):
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_bytes(content)
        with pytest.raises(BundleError, match=message):
            sdcompile.load(folder)
        (folder / file).write_bytes(whole)
    sdcompile.load(folder)


def test_files_no_image_needs_are_not_read(folder: Path) -> None:
    (folder / "README.md").write_text("a note of one's own", encoding="utf-8")
    sdcompile.load(folder)


def test_a_path_that_is_no_bundle_is_refused(folder: Path, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none", "does not exist"),
        (folder / "manifest.json", "is a file"),
        (tmp_path, "no manifest"),
    ):
        with pytest.raises(BundleError, match=message):
            sdcompile.load(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema_version": 99}, "schema 99"),
        ({"family": "sd9"}, "family 'sd9'"),
        ({"components": {}}, "has no text_encoder, unet, vae_decoder"),
        ({"shapes": 3}, "damaged"),
    ],
)
def test_a_manifest_this_version_cannot_run_is_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    altered(folder, **fields)
    with pytest.raises(BundleError, match=message):
        sdcompile.load(folder)


def test_a_backend_this_version_does_not_have_is_refused(folder: Path) -> None:
    components = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["components"]
    components["unet"]["backend"] = "abacus"
    altered(folder, components=components)
    with pytest.raises(BundleError, match="unet was compiled by backend 'abacus'"):
        sdcompile.load(folder)


def test_a_host_without_the_backend_is_refused_with_reason_and_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    missing = dataclasses.replace(
        BACKENDS["stub"], probe=lambda: Probe(False, reason="no stub here", hint="pip install stub")
    )
    monkeypatch.setitem(BACKENDS, "stub", missing)
    with pytest.raises(HostError, match="no stub here") as caught:
        sdcompile.load(folder)
    assert "pip install stub" in caught.value.hint
    assert "sdcompile build RECIPE --set backend=" in caught.value.hint


def test_memory_decides_whether_engines_stay_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sdcompile.load(folder, memory="low").low_memory
    assert not sdcompile.load(folder, memory="high").low_memory
    for free, low in ((1 << 20, True), (64 << 30, False)):
        monkeypatch.setattr(machine, "memory_bytes", lambda free=free: (64 << 30, free))
        assert sdcompile.load(folder).low_memory is low


@pytest.mark.parametrize("options", [{"memory": "some"}, {"threads": 0}])
def test_unknown_options_are_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        sdcompile.load(folder, **options)


def test_an_engine_that_computes_otherwise_than_it_was_verified_warns(folder: Path) -> None:
    manifest = bundle.read(folder)
    entry = manifest.components["unet"].model_copy(update={"precision": "bf16", "facts": {"precision": "bf16"}})
    altered(folder, components={k: v.model_dump() for k, v in {**manifest.components, "unet": entry}.items()})
    with (
        sdcompile.load(folder) as pipe,
        pytest.warns(SdcompileWarning, match="unet was verified computing in bf16 and"),
    ):
        pipe("x", num_inference_steps=2)
