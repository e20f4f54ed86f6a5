"""One self-contained page about a bundle or an experiment: nothing is loaded from the network.

Reads what other commands wrote (manifest, verify.json, bench and eval results, pictures) and
measures one thing itself: where the time of a single image goes, when this machine runs the bundle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdcompile import __version__, bundle
from sdcompile.console.effects import alignment, time_of_call, won
from sdcompile.errors import RecipeError
from sdcompile.measure import charts, html, pictures, tables
from sdcompile.measure.tables import Table, number

Data = Mapping[str, Any]

_ROWS = 8
_GROUPS = 20


def of_bundle(folder: Path, bench: Data | None, evaluation: Path | None, timings: Data | None) -> str:
    """The page of the bundle in `folder`.

    bench       a result of `sdcompile bench` that may hold this bundle
    evaluation  a folder written by `sdcompile eval --output`
    timings     of one image (see runtime `Output.timings`)
    """
    manifest = bundle.read(folder)
    digest = bundle.digest(folder)
    if bench is not None and digest not in [row["digest"] for row in bench["contenders"]]:
        raise RecipeError(
            f"the bench result holds no {manifest.name} as it is now", f"sdcompile bench {folder} --output FILE"
        )
    judged = None if evaluation is None else _json(evaluation / "eval.json")
    body = [
        *_head(manifest, digest),
        html.section("Verification", *_verified(folder)),
        html.section("What passes did", *_each(manifest, lambda one: _compression(folder, one))),
        html.section("One image", *_waterfall(timings)),
        html.section("Speed", *_tables(tables.bench(bench) if bench else ())),
        html.section("Quality", *_quality(judged, evaluation, manifest.name, digest)),
        html.section("What it is made of", _manifest(manifest)),
    ]
    return html.page(manifest.name, body)


def _each(manifest: bundle.Manifest, part: Callable[[bundle.Manifest], Iterable[str]]) -> Iterator[str]:
    """`part` of every target, each under its name where there are several."""
    for target, one in manifest.by_target().items():
        inside = list(part(one))
        if target and inside:
            yield f"<h3>{html.escape(target)}</h3>"
        yield from inside


def _verified(folder: Path) -> Iterator[str]:
    """The verification of every target of the bundle in `folder`."""
    return _each(bundle.read(folder), lambda one: _verification(_json(folder / one.reports / "verify.json")))


def timed(folder: Path, target: str | None = None) -> Mapping[str, Any]:
    """Timings of one image of the bundle in `folder`, after a first one that warms up, and `target`, whose they are.

    Raises HostError when this machine cannot run it.
    """
    from sdcompile.runtime import load

    with load(folder, memory="high", target=target) as pipeline:
        # Another prompt each time: one that was met before does not reach the text encoder.
        for prompt in ("a red circle on a white background", "a blue square on a yellow background"):
            timings = pipeline(prompt, seed=0).timings
        return {**timings, "target": pipeline.target}


def of_experiment(folder: Path) -> str:
    """The page of the experiment whose result lies in `folder`."""
    result = _json(folder / "experiment.json")
    rows, chosen = result["layers"], result["pick"]
    figure, label = chosen["figure"], tables.QUALITY[chosen["figure"]]
    best = next(row for row in rows if row["name"] == chosen["layer"])
    saved = rows[0]["image_s"]["median"] / best["image_s"]["median"]
    points = [
        {
            "name": row["name"], "x": row["image_s"]["median"], "y": row["quality"][figure]["mean"],
            "low": row["image_s"]["low"], "high": row["image_s"]["high"], "error": row["quality"][figure]["error"],
            "front": row["on_front"], "chosen": row["name"] == chosen["layer"],
        }
        for row in rows
    ]  # fmt: skip
    times = [
        (f"{place + 1}  {row['name']}", row["ratio"]["median"], row["ratio"]["low"], row["ratio"]["high"])
        for place, row in enumerate(rows)
    ]
    winner = next(name for name, *_ in times if name.endswith(f"  {chosen['layer']}"))
    names = "; ".join(f"{place + 1} {row['name']}" for place, row in enumerate(rows))
    body = [
        f"<header><h1>{html.escape(result['name'])}</h1>",
        html.paragraph(
            f"{chosen['layer']} is the fastest layer with {label} of at least {chosen['at_least']:g} times the first "
            f"layer's: {saved:.1f} times as fast as {rows[0]['name']}.", "lead"),
        html.paragraph(
            f"{result['host']['cpu']}, {result['bench']['settings']['threads']} threads; measured {result['made_at']} "
            f"by sdcompile {result['sdcompile']}."
        ) + "</header>",
        html.section(
            "Time against quality",
            html.figure(
                charts.pareto(
                    points, x="seconds per image", y=label,
                    floor=chosen["at_least"] * rows[0]["quality"][figure]["mean"],
                ),
                f"Up and left is better. The line joins the Pareto front, the ring is what was picked. {names}.",
            ),
        ),
        html.section("Layers", *_tables(tables.experiment(result))),
        html.section(
            "Time per image",
            html.figure(
                charts.bars(times, x=f"time per image over that of {rows[0]['name']}", chosen=winner),
                "Medians of ratios taken within rounds; whiskers are 95 % intervals.",
            ),
        ),
        html.section("The same prompts, layer by layer", *_layers_sheet(folder, result)),
        html.section("Worst pictures", *_worst(folder, result["eval"]["bundles"])),
        html.section("Verification of every layer", *_layers_verified(folder, result)),
        html.section("How it was measured", *_tables(tables.bench(result["bench"]))),
    ]  # fmt: skip
    return html.page(result["name"], body)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path} cannot be read: {error}",
            "name a bundle, or a folder written by `sdcompile experiment` or `sdcompile eval --output`",
        ) from error


def _tables(shown: Sequence[Table]) -> Iterator[str]:
    for table in shown:
        yield html.table(table)


def _head(manifest: bundle.Manifest, digest: str) -> Iterator[str]:
    passed = manifest.verification.get("passed")
    word = {True: "verified", False: "FAILED verification", None: "not verified"}[passed]
    yield f"<header><h1>{html.escape(manifest.name)}</h1>"
    for target, one in manifest.by_target().items():
        engines = ", ".join(f"{name} on {e.backend} in {e.precision}" for name, e in one.components.items())
        what = f"for target {target}" if target else "compiled"
        yield html.paragraph(f"{manifest.source.get('id')} {what}: {engines}.", "lead")
    yield html.paragraph(f"{word} against torch in fp32", "passed" if passed else "failed")
    yield (
        html.paragraph(f"bundle {digest[:16]}…, built {manifest.built_at} by sdcompile {manifest.sdcompile}")
        + "</header>"
    )


def _verification(verify: Data) -> Iterator[str]:
    reports = verify["reports"]
    if not reports:
        yield html.paragraph("The backend computes nothing that could be compared with a reference.")
        return
    rows = []
    series: dict[str, list[tuple[float, float]]] = {}
    floors: dict[str, float] = {}
    for name, report in reports.items():
        worst = report["worst"]
        unit = "psnr_db" if "psnr_db" in worst else "snr_db"
        floor = report["floor"].get(f"min_{unit}")
        words = "passed" if report["passed"] else "FAILED"
        title = "whole images" if name == "pipeline" else name
        rows.append((title, report["backend"], report["precision"], f"{worst[unit]:.1f}", f"{floor:g}",
                     str(len(report["samples"])), words))  # fmt: skip
        if cost := report.get("step_cache"):
            least = cost["floor"]["min_psnr_db"]
            rows.append((f"cost of cached steps (every {cost['every']})", "", "", f"{cost['psnr_db']['min']:.1f}",
                         "none" if least is None else f"{least:g}", str(cost["images"]),
                         "passed" if cost["passed"] else "FAILED"))  # fmt: skip
        timed = [(s["timestep"], s["snr_db"]) for s in report["samples"] if s.get("timestep") is not None]
        if timed:
            series[name], floors[name] = timed, floor
    columns = ("", "backend", "precision", "worst dB", "floor dB", "samples", "")
    yield html.table(Table("", columns, tuple(rows)))
    if score := reports.get("pipeline", {}).get("alignment"):
        yield html.paragraph(
            f"Prompt alignment of the {score['images']} verification pictures of the usual size: {score['built']:.3f}, "
            f"of the reference's {score['source']:.3f} (`sdcompile eval` scores many)."
        )
    if own := reports.get("pipeline", {}).get("own_decoder"):
        yield html.paragraph(
            "Pictures of this bundle's decoder to those of the model's own decoder, from the same latents: "
            f"PSNR {own['psnr_db']['mean']:.1f} dB, the least {own['psnr_db']['min']:.1f} dB."
        )
    if series:
        yield html.figure(
            charts.lines(series, x="timestep (1000 = pure noise)", y="SNR, dB", floors=floors),
            "Agreement of every recorded call of the denoiser with torch in fp32, by timestep: higher is closer.",
        )


def _compression(folder: Path, manifest: bundle.Manifest) -> Iterator[str]:
    """Effects of passes, races, and what it costs in each group of layers where that was measured."""
    rows = tuple(
        (name, effect["pass"], *(_of(effect.get(key)) for key in ("parameters", "bytes", "macs")),
         ", ".join(f"{region} {level:.1f}" for region, level in effect["snr_db"].items()) or "-",
         time_of_call(effect) or "-", alignment(effect) or "-")
        for name, entry in manifest.components.items()
        for effect in entry.effects
    )  # fmt: skip
    if rows:
        columns = (
            "component",
            "pass",
            "parameters",
            "bytes",
            "multiply-accumulates",
            "SNR dB by timestep region",
            "call (processor time)",
            "alignment",
        )
        yield html.table(Table("", columns, rows))
    for name, entry in manifest.components.items():
        for race in entry.races:
            yield html.paragraph(f"{name}: {won(race)}.")
    for path in sorted((folder / manifest.reports).glob("*-sensitivity.json")):
        told = _json(path)
        worst = sorted((min(row["snr_db"].values()), row["name"], row.get("groups", 1)) for row in told["groups"])[
            :_GROUPS
        ]
        kept = set(told["left_out"])
        names = [
            name + (" (left in float)" if name in kept else f" ({count} groups)" if count > 1 else "")
            for _, name, count in worst
        ]
        bars = [(name, level, level, level) for name, (level, *_) in zip(names, worst, strict=True)]
        yield html.figure(
            charts.bars(bars, x="SNR with that part alone in int8, dB", digits=1),
            f"{path.name.partition('-')[0]}: the {len(bars)} groups of layers, or blocks of them, that int8 costs "
            f"most, worst first; all {sum(row.get('groups', 1) for row in told['groups'])} groups together give "
            f"{min(told['all'].values()):.1f} dB.",
        )


def _of(figures: Sequence[int] | None) -> str:
    """(before, after); a pass that takes out no work has no multiply-accumulates to tell."""
    return "-" if figures is None else f"{figures[1]:,} of {figures[0]:,}"


def _waterfall(timings: Data | None) -> Iterator[str]:
    if timings is None:
        return
    spans, now = [], 0.0
    parts = [("text encoder", timings["text_encoder_s"])]
    parts += [("denoising step", step) for step in timings["denoise_s"]]
    parts += [("VAE decoder", timings["vae_s"])]
    for name, seconds in parts:
        spans.append((name, now * 1e3, (now + seconds) * 1e3))
        now += seconds
    yield html.figure(
        charts.waterfall(spans, x="milliseconds"),
        f"One image after a first one: {now * 1e3:.0f} ms in {len(timings['denoise_s'])} denoiser calls"
        + (f", by target {timings['target']}." if timings.get("target") else "."),
    )


def _quality(judged: Data | None, folder: Path | None, name: str, digest: str) -> Iterator[str]:
    if judged is None or folder is None:
        return
    rows = [row for row in judged["bundles"] if row["digest"] == digest]
    if not rows:
        raise RecipeError(
            f"{folder} holds no evaluation of {name} as it is now", f"sdcompile eval {name}.sdc --output {folder}"
        )
    yield from _tables(tables.evaluation({"bundles": rows})[:1])
    yield from _against_reference(folder / rows[0]["folder"], rows[0], range(min(_ROWS, len(rows[0]["pictures"]))))
    yield "<h2>Worst pictures</h2>"
    yield from _worst(folder, rows)


def _against_reference(folder: Path, row: Data, which: Sequence[int]) -> Iterator[str]:
    cells = [_compared(folder, row["pictures"][index], index) for index in which]
    if cells:
        yield html.sheet(("prompt", "bundle", "torch, fp32", f"difference x {pictures.GAIN}"), cells)


def _compared(folder: Path, told: Data, index: int) -> tuple[str, ...]:
    made = pictures.read(folder / f"{index:03d}.png")
    figures = ", ".join(
        f"{label} {told[key]:.3g}" for key, label in (("alignment", "alignment"), ("psnr_db", "PSNR")) if key in told
    )
    words = f"{told['prompt']} (seed {told['seed']}; {figures})"
    other = folder / f"{index:03d}-reference.png"
    if not other.is_file():
        return html.paragraph(words), _shown(made, words), "", ""
    reference = pictures.read(other)
    return (
        html.paragraph(words), _shown(made, words), _shown(reference, f"reference: {words}"),
        _shown(pictures.difference(reference, made), f"difference: {words}"),
    )  # fmt: skip


def _shown(image: Any, words: str) -> str:
    uri, small = pictures.embedded(image)
    return html.picture(uri, words, small=small)


def _worst(folder: Path, rows: Sequence[Data]) -> Iterator[str]:
    """The worst pictures of the last of `rows`, compared; of the others by name."""
    for row in rows:
        seeds = [told["seed"] for told in row["pictures"]]
        which = [seeds.index(told["seed"]) for told in row["worst"]]
        inside = "".join(_against_reference(folder / row["folder"], row, which))
        yield html.folded(row["name"], inside) if len(rows) > 1 else inside


def _layers_sheet(folder: Path, result: Data) -> Iterator[str]:
    rows = result["eval"]["bundles"]
    count = min(_ROWS, *(len(row["pictures"]) for row in rows))
    names = [layer["name"] for layer in result["layers"]]
    cells = []
    for index in range(count):
        prompt = rows[0]["pictures"][index]["prompt"]
        cells.append((
            html.paragraph(prompt),
            *(_shown(pictures.read(folder / row["folder"] / f"{index:03d}.png"), prompt) for row in rows),
        ))  # fmt: skip
    yield html.sheet(("prompt", *names), cells)


def _layers_verified(folder: Path, result: Data) -> Iterator[str]:
    for layer in result["layers"]:
        yield html.folded(layer["name"], "".join(_verified(folder / "bundles" / layer["bundle"])))


def _manifest(manifest: bundle.Manifest) -> str:
    data = manifest.model_dump(mode="json")
    rows = {
        "source": f"{data['source'].get('id')} {data['source'].get('revision') or ''}".strip(),
        "licence": data["licence"] or "not stated by the source",
        **{f"source of {name}": f"{part['id']} ({part['licence'] or 'licence not stated'})"
           for name, part in data["source"].get("components", {}).items()},
        "family": data["family"],
        "shapes": ", ".join(f"{letter} {low} to {high} (usual {usual})" if low != high else f"{letter} {usual}"
                            for letter, (low, usual, high) in data["shapes"].items()),
        "samplers": ", ".join(data["samplers"]),
        "defaults": ", ".join(f"{key} {value}" for key, value in data["defaults"].items() if value != ""),
        "host": f"{data['host'].get('cpu')}, {data['host'].get('system')}",
        "tools": ", ".join(f"{name} {version}" for name, version in data["tools"].items()),
        "files": f"{len(data['files'])}, {number(sum(e['bytes'] for e in data['files'].values()) / 2**20)} MiB",
        "page": f"written by sdcompile {__version__}",
    }  # fmt: skip
    hashes = {path: entry["sha256"] for path, entry in data["files"].items()}
    recipe = f"<pre>{html.escape(json.dumps(data['recipe'], indent=1, ensure_ascii=False))}</pre>"
    return html.facts(rows) + html.folded("Recipe as resolved", recipe) + html.folded("Files", html.facts(hashes))
