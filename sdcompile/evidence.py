"""What a verified build hands to other tools: each engine's worst recorded call as Polygraphy files.

Reads the plan and the store, also after a build that verification stopped; makes no step.
"""

from __future__ import annotations

import json
from pathlib import Path

from sdcompile.bundle import folder_of_target
from sdcompile.errors import RecipeError
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
    for step in work.plan:
        report_folder = work.store.get(step.key)
        if (
            step.op != "engine"
            or "onnx" not in step.inputs
            or report_folder is None
            or only not in (None, step.component)
        ):
            continue
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
            report["floor"]["min_snr_db"],
        )  # fmt: skip
    if not found:
        raise RecipeError(
            "no engine of this recipe was built from ONNX and verified", "Polygraphy compares ONNX graphs"
        )
    return found


def _exported(work: Build, name: str) -> str:
    """The step that exported what the ONNX of step `name` was made of."""
    while work.plan[name].op != "onnx":
        name = work.plan[name].inputs["onnx"]
    return name
