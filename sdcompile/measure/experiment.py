"""The layered study: every layer built from the store, all timed in one run, each judged, one chosen.

The result is a folder: experiment.json, the bundles, the pictures of every layer and of its
reference, and a page that shows them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile import __version__, bundle, recipe, run
from sdcompile.errors import RecipeError, SdcompileError
from sdcompile.families import FAMILIES
from sdcompile.measure import layers
from sdcompile.measure.bench import Settings, bench
from sdcompile.measure.contenders import Ask
from sdcompile.measure.evaluate import Asked, evaluate, mean_of, named
from sdcompile.measure.writing import write_json
from sdcompile.spec import Say

if TYPE_CHECKING:
    from sdcompile.console import Observer
    from sdcompile.store import Store

FORMAT = 1
_BUNDLE_STEP = "pipeline.package.bundle"


def build_layers(
    path: Path, store: Store, folder: Path, observer: Observer, *, offline: bool, force: bool
) -> tuple[layers.Experiment, list[layers.Planned], list[Path]]:
    """Read the experiment, plan all of it, then build every layer into `folder`.

    Raises RecipeError before anything is made when a layer is no valid recipe.
    """
    experiment, planned = layers.load(path)
    works = []
    faults = []
    for layer in planned:
        try:
            works.append(run.prepare(layer.recipe, (*layer.sets, f"name={layer.bundle}"), store, offline=offline))
        except RecipeError as error:
            faults += [f"layer '{layer.name}': {line}" for line in error.message.splitlines()]
    if faults:
        raise RecipeError("\n".join(faults), f"correct the layers in {path}")
    bundles = []
    for number, (layer, work) in enumerate(zip(planned, works, strict=True)):
        observer.note(f"layer {number + 1} of {len(planned)}: {layer.name}")
        try:
            with observer.watching(work.plan):
                made = run.build(work, "package", observer, force=force)
        except SdcompileError as error:
            raise type(error)(f"layer '{layer.name}': {error.message}", error.hint) from error
        bundles.append(run.place(work, made[_BUNDLE_STEP], folder / "bundles"))
    return experiment, planned, bundles


def measure_layers(
    experiment: layers.Experiment,
    planned: Sequence[layers.Planned],
    bundles: Sequence[Path],
    path: Path,
    store: Store,
    folder: Path,
    *,
    offline: bool,
    say: Say,
) -> dict[str, Any]:
    """Time and judge the built layers; writes and returns experiment.json."""
    timing, judging = experiment.bench, experiment.eval
    settings = Settings(timing.processes, timing.images, batches=timing.batch, seed=judging.seed)
    if timing.threads is not None:
        settings = replace(settings, threads=timing.threads)
    timed = bench(bundles, settings=settings, say=named(say, "bench"))
    prompts_file = None if judging.prompts_file is None else path.parent / judging.prompts_file
    asked = Asked(Ask(), judging.prompts, prompts_file, judging.seed, judging.reference)
    judged = evaluate(
        bundles, [_sources(layer) for layer in planned], asked, store, offline=offline, output=folder,
        say=named(say, "eval"),
    )  # fmt: skip
    first, figure = judged["bundles"][0], experiment.pick.figure
    rows = [
        {**_row(layer, made, seconds, quality), "change": change(first, quality, figure)}
        for layer, made, seconds, quality in zip(planned, bundles, timed["contenders"], judged["bundles"], strict=True)
    ]
    front = pareto(rows, experiment.pick.figure)
    for row in rows:
        row["on_front"] = row["name"] in front
    result = {
        "format": FORMAT, "kind": "experiment", "name": experiment.name, "sdcompile": __version__,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "host": timed["host"],
        "layers": rows, "pick": {**experiment.pick.model_dump(), "layer": pick(rows, experiment.pick)},
        "bench": timed, "eval": judged,
    }  # fmt: skip
    write_json(folder / "experiment.json", result)
    return result


def _sources(layer: layers.Planned) -> list[str]:
    """The sources to name where a bundle only knows a folder's name: as the layer's recipe says it."""
    asked = recipe.load(layer.recipe, layer.sets)
    model = asked.source_of()
    named = [model.name] if model.kind == "path" else []
    for name, text in asked.component_sources.items():
        if not text.startswith(("builtin:", "hf://")):
            named.append(f"{name}={asked.path(text, f'components.{name}.source')}")
    return named


def _row(layer: layers.Planned, folder: Path, seconds: Mapping[str, Any], quality: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": layer.name, "bundle": folder.name, "sets": list(layer.sets),
        "image_s": seconds["figures"]["image_s"], "ratio": seconds["ratio"]["image_s"],
        "peak_bytes": seconds["peak_bytes"], "denoiser": _denoiser(folder, seconds),
        "disk_bytes": sum(path.stat().st_size for path in (folder / "components").rglob("*") if path.is_file()),
        "call": seconds["call"], "sampler": seconds["sampler"], "quality": quality["figures"],
    }  # fmt: skip


def _denoiser(folder: Path, seconds: Mapping[str, Any]) -> dict[str, Any]:
    """Time of one call over the first layer's, bytes, and lowest SNR in verification (None where nothing verified)."""
    manifest = bundle.read(folder)
    name = FAMILIES[manifest.family].denoiser
    size = sum(entry.bytes for path, entry in manifest.files.items() if path.startswith(f"components/{name}/"))
    worst = (manifest.components[name].verification or {}).get("worst", {})
    return {"ratio": seconds["ratio"].get("call_s"), "bytes": size, "snr_db": worst.get("snr_db")}


def change(first: Mapping[str, Any], other: Mapping[str, Any], figure: str) -> dict[str, float] | None:
    """Mean change of `figure` from `first` to `other`, results of `judge`, picture by picture, and its standard error.

    None where a picture has no such figure.
    """
    pairs = [(a.get(figure), b.get(figure)) for a, b in zip(first["pictures"], other["pictures"], strict=True)]
    if any(a is None or b is None for a, b in pairs):
        return None
    return mean_of([b - a for a, b in pairs])


def quality_of(row: Mapping[str, Any], figure: str) -> float:
    """The mean of `figure` of a layer. Raises RecipeError when it was not measured."""
    found = row["quality"].get(figure)
    if found is None:
        raise RecipeError(
            f"layer '{row['name']}' has no {figure} to choose by", f"it has {', '.join(row['quality']) or 'none'}"
        )
    return float(found["mean"])


def pareto(rows: Sequence[Mapping[str, Any]], figure: str) -> set[str]:
    """Names of the layers that no other beats in both time and quality."""

    def beats(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        faster, better = (
            a["image_s"]["median"] <= b["image_s"]["median"],
            quality_of(a, figure) >= quality_of(b, figure),
        )
        same = a["image_s"]["median"] == b["image_s"]["median"] and quality_of(a, figure) == quality_of(b, figure)
        return faster and better and not same

    return {row["name"] for row in rows if not any(beats(other, row) for other in rows)}


def pick(rows: Sequence[Mapping[str, Any]], rule: layers.Pick) -> str:
    """Name of the fastest layer with at least `rule.at_least` times the first layer's quality."""
    floor = rule.at_least * quality_of(rows[0], rule.figure)
    fit = [row for row in rows if quality_of(row, rule.figure) >= floor]
    # at_least above 1 may leave none, not even the first layer itself.
    if not fit:
        raise RecipeError(f"no layer has {rule.figure} of at least {floor:.4g}", "lower pick.at_least")
    return str(min(fit, key=lambda row: row["image_s"]["median"])["name"])
