"""Bundles of several targets: the first that the machine runs is taken, for a reason that is told."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import sdcompile
from sdcompile import bundle, status
from sdcompile.backends import BACKENDS, Probe
from sdcompile.backends.base import read_card
from sdcompile.errors import BundleError, HostError, RecipeError
from sdcompile.runtime import choosing
from tests.runtime.test_opening import altered, folder  # noqa: F401

NAMES = ("gpu:sm89", "fast", "plain")
BACKEND = {"gpu:sm89": "gpu", "fast": "fast", "plain": "plain"}

Machine = Callable[..., None]


@pytest.fixture
def fat(folder: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A bundle of the targets NAMES, of stub engines; "plain" has the text encoder of "fast"."""
    manifest = bundle.read(folder)
    made, targets = tmp_path / "fat.sdc", {}
    for name in NAMES:
        folders = {part: f"components/{bundle.folder_of_target(name)}/{part}" for part in manifest.components}
        if name == "plain":
            folders["text_encoder"] = targets["fast"].folders["text_encoder"]
        for part, place in folders.items():
            shutil.copytree(folder / "components" / part, made / place, dirs_exist_ok=True)
        entries = {
            part: entry.model_copy(update={"backend": BACKEND[name]}) for part, entry in manifest.components.items()
        }
        targets[name] = bundle.TargetEntry(folders=folders, components=entries, verification={})
    for extra in ("samplers", "tokenizer"):
        shutil.copytree(folder / extra, made / extra)
    files = {path.relative_to(made).as_posix(): bundle.entry_of(path) for path in made.rglob("*") if path.is_file()}
    bundle.write(made, manifest.model_copy(update={"components": {}, "targets": targets, "files": files}))
    return made


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A function that says which of the backends gpu, fast and plain are there; the others run nothing."""

    def has(*present: str, cannot_run: str = "") -> None:
        for name in BACKEND.values():
            there = name in present
            probe = Probe(there, reason=f"no {name} here", hint=f"pip install {name}", cannot_run=cannot_run)
            row = dataclasses.replace(
                BACKENDS["stub"], name=name, probe=lambda probe=probe: probe,
                fits=lambda at, name=name: f"{read_card(at, 'stub').component} for {name}",
            )  # fmt: skip
            monkeypatch.setitem(BACKENDS, name, row)

    return has


def test_the_preferred_target_is_taken_where_it_runs(fat: Path, machine: Machine) -> None:
    machine("gpu", "fast", "plain")
    pipe = sdcompile.load(fat)
    assert (pipe.target, pipe.why) == ("gpu:sm89", "gpu:sm89, the preferred target")
    assert pipe("red", seed=1).metadata(0)["target"] == "gpu:sm89"


def test_the_next_that_runs_is_taken_and_the_reason_told(
    fat: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(logging.getLogger("sdcompile"), "info", lambda text, *words: logged.append(text % words))
    machine("plain")
    pipe = sdcompile.load(fat)
    assert pipe.target == "plain"
    assert "no gpu here" in pipe.why
    assert "no fast here" in pipe.why
    assert logged == [f"{fat}: {pipe.why}"]


def test_the_target_that_was_asked_for_is_taken(fat: Path, machine: Machine) -> None:
    machine("gpu", "fast", "plain")
    pipe = sdcompile.load(fat, target="plain")
    assert (pipe.target, pipe.why) == ("plain", "plain, as asked")


def test_a_target_there_is_not_or_that_cannot_run_is_refused(fat: Path, folder: Path, machine: Machine) -> None:  # noqa: F811
    machine("plain")
    with pytest.raises(RecipeError, match="no target gpu") as unknown:
        sdcompile.load(fat, target="gpu")
    assert unknown.value.hint == "it has: gpu:sm89, fast, plain"
    with pytest.raises(HostError, match=r"target fast cannot run here: .*no fast here") as caught:
        sdcompile.load(fat, target="fast")
    assert "of its targets, plain can" in caught.value.hint
    with pytest.raises(RecipeError, match="has one target"):
        sdcompile.load(folder, target="plain")


def test_where_none_runs_every_reason_and_the_way_out_are_told(fat: Path, machine: Machine) -> None:
    machine()
    with pytest.raises(HostError) as caught:
        sdcompile.load(fat)
    assert "none of its 3 targets can run here" in caught.value.message
    for name, backend in BACKEND.items():
        assert f"  {name}: text_encoder needs backend {backend}" in caught.value.message
        assert f"{name}: pip install {backend}" in caught.value.hint
    assert "sdcompile build RECIPE --set targets.3=" in caught.value.hint


def test_only_the_chosen_targets_files_must_be_whole(fat: Path, machine: Machine) -> None:
    machine("gpu", "fast", "plain")
    broken = fat / "components" / "fast" / "unet" / "checkpoint" / "config.json"
    broken.write_text("[]", encoding="utf-8")
    assert sdcompile.load(fat).target == "gpu:sm89"
    assert sdcompile.load(fat, target="plain").target == "plain"
    with pytest.raises(BundleError, match=r"components/fast/unet/checkpoint/config\.json does not match"):
        sdcompile.load(fat, target="fast")
    # Nor does a damaged one make room for the next: who has the GPU wants to know.
    machine("fast", "plain")
    with pytest.raises(BundleError):
        sdcompile.load(fat)


def test_a_file_two_targets_share_counts_for_both(fat: Path, machine: Machine) -> None:
    machine("gpu", "fast", "plain")
    assert not (fat / "components" / "plain" / "text_encoder").exists()
    (fat / "components" / "fast" / "text_encoder" / "checkpoint" / "config.json").write_text("[]", encoding="utf-8")
    for name in ("fast", "plain"):
        with pytest.raises(BundleError, match="components/fast/text_encoder"):
            sdcompile.load(fat, target=name)


def test_a_damaged_card_is_a_damaged_bundle_only_where_the_engine_could_run(fat: Path, machine: Machine) -> None:
    for card in (fat / "components" / "gpu-sm89").rglob("engine.json"):
        card.write_text("{", encoding="utf-8")
    machine("gpu", "fast", "plain")
    with pytest.raises(BundleError, match=r"holds no whole engine: engine\.json"):
        sdcompile.load(fat)
    machine("gpu", "fast", "plain", cannot_run="no driver here")
    pipe = sdcompile.load(fat)
    assert pipe.target == "fast"
    assert "text_encoder (gpu) cannot run here: no driver here" in pipe.why


def test_a_backend_unknown_to_this_version_is_no_reason_to_refuse_the_others(fat: Path, machine: Machine) -> None:
    machine("gpu", "fast", "plain")
    manifest = bundle.read(fat)
    gpu = manifest.targets["gpu:sm89"]
    unknown = {part: entry.model_copy(update={"backend": "abacus"}) for part, entry in gpu.components.items()}
    targets = {**manifest.targets, "gpu:sm89": gpu.model_copy(update={"components": unknown})}
    bundle.write(fat, manifest.model_copy(update={"targets": targets}))
    pipe = sdcompile.load(fat)
    assert pipe.target == "fast"
    assert "'abacus', which this sdcompile does not have" in pipe.why


def test_the_same_seed_draws_the_same_picture_with_every_target(fat: Path, machine: Machine) -> None:
    machine("gpu", "fast", "plain")
    drawn = [sdcompile.load(fat, target=name)("red", seed=3, output_type="np").images for name in NAMES]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


def test_finished_images_are_kept_for_each_target(fat: Path, machine: Machine, tmp_path: Path) -> None:
    machine("gpu", "fast", "plain")
    for name in NAMES:
        pipe = sdcompile.load(fat, target=name, image_cache=tmp_path / "images")
        assert [pipe("red", seed=3).timings["images_read"] for _ in range(2)] == [0, 1]


# Asking without loading --------------------------------------------------------------------------


def test_check_tells_of_every_target_and_which_is_taken(fat: Path, machine: Machine) -> None:
    machine("fast", "plain")
    found = status.fitness(fat)
    assert (found["runs"], found["target"]) == (True, "fast")
    assert {row["target"]: row["runs"] for row in found["targets"]} == {"gpu:sm89": False, "fast": True, "plain": True}
    assert found["targets"][1]["components"][0]["engine"] == "text_encoder for fast"
    assert found["hints"] == ["gpu:sm89: pip install gpu"]
    only = status.fitness(fat, "gpu:sm89")
    assert (only["runs"], [row["target"] for row in only["targets"]]) == (False, ["gpu:sm89"])
    with pytest.raises(RecipeError, match="no target slow"):
        status.fitness(fat, "slow")


def test_check_of_a_machine_that_runs_none_says_what_to_build(fat: Path, machine: Machine) -> None:
    machine()
    found = status.fitness(fat)
    assert (found["runs"], found["target"]) == (False, None)
    assert found["hints"][-1].startswith("build it with a target for this machine: sdcompile build RECIPE --set ")


def test_a_gpu_that_no_target_uses_is_worth_a_hint_though_others_run(
    fat: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("fast", "plain")
    here = Probe(True, version="1", identity={"gpu": "X", "architecture": "sm120"})
    for name in ("tensorrt", "tensorrt_rtx"):
        probe = here if name == "tensorrt_rtx" else Probe(False)
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], probe=lambda probe=probe: probe))
    found = status.fitness(fat)
    assert found["target"] == "fast"
    assert found["hints"][-1].endswith("sdcompile build RECIPE --set targets.3=tensorrt_rtx:sm120")


@pytest.mark.parametrize(("architecture", "expected"), [("sm89", "tensorrt_rtx:sm89"), ("sm90", "tensorrt")])
def test_what_to_build_is_for_the_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, architecture: str, expected: str
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        here = Probe(True, version="1", identity={"gpu": "X", "architecture": architecture})
        if name == "tensorrt" and expected != "tensorrt":
            here = Probe(False, reason="not installed")
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], probe=lambda here=here: here))
    assert choosing.target_here() == expected


def test_those_that_run_are_told_apart_from_those_that_do_not(fat: Path, machine: Machine) -> None:
    machine("fast", "plain")
    ways, unfit = choosing.runnable(fat, bundle.read(fat), None)
    assert [one.target for one in ways] == ["fast", "plain"]
    assert [verdict.target for verdict in unfit] == ["gpu:sm89"]
    machine()
    with pytest.raises(HostError, match="none of its 3 targets"):
        choosing.runnable(fat, bundle.read(fat), None)


# The manifest ------------------------------------------------------------------------------------


def test_a_manifest_of_several_targets_is_of_schema_2_and_one_of_one_stays_readable_as_schema_1(
    fat: Path,
    folder: Path,  # noqa: F811
) -> None:
    import json

    several, one = (json.loads((place / "manifest.json").read_text(encoding="utf-8")) for place in (fat, folder))
    assert (several["schema_version"], one["schema_version"]) == (2, 1)
    assert "targets" not in one


def test_a_newer_manifest_is_refused(fat: Path) -> None:
    altered(fat, schema_version=3)
    with pytest.raises(BundleError, match="schema 3; this sdcompile reads schema 1 to 2"):
        sdcompile.load(fat)


def test_one_target_looks_like_a_bundle_of_it_alone(fat: Path) -> None:
    whole = bundle.read(fat)
    one = whole.by_target()["plain"]
    assert (one.target, tuple(one.components), one.targets) == ("plain", ("text_encoder", "unet", "vae_decoder"), {})
    assert one.folder_of("unet") == "components/plain/unet"
    assert one.folder_of("text_encoder") == "components/fast/text_encoder"
    assert one.reports == "reports/plain"
    assert whole.components == {}
