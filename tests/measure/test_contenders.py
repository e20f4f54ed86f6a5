"""Which targets of a bundle of several are measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdcompile.errors import HostError, RecipeError
from sdcompile.measure import contenders, report
from tests.runtime.test_choosing import fat, folder, machine  # noqa: F401


def measured(*paths: Path, targets: tuple[str, ...] = ()) -> list[tuple[str, str | None]]:
    found = contenders.of_bundles(paths, contenders.Ask(), 1, "auto", targets=targets)
    return [(one.name, one.job["target"]) for one in found]


def test_the_target_that_runs_here_is_measured_and_named(fat, machine):  # noqa: F811
    machine("fast", "plain")
    assert measured(fat) == [("fat@fast", "fast")]
    machine()
    with pytest.raises(HostError, match="none of its 3 targets"):
        measured(fat)


def test_targets_that_are_asked_for_are_measured_against_each_other(fat, folder, machine):  # noqa: F811
    machine("fast", "plain")
    assert measured(fat, targets=("plain", "fast", "plain")) == [("fat@plain", "plain"), ("fat@fast", "fast")]
    # Beside it a bundle of one target is what it is.
    assert measured(folder, fat, targets=("plain",)) == [("toy", None), ("fat@plain", "plain")]
    with pytest.raises(RecipeError, match="has no target slow"):
        measured(fat, targets=("slow",))
    with pytest.raises(RecipeError, match="has one target"):
        measured(folder, targets=("plain",))


def test_a_target_is_guessed_by_its_own_engines_size_and_told_by_its_own_components(fat, machine):  # noqa: F811
    machine("fast", "plain")
    (one,) = contenders.of_bundles([fat], contenders.Ask(), 1, "auto", targets=("plain",))
    assert {row["backend"] for row in one.components.values()} == {"plain"}
    assert 0 < one.bytes < sum(path.stat().st_size for path in (fat / "components").rglob("*") if path.is_file())


def test_the_page_of_a_bundle_shows_the_verification_of_every_target(fat):  # noqa: F811
    for name in ("gpu-sm89", "fast", "plain"):
        (fat / "reports" / name).mkdir(parents=True)
        (fat / "reports" / name / "verify.json").write_text('{"passed": true, "reports": {}}', encoding="utf-8")
    page = report.of_bundle(fat, None, None, None)
    for name in ("gpu:sm89", "fast", "plain"):
        assert f"<h3>{name}</h3>" in page
        assert f"for target {name}: text_encoder on " in page
