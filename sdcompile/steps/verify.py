"""Compare an engine with what its torch reference answered to the same feeds.

The feeds and answers were recorded by `steps.record` on real denoising trajectories. A floor that
is missed is a finding, not an exception: the report says so and the caller decides. It knows no
library an engine runs in.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile import checkpoint, metrics
from sdcompile.backends import BACKENDS, STAND_IN, Backend, Engine, Host
from sdcompile.backends.base import read_card
from sdcompile.errors import StageError
from sdcompile.families import FAMILIES
from sdcompile.samples import Sample, Samples
from sdcompile.spec import PIPELINE, Job, Say, say_nothing
from sdcompile.steps import ranges, standing_in, sweep
from sdcompile.steps.report import refuted, write

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sdcompile.bundle import Manifest

    Arrays = Mapping[str, NDArray[Any]]

WORST_FILE = "worst.npz"


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Verify the engine in `inputs["engine"]` against `inputs["samples"]`; always writes report.json.

    job.params: backend, floor {min_snr_db, min_cosine}, stand_in {why} where the engine cannot run here
    (then `inputs["exported"]` is the fp32 ONNX), own_floor (see `_judged`), and the component's own.
    When a floor is missed, worst.npz keeps the worst sample, and with `inputs["checkpoint"]` and
    `inputs["onnx"]` the first layer that diverges is looked for.
    """
    backend, engine = BACKENDS[job.params["backend"]], inputs["engine"]
    floor = metrics.Floor(**job.params["floor"])
    samples = Samples(inputs["samples"], job.component)
    stand_in = job.params.get("stand_in")
    told: dict[str, Any] = {"backend": backend.name, "precision": job.precision, "proof": standing_in.proof(engine)}
    with tempfile.TemporaryDirectory(dir=out, prefix="standing-in-") as scratch:
        if stand_in:
            told["stand_in"] = {"backend": STAND_IN, "why": stand_in["why"]}
            card = read_card(engine, backend.name)
            told["ranges"] = ranges.check(inputs["exported"], inputs["onnx"], samples, Path(scratch), job.say)
            told["whole"] = standing_in.whole(inputs["exported"], samples, job.say)
            engine = standing_in.build(card, inputs["onnx"], Path(scratch) / "engine")
            backend = standing_in.BACKEND
        report = _judged(backend, {**inputs, "engine": engine}, samples, floor, job, out)
    apart = not (told.get("whole") or {"passed": True})["passed"]
    if (told.get("ranges") or {}).get("beyond") or apart or refuted(told["proof"]):
        told["passed"] = False
    write(out, {**report, **told})


def _judged(
    backend: Backend, inputs: Mapping[str, Path], samples: Samples, floor: metrics.Floor, job: Job, out: Path
) -> dict[str, Any]:
    """The report of the engine in `inputs["engine"]`.

    own_floor, given where the component was pruned, is what the engine must reach against the pruned
    torch module itself, before it is compared with the source's: only then is what is left the cost of
    pruning, and not of compiling, which the floor of pruned components would let pass.
    """
    own: dict[str, Any] | None = None
    if job.params.get("own_floor"):
        own_floor = metrics.Floor(**job.params["own_floor"])
        mine = _answered(inputs, job)
        found = judge(backend, inputs["engine"], mine, own_floor, keep=out, say=job.say, swept=False)
        own = {**found, "against": "checkpoint"}
        if not own["passed"]:
            own["divergence"] = _divergence(backend, inputs, mine, own, own_floor, out, job.say)
            return own
    report = judge(backend, inputs["engine"], samples, floor, keep=out, say=job.say)
    if own is not None:
        report["own"] = {"floor": own["floor"], "worst": own["worst"]}
    elif not all(row["passed"] for row in report["samples"]):
        report["divergence"] = _divergence(backend, inputs, samples, report, floor, out, job.say)
    return report


class _Answered(Samples):
    """Recorded feeds with other answers than the reference's."""

    def __init__(self, folder: Path, component: str, answers: Mapping[str, Arrays]) -> None:
        super().__init__(folder, component)
        self._answers = answers

    def __getitem__(self, name: str) -> Sample:
        return replace(super().__getitem__(name), outputs=self._answers[name])


def _answered(inputs: Mapping[str, Path], job: Job) -> _Answered:
    """The recorded feeds, and what the torch module in `inputs["checkpoint"]` answers to them."""
    import torch

    assert job.spec is not None
    samples = Samples(inputs["samples"], job.component)
    module = checkpoint.load(job.params["family"], job.component, inputs["checkpoint"], job.params)
    answers = {}
    with torch.inference_mode():
        for name in samples.rows:
            job.say(f"the pruned torch module, sample {name}", None)
            output = module(*(torch.tensor(samples[name].feeds[t.name]) for t in job.spec.inputs))
            tensors = output if isinstance(output, tuple) else (output,)
            answers[name] = {t.name: a.numpy() for t, a in zip(job.spec.outputs, tensors, strict=True)}
    return _Answered(inputs["samples"], job.component, answers)


def recheck(bundle: Path, manifest: Manifest, samples: Path) -> dict[str, dict[str, Any]]:
    """Component (and "pipeline") -> report of the finished bundle's engines, compared on this machine. What the
    layer tables in it show is claimed again.

    Floors are those the bundle was built with, else the defaults of its precisions.
    """
    from sdcompile.steps import verify_images

    found: dict[str, dict[str, Any]] = {}
    for name, entry in manifest.components.items():
        base = metrics.FLOORS[entry.precision]
        floor = metrics.Floor(**entry.verification["floor"]) if entry.verification.get("floor") else base
        folder, recorded = bundle / manifest.folder_of(name), Samples(samples, FAMILIES[manifest.family].plain(name))
        report, proof = judge(BACKENDS[entry.backend], folder, recorded, floor), standing_in.proof(folder)
        passed = report["passed"] and not refuted(proof)
        found[name] = {**report, "component": name, "proof": proof, "passed": passed}
    found[PIPELINE] = verify_images.recheck(bundle, manifest, samples)
    return found


def judge(
    backend: Backend,
    folder: Path,
    samples: Samples,
    floor: metrics.Floor,
    keep: Path | None = None,
    say: Say = say_nothing,
    *,
    swept: bool = True,
) -> dict[str, Any]:
    """The report of the engine in `folder`: every sample's figures, the worst, the least by region and shape, and,
    if `swept`, whether shapes that were not recorded give finite values that differ (`sweep`).

    When the floor is missed, the worst sample is kept in the folder `keep`, if one is given.
    """
    if not len(samples):
        raise StageError(f"{samples.component}: nothing was recorded to verify it with", "run the record step again")
    card = read_card(folder, backend.name)
    engine = backend.open(folder, Host())
    try:
        rows, recorded, least = [], set(), math.inf
        for number, sample in enumerate(samples):
            say(f"sample {number + 1} of {len(samples)}", number / len(samples))
            rows.append(_row(engine, sample, floor))
            recorded.add(sweep.sizes(card, sample.feeds))
            least = min(least, sweep.span(sample.outputs))
        worst = min(rows, key=_badness)
        kept = _keep(engine, samples[worst["id"]], keep) if keep is not None and not worst["passed"] else None
        found = sweep.run(engine, card, samples, recorded, least, say) if swept else None
        facts = dict(engine.facts)
    finally:
        engine.close()
    return {
        "component": card.component,
        "against": "reference",
        "backend": backend.name,
        "precision": card.precision,
        "passed": all(row["passed"] for row in rows) and not (found and found["faults"]),
        "floor": {"min_snr_db": floor.min_snr_db, "min_cosine": floor.min_cosine},
        "facts": facts,
        "worst": worst,
        "by_region": _least(rows, "region"),
        "by_shape": _least(rows, "shape"),
        "samples": rows,
        "sweep": found,
        "kept": kept,
        "divergence": None,
    }


def figures(reference: Arrays, value: Arrays) -> dict[str, Any]:
    """The worst figures over all outputs of one call.

    Raises ValueError when an output is missing or has another shape than the reference's.
    """
    missing = sorted(set(reference) - set(value))
    if missing:
        raise ValueError(f"the engine gives no output {', '.join(missing)}")
    pairs = [(reference[name], value[name]) for name in reference]
    finite = all(metrics.is_finite(v) for _, v in pairs)
    return {
        "snr_db": round(min(metrics.snr_db(r, v) for r, v in pairs), 3),
        "cosine": round(min(metrics.cosine(r, v) for r, v in pairs), 9),
        "max_abs": float(f"{max(metrics.max_abs(r, v) for r, v in pairs):.4g}") if finite else None,
        "finite": finite,
    }


def _keep(engine: Engine, sample: Sample, out: Path) -> str:
    """Write feeds (in.*), reference (ref.*) and engine outputs (got.*, unless it fails); the file's name."""
    arrays = {f"in.{k}": v for k, v in sample.feeds.items()} | {f"ref.{k}": v for k, v in sample.outputs.items()}
    answer = _attempt(engine, sample)
    if not isinstance(answer, str):
        arrays |= {f"got.{k}": v for k, v in answer.items()}
    np.savez(out / WORST_FILE, **arrays)  # type: ignore[arg-type]  # mypy thinks of allow_pickle
    return WORST_FILE


def _row(engine: Engine, sample: Sample, floor: metrics.Floor) -> dict[str, Any]:
    row: dict[str, Any] = {**sample.told, "error": None}
    answer = _attempt(engine, sample)
    if not isinstance(answer, str):
        try:
            found = figures(sample.outputs, answer)
            flat = found["finite"] and sweep.span(answer) < sweep.FLAT * sweep.span(sample.outputs)
            held = found["finite"] and not flat and floor.holds(found["snr_db"], found["cosine"])
            return {**row, **found, "flat": flat, "passed": held}
        except ValueError as error:
            answer = str(error)
    failed = {"snr_db": metrics.WORST_DB, "cosine": -1.0, "max_abs": None, "finite": False}
    failed |= {"flat": False, "passed": False}
    return {**row, **failed, "error": answer}


def _attempt(engine: Engine, sample: Sample) -> dict[str, NDArray[Any]] | str:
    """The engine's answer, or what it said when it failed."""
    try:
        return engine(sample.feeds)
    # Engines are foreign libraries and raise what they like (ONNX Runtime's errors derive from Exception
    # alone). An engine that fails on a legal input is what verification looks for, so it is reported.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[:2000]}"


def _badness(row: Mapping[str, Any]) -> tuple[bool, bool, float, float]:
    return (row["passed"], row["error"] is None, row["snr_db"], row["cosine"])


def _least(rows: Iterable[Mapping[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row[key] is not None:
            groups.setdefault(row[key], []).append(row)
    return {
        name: {
            "samples": len(group),
            "passed": all(row["passed"] for row in group),
            "min_snr_db": min(row["snr_db"] for row in group),
            "min_cosine": min(row["cosine"] for row in group),
        }
        for name, group in groups.items()
    }


def _divergence(
    backend: Backend,
    inputs: Mapping[str, Path],
    samples: Samples,
    report: Mapping[str, Any],
    floor: metrics.Floor,
    out: Path,
    say: Callable[[str, float | None], None],
) -> dict[str, Any]:
    nothing: dict[str, Any] = dict.fromkeys(("module", "node", "snr_db", "finite", "previous"))
    nothing["table"] = []
    if backend.takes != "onnx" or "onnx" not in inputs or "checkpoint" not in inputs:
        return {**nothing, "reason": f"backend {backend.name} takes no ONNX graph whose values could be looked at"}
    from sdcompile.steps import divergence

    card = read_card(inputs["engine"], backend.name)
    suspect = divergence.Suspect(backend, card, inputs["checkpoint"], inputs["onnx"])
    sample = samples[report["worst"]["id"]]
    try:
        return divergence.search(suspect, sample.feeds, floor.min_snr_db, out, say)
    # The search runs an engine already known to be broken; whatever it raises must not hide the finding above.
    except Exception as error:
        return {**nothing, "reason": f"the search failed: {type(error).__name__}: {str(error).strip()[:500]}"}
