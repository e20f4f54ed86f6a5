"""Compare whole images: the built engines against the reference, same noise, same sampler, by PSNR.

What single calls cannot show, errors that build up from step to step, shows here. It knows no
library an engine runs in.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile import metrics, samples
from sdcompile.backends import BACKENDS, STAND_IN, Engine, Host
from sdcompile.backends.base import read_card
from sdcompile.families import FAMILIES
from sdcompile.models import TINY
from sdcompile.runtime import load
from sdcompile.runtime.images import pil_from_pixels, pixels_from_decoded
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.spec import FULL, PIPELINE, Job, Precision, Say, say_nothing
from sdcompile.steps import standing_in, sweep
from sdcompile.steps.reference import Trajectory, model_of
from sdcompile.steps.report import write

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sdcompile.bundle import Manifest

    Floats = NDArray[np.float32]


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Make every recorded image with the engines in `inputs` and write report.json.

    inputs: one engine folder per component (and onnx.<component> where something stands in for it),
    samples, tokenizer, tables. job.params: those of `record`, backends {component: name}, how
    {component: {stand_in: {why}}}, min_psnr_db, step_cache_min_psnr_db (absent, or a floor or None),
    min_decoder_psnr_db (where another decoder is built), scored (by the tiny model's checker). When a floor is
    missed, the worst pair is kept as worst-reference.png and worst-engine.png.
    """
    backends: Mapping[str, str] = job.params["backends"]
    cards = {name: read_card(inputs[name], backend) for name, backend in backends.items()}
    unrun = {name: how["stand_in"] for name, how in job.params.get("how", {}).items() if "stand_in" in how}
    with tempfile.TemporaryDirectory(dir=out, prefix="standing-in-") as scratch:
        engines = {name: (BACKENDS[backend], inputs[name]) for name, backend in backends.items()}
        for name in unrun:
            made = standing_in.build(cards[name], inputs[f"onnx.{name}"], Path(scratch) / name)
            engines[name] = (standing_in.BACKEND, made)

        broken: list[str] = []

        def open_engine(component: str) -> Engine:
            backend, folder = engines[component]
            return _Watched(backend.open(folder, Host()), component, broken)

        with Pipeline(model_of(job.params, inputs, job), open_engine, low_memory=True) as pipeline:
            report = judge(
                pipeline, inputs["samples"], job.params["min_psnr_db"], backends,
                [card.precision for card in cards.values()], job.params.get("step_cache_min_psnr_db"),
                keep=out, say=job.say, min_decoder_psnr_db=job.params.get("min_decoder_psnr_db"),
                scored=job.params.get("scored", False),
            )  # fmt: skip
    if not broken and report["worst"].get("flat") and (report["worst"]["latents_snr_db"] or 0) > 0:
        broken.append("vae_decoder")  # it was given a picture's latents
    report["blame"] = broken[0] if broken else None
    why = "; ".join(dict.fromkeys(row["why"] for row in unrun.values()))
    write(out, {**report, "stand_in": {"backend": STAND_IN, "why": why}} if unrun else report)


class _Watched:
    """An engine that notes its component's name in `broken` when it gives NaN or infinite values."""

    def __init__(self, engine: Engine, component: str, broken: list[str]) -> None:
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._engine, self._component, self._broken = engine, component, broken

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._engine.facts

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = self._engine(feeds)
        if not all(metrics.is_finite(array) for array in outputs.values()):
            self._broken.append(self._component)
        return outputs

    def close(self) -> None:
        self._engine.close()


def recheck(bundle: Path, manifest: Manifest, recorded: Path) -> dict[str, Any]:
    """The report of a finished bundle's images, made on this machine."""
    plain = FAMILIES[manifest.family].plain
    built = {name: entry for name, entry in manifest.components.items() if plain(name) == name}
    precisions = [entry.precision for entry in built.values()]
    told = manifest.verification.get("images", {})
    floor, cached, decoder = (
        part.get("floor", {}).get("min_psnr_db")
        for part in (told, told.get("step_cache", {}), told.get("own_decoder", {}))
    )
    backends = {name: entry.backend for name, entry in built.items()}
    with load(bundle, memory="low", verify_files=False, target=manifest.target or None) as pipeline:
        return judge(
            pipeline, recorded, floor_db(precisions) if floor is None else floor, backends, precisions, cached,
            min_decoder_psnr_db=decoder, scored=manifest.source["id"] == TINY,
        )  # fmt: skip


def floor_db(precisions: list[Precision]) -> float:
    """The default PSNR floor of images made by engines of these precisions: that of the lowest."""
    return min(metrics.IMAGE_FLOORS_DB[p] for p in precisions)


def judge(
    pipeline: Pipeline, recorded: Path, min_psnr_db: float, backends: Mapping[str, str], precisions: list[Precision],
    step_cache_min_psnr_db: float | None = None, keep: Path | None = None, say: Say = say_nothing,
    min_decoder_psnr_db: float | None = None, scored: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The report: PSNR of every recorded image (of a batch, its worst), the worst, and the least by shape.

    `alignment`, where pictures are `scored`, says how well those of the usual shape and without cached steps fit
    their prompts, beside the reference's. Where another decoder is built, `own_decoder` says how far its pictures are
    from those of the source's own, and whether their mean reaches `min_decoder_psnr_db`.
    Images with cached steps are compared with the reference's that have the same ones; "step_cache" tells how far
    they are from the reference's without any, which is what step caching costs.
    """
    planned = [Trajectory.from_json(row) for row in samples.trajectories(recorded)]
    rows, fits = [], list[tuple[float, float]]()
    worst: tuple[float, Floats, Floats] | None = None
    dearest: tuple[float, Floats, Floats] | None = None
    for number, trajectory in enumerate(planned):
        say(f"image {number + 1} of {len(planned)}", number / len(planned))
        reference = samples.image_arrays(recorded, trajectory.id)
        row, images = _row(pipeline, trajectory, reference, min_psnr_db)
        rows.append(row)
        if scored and images is not None and trajectory.shape == "opt" and trajectory.like is None:
            fits += _alignment(trajectory, reference["images"], images)
        if images is not None and (worst is None or row["psnr_db"] < worst[0]):
            index = row["image"]
            worst = (row["psnr_db"], reference["images"][index], images[index])
        if images is not None and trajectory.like is not None:
            plain = samples.image_arrays(recorded, trajectory.like)["images"]
            figures = [metrics.psnr_db(r, v) for r, v in zip(plain, images, strict=True)]
            row["uncached_psnr_db"] = [round(figure, 3) for figure in figures]
            index = min(range(len(figures)), key=figures.__getitem__)
            if dearest is None or figures[index] < dearest[0]:
                dearest = (figures[index], plain[index], images[index])
    own = _own_decoder([samples.image_arrays(recorded, trajectory.id) for trajectory in planned], min_decoder_psnr_db)
    cost = _cost_of_step_cache(rows, step_cache_min_psnr_db)
    computed = all(row["passed"] for row in rows)
    passed = computed and cost.get("passed", True) and own.get("passed", True)
    shown = dearest if computed else worst
    return {
        **({"own_decoder": own} if own else {}),
        **({"alignment": _means(fits)} if fits else {}),
        "component": PIPELINE,
        "backend": ", ".join(dict.fromkeys(backends.values())),
        "precision": min(precisions, key=lambda p: metrics.FLOORS[p].min_snr_db),
        "passed": passed,
        "floor": {"min_psnr_db": min_psnr_db},
        "facts": {},
        "worst": min(rows, key=lambda row: (row["passed"], row["error"] is None, row["psnr_db"])),
        "by_shape": {
            shape: {
                "samples": sum(row["shape"] == shape for row in rows),
                "passed": all(row["passed"] for row in rows if row["shape"] == shape),
                "min_psnr_db": min(row["psnr_db"] for row in rows if row["shape"] == shape),
            }
            for shape in dict.fromkeys(row["shape"] for row in rows)
        },
        "samples": rows,
        "kept": _keep(keep, shown) if keep is not None and shown is not None and not passed else [],
        "divergence": None,
        **({"step_cache": cost} if cost else {}),
    }


def _cost_of_step_cache(rows: list[dict[str, Any]], min_psnr_db: float | None) -> dict[str, Any]:
    """PSNR of images with cached steps to the reference's without, at the usual shape; {} when there are none.

    The other shapes are run in very few steps, which says nothing of the cost.
    """
    told = [row for row in rows if row.get("uncached_psnr_db") and row["shape"] == "opt"]
    if not told:
        return {}
    figures = [figure for row in told for figure in row["uncached_psnr_db"]]
    worst = min(told, key=lambda row: min(row["uncached_psnr_db"]))
    return {
        "every": told[0]["step_cache"],
        "num_inference_steps": told[0]["num_inference_steps"],
        "images": len(figures),
        "psnr_db": {"min": min(figures), "mean": round(sum(figures) / len(figures), 3)},
        "worst": {key: worst[key] for key in ("id", "prompt", "seed", "shape")},
        "floor": {"min_psnr_db": min_psnr_db},
        "passed": min_psnr_db is None or min(figures) >= min_psnr_db,
    }


def _alignment(trajectory: Trajectory, references: Floats, images: Floats) -> list[tuple[float, float]]:
    """Of each picture whose prompt the tiny model's checker can read: the score of the reference's, and of this one."""
    from sdcompile.models import tiny

    found = []
    for prompt, *pair in zip(trajectory.prompts, references, images, strict=True):
        with suppress(ValueError):
            source, mine = (tiny.alignment(picture, prompt) for picture in pair)
            found.append((source, mine))
    return found


def _means(fits: Sequence[tuple[float, float]]) -> dict[str, Any]:
    source, mine = (round(float(np.mean(scores)), 4) for scores in zip(*fits, strict=True))
    return {"images": len(fits), "source": source, "built": mine}


def _own_decoder(recorded: Sequence[Mapping[str, Floats]], floor_db: float | None) -> dict[str, Any]:
    """PSNR of the reference's pictures to those that the source's own decoder makes of the same latents: what
    another decoder changes, and that it was made for such latents at all. {} where the source's own is built.
    """
    figures = [
        metrics.psnr_db(own, other)
        for arrays in recorded if "source_images" in arrays
        for own, other in zip(arrays["source_images"], arrays["images"], strict=True)
    ]  # fmt: skip
    if not figures:
        return {}
    mean = float(np.mean(figures))
    return {
        "psnr_db": {"min": round(min(figures), 3), "mean": round(mean, 3)},
        "images": len(figures),
        "floor": {"min_psnr_db": floor_db},
        "passed": floor_db is None or mean >= floor_db,
    }


def _row(
    pipeline: Pipeline, trajectory: Trajectory, reference: Mapping[str, Floats], min_psnr_db: float
) -> tuple[dict[str, Any], Floats | None]:
    row: dict[str, Any] = {
        "id": trajectory.id, "prompt": " | ".join(dict.fromkeys(trajectory.prompts)), "seed": trajectory.seed,
        "sampler": trajectory.sampler, "num_inference_steps": trajectory.num_inference_steps,
        "guidance_scale": trajectory.guidance_scale, "height": trajectory.height, "width": trajectory.width,
        "shape": trajectory.shape, "step_cache": trajectory.step_cache, "error": None,
    }  # fmt: skip
    try:
        # Not by a callback, for which latents would come to the host at every step of an engine that need not.
        call = {**trajectory.call(), "unet_width": FULL, "output_type": "latent"}
        final = np.asarray(pipeline(**call).images)
        images = pixels_from_decoded(pipeline.decode(final))
    # As in `verify`: foreign libraries raise what they like, and a pipeline that fails is a finding.
    except Exception as error:
        failed = {"psnr_db": metrics.WORST_DB, "latents_snr_db": None, "image": 0, "finite": False, "passed": False}
        return {**row, **failed, "error": f"{type(error).__name__}: {str(error).strip()[:2000]}"}, None
    figures = [metrics.psnr_db(r, v) for r, v in zip(reference["images"], images, strict=True)]
    index = min(range(len(figures)), key=figures.__getitem__)
    found = {
        "psnr_db": round(figures[index], 3),
        "latents_snr_db": round(metrics.snr_db(reference["final"], final), 3),
        "image": index,
        "finite": metrics.is_finite(images),
        "flat": sweep.span({"images": images}) < sweep.FLAT * sweep.span({"images": reference["images"]}),
    }
    return {**row, **found, "passed": found["finite"] and not found["flat"] and figures[index] >= min_psnr_db}, images


def _keep(folder: Path, worst: tuple[float, Floats, Floats]) -> list[str]:
    names = ["worst-reference.png", "worst-engine.png"]
    for name, pixels in zip(names, worst[1:], strict=True):
        (image,) = pil_from_pixels(pixels[None])
        image.save(folder / name)
    return names
