"""How good: a bundle's pictures of a fixed set of prompts, judged by prompt and against the fp32 reference.

Nothing is timed here. Every figure has its mean and standard error, and the pictures that came out
worst are named with prompt and seed, so that anyone can make them again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile import __version__, bundle, metrics
from sdcompile.console import SayObserver
from sdcompile.errors import RecipeError, VerifyError
from sdcompile.measure import contenders
from sdcompile.measure.bench import host
from sdcompile.measure.contenders import Ask
from sdcompile.measure.drawing import Request, draw, read_pictures, write_pictures
from sdcompile.measure.prompts import is_tiny, prompts_for, prompts_from
from sdcompile.measure.reference import reference_of
from sdcompile.measure.similarity import distances
from sdcompile.measure.writing import write_json
from sdcompile.runtime import load
from sdcompile.runtime.options import APPROXIMATIONS
from sdcompile.spec import Say, at_target, say_nothing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sdcompile.measure.features import Features
    from sdcompile.store import Store

    Pictures = NDArray[np.float32]

FORMAT = 1
_WORST = 5
PARTS = ("background", "count", "colour", "shape", "size", "relation")


@dataclass(frozen=True)
class Asked:
    """What to judge by.

    targets       of bundles of several, those to judge; () = the one that runs here
    prompts_file  prompts, one a line, instead of `prompts` ones of the model's own world
    reference     compare with what torch draws in fp32
    features      a vision model's folder or hub id; real: a folder of pictures for FID and KID
    step_cache, unet_width   of the bundles' requests; None = their own default. The reference has neither
    """

    ask: Ask
    prompts: int = 64
    prompts_file: Path | None = None
    seed: int = 2024
    reference: bool = True
    features: str | None = None
    real: Path | None = None
    step_cache: str | None = None
    targets: tuple[str, ...] = ()
    unet_width: str | None = None

    @property
    def options(self) -> dict[str, str]:
        """The approximations that are asked for."""
        return {name: value for name in APPROXIMATIONS if (value := getattr(self, name)) is not None}


def evaluate(
    bundles: Sequence[Path],
    sources: Sequence[Sequence[str]],
    asked: Asked,
    store: Store,
    *,
    offline: bool = False,
    output: Path | None = None,
    say: Say = say_nothing,
) -> dict[str, Any]:
    """Judge `bundles`; with `output`, eval.json and every picture are written there.

    sources: what was named of the source of each (see `recheck.sources_of`).

    Raises RecipeError for bad prompts or a source that is not known here, HostError where
    something is missing, BundleError for a damaged bundle.
    """
    _check(asked)
    features = None
    if asked.features is not None:
        from sdcompile.measure.features import Features

        features = Features(asked.features, offline=offline)
    real = None if asked.real is None else read_pictures(asked.real)
    rows: list[dict[str, Any]] = []
    for folder, source in zip(bundles, sources, strict=True):
        manifest = bundle.read(folder)
        ways = contenders.ways(folder, asked.targets, alone=len(bundles) == 1)
        for option, value in asked.options.items():
            for one in ways:
                contenders.require(one, option, value)
        prompts = prompts_from(asked.prompts_file) or prompts_for(manifest, asked.prompts, asked.seed)
        request = Request.of(manifest.defaults, asked.ask, asked.seed)
        reference = None
        if asked.reference:
            made = reference_of(folder, manifest, source, store, SayObserver(say), offline=offline)
            reference = made.pictures(prompts, request, named(say, "reference"))
        approximately = {**manifest.defaults.options, **asked.options}
        for one in ways:
            name = at_target(one.name, one.target)
            with load(folder, target=one.target or None) as pipeline:
                pictures = draw(pipeline, prompts, request, named(say, name), asked.options)
            row = {**judge(folder, pictures, prompts, request, reference, features, real), "name": name}
            row |= {option: approximately[option] for option in APPROXIMATIONS if option in approximately}
            if output is not None:
                # Two bundles of one name (an old and a new build, say) keep their pictures apart.
                taken, place = sum(other["name"] == name for other in rows), bundle.folder_of_target(name)
                row["folder"] = f"{place}-{taken + 1}" if taken else place
                write_pictures(output / row["folder"], pictures, reference)
            rows.append(row)
    found = result(rows)
    if output is not None:
        write_json(output / "eval.json", found)
    return found


def _check(asked: Asked) -> None:
    if asked.real is not None and asked.features is None:
        raise RecipeError("--real is for FID and KID, which need a vision model", "name one: --features MODEL")


def named(say: Say, who: str) -> Say:
    """A `Say` that puts `who` before every line."""

    def tell(text: str, fraction: float | None = None) -> None:
        say(f"{who}: {text}", fraction)

    return tell


def judge(
    folder: Path,
    pictures: Pictures,
    prompts: Sequence[str],
    request: Request,
    reference: Pictures | None = None,
    features: Features | None = None,
    real: Pictures | None = None,
) -> dict[str, Any]:
    """Every figure of `pictures`, as plain JSON data.

    reference  what the fp32 reference draws of the same prompts and noise
    features   a vision model: FID and KID against `real` pictures (else against `reference`), CLIP score
    """
    manifest = bundle.read(folder)
    rows = [
        _row(picture, prompts[index], request.seed + index, None if reference is None else reference[index],
             reads=is_tiny(manifest))
        for index, picture in enumerate(pictures)
    ]  # fmt: skip
    measured = {
        name: [row[name] for row in rows if row.get(name) is not None]
        for name in ("alignment", *PARTS, "psnr_db", "ssim", "gmsd")
    }
    return {
        "name": manifest.name,
        "digest": bundle.digest(folder),
        "request": request.as_json(),
        "prompts": len(prompts),
        "figures": {name: mean_of(values) for name, values in measured.items() if values},
        "sets": _sets(pictures, prompts, reference, features, real),
        "worst": sorted(rows, key=_badness)[:_WORST],
        "pictures": rows,
    }


def result(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The result of one command: what `judge` said of each bundle, when and where."""
    return {
        "format": FORMAT, "kind": "eval", "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sdcompile": __version__, "host": host(), "bundles": [dict(row) for row in rows],
    }  # fmt: skip


def _row(picture: Pictures, prompt: str, seed: int, reference: Pictures | None, *, reads: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": prompt, "seed": seed, "finite": metrics.is_finite(picture)}
    if reads:
        from sdcompile.models import tiny

        parts = tiny.alignment_parts(picture, prompt)
        row |= {"alignment": round(parts.score, 4), **{name: getattr(parts, name) for name in PARTS}}
    if reference is not None:
        row |= distances(reference, picture)
    return row


def _badness(row: Mapping[str, Any]) -> tuple[float, float]:
    return row.get("alignment", 0.0), row.get("psnr_db", 0.0)


def mean_of(values: Sequence[float]) -> dict[str, float]:
    """The mean of `values`, its standard error and the least of them."""
    array = np.asarray(values, float)
    error = float(array.std(ddof=1) / len(array) ** 0.5) if len(array) > 1 else 0.0
    return {"mean": round(float(array.mean()), 5), "error": round(error, 5), "min": round(float(array.min()), 5)}


def _sets(
    pictures: Pictures, prompts: Sequence[str], reference: Pictures | None, features: Features | None,
    real: Pictures | None,
) -> dict[str, float]:  # fmt: skip
    if features is None:
        return {}
    from sdcompile.measure.features import clip_score, set_distances

    made = features.of_pictures(pictures)
    found = {"clip_score": clip_score(made, features.of_prompts(prompts))} if features.is_clip else {}
    other = reference if real is None else real
    return found if other is None else {**found, **set_distances(features.of_pictures(other), made)}


def require(rows: Sequence[Mapping[str, Any]], floors: Mapping[str, float | None]) -> None:
    """Raise VerifyError when a mean lies below its floor (figure -> least mean, None = no floor)."""
    faults = []
    for row in rows:
        for figure, least in floors.items():
            if least is None:
                continue
            found = row["figures"].get(figure)
            if found is None:
                faults.append(f"{row['name']}: {figure} was not measured, so its floor {least:g} cannot hold")
            elif not found["mean"] >= least:
                faults.append(f"{row['name']}: mean {figure} {found['mean']:.4g} is below the floor {least:g}")
    if faults:
        raise VerifyError("\n".join(faults), "look at the worst pictures; each is named with its prompt and seed")
