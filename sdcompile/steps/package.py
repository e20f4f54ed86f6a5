"""engines + tokenizer + sampler tables + reports -> bundle.

Files are hard-linked from the store, hashed once more on the way, and the manifest is written
last. What the manifest says of precision and quality is read from the verification reports,
never from the recipe.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdcompile import __version__, bundle, machine
from sdcompile.files import link, link_tree
from sdcompile.passes.base import read_effect
from sdcompile.passes.nncf_int8 import SENSITIVITY
from sdcompile.runtime.profiles import FILE as PROFILES
from sdcompile.spec import Job
from sdcompile.steps.report import reports as combined
from sdcompile.steps.report import stood_in

ARTIFACT = "artifact.json"

_TOOLS = (
    "torch", "diffusers", "transformers", "tokenizers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "openvino", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13", "tensorrt", "numpy", "safetensors",
)  # fmt: skip


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Assemble the bundle in `out`.

    inputs: engine.<component>, report.<component> (absent for backends that cannot be verified),
    pass.<component>.<op> for each pass, race.<component> where int8 had to win, tokenizer, tables.
    job.params: recipe, source, facts, components, defaults, profiles, fallbacks.
    """
    params = job.params
    reports = {
        role.removeprefix("report."): json.loads((folder / "report.json").read_text(encoding="utf-8"))
        for role, folder in inputs.items()
        if role.startswith("report.")
    }
    for name in params["components"]:
        job.say(f"linking {name}", None)
        link_tree(inputs[f"engine.{name}"], out / "components" / name)
    tables = json.loads((inputs["tables"] / "samplers.json").read_text(encoding="utf-8"))
    for name in tables:
        link(inputs["tables"] / f"{name}.npz", out / "samplers" / f"{name}.npz")
    link(inputs["tokenizer"] / "tokenizer.json", out / "tokenizer" / "tokenizer.json")
    _write_reports(out / "reports", reports)
    for role, folder in inputs.items():
        if role.startswith("pass.") and (folder / SENSITIVITY).is_file():
            link(folder / SENSITIVITY, out / "reports" / f"{role.split('.')[1]}-{SENSITIVITY}")
    (out / "README.md").write_text(_readme(params), encoding="utf-8")
    (out / PROFILES).write_text(_profiles(params), encoding="utf-8")
    for stray in out.rglob(ARTIFACT):
        stray.unlink()

    job.say("hashing", None)
    manifest = bundle.Manifest(
        name=params["recipe"]["name"],
        family=params["recipe"]["family"],
        sdcompile=__version__,
        built_at=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=params["recipe"],
        source={k: v for k, v in params["source"].items() if k != "licence"},
        licence=params["source"]["licence"],
        tools={name: version for name in _TOOLS if (version := machine.version(name))},
        host={**machine.identity(), "system": platform.platform(), "python": platform.python_version()},
        facts=params["facts"],
        shapes={letter: (bounds.min, bounds.opt, bounds.max) for letter, bounds in job.shapes.items()},
        components={name: _component(name, params, reports.get(name), inputs) for name in params["components"]},
        tokenizer=bundle.TokenizerEntry(
            file="tokenizer/tokenizer.json",
            **json.loads((inputs["tokenizer"] / "entry.json").read_text(encoding="utf-8")),
        ),
        samplers={
            name: bundle.SamplerEntry(file=f"samplers/{name}.npz", **_only(bundle.SamplerEntry, entry))
            for name, entry in tables.items()
        },
        defaults=bundle.Defaults(**params["defaults"]),
        verification=_verification(reports),
        files={
            path.relative_to(out).as_posix(): bundle.FileEntry(bytes=path.stat().st_size, sha256=bundle.sha256_of(path))
            for path in sorted(out.rglob("*"))
            if path.is_file() and path.name != PROFILES  # people edit it
        },
    )
    bundle.write(out, manifest)


def _component(
    name: str, params: Mapping[str, Any], report: Mapping[str, Any] | None, inputs: Mapping[str, Path]
) -> bundle.ComponentEntry:
    entry = params["components"][name]
    notes = [params.get("fallbacks", {}).get(name), stood_in(report) if report else None]
    race = inputs.get(f"race.{name}")
    return bundle.ComponentEntry(
        backend=entry["backend"],
        precision=entry["precision"],
        params=entry["params"],
        spec=entry["spec"],
        facts=dict(report["facts"]) if report else {},
        verification=_figures(report) if report else {},
        effects=[
            {"pass": op, **effect}
            for op in entry.get("passes", ())
            if (effect := read_effect(inputs[f"pass.{name}.{op}"])) is not None
        ],
        race=json.loads((race / "race.json").read_text(encoding="utf-8")) if race else {},
        notes=[note for note in notes if note],
    )


def _figures(report: Mapping[str, Any]) -> dict[str, Any]:
    keep = ("passed", "floor", "worst", "by_region", "by_shape", "stand_in", "ranges", "proof", "own_decoder",
            "step_cache")  # fmt: skip
    return {key: report[key] for key in keep if key in report}


def _verification(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if not reports:
        return {"passed": None, "reason": "the backend computes nothing that could be compared"}
    return {
        "passed": all(report["passed"] for report in reports.values()),
        "images": _figures(reports["pipeline"]) if "pipeline" in reports else {},
    }


def _write_reports(folder: Path, reports: Mapping[str, Any]) -> None:
    folder.mkdir()
    summary, junit = combined(reports)
    (folder / "verify.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "verify.xml").write_text(junit, encoding="utf-8")


def _profiles(params: Mapping[str, Any]) -> str:
    """profiles.json; a policy for its usual names: save when the battery is low or the machine hot."""
    names = params["profiles"]
    rules = (
        {"battery_below": 0.2, "profile": "draft"},
        {"thermal": "throttling", "profile": "draft"},
        {"battery_above": 0.8, "profile": "quality"},
    )
    content = {"profiles": names, "policy": [rule for rule in rules if rule["profile"] in names]}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _only(model: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key in model.model_fields and key != "file"}


def _readme(params: Mapping[str, Any]) -> str:
    recipe, source = params["recipe"], params["source"]
    rows = "\n".join(
        f"| {name} | {entry['backend']} | {entry['precision']} |" for name, entry in params["components"].items()
    )
    extras = ",".join(sorted({entry["backend"].replace("_", "-") for entry in params["components"].values()}))
    parts = "".join(
        f"\n{name} is made of {part['id']}. Its licence: {part['licence'] or 'not stated'}.\n"
        for name, part in source.get("components", {}).items()
    )
    return f"""# {recipe["name"]}

Compiled by sdcompile {__version__} from {source["id"]}. Licence of the source: {source["licence"] or "not stated"}.
{parts}
    pip install 'sdcompile[{extras}]'
    sdcompile generate . "a prompt" --seed 1

| component | backend | precision |
|---|---|---|
{rows}

`sdcompile inspect .` tells what it was made of and how it was verified; reports/verify.json has every figure.
"""
