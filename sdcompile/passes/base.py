"""The words every pass shares: its record, and the file that tells what it did. Knows no pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.spec import Job, Kind, Shapes, Stage

if TYPE_CHECKING:
    from pydantic import BaseModel


def never(params: BaseModel) -> bool:
    return False


def always(params: BaseModel) -> bool:
    return True


@dataclass(frozen=True)
class Setting:
    """What a plan knows of the component a pass is asked for.

    config      config.json of its checkpoint
    modules     path -> kind of every module that has weights; None where they are not known
    multiples   shape letter -> what its value is always divisible by
    before      parameters of the passes that run before this one, by name
    edits       what the source had lost before any pass (see `sdcompile.edits`); it is no longer among `modules`
    counts      weight -> how many numbers; empty where they are not known
    """

    config: Mapping[str, Any]
    modules: Mapping[str, str] | None
    shapes: Shapes
    multiples: Mapping[str, int]
    before: Mapping[str, Any] = field(default_factory=dict)
    edits: Sequence[Mapping[str, Any]] = ()
    counts: Mapping[str, int] = field(default_factory=dict)


def nothing(params: Any, setting: Setting) -> list[str]:
    return []


def nothing_more(params: BaseModel) -> tuple[str, ...]:
    return ()


def no_more(params: Any, setting: Setting) -> float:
    return 0.0


def by_modules(fault: Callable[[Any, Mapping[str, str]], list[str]]) -> Callable[[Any, Setting], list[str]]:
    """`refuses` of a pass that asks for the names of modules alone; where they are not known it refuses nothing."""

    def refuses(params: Any, setting: Setting) -> list[str]:
        return [] if setting.modules is None else fault(params, setting.modules)

    return refuses


@dataclass(frozen=True)
class Pass:
    """One rewriting of a model: it reads the form `kind` and writes the same form, and effect.json (`write_effect`).

    kind        "checkpoint" or "onnx": the role of its input folder and the form of its output
    stage       the command that makes it. Passes of the prune stage are named in a recipe's `prune:`;
                one of the quantize stage runs where a backend's `realises` names it
    revision    to be raised whenever the bytes it writes for the same input change
    params      pydantic model of what the recipe may tell it; run finds them, with every default, in
                job.params beside "family"
    run         (inputs, out, job), as every op
    packages    distributions whose versions decide those bytes
    calibrates  params -> does it want an input "samples": what the fp32 reference was fed and answered on
                the trajectories of `calibrate` (see `sdcompile.samples`)?
    memory      peak resident memory of `run`: (times the component's fp32 bytes, plus GiB), or (params, setting) ->
                that
    measuring   the same where it wants samples, if that takes more
    working     (params, setting) -> GiB beside those, of what depends on parameters and sizes
    refuses     (params, setting) -> what cannot be, each as "field: fault"; a plan asks before anything is made
    idle        params -> does it change nothing, as with a ratio of 0?
    exact       does the module compute the same function after it, so that the floors of its precision hold?
    disk        what `run` writes, at most: times the component's fp32 bytes, or (params, setting) -> that
    wants       params -> further inputs, by role: "teacher", the component's checkpoint as it was before any pass;
                "assets", the source's scheduler config, in `scheduler`; "pictures", where the recipe names some,
                their latents (`samples.write_pictures`)
    section     of a pass of the quantize stage: the mapping in a recipe that its parameters are written in
    opset       the oldest ONNX opset whose operators take what it writes
    """

    name: str
    stage: Stage
    kind: Kind
    revision: int
    params: type[BaseModel]
    run: Callable[[Mapping[str, Path], Path, Job], None]
    packages: tuple[str, ...] = ()
    calibrates: Callable[[Any], bool] = never
    refuses: Callable[[Any, Setting], list[str]] = nothing
    idle: Callable[[Any], bool] = never
    exact: bool = False
    wants: Callable[[Any], tuple[str, ...]] = nothing_more
    memory: tuple[float, float] | Callable[[Any, Setting], tuple[float, float]] = (2.0, 1.0)
    measuring: tuple[float, float] | None = None
    working: Callable[[Any, Setting], float] = no_more
    section: str = "quantize"
    opset: int = 18
    disk: float | Callable[[Any, Setting], float] = 1.0


EFFECT = "effect.json"


def write_effect(
    out: Path,
    parameters: tuple[int, int],
    size_bytes: tuple[int, int],
    macs: tuple[int, int] | None = None,
    snr_db: Mapping[str, float] | None = None,
    **detail: Any,
) -> None:
    """Write what a pass did to effect.json: figures as (before, after), and details of its own.

    parameters   numbers in the weights; size_bytes: bytes of the weights as stored
    macs         multiply-accumulates of one call at the usual shapes; None of a pass that takes out none
    snr_db       timestep region -> lowest SNR on held out samples, against the form the pass was given
    """
    effect = {"parameters": parameters, "bytes": size_bytes, "macs": macs, "snr_db": dict(snr_db or {}), **detail}
    (out / EFFECT).write_text(json.dumps(effect, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_effect(folder: Path) -> dict[str, Any] | None:
    """What the pass that wrote `folder` said of itself; None where it said nothing."""
    path = folder / EFFECT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
