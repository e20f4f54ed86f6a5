"""What both NVIDIA backends do with a component: one plan per target, its layer table, and the proof of it.

<target>.plan   the engine
<target>.log    what the library said while it built it
layers.json     the compiler's own layer tables and what each engine claims
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sdcompile.backends.base import LAYERS, card_from_job, write_card
from sdcompile.backends.trt import layers
from sdcompile.backends.trt.compiling import TABLE, Order, compile_plan
from sdcompile.backends.trt.graph import Promise, promise
from sdcompile.errors import StageError
from sdcompile.spec import Job

_LAST = 5
"""Lines of the library's log that an error repeats."""


def build_engines(
    backend: str,
    src: Path,
    out: Path,
    job: Job,
    orders: Mapping[str, Order],
    *,
    fused_attention: bool,
    built_on: Mapping[str, str] | None = None,
) -> None:
    """Build every order (target -> what to build; its files are named here) and describe them in engine.json.

    `built_on` is the GPU (`driver.Driver.identity`) whose kernels were chosen, where one was needed.

    Raises StageError when the library refuses the graph or a target, or when an engine does not
    bear out what its precision claims.
    """
    promised = promise(src / "model.onnx")
    if job.precision == "int8" and not promised.quantized:
        raise StageError(
            f"{job.component}: int8 was asked for, but nothing in the graph is quantised (no matrix product or "
            "convolution has dequantised inputs on both sides)",
            "the pass that quantises must run before the build",
        )
    tables, measured = {}, {}
    with _emptied_on_failure(out):
        for number, (target, order) in enumerate(orders.items()):
            say = _labelled(job, target, number, len(orders))
            tables[target], measured[target] = _one(order, target, out, job, say)
        made = {target: _claims(table, promised, job, fused_attention) for target, table in tables.items()}
        faults = [
            f"{job.component} for {target}: not so: {claim.claim} (found {claim.found})"
            for target, claims in made.items()
            for claim in claims
            if claim.holds is False
        ]
        if faults:
            raise StageError("\n".join(faults), _hint(job, fused_attention))
    data = {
        # What the claims were held against: the ONNX does not travel with the engine.
        "promise": {name: sorted(nodes) for name, nodes in vars(promised).items()},
        "engines": {
            target: {"claims": [claim._asdict() for claim in made[target]], **table} for target, table in tables.items()
        },
    }
    (out / LAYERS).write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")
    version = next(iter(orders.values())).version
    here = {"built_on": dict(built_on)} if built_on else {}
    write_card(out, card_from_job(backend, job, {"version": version, "engines": measured, **here}))


def _one(order: Order, target: str, out: Path, job: Job, say: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    with TemporaryDirectory(dir=out, prefix="building-") as scratch:
        table = Path(scratch) / "layers.txt"
        order = replace(order, plan=out / f"{target}.plan", log=out / f"{target}.log", table=table)
        try:
            peak = compile_plan(order, say, f"{job.component} for {target}")
        except StageError as error:
            message = f"{job.component} for {target}: {error.message}{_last_words(order.log, error.message)}"
            raise StageError(message, error.hint) from error
        text, log = table.read_text(encoding="utf-8"), order.log.read_text(encoding="utf-8")
    try:
        read = layers.parse(text, log) if text.startswith(TABLE) else layers.parse_inspector(text, log)
    except ValueError as error:
        raise StageError(f"{job.component} for {target}: {error}", "this is a fault of sdcompile: report it") from error
    with order.plan.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    measured = {"plan": order.plan.name, "sha256": digest, "bytes": order.plan.stat().st_size, "peak_bytes": peak}
    return read, {**measured, **read["summary"]}


def _last_words(log: Path, told: str) -> str:
    """What the library said last, but for what `told` has of it: the folder goes with a failed step, and its log."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    new = [line for line in lines if line.partition("] ")[2].strip() not in told]
    return "".join(f"\n  {line}" for line in ("its log ends with:", *new[-_LAST:])) if new else ""


def _claims(table: Mapping[str, Any], promised: Promise, job: Job, fused_attention: bool) -> list[layers.Claim]:
    return layers.claims(table, promised, job.precision, fused_attention=fused_attention)


def _hint(job: Job, fused_attention: bool) -> str:
    words = f"the engine would not be {job.precision} where it counts"
    return words + (
        "; `build: {fused_attention: false}` accepts attentions that are not fused" if fused_attention else ""
    )


def _labelled(job: Job, target: str, number: int, count: int) -> Any:
    def say(text: str, fraction: float | None = None) -> None:
        job.say(f"{target}: {text}", None if fraction is None else (number + fraction) / count)

    return say


@contextmanager
def _emptied_on_failure(folder: Path) -> Iterator[None]:
    """A refused engine is not left lying about: whoever finds a plan in a folder may take it for a good one."""
    try:
        yield
    except BaseException:
        for path in folder.glob("*.plan"):
            path.unlink()
        raise
