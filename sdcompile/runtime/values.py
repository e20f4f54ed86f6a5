"""Single values of options: what each may be, and the words that refuse one.

It knows no model: what a value means to one (its sizes, samplers, steps) is checked in `request`.
The recipe's defaults are checked by the same functions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sdcompile.errors import RecipeError
from sdcompile.spec import FULL

Kind = str


class Schedule(NamedTuple):
    """How guidance changes over the steps: a kind (see SCHEDULES) and its scales; () = made from guidance_scale."""

    kind: Kind
    scales: tuple[float, ...] = ()

    def __str__(self) -> str:
        return self.kind + (":" + ",".join(f"{scale:g}" for scale in self.scales) if self.scales else "")


class Interval(NamedTuple):
    """Where guidance acts: from `start` to `stop`, both included, as fractions of the steps or as timesteps."""

    start: float
    stop: float
    timesteps: bool = False

    def __str__(self) -> str:
        return f"{'t' if self.timesteps else ''}{self.start:g}..{self.stop:g}"


class Stage(NamedTuple):
    """One of several samplers in a row: `steps` of it (None = the rest), at its own guidance scale or the request's."""

    sampler: str
    steps: int | None = None
    guidance_scale: float | None = None

    def __str__(self) -> str:
        at = "" if self.guidance_scale is None else f"@{self.guidance_scale:g}"
        return self.sampler + ("" if self.steps is None else f":{self.steps}") + at


class EarlyStop(NamedTuple):
    """Finish an image when its predicted clean latents stop changing: when the mean squared change from
    one call to the next falls below `threshold` times their mean square, after `min_steps` calls."""

    threshold: float
    min_steps: int = 5

    def __str__(self) -> str:
        return f"{self.threshold:g}:{self.min_steps}"


class Hires(NamedTuple):
    """A second pass: `scale` times as large, begun from the first one's latents with `strength`."""

    scale: float
    strength: float = 0.6

    def __str__(self) -> str:
        return f"{self.scale:g}@{self.strength:g}"


SCHEDULES: Mapping[Kind, int] = {"constant": 1, "linear": 2, "cosine": 2, "phases": 3}
"""Kind -> how many scales it takes."""


def whole(what: str, value: Any) -> int:
    """A whole number. Raises RecipeError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise RecipeError(f"{what}={value!r} is no whole number") from error


def count(what: str, value: Any) -> int:
    """A whole number of at least 1."""
    number = whole(what, value)
    if number < 1:
        raise RecipeError(f"{what}={number}: at least 1 is needed")
    return number


def number(what: str, value: Any, hint: str = "", low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from `low` to `high`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{what}={value!r} is no number", hint) from error
    if not math.isfinite(found):
        raise RecipeError(f"{what}={found} is not finite", hint)
    if not low <= found <= high:
        raise RecipeError(f"{what}={found:g} is out of range: {low:g} to {high:g}", hint)
    return found


def choice(what: str, value: Any, known: Sequence[str]) -> str:
    """One of the words in `known`."""
    if value not in known:
        raise RecipeError(f"{what}={value!r} is unknown", f"one of: {', '.join(known)}")
    return str(value)


def guidance_scale(value: Any) -> float:
    return number("guidance_scale", value, "usual values are 1 (off) to 15")


def guidance_rescale(value: Any) -> float:
    return number("guidance_rescale", value, "0 (off) to 1; 0.7 is usual", 0.0, 1.0)


def guidance_schedule(value: Any) -> Schedule:
    """ "cosine", "linear:2,9", or a mapping {kind, scales}."""
    forms = "constant, linear[:first,last], cosine[:first,last] or phases[:first,second,third], as in phases:5,7,9"
    if isinstance(value, Schedule):
        return value
    if isinstance(value, str):
        kind, _, rest = value.partition(":")
        scales: Any = [part for part in rest.split(",") if part.strip()]
    elif isinstance(value, Mapping) and set(value) <= {"kind", "scales"} and "kind" in value:
        kind, scales = value["kind"], value.get("scales", [])
    else:
        raise RecipeError(f"guidance_schedule={value!r} is no schedule", forms)
    kind = choice("guidance_schedule", kind, tuple(SCHEDULES))
    found = tuple(number("guidance_schedule", scale, forms) for scale in _listed("guidance_schedule", scales, forms))
    if found and len(found) != SCHEDULES[kind]:
        raise RecipeError(f"guidance_schedule {kind} takes {SCHEDULES[kind]} scale(s), not {len(found)}", forms)
    return Schedule(kind, found)


def guidance_interval(value: Any) -> Interval:
    """ "0.2..0.8" or (0.2, 0.8): fractions of the steps; "t200..800" or {timesteps: [200, 800]}: timesteps."""
    forms = 'fractions of the steps, as in "0.2..0.8", or timesteps, as in "t200..800"'
    if isinstance(value, Interval):
        return value
    timesteps = False
    ends: Any = value
    if isinstance(value, str):
        timesteps = value.startswith("t")
        ends = value.removeprefix("t").split("..")
    elif isinstance(value, Mapping):
        timesteps = set(value) == {"timesteps"}
        ends = value.get("timesteps")
    ends = _listed("guidance_interval", ends, forms)
    if len(ends) != 2:
        raise RecipeError(f"guidance_interval={value!r}: two ends are needed", forms)
    start, stop = (number("guidance_interval", end, forms) for end in ends)
    if not 0 <= start <= stop or (stop > 1 and not timesteps):
        raise RecipeError(f"guidance_interval={value!r} is no interval from 0 to 1", forms)
    return Interval(start, stop, timesteps)


def stages(value: Any) -> tuple[Stage, ...]:
    """ "dpmpp_2m:6@7,euler_ancestral@9", or a list of {sampler, steps, guidance_scale}; the last takes the rest."""
    forms = 'sampler:steps@scale, as in "dpmpp_2m:6@7,euler_ancestral@9"; the last one takes the steps that are left'
    rows = value.split(",") if isinstance(value, str) else _listed("stages", value, forms)
    found = tuple(_stage(row, forms) for row in rows)
    if len(found) < 2 or found[-1].steps is not None or any(stage.steps is None for stage in found[:-1]):
        raise RecipeError(f"stages={value!r}: at least two, all but the last with their steps", forms)
    return found


def _stage(row: Any, forms: str) -> Stage:
    if isinstance(row, Stage):
        return row
    if isinstance(row, str):
        rest, _, scale = row.strip().partition("@")
        name, _, steps = rest.partition(":")
        row = {
            "sampler": name,
            "steps": int(steps) if steps.isdecimal() else steps or None,
            "guidance_scale": scale or None,
        }
    if not isinstance(row, Mapping) or not set(row) <= set(Stage._fields) or not isinstance(row.get("sampler"), str):
        raise RecipeError(f"{row!r} is no stage", forms)
    return Stage(
        row["sampler"],
        None if row.get("steps") is None else count("stages: steps", row["steps"]),
        None if row.get("guidance_scale") is None else guidance_scale(row["guidance_scale"]),
    )


def early_stop(value: Any) -> EarlyStop:
    """A threshold, "threshold:min_steps", or a mapping of the two."""
    forms = "a threshold, as in 1e-4, or threshold:min_steps, as in 1e-4:5"
    if isinstance(value, EarlyStop):
        return value
    if isinstance(value, str):
        threshold, colon, least = value.partition(":")
        value = {"threshold": threshold} | ({"min_steps": int(least) if least.isdecimal() else least} if colon else {})
    elif isinstance(value, Mapping):
        value = dict(value)
    else:
        value = {"threshold": value}
    if not {"threshold"} <= set(value) <= set(EarlyStop._fields):
        raise RecipeError(f"early_stop={value!r} is no threshold", forms)
    return EarlyStop(
        number("early_stop", value["threshold"], forms, 0.0), count("early_stop: min_steps", value.get("min_steps", 5))
    )


def tiling(value: Any) -> str:
    return choice("tiling", value, ("off", "auto"))


def hires(value: Any) -> Hires:
    """A scale, "scale@strength", or a mapping of the two."""
    forms = "how many times as large, as in 2, or with a strength: 2@0.6"
    if isinstance(value, Hires):
        return value
    if isinstance(value, str):
        scale, at, strength = value.partition("@")
        value = {"scale": scale} | ({"strength": strength} if at else {})
    elif not isinstance(value, Mapping):
        value = {"scale": value}
    if not {"scale"} <= set(value) <= set(Hires._fields):
        raise RecipeError(f"hires={value!r} is no scale", forms)
    return Hires(
        number("hires: scale", value["scale"], forms, 1.0, 8.0),
        number("hires: strength", value.get("strength", 0.6), forms, 0.0, 1.0),
    )


def step_cache(value: Any) -> int | None:
    """N where one of every N calls runs the whole denoiser; None where all do ("off", or 1)."""
    forms = "off, or N: one whole call of the denoiser in every N, as in 3"
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if value is False or value == "off":  # YAML 1.1 reads off as false
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not value >= 1:
        raise RecipeError(f"step_cache={value!r} is no number of calls", forms)
    return value if value > 1 else None


def unet_width(value: Any) -> str:
    """The name of a width; which there are, a model knows."""
    if not isinstance(value, str) or not value:
        raise RecipeError(f"unet_width={value!r} is no name of a width", f"{FULL}, or one that was built, as in w75")
    return value


def prompt_weighting(value: Any) -> str:
    return choice("prompt_weighting", value, ("off", "a1111"))


def _listed(what: str, value: Any, hint: str) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RecipeError(f"{what}={value!r} is no list", hint)
    return value


CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "prompt_weighting": prompt_weighting,
    "guidance_schedule": guidance_schedule,
    "guidance_interval": guidance_interval,
    "guidance_rescale": guidance_rescale,
    "stages": stages,
    "early_stop": early_stop,
    "tiling": tiling,
    "hires": hires,
    "step_cache": step_cache,
    "unet_width": unet_width,
}
"""Option -> its check, for the options that a recipe's defaults may set besides the first few."""
