"""The package step's own promises."""

from __future__ import annotations

from pathlib import Path

from sdcompile.files import link_tree, size_bytes
from sdcompile.steps import package


def test_engine_files_of_the_same_content_are_one_file_and_others_are_left_alone(tmp_path: Path) -> None:
    for name, content in (
        ("components/a/unet/weights", "same"),
        ("components/b/unet/weights", "same"),
        ("components/b/unet/plan", "other"),
        ("reports/a/verify.json", "same"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    found = package._hashed(tmp_path)
    first, second = (tmp_path / f"components/{name}/unet/weights" for name in "ab")
    assert first.samefile(second)
    assert not first.samefile(tmp_path / "reports/a/verify.json")
    assert found["components/a/unet/weights"] == found["components/b/unet/weights"]
    assert size_bytes(tmp_path) == len("same" + "other" + "same")


def test_names_of_one_file_stay_names_of_one_file_where_a_tree_is_copied(tmp_path: Path, monkeypatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "a").write_text("weights", encoding="utf-8")
    (source / "b").hardlink_to(source / "a")

    import os

    linked = os.link

    def on_one_disk(old: Path, new: Path) -> None:
        if Path(old).is_relative_to(source):
            raise OSError("another disk")
        linked(old, new)

    monkeypatch.setattr(os, "link", on_one_disk)
    link_tree(source, target)
    assert (target / "a").samefile(target / "b")
    assert not (target / "a").samefile(source / "a")
