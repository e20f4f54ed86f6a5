"""Results as rich renderables. Imports rich, so only functions of this room import it, when they show something."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sdcompile.console.effects import effects
from sdcompile.console.grid import Facts, grid
from sdcompile.console.terminal import duration, size
from sdcompile.errors import SdcompileError
from sdcompile.families import FAMILIES

_STATES = {"hit": ("hit", "green"), "make": ("make", "cyan"), "skip": ("-", "dim"), "cannot": ("cannot", "bold red")}


def error(fault: SdcompileError) -> Panel:
    """The error panel: the message, and the hint below it."""
    text = Text(fault.message, overflow="fold")
    if fault.hint:
        text.append(f"\n\n{fault.hint}", style="cyan")
    title = type(fault).__name__.removesuffix("Error").removesuffix("Sdcompile").lower()
    return Panel(text, title=f"{title} error".strip(), title_align="left", border_style="red", box=box.ROUNDED)


def plan(rows: Sequence[Facts]) -> Table:
    table = grid("step", "", "memory", "disk", "reason", right=("memory", "disk"))
    for index in range(4):
        table.columns[index].no_wrap = True
    for row in rows:
        word, style = _STATES.get(row["state"], (row["state"], ""))
        costs = row["state"] in ("make", "cannot")
        table.add_row(
            Text(row["step"], style="dim" if row["state"] == "skip" else ""),
            Text(word, style=style),
            size(row["memory_bytes"] or None) if costs else "",
            size(row["disk_bytes"] or None) if costs else "",
            Text(row["reason"] or ""),
        )
    return table


def plan_sums(rows: Sequence[Facts]) -> str:
    todo = [row for row in rows if row["state"] in ("make", "cannot")]
    if not todo:
        return f"{len(rows)} steps: nothing to make"
    memory, disk = max(row["memory_bytes"] for row in todo), sum(row["disk_bytes"] for row in todo)
    return f"{len(todo)} of {len(rows)} steps to make: at most {size(memory)} of memory, {size(disk)} of disk"


def explanation(facts: Facts) -> Iterator[Any]:
    made = "in the store" if facts["state"] == "hit" else "to be made"
    yield Text(f"{facts['step']}: {made}", style="bold")
    if facts["changes"]:
        yield "changed since the last time:"
        for change in facts["changes"]:
            yield f"  {change}"
    elif facts["state"] != "hit":
        yield "no longer in the store" if facts["made_before"] else "never made before"
    yield f"key {facts['key']} is the sha256 of:"
    yield json.dumps(facts["parts"], indent=2, ensure_ascii=False, default=str)


def prompt(facts: Facts) -> Iterator[Any]:
    tokens = list(facts["tokens"])
    yield f"tokens     {' + '.join(map(str, tokens))} of {facts['chunks']} x {facts['chunk_length']}"
    if facts["left_out"]:
        yield f"left out   {facts['left_out']}"
    for remark in facts["remarks"]:
        yield f"remark     {remark}"


def doctor(facts: Facts) -> Iterator[Any]:
    features = ", ".join(facts["features"]) or "no known features"
    yield f"processor  {facts['cpu']}, {facts['threads']} threads ({features})"
    yield f"memory     {size(facts['memory_available_bytes'])} available of {size(facts['memory_bytes'])}"
    yield f"store      {facts['store']}: {size(facts['disk_free_bytes'])} free on its disk"
    table = grid("backend", "version", "devices", "precisions", "")
    for row in facts["backends"]:
        words = (
            " ".join(row["notes"])
            if row["available"]
            else f"{row['reason']}: {row['hint']}"
            if row["hint"]
            else row["reason"]
        )
        table.add_row(
            Text(row["name"], style="" if row["available"] else "dim"),
            Text(
                row["version"] or ("ready" if row["available"] else "missing"),
                style="green" if row["available"] else "red",
            ),
            Text(", ".join(row["devices"])),
            Text(", ".join(row["precisions"])),
            Text(words),
        )
    yield table


def result(facts: Facts) -> Iterator[Any]:
    if facts["reports"]:
        yield _figures(facts["reports"])
    if facts.get("effects"):
        yield from effects(facts["effects"])
    yield from _own_decoder(facts["reports"].get("pipeline", {}))
    for component, text in facts["fallbacks"].items():
        yield Text(f"{component}: {text}", style="yellow")
    if facts["bundle"]:
        yield f"{facts['bundle']} ({size(facts['bytes'])})"
        # Of several targets one that ran is enough to go on with.
        unrun: dict[str, bool] = {}
        for name, report in facts["reports"].items():
            target = name.partition("@")[2]
            unrun[target] = unrun.get(target, False) or bool(report.get("stand_in"))
        if unrun and all(unrun.values()):
            yield f"next, on a machine that can run it: sdcompile verify {facts['bundle']} --source SOURCE"
        else:
            yield f'next: sdcompile generate {facts["bundle"]} "a prompt"'
    for name, folder in facts["folders"].items():
        yield f"{name}: {folder}"


def _figures(reports: Mapping[str, Facts]) -> Table:
    table = grid("verified", "backend", "precision", "worst", "floor", "")
    for name, report in reports.items():
        worst, floor = report.get("worst") or {}, report.get("floor") or {}
        if worst.get("psnr_db") is not None:
            figures, floors = f"PSNR {worst['psnr_db']:.1f} dB", f"{floor.get('min_psnr_db', 0):g} dB"
            if score := report.get("alignment"):
                figures += f", alignment {score['built']:.3f} (source {score['source']:.3f})"
        elif worst.get("snr_db") is not None:
            figures = f"SNR {worst['snr_db']:.1f} dB, cosine {worst.get('cosine', 0):.6f}"
            floors = f"{floor.get('min_snr_db', 0):g} dB, {floor.get('min_cosine', 0):g}"
        else:
            figures, floors = "", ""
        passed = report.get("passed", False)
        table.add_row(
            Text(name.replace("pipeline", "whole images", 1) if name.partition("@")[0] == "pipeline" else name),
            Text(str(report.get("backend") or "") + (": its ONNX, on the CPU" if report.get("stand_in") else "")),
            Text(str(report.get("precision") or "")),
            figures,
            floors,
            Text("passed" if passed else "FAILED", style="green" if passed else "bold red"),
        )
        if cost := report.get("step_cache"):
            least = cost["floor"]["min_psnr_db"]
            table.add_row(
                "cost of cached steps", f"every {cost['every']} of {cost['num_inference_steps']}", "", _cost(cost),
                "none" if least is None else f"{least:g} dB",
                Text("passed" if cost["passed"] else "FAILED", style="green" if cost["passed"] else "bold red"),
            )  # fmt: skip
    return table


def _widths(data: Facts) -> str | None:
    """The widths of the denoiser, where there are several."""
    components = next(iter(data.get("targets", {}).values()), data)["components"]
    family = FAMILIES.get(data["family"])
    widths = family.widths(components) if family else ()
    return ", ".join(widths) if len(widths) > 1 else None


def _cost(cost: Facts) -> str:
    """What step caching costs, in words."""
    return f"PSNR {cost['psnr_db']['min']:.1f} dB (mean {cost['psnr_db']['mean']:.1f}) to images without"


def manifest(facts: Facts) -> Iterator[Any]:
    data = facts["manifest"]
    yield Text(data["name"], style="bold")
    source = data["source"]
    rows = {
        "path": facts["path"],
        "digest": facts["digest"],
        "family": data["family"],
        "source": source.get("id", ""),
        "revision": source.get("revision"),
        "licence": data["licence"] or "not stated by the source",
        "built": f"{data['built_at']} by sdcompile {data['sdcompile']}",
        "shapes": ", ".join(f"{letter} {_bounds(bounds)}" for letter, bounds in data["shapes"].items()),
        "samplers": ", ".join(data["samplers"]),
        "widths": _widths(data),
        "defaults": ", ".join(f"{key} {value!r}" for key, value in data["defaults"].items()),
        "tools": ", ".join(f"{name} {version}" for name, version in data["tools"].items()),
        "files": f"{len(data['files'])}, {size(sum(entry['bytes'] for entry in data['files'].values()))}",
    }
    for name, value in rows.items():
        if value is not None:
            yield f"{name:<9} {value}"
    ways = {name: (row["components"], row["folders"]) for name, row in data.get("targets", {}).items()}
    ways = ways or {"": (data["components"], {name: f"components/{name}" for name in data["components"]})}
    columns = ("component", "backend", "precision", "verified", "size")
    table = grid(*(("target",) if "" not in ways else ()), *columns, right=("size",))
    changed: dict[str, Facts] = {}
    notes: dict[str, list[str]] = {}
    for target, (components, folders) in ways.items():
        for name, entry in components.items():
            held = sum(f["bytes"] for path, f in data["files"].items() if path.startswith(f"{folders[name]}/"))
            row = (Text(name), entry["backend"], entry["precision"], Text(_verdict(entry)), size(held))
            table.add_row(*((Text(target),) if target else ()), *row)
            label = f"{name}@{target}" if target else name
            changed[label] = {"passes": entry.get("effects", ()), "races": entry.get("races", ())}
            for text in entry["notes"]:
                notes.setdefault(text, []).append(label)
    yield table
    images = [
        (row["components"], row.get("verification", {}).get("images", {}))
        for row in (data.get("targets") or {"": data}).values()
    ]
    for components, verified in images:
        if cost := verified.get("step_cache"):
            depths = (entry["params"].get("step_cache_depth") for entry in components.values())
            yield (
                f"cached steps, one of every {cost['every']} whole, depth {next(d for d in depths if d)}: "
                f"in {cost['num_inference_steps']} steps {_cost(cost)}"
            )
    if any(row["passes"] or row["races"] for row in changed.values()):
        yield from effects(changed)
    for name, part in source.get("components", {}).items():
        yield f"{name}: made of {part['id']} (licence: {part['licence'] or 'not stated'}), not of the model's own"
    for _, verified in images:
        yield from _own_decoder(verified)
    for text, labels in notes.items():
        yield Text(f"{', '.join(labels)}: {text}", style="yellow")


def _own_decoder(report: Facts) -> Iterator[str]:
    """How far the pictures of another decoder are from those of the model's own."""
    if found := report.get("own_decoder"):
        yield (
            f"its decoder's pictures to those of the model's own decoder, from the same latents: "
            f"PSNR {found['psnr_db']['mean']:.1f} dB, the least {found['psnr_db']['min']:.1f} dB"
        )


def sensitivity(facts: Facts) -> Iterator[Any]:
    """Groups of layers, the most sensitive first, with a bar for the noise int8 in that group alone adds."""
    for name, told in facts["components"].items():
        regions = list(told["all"])
        yield Text(
            f"{name}: all in int8 "
            + ", ".join(f"{region} {told['all'][region]:.1f} dB" for region in regions)
            + f"; lowest SNR of {told['samples']} held out samples, each group alone:",
            style="bold",
        )
        table = grid("group", "operators", *regions, "noise", right=("operators", *regions))
        levels = [min(row["snr_db"].values()) for row in told["groups"]]
        most = max((10 ** (-level / 10) for level in levels), default=1.0)
        for row, level in zip(told["groups"], levels, strict=True):
            bar = "█" * round(20 * 10 ** (-level / 10) / most) or "·"
            figures = [f"{row['snr_db'][region]:.1f}" for region in regions]
            mark = " (left in float)" if row["name"] in told["left_out"] else ""
            table.add_row(Text(row["name"] + mark), str(row["operators"]), *figures, bar)
        yield table
        yield facts["files"][name]


def _verdict(entry: Facts) -> str:
    found = entry["verification"]
    worst = found.get("worst") or found
    if worst.get("snr_db") is None:
        return "not verified" if not found else "passed" if found.get("passed") else ""
    figure = f"SNR {worst['snr_db']:.1f} dB"
    return f"its ONNX: {figure}; engine not run" if found.get("stand_in") else figure


def _bounds(bounds: Sequence[int]) -> str:
    low, usual, high = bounds
    return str(usual) if low == high else f"{low}-{high} ({usual})"


def measured(facts: Facts) -> Iterator[Any]:
    for shown in facts["tables"]:
        yield Text(shown.title, style="bold")
        table = grid(*shown.columns, right=shown.columns[1:])
        for row in shown.rows:
            table.add_row(*(Text(cell, style="bold red" if cell == "REGRESSED" else "") for cell in row))
        yield table
        for note in shown.notes:
            yield Text(note, style="dim")
        yield ""


_VERDICTS: Mapping[bool | None, tuple[str, str]] = {
    True: ("holds", "green"), False: ("NOT SO", "bold red"), None: ("unproven", "yellow"),
}  # fmt: skip


def layers(facts: Facts) -> Iterator[Any]:
    for component, engines in facts["components"].items():
        for engine, table in engines.items():
            yield from _layergrid(component, engine, table)


def _layergrid(component: str, engine: str, table: Facts) -> Iterator[Any]:
    summary = table["summary"]
    yield Text(f"{component}, {engine}: {summary['layers']} layers", style="bold")
    rows = grid("kind", "computes in", "layer", "kernel")
    for row in table["layers"]:
        if row["computes"]:
            kernel = "" if row["tactic"].startswith("__myelin") else row["tactic"]
            rows.add_row(
                Text(row["kind"]), Text(row["computes"]), Text((row["onnx"] or [row["name"]])[0]), Text(kernel)
            )
    yield rows
    yield f"computing: {_counted(summary['computing'])}; other: {_counted(summary['other'])}"
    memory = {words: summary[f"{words}_bytes"] for words in ("weights", "activations", "scratch")}
    yield "memory: " + ", ".join(f"{words} {size(value)}" for words, value in memory.items() if value is not None)
    for binding in table["io"]:
        profile = binding["profile"]
        shapes = ", ".join(f"{side} {shape}" for side, shape in profile.items()) if profile else ""
        yield f"{binding['mode']} {binding['name']}: {binding['type']} {shapes}".rstrip()
    for claim in table["claims"]:
        mark, style = _VERDICTS[claim["holds"]]
        yield Text(f"{mark}  ", style=style).append(f"{claim['claim']} (found {claim['found']})", style="default")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def commands(facts: Facts) -> Iterator[Any]:
    for component, lines in facts["commands"].items():
        yield Text(
            f"cd {facts['folder']}/{component}   # or: sh {facts['folder']}/{component}/commands.sh", style="bold"
        )
        yield from lines
        if found := facts["found"].get(component):
            yield _bisected(found)


def _bisected(found: Facts) -> Text:
    if found["agrees"]:
        return Text(f"Polygraphy: the library agrees with the reference here (log: {found['log']})", style="green")
    where = f"the first node that leaves it is {found['first_node']}" if found["first_node"] else "the search failed"
    return Text(f"Polygraphy: it does not agree with the reference; {where} (log: {found['log']})", style="bold red")


def selftest(facts: Facts) -> Iterator[Any]:
    table = grid("backend", "version", "", "denoiser call", "")
    styles = {"passed": "green", "built": "yellow", "absent": "dim", "failed": "bold red"}
    full = {f"{name}, full size": row for name, row in (facts.get("full") or {}).get("backends", {}).items()}
    for name, row in {**facts["backends"], **full}.items():
        timings = row.get("timings")
        table.add_row(
            Text(name),
            Text(row.get("version") or ""),
            Text(row["state"], style=styles[row["state"]]),
            f"{timings['denoiser_call_ms']['median']:g} ms" if timings else "",
            Text(row.get("error") or row.get("not_run") or ""),
        )
    yield table
    if facts.get("full"):
        yield from _contenders(facts["full"]["bench"])
    yield f"report: {facts['path']}"


def _contenders(bench: Facts) -> Iterator[Any]:
    """Seconds an image of the full-size bundles and of torch, and who could not take part."""
    table = grid("full size", "seconds an image", "times the first", right=("seconds an image",))
    for row in bench.get("contenders", ()):
        ratio = row["ratio"]["image_s"]
        table.add_row(
            Text(f"{row['name']}: {row['what']}"),
            f"{row['figures']['image_s']['median']:.3g}",
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
        )
    yield table
    for name, why in bench["absent"].items():
        yield Text(f"{name}: {why}", style="dim")


def freed(facts: Facts) -> Iterator[Any]:
    verb = "would free" if facts["dry_run"] else "freed"
    leftovers = f"{facts['leftovers']} leftovers of killed builds"
    yield f"{verb} {size(facts['bytes'])}: {facts['artifacts']} artifacts, {leftovers}"


def images(facts: Facts) -> Iterator[Any]:
    for row in facts["images"]:
        yield f"{row['path']}  seed {row['seed']}, {duration(row['seconds'])}"
