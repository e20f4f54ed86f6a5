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
from sdcompile.spec import Job, at_target
from sdcompile.steps.each_pass import EACH_PASS
from sdcompile.steps.report import reports as combined
from sdcompile.steps.report import stood_in

ARTIFACT = "artifact.json"
README = "README.md"

_TOOLS = (
    "torch", "diffusers", "transformers", "tokenizers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "openvino", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13", "tensorrt", "numpy", "safetensors",
)  # fmt: skip


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Assemble the bundle in `out`.

    inputs: engine.<component>, report.<component> (absent for backends that cannot be verified),
    pass.<component>.<op> for each pass, race.<component>.<stage> where that had to win, tokenizer, tables; of
    several targets each has its own, with <component>@<target>.
    job.params: recipe, source, facts, components, or targets {name: components}, defaults, profiles, fallbacks.
    """
    params = job.params
    ways: Mapping[str, Mapping[str, Any]] = params.get("targets") or {"": params["components"]}
    told = {target: _of_target(inputs, target) for target in ways}
    placed: dict[Path, str] = {}
    folders: dict[str, dict[str, str]] = {}
    for target, components in ways.items():
        job.say(f"linking {target or ', '.join(components)}", None)
        at = f"components/{bundle.folder_of_target(target)}" if target else "components"
        folders[target] = {}
        for name in components:
            engine = told[target][f"engine.{name}"].resolve()
            if engine not in placed:
                placed[engine] = f"{at}/{name}"
                link_tree(engine, out / at / name)
            folders[target][name] = placed[engine]
    tables = json.loads((inputs["tables"] / "samplers.json").read_text(encoding="utf-8"))
    for name in tables:
        link(inputs["tables"] / f"{name}.npz", out / "samplers" / f"{name}.npz")
    link(inputs["tokenizer"] / "tokenizer.json", out / "tokenizer" / "tokenizer.json")
    reports = {target: _reports(rows) for target, rows in told.items()}
    for target, rows in told.items():
        folder = out / "reports" / bundle.folder_of_target(target)
        _write_reports(folder, reports[target])
        for role, path in rows.items():
            if role.startswith("pass.") and (path / SENSITIVITY).is_file():
                link(path / SENSITIVITY, folder / f"{role.split('.')[1]}-{SENSITIVITY}")
    (out / README).write_text(readme(params["recipe"], params["source"], ways), encoding="utf-8")
    (out / PROFILES).write_text(_profiles(params), encoding="utf-8")
    for stray in out.rglob(ARTIFACT):
        stray.unlink()

    job.say("hashing", None)
    entries = {
        target: {
            name: _component(
                name, components[name], reports[target].get(name), told[target], _note(params, name, target)
            )
            for name in components
        }
        for target, components in ways.items()
    }
    verified = {target: _verification(rows) for target, rows in reports.items()}
    targets = {
        target: bundle.TargetEntry(folders=folders[target], components=entries[target], verification=verified[target])
        for target in ways
        if target
    }
    manifest = bundle.Manifest(
        name=params["recipe"]["name"],
        family=params["recipe"]["family"],
        sdcompile=__version__,
        built_at=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=params["recipe"],
        source={k: v for k, v in params["source"].items() if k != "licence"},
        licence=params["source"]["licence"],
        tools={name: version for name in _TOOLS if (version := machine.installed(name))},
        host={**machine.identity(), "system": platform.platform(), "python": platform.python_version()},
        facts=params["facts"],
        shapes={letter: (bounds.min, bounds.opt, bounds.max) for letter, bounds in job.shapes.items()},
        components=entries.get("", {}),
        targets=targets,
        tokenizer=bundle.TokenizerEntry(
            file="tokenizer/tokenizer.json",
            **json.loads((inputs["tokenizer"] / "entry.json").read_text(encoding="utf-8")),
        ),
        samplers={
            name: bundle.SamplerEntry(file=f"samplers/{name}.npz", **_only(bundle.SamplerEntry, entry))
            for name, entry in tables.items()
        },
        defaults=bundle.Defaults(**params["defaults"]),
        verification=verified[""] if "" in verified else _verification_of_all(verified),
        files=_hashed(out),
    )
    bundle.write(out, manifest)


def _of_target(inputs: Mapping[str, Path], target: str) -> dict[str, Path]:
    """The inputs of one target, by their roles as if it were the only one."""
    found = {}
    for role, path in inputs.items():
        kind, dot, rest = role.partition(".")
        label, _, op = rest.partition(".")
        name, _, whose = label.partition("@")
        if dot and whose == target:
            found[f"{kind}.{name}" + (f".{op}" if op else "")] = path
    return found


def _reports(inputs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    return {
        # Under the name it has here: a width's report speaks of the denoiser.
        (name := role.removeprefix("report.")): {
            **json.loads((folder / "report.json").read_text(encoding="utf-8")),
            "component": name,
        }
        for role, folder in inputs.items()
        if role.startswith("report.")
    }


def _hashed(out: Path) -> dict[str, bundle.FileEntry]:
    """Every file's size and hash. Engines' files of the same content are made one file on the way."""
    found: dict[str, bundle.FileEntry] = {}
    first: dict[str, Path] = {}
    for path in sorted(out.rglob("*")):
        if not path.is_file() or path.name == PROFILES:  # people edit it
            continue
        relative = path.relative_to(out).as_posix()
        entry = bundle.entry_of(path)
        found[relative] = entry
        same = first.setdefault(entry.sha256, path)
        if relative.startswith("components/") and not same.samefile(path):
            path.unlink()
            link(same, path)
    return found


def _component(
    name: str,
    entry: Mapping[str, Any],
    report: Mapping[str, Any] | None,
    inputs: Mapping[str, Path],
    fallback: str | None,
) -> bundle.ComponentEntry:
    notes = [fallback, stood_in(report) if report else None]
    races = [folder for role, folder in inputs.items() if role.startswith(f"race.{name}.")]
    apart = inputs.get(f"apart.{name}")
    measured = {} if apart is None else json.loads((apart / EACH_PASS).read_text(encoding="utf-8"))
    return bundle.ComponentEntry(
        backend=entry["backend"],
        precision=entry["precision"],
        params=entry["params"],
        spec=entry["spec"],
        facts=dict(report["facts"]) if report else {},
        verification=_figures(report) if report else {},
        effects=[
            {"pass": op, **effect, **measured.get(op, {})}
            for op in entry.get("passes", ())
            if (effect := read_effect(inputs[f"pass.{name}.{op}"])) is not None
        ],
        races=[json.loads((folder / "race.json").read_text(encoding="utf-8")) for folder in races],
        notes=[note for note in notes if note],
    )


def _note(params: Mapping[str, Any], name: str, target: str) -> str | None:
    """Why the component is not what the recipe asked for, where it is not."""
    told = params.get("fallbacks", {})
    # What happened to the model itself, as every target has it, is told without a target.
    notes = dict.fromkeys(told[label] for label in (name, at_target(name, target)) if label in told)
    return "; ".join(notes) or None


def _figures(report: Mapping[str, Any]) -> dict[str, Any]:
    keep = ("passed", "floor", "worst", "by_region", "by_shape", "stand_in", "ranges", "proof", "own_decoder",
            "alignment", "step_cache", "sweep")  # fmt: skip
    return {key: report[key] for key in keep if key in report}


def _verification(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if not reports:
        return {"passed": None, "reason": "the backend computes nothing that could be compared"}
    return {
        "passed": all(report["passed"] for report in reports.values()),
        "images": _figures(reports["pipeline"]) if "pipeline" in reports else {},
    }


def _verification_of_all(verified: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of several targets: did all pass, of those that compute something?"""
    verdicts = [row["passed"] for row in verified.values() if row["passed"] is not None]
    return {"passed": all(verdicts) if verdicts else None}


def _write_reports(folder: Path, reports: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
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


def readme(recipe: Mapping[str, Any], source: Mapping[str, Any], ways: Mapping[str, Mapping[str, Any]]) -> str:
    """README.md of a bundle. ways: target ("" where there is one) -> component -> {backend, precision}."""
    several = "" not in ways
    rows: list[tuple[str, ...]] = [
        (*((target,) if several else ()), name, entry["backend"], entry["precision"])
        for target, components in ways.items()
        for name, entry in components.items()
    ]
    columns = (*(("target",) if several else ()), "component", "backend", "precision")
    extras = ",".join(sorted({row[-2].replace("_", "-") for row in rows}))
    first = (
        "sdcompile check .    # which targets run here, and what the others lack"
        if several
        else (f"pip install 'sdcompile[{extras}]'")
    )
    parts = "".join(
        f"\n{name} is made of {part['id']}. Its licence: {part['licence'] or 'not stated'}.\n"
        for name, part in source.get("components", {}).items()
    )
    figures = f"reports/{'TARGET/' if several else ''}verify.json"
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""# {recipe["name"]}

Compiled by sdcompile {__version__} from {source["id"]}. Licence of the source: {source["licence"] or "not stated"}.
{parts}
    {first}
    sdcompile generate . "a prompt" --seed 1

| {" | ".join(columns)} |
{"|---" * len(columns)}|
{table}

`sdcompile inspect .` tells what it was made of and how it was verified; {figures} has every figure.
"""
