"""Verification reports: put together for a bundle, and told to a person when one failed.

Standard library only; it knows the fields of a report.json and no engine.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdcompile.errors import VerifyError
from sdcompile.spec import PIPELINE

Report = Mapping[str, Any]


def reports(found: Mapping[str, Report]) -> tuple[dict[str, Any], str]:
    """Component -> report.json (and "pipeline" for whole images) -> (verify.json, JUnit XML).

    The XML has one test case per component and shape, and one per whole image.
    """
    passed = all(report["passed"] for report in found.values())
    return {"passed": passed, "reports": {name: dict(report) for name, report in found.items()}}, _junit(found)


def write(folder: Path, report: Report) -> None:
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")


def fault(report: Report, folder: Path | None = None, target: str = "") -> VerifyError:
    """The error that a report with `passed: false` is worth: what missed, by how much, where, and what to type.

    `folder` is where the report lies, so that the kept files can be named; `target` is whose engine it was.
    """
    error = _image_fault(report, folder) if report["component"] == PIPELINE else _engine_fault(report, folder)
    return VerifyError(f"target {target}: {error.message}", error.hint) if target else error


def broken(report: Report) -> str:
    """Why an engine, or the images, are worse than inexact: NaN, one colour, or values beyond fp16; "" = they are not.

    It is what `verify: {on_nan: ...}` is about.
    """
    faults = (report.get("sweep") or {}).get("faults", ())
    if (report.get("ranges") or {}).get("beyond"):
        return _shortfall(report)
    if report.get("blame"):
        return f"{report['blame']} gives NaN, infinite values or one colour"
    for row in report["samples"]:
        if row["error"] is None and not row["finite"]:
            return _NOT_FINITE
        if row.get("flat"):
            return _FLAT
    return next((f"at its {fault['shape']} shape {fault['what']}" for fault in faults if fault["kind"] != "error"), "")


def refuted(proof: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[str]:
    """The claims of `proof` that its tables refute, a line each."""
    return [
        f"{target}: not so: {claim['claim']} (found {claim['found']})"
        for target, claims in proof.items()
        for claim in claims
        if claim["holds"] is False
    ]


_NOT_FINITE = "its output holds NaN or infinite values"
_FLAT = "its output is all one value, as a black picture is"

_AGAINST = {
    "reference": "its fp32 reference",
    "checkpoint": "the pruned torch module it was made of, which it must whatever pruning cost",
}


def _engine_fault(report: Report, folder: Path | None) -> VerifyError:
    worst, name = report["worst"], report["component"]
    engine = f"{_subject(report)}{name} ({report['backend']}, {report['precision']})"
    if lines := refuted(report.get("proof") or {}):
        return VerifyError(
            f"{engine} is not what its precision says, by its compiler's own layer table\n" + "\n".join(lines),
            "build it again; `sdcompile inspect --layers BUNDLE` shows the table",
        )
    whole = report.get("whole") or {"passed": True}
    if not whole["passed"]:
        return VerifyError(
            f"{engine} answers {whole['rows']} rows at once otherwise than one after the other, already as it was "
            f"exported, in fp32: SNR {whole['snr_db']:.1f} dB (floor {whole['floor_db']:g})\n"
            f"input: sample {whole['sample']}",
            "this is a fault of the exported graph: try another `opset:` in the recipe (18 to 23)",
        )
    faults = (report.get("sweep") or {}).get("faults", ())
    if faults and worst["passed"] and not (report.get("ranges") or {}).get("beyond"):
        dims = ", ".join(f"{name} {'x'.join(map(str, sides))}" for name, sides in faults[0]["dims"].items())
        return VerifyError(
            f"{engine} agrees with its fp32 reference where that was recorded, but not so at its "
            f"{faults[0]['shape']} shape: {faults[0]['what']}\ninput: {dims}, made of sample {faults[0]['sample']}",
            _hint(report),
        )
    lines = [
        f"{engine} does not agree with {_AGAINST[report['against']]}: {_shortfall(report)}",
        f"worst input: {_described(worst)}",
    ]
    if report.get("kept"):
        lines.append(f"kept: {_at(folder, report['kept'])} (feeds, reference and engine outputs)")
    if found := report.get("divergence"):
        lines.append(_where(found))
    return VerifyError("\n".join(lines), _hint(report))


def _decoder_fault(found: Report) -> VerifyError:
    return VerifyError(
        "the decoder of another source draws other pictures than the model's own, from the same latents: mean PSNR "
        f"{found['psnr_db']['mean']:.1f} dB, floor {found['floor']['min_psnr_db']:g} dB",
        "it was probably made for another model's latents: name one made for this model's; if the difference is one "
        "you accept, lower `verify: {min_decoder_psnr_db: ...}`",
    )


def _image_fault(report: Report, folder: Path | None) -> VerifyError:
    if not report.get("own_decoder", {}).get("passed", True):
        return _decoder_fault(report["own_decoder"])
    worst, cost = report["worst"], report.get("step_cache", {})
    kept = ["kept: " + ", ".join(_at(folder, name) for name in report["kept"])] if report.get("kept") else []
    if not cost.get("passed", True) and worst["passed"]:
        lines = [_step_cache_shortfall(cost), f"worst image: {_described(cost['worst'])}", *kept]
        return VerifyError("\n".join(lines), _STEP_CACHE_HINT)
    lines = [
        f"{_subject(report)}whole images do not agree with the fp32 reference: {_shortfall(report)}",
        f"worst image: {_described(worst)}",
        *kept,
    ]
    hint = (
        "look at the two pictures; if the difference is one you accept, lower `verify: {min_image_psnr_db: ...}`, "
        "else widen the precision (`components: {unet: {precision: fp32}}`) or let the build do it "
        "(`verify: {on_fail: fallback}`)"
    )
    return VerifyError("\n".join(lines), hint)


_STEP_CACHE_HINT = (
    "run the whole denoiser more often or cut it deeper (`components: {unet: {step_cache: {every: ..., depth: ...}}}`) "
    "or, if you accept the difference, lower its min_psnr_db"
)


def _step_cache_shortfall(cost: Report) -> str:
    return (
        f"images with cached steps (every {cost['every']} of {cost['num_inference_steps']}) are too far from the "
        f"reference's without: PSNR {cost['psnr_db']['min']:.1f} dB, floor {cost['floor']['min_psnr_db']:g} dB"
    )


def stood_in(report: Report) -> str:
    """What was run instead of an engine that cannot run where it was built; "" when the engine itself was."""
    told = report.get("stand_in")
    if not told:
        return ""
    return (
        f"the engine was not run ({told['why']}): verified is the ONNX it was built from, run by {told['backend']} on "
        "the CPU, and the compiler's own layer table"
    )


def _subject(report: Report) -> str:
    return f"the ONNX (run by {report['stand_in']['backend']}, not the engine) of " if report.get("stand_in") else ""


def _hint(report: Report) -> str:
    if "own" in report:
        made = report["own"]["worst"]["snr_db"]
        return (
            f"the engine computes what it was made of ({made:.1f} dB): this is what pruning cost. Prune less, add "
            f"`recover: {{}}`, or lower `verify: {{{report['component']}: {{min_snr_db: ...}}}}`"
        )
    name, wider = report["component"], {"int8": "bf16 or fp16", "bf16": "fp16 or fp32", "fp16": "bf16 or fp32"}
    if report["precision"] == "fp32":
        return (
            "fp32 should agree: this is most likely a fault of the exported graph or of the backend; try another "
            f"`components: {{{name}: {{backend: ...}}}}`"
        )
    if broken(report):
        kept = f"`components: {{{name}: {{cast: {{from_samples: true}}}}}}` keeps what overflows in fp32; "
        return (
            f"{kept if report['precision'] == 'fp16' else ''}`verify: {{on_nan: fallback}}` builds {name} in fp32 "
            f"instead; `components: {{{name}: {{precision: ...}}}}` takes {wider[report['precision']]}"
        )
    return (
        f"`verify: {{on_fail: fallback}}` builds {name} in fp32 instead; `components: {{{name}: {{precision: ...}}}}` "
        f"takes {wider[report['precision']]}; `verify: {{{name}: {{min_snr_db: ...}}}}` lowers the floor if you accept "
        "the difference"
    )


def _shortfall(figures: Report) -> str:
    """What missed which floor, in words: of a report, or of one row of it."""
    worst, floor = figures["worst"], figures["floor"]
    if beyond := (figures.get("ranges") or {}).get("beyond"):
        return (
            f"the value of {beyond[0]['node']} reaches {beyond[0]['max_abs']:g} where the largest fp16 is "
            f"{figures['ranges']['limit']:g}" + (f", and {len(beyond) - 1} more do" if len(beyond) > 1 else "")
        )
    if worst.get("error"):
        return f"the engine failed: {worst['error']}"
    if not worst["finite"]:
        return _NOT_FINITE
    if worst.get("flat"):
        return _FLAT
    if "psnr_db" in worst:
        return f"PSNR {worst['psnr_db']:.1f} dB, floor {floor['min_psnr_db']:g} dB"
    return (
        f"SNR {worst['snr_db']:.1f} dB (floor {floor['min_snr_db']:g}), "
        f"cosine {worst['cosine']:.6f} (floor {floor['min_cosine']:g})"
    )


def _described(worst: Report) -> str:
    parts = [f"sample {worst['id']}", f"prompt {worst['prompt']!r}"]
    if worst.get("step") is not None:
        parts.append(f"step {worst['step']} (timestep {worst['timestep']:g}, {worst['region']})")
    parts.append(f"{worst['shape']} shape")
    if worst.get("step_cache", "off") != "off":
        parts.append(f"step_cache {worst['step_cache']}, as in the reference")
    return ", ".join(parts)


def _where(found: Report) -> str:
    if found.get("module") is None:
        return f"no single layer to blame: {found['reason']}"
    level = f"{found['snr_db']:.1f} dB" if found["finite"] else "NaN or infinite values"
    text = f"first layer that diverges: {found['module']} (ONNX node {found['node']}): {level}"
    if previous := found.get("previous"):
        text += f", after {previous['module']} with {previous['snr_db']:.1f} dB"
    return text


def _at(folder: Path | None, name: str) -> str:
    return str(folder / name) if folder else name


def _junit(found: Mapping[str, Report]) -> str:
    suites = ET.Element("testsuites", name="sdcompile verify")
    for name, report in found.items():
        cases = list(_cases(name, report))
        if not report["passed"] and all(message is None for _, message in cases):
            cases.append(("what no single call shows", _xml_safe(fault(report).message)))
        failed = sum(message is not None for _, message in cases)
        suite = ET.SubElement(suites, "testsuite", name=name, tests=str(len(cases)), failures=str(failed), errors="0")
        for title, message in cases:
            case = ET.SubElement(suite, "testcase", classname=name, name=title)
            if message is not None:
                ET.SubElement(case, "failure", message=message.splitlines()[0]).text = message
    ET.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _cases(name: str, report: Report) -> Iterator[tuple[str, str | None]]:
    """(title, failure text or None) of each test case of one report."""
    if name == PIPELINE:
        for row in report["samples"]:
            yield f"image {row['id']} ({row['shape']})", None if row["passed"] else _row_failure(row, report)
        if cost := report.get("step_cache"):
            failure = None if cost["passed"] else f"{_step_cache_shortfall(cost)}\n{_described(cost['worst'])}"
            yield f"cost of step caching, {cost['images']} images", _xml_safe(failure) if failure else None
        return
    for shape, row in report["by_shape"].items():
        worst = min((s for s in report["samples"] if s["shape"] == shape), key=lambda s: (s["passed"], s["snr_db"]))
        yield f"{shape} shape, {row['samples']} samples", None if row["passed"] else _row_failure(worst, report)
    told = report.get("sweep") or {"shapes": (), "faults": ()}
    for shape in told["shapes"]:
        what = next((fault["what"] for fault in told["faults"] if fault["shape"] == shape), None)
        yield f"{shape} shape, finite and not all one value", what if what is None else _xml_safe(what)


def _row_failure(worst: Report, report: Report) -> str:
    text = f"{_shortfall({'worst': worst, 'floor': report['floor']})}\n{_described(worst)}"
    found = report.get("divergence")
    return _xml_safe(f"{text}\n{_where(found)}" if found else text)


def _xml_safe(text: str) -> str:
    """XML 1.0 has no way to write most control characters, and prompts and library errors may hold them."""
    return re.sub("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
