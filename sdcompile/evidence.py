"""What a verified build hands to other tools: each engine's worst recorded call as Polygraphy files.

Reads the plan and the store, also after a build that verification stopped; makes no step.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sdcompile.bundle import folder_of_target
from sdcompile.errors import RecipeError
from sdcompile.plan import Step
from sdcompile.run import Build


def polygraphy(work: Build, folder: Path, only: str | None = None) -> dict[str, list[str]]:
    """Write `folder/<component>/` for every engine that was verified; returns its commands, by folder.

    Raises RecipeError when no engine was made from ONNX, HostError when polygraphy is missing.
    """
    import numpy as np

    from sdcompile.samples import Samples
    from sdcompile.steps import polygraphy_files
    from sdcompile.steps.verify import WORST_FILE

    found: dict[str, list[str]] = {}
    for step, report_folder in _verified(work, only):
        report = json.loads((report_folder / "report.json").read_text(encoding="utf-8"))
        steps = {
            "typed": step.inputs["onnx"],
            "exported": _exported(work, step.inputs["onnx"]),
            "samples": step.inputs["samples"],
        }
        folders = {role: work.store.get(work.plan[name].key) for role, name in steps.items()}
        missing = [steps[role] for role, path in folders.items() if path is None]
        if missing:
            raise RecipeError(
                f"{step.name} is in the store, but what it was made of is not: {', '.join(missing)}",
                "`sdcompile gc` removed it; name another --store, so that it is made again",
            )
        sample = Samples(folders["samples"], step.job.component)[report["worst"]["id"]]  # type: ignore[arg-type]
        answer = None
        if (report_folder / WORST_FILE).is_file():
            with np.load(report_folder / WORST_FILE) as kept:
                answer = {
                    name.removeprefix("got."): kept[name] for name in kept.files if name.startswith("got.")
                } or None
        forms = {role: path for role, path in folders.items() if path is not None and role != "samples"}
        place = folder_of_target(step.of)
        found[place] = polygraphy_files.write(
            folder / place, report["backend"], forms, sample.feeds, sample.outputs, answer,
            report["floor"]["min_snr_db"], step.job.params["options"].get("provider", "cpu"),
        )  # fmt: skip
    if not found:
        raise RecipeError(
            "no engine of this recipe was built from ONNX and verified", "Polygraphy compares ONNX graphs"
        )
    return found


def run(folder: Path, places: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What Polygraphy finds with the commands in each `folder`/place (see `polygraphy_files.run`)."""
    from sdcompile.steps import polygraphy_files

    return {place: polygraphy_files.run(folder / place) for place in places}


def words(work: Build, recipe: Path, sets: Iterable[str], store: Path, only: str | None) -> str:
    """What to type to have Polygraphy look for the fault of an engine of `recipe`; "" where it has nothing to run."""
    if not list(_verified(work, only)):
        return ""
    options = [word for change in sets for word in ("--set", change)]
    options += ["--store", str(store)] if store != Path("artifacts") else []
    options += ["--only", only] if only is not None else []
    folder = f"polygraphy/{work.recipe.name}"
    return shlex.join(["sdcompile", "verify", str(recipe), *options, "--polygraphy", folder, "--polygraphy-run"])


def _verified(work: Build, only: str | None) -> Iterator[tuple[Step, Path]]:
    """The steps that verified an engine made from ONNX, and their reports' folders."""
    for step in work.plan:
        if step.op == "engine" and "onnx" in step.inputs and only in (None, step.component):
            folder = work.store.get(step.key)
            if folder is not None:
                yield step, folder


def _exported(work: Build, name: str) -> str:
    """The step that exported what the ONNX of step `name` was made of."""
    while work.plan[name].op != "onnx":
        name = work.plan[name].inputs["onnx"]
    return name
