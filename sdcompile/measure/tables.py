"""Results as tables of text: what the terminal, step summaries and pages of a report all show.

Knows the fields of results and no way of drawing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdcompile.runtime.options import APPROXIMATIONS

Result = Mapping[str, Any]

_GIB = 1 << 30

_ALIKE_DB = 20.0
"""Two runs of one request agree far better than this in any precision; different requests do not."""


@dataclass(frozen=True)
class Table:
    """Columns and rows of text; the first column is left-aligned, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def markdown(tables: Sequence[Table]) -> str:
    """GitHub-flavoured Markdown, for step summaries and READMEs."""
    blocks = []
    for table in tables:
        head = ["| " + " | ".join(table.columns) + " |", "|---" + "|---:" * (len(table.columns) - 1) + "|"]
        body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
        blocks += [f"### {table.title}", "\n".join([*head, *body]), *table.notes]
    return "\n\n".join(blocks) + "\n"


def bench(result: Result) -> list[Table]:
    """Seconds and memory of every contender; where the time of an image goes; regressions, where asked."""
    rows, host, settings = result["contenders"], result["host"], result["settings"]
    has_energy = any(row["energy_j"] for row in rows)
    columns = ("", "x " + result["base"], "s/image", "s/step", "cold start s", "peak GiB",
               *(["J/image"] if has_energy else []), "PSNR dB")  # fmt: skip
    body = tuple(
        (
            row["name"], _ratio(row["ratio"]["image_s"]), _median(row, "image_s"), _median(row, "step_s"),
            _median(row, "cold_start_s"), f"{row['peak_bytes'] / _GIB:.2f}",
            *([number(row["energy_j"]["median"]) if row["energy_j"] else "-"] if has_energy else []),
            "-" if row["psnr_db"] is None else _psnr(row["psnr_db"], row["name"] == result["reference"]),
        )
        for row in rows
    )  # fmt: skip
    count = rows[0]["figures"]["image_s"]["n"]
    notes: tuple[str, ...] = (
        f"{host['cpu']} ({', '.join(host['features'])}), {settings['threads']} threads, {host['system']}; "
        f"medians of {count} images in {settings['processes']} processes, alternated {settings['alternated']}, "
        "ratios of time per image with 95 % intervals.",
        "; ".join(f"{row['name']}: {row['what']}, {_asked(row)}" for row in rows) + ".",
        f"PSNR of the first picture against {result['reference']}. Energy: {result['energy']}.",
    )
    others = [row["name"] for row in rows if row["psnr_db"] is not None and row["psnr_db"] < _ALIKE_DB]
    if others:
        notes += (f"{', '.join(others)}: below {_ALIKE_DB:g} dB, so another picture; no race is won by it.",)
    tables = [Table("Bench", columns, body, notes), _details(rows), _parts(rows)]
    if result.get("baseline"):
        tables.append(_baseline(result["baseline"]))
    return [table for table in tables if table.rows]


def _details(rows: Sequence[Result]) -> Table:
    sizes = sorted({int(size) for row in rows for size in row["images_per_s"]})
    columns = ("", "quartiles s/image", "CPU s/image", "s/denoiser call", "x", "first image s", "load s",
               "anonymous GiB", *(f"images/s at {size}" for size in sizes))  # fmt: skip
    body = tuple(
        (
            row["name"], f"{number(row['figures']['image_s']['low'])} to {number(row['figures']['image_s']['high'])}",
            _median(row, "cpu_s"), _median(row, "call_s"), _ratio(row["ratio"].get("call_s")),
            _median(row, "first_image_s"), _median(row, "load_s"),
            f"{row['anonymous_bytes'] / _GIB:.2f}",
            *(number(row["images_per_s"][str(n)]["median"]) if str(n) in row["images_per_s"] else "-" for n in sizes),
        )
        for row in rows
    )  # fmt: skip
    return Table("Details", columns, body)


def _median(row: Result, figure: str) -> str:
    found = row["figures"].get(figure)
    return number(found["median"]) if found else "-"


def _parts(rows: Sequence[Result]) -> Table:
    body = []
    for row in rows:
        found = row["figures"]
        if "denoise_s" not in found:
            continue
        whole = found["image_s"]["median"]
        parts = [found[name]["median"] for name in ("text_encoder_s", "denoise_s", "vae_s", "open_s")]
        rest = max(0.0, whole - sum(parts))
        body.append((row["name"], *(f"{number(part)} ({part / whole:.0%})" for part in (*parts, rest))))
    columns = ("", "text encoder", "denoiser", "VAE decoder", "opening engines", "the rest")
    return Table("Where an image's time goes, in seconds", columns, tuple(body))


def _baseline(rows: Sequence[Result]) -> Table:
    body = tuple(
        (row["name"], row["figure"], f"{row['old']:.4g}", f"{row['new']:.4g}", _ratio(row["ratio"]),
         "REGRESSED" if row["regressed"] else "ok")
        for row in rows
    )  # fmt: skip
    by = rows[0]["by"] if rows else ""
    return Table("Against the baseline", ("", "figure", "baseline", "now", "ratio", ""), body, (f"Ratios by {by}.",))


QUALITY = {
    "alignment": "alignment", "psnr_db": "PSNR dB", "ssim": "SSIM", "gmsd": "GMSD",
    "shape": "shape", "colour": "colour", "size": "size", "relation": "relation",
}  # fmt: skip
_SETS = {"fid": "FID", "kid": "KID", "clip_score": "CLIP score"}


def evaluation(result: Result) -> list[Table]:
    """Means with standard errors per bundle, and the worst pictures."""
    rows = result["bundles"]
    figures = [name for name in QUALITY if any(name in row["figures"] for row in rows)]
    sets = [name for name in _SETS if any(name in row["sets"] for row in rows)]
    body = tuple(
        (row["name"], *(_mean(row["figures"].get(name)) for name in figures),
         *(f"{row['sets'][name]:.3f}" if name in row["sets"] else "-" for name in sets))
        for row in rows
    )  # fmt: skip
    request = rows[0]["request"]
    against = "; PSNR, SSIM and GMSD against the fp32 reference from the same noise" if "psnr_db" in figures else ""
    approximate = "".join(
        f" {words[:1].upper()}{words[1:]}: {', '.join(told)}."
        for option, words in APPROXIMATIONS.items()
        if (told := [f"{row['name']} {row[option]}" for row in rows if row.get(option) is not None])
    )
    notes = (
        f"{rows[0]['prompts']} prompts, seeds from {request['seed']}, {request['num_inference_steps']} steps of "
        f"{request['sampler']}, guidance {request['guidance_scale']:g}; means with standard errors{against}."
        + approximate,
    )
    columns = ("", *(QUALITY[name] for name in figures), *(_SETS[name] for name in sets))
    worst = tuple(
        (row["name"], str(one["seed"]), *(_short(one.get(name)) for name in ("alignment", "psnr_db")), one["prompt"])
        for row in rows
        for one in row["worst"]
    )
    return [
        Table("Quality", columns, body, notes),
        Table("Worst pictures", ("", "seed", "alignment", "PSNR dB", "prompt"), worst),
    ]


def experiment(result: Result) -> list[Table]:
    """Layers with their time and quality; * marks the Pareto front, > the layer that was picked."""
    rows, chosen = result["layers"], result["pick"]
    figures = [name for name in QUALITY if any(name in row["quality"] for row in rows)][:4]
    names = [
        f"{'> ' if row['name'] == chosen['layer'] else ''}{row['name']}{' *' if row['on_front'] else ''}"
        for row in rows
    ]
    body = tuple(
        (name, _ratio(row["ratio"]), number(row["image_s"]["median"]), f"{row['peak_bytes'] / _GIB:.2f}",
         f"{row['disk_bytes'] / 2**20:.1f}", *(_mean(row["quality"].get(figure)) for figure in figures[:1]),
         _mean(row["change"]), *(_mean(row["quality"].get(figure)) for figure in figures[1:]))
        for name, row in zip(names, rows, strict=True)
    )  # fmt: skip
    denoisers = tuple(
        (name, _ratio(row["denoiser"]["ratio"]), f"{row['denoiser']['bytes'] / 2**20:.1f}",
         _short(row["denoiser"]["snr_db"]))
        for name, row in zip(names, rows, strict=True)
    )  # fmt: skip
    host = result["host"]
    notes = (
        f"{host['cpu']}, {result['bench']['settings']['threads']} threads; x = time per image over the first layer's, "
        "with 95 % intervals; "
        f"change = of {QUALITY[chosen['figure']]} from the first layer's, picture by picture; "
        f"* = on the Pareto front of time and {QUALITY[chosen['figure']]}.",
        f"Picked: {chosen['layer']}, the fastest with {QUALITY[chosen['figure']]} of at least "
        f"{chosen['at_least']:g} x the first layer's.",
    )
    first, *others = (QUALITY[name] for name in figures)
    columns = ("layer", "x", "s/image", "peak GiB", "engines MiB", first, "change", *others)
    told = ("x = mean time of a call over the first layer's; SNR = the worst in verification.",)
    return [
        Table(f"Experiment {result['name']}", columns, body, notes),
        Table("Denoiser", ("layer", "x", "MiB", "SNR dB"), denoisers, told),
    ]


def _mean(figure: Result | None) -> str:
    if figure is None:
        return "-"
    digits = 1 if abs(figure["mean"]) >= 10 else 3
    return f"{figure['mean']:.{digits}f} ± {figure['error']:.{digits}f}"


def _short(value: float | None) -> str:
    return "-" if value is None else "identical" if value >= 200 else f"{value:.3g}"


def _asked(row: Result) -> str:
    call = row["call"]
    return (
        f"{call['num_inference_steps']} steps of {row['sampler']}, guidance {call['guidance_scale']:g}, "
        f"{call['width']}x{call['height']}"
    )


def _ratio(ratio: Result | None) -> str:
    if ratio is None:
        return "-"
    if ratio["low"] == ratio["high"]:
        return f"{ratio['median']:.2f}"
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _psnr(value: float, is_reference: bool) -> str:
    return "reference" if is_reference else "identical" if value >= 200 else f"{value:.1f}"


def number(value: float | None) -> str:
    """About three significant digits, without an exponent."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}"
