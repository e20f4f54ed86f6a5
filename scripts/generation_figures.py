"""Measure what each generation feature costs and gives on the tiny model; writes docs/generation.json and a table.

    sdcompile build recipes/tiny-openvino-bf16.yaml --set components.vae_encoder.precision=fp32
    sdcompile build recipes/tiny-openvino-fitted.yaml
    sdcompile build recipes/tiny-openvino-stepcache.yaml
    sdcompile build recipes/tiny-openvino-light.yaml
    python scripts/generation_figures.py artifacts/tiny-openvino-{bf16,fitted,stepcache,light}.sdc

Quality is taken over held-out prompts, each with a seed of its own: prompt alignment, and the distance of
the final latents from those of 100 steps (mean SNR in dB; the teacher is compiled here, from the same
scheduler). CPU seconds are those of the process while a row's images are made, one after the other for a few
prompts, rows taken in turn and all repeated; a row's figure is the median of its ratios to the first row.
Rows with cached steps also have the mean PSNR of their pictures to those of the same call without, and inpainting
that of what it keeps to the picture it began from. Seams of tiled pictures are in seam_figures.py; caches, warm-up and
workers in serving_figures.py.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that a fresh checkout runs without being installed

from sdcompile import load, metrics  # noqa: E402  (needs the path above)
from sdcompile.models import tiny  # noqa: E402
from sdcompile.runtime import images as pictures  # noqa: E402
from sdcompile.runtime import tables  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
import seam_figures  # noqa: E402
import serving_figures  # noqa: E402

BATCH = 4
TEACHER = "dpmpp_2m"
TIMED_PROMPTS, ROUNDS = 3, 9
_NONE = np.zeros((0, 0, 0, 3), np.float32)


@dataclass(frozen=True)
class Starts:
    """Pictures to begin from, for the prompts numbered `numbers`: the teacher's, (N, H, W, 3) in [0, 1]."""

    teacher: np.ndarray
    numbers: range

    def own(self) -> list[np.ndarray]:
        """Of the prompt itself."""
        return [self.teacher[number] for number in self.numbers]

    def others(self) -> list[np.ndarray]:
        """Of the prompt before."""
        return [self.teacher[number - 1] for number in self.numbers]

    def right_half(self) -> np.ndarray:
        """A mask: the right half is painted anew."""
        mask = np.zeros(self.teacher.shape[1:3], np.float32)
        mask[:, mask.shape[1] // 2 :] = 1
        return mask


# Name -> options, or what gives an option of each prompt; the first row is what others are compared with.
ROWS: dict[str, dict[str, Any]] = {
    "dpmpp_2m, 20 steps": {"sampler": "dpmpp_2m", "num_inference_steps": 20},
    "dpmpp_2m, 12 steps": {"sampler": "dpmpp_2m", "num_inference_steps": 12},
    "dpmpp_2m, 10 steps": {"sampler": "dpmpp_2m", "num_inference_steps": 10},
    "dpmpp_2m, 6 steps": {"sampler": "dpmpp_2m", "num_inference_steps": 6},
    "unipc, 12 steps": {"sampler": "unipc", "num_inference_steps": 12},
    "ddim, 12 steps": {"sampler": "ddim", "num_inference_steps": 12},
    "deis, 12 steps": {"sampler": "deis", "num_inference_steps": 12},
    "deis, 6 steps": {"sampler": "deis", "num_inference_steps": 6},
    "fitted_6 (base dpmpp_2m)": {"sampler": "fitted_6"},
    "guidance_schedule phases": {"guidance_schedule": "phases"},
    "guidance_schedule linear": {"guidance_schedule": "linear"},
    "guidance_schedule cosine": {"guidance_schedule": "cosine"},
    "guidance_interval 0..0.5": {"guidance_interval": (0, 0.5)},
    "guidance_interval 0.2..0.8": {"guidance_interval": (0.2, 0.8)},
    "guidance_scale 1 (no guidance)": {"guidance_scale": 1.0},
    "guidance_rescale 0.7": {"guidance_rescale": 0.7},
    "stages dpmpp_2m:6, ddim": {"stages": "dpmpp_2m:6,ddim"},
    "stages dpmpp_2m:6@3, euler_ancestral@4": {"stages": "dpmpp_2m:6@3,euler_ancestral@4"},
    "early_stop 1e-3:5": {"early_stop": "1e-3:5"},
    "early_stop 1e-2:5": {"early_stop": "1e-2:5"},
    "prompt_weighting a1111, plain prompts": {"prompt_weighting": "a1111"},
    "step_cache 2": {"step_cache": 2},
    "step_cache 3": {"step_cache": 3},
    "step_cache 5": {"step_cache": 5},
    "light decoder": {},
    "profile draft": {"profile": "draft"},
    "profile balanced": {"profile": "balanced"},
    "profile quality": {"profile": "quality"},
    "image (the prompt before's), strength 0.8": {"image": Starts.others, "strength": 0.8},
    "image (the prompt before's), strength 0.5": {"image": Starts.others, "strength": 0.5},
    "image (its own), mask_image right half": {"image": Starts.own, "mask_image": Starts.right_half},
    "128 x 128": {"height": 128, "width": 128},
    "128 x 128, hires 2@0.6": {"hires": "2@0.6"},
    "128 x 128, hires 2@0.4": {"hires": "2@0.4"},
    "192 x 192, tiling auto": {"height": 192, "width": 192, "tiling": "auto"},
    "192 x 192, tiling auto, hires 3@0.6": {"tiling": "auto", "hires": "3@0.6"},
    "ddim, 50 steps": {"sampler": "ddim", "num_inference_steps": 50},
    "ddim, 50 steps, step_cache 3": {"sampler": "ddim", "num_inference_steps": 50, "step_cache": 3},
    "ddim, 50 steps, step_cache 5": {"sampler": "ddim", "num_inference_steps": 50, "step_cache": 5},
}


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def asked(options: dict[str, Any], starts: Starts) -> dict[str, Any]:
    """The options of a call; cached steps are off whatever the bundle's default is."""
    return {"step_cache": "off"} | {name: of(starts) if callable(of) else of for name, of in options.items()}


def latents(
    pipe: Any, prompts: list[str], options: dict[str, Any], teacher: np.ndarray = _NONE
) -> tuple[np.ndarray, list[int]]:
    """Final latents, prompt i from seed i, and the denoiser rows of all; `teacher`: pictures to begin from."""
    made, rows = [], []
    for first in range(0, len(prompts), BATCH):
        some = prompts[first : first + BATCH]
        seeds = range(first, first + len(some))
        output = pipe(some, seed=list(seeds), output_type="latent", **asked(options, Starts(teacher, seeds)))
        made.append(output.images)
        rows += output.timings["denoise_rows"]
    return np.concatenate(made), rows


def pixels(pipe: Any, finals: np.ndarray) -> np.ndarray:
    parts = [pipe.decode(finals[first : first + BATCH]) for first in range(0, len(finals), BATCH)]
    return pictures.pixels_from_decoded(np.concatenate(parts))


def alignment(pipe: Any, finals: np.ndarray, prompts: list[str]) -> float:
    scores = [tiny.alignment(image, prompt) for image, prompt in zip(pixels(pipe, finals), prompts, strict=True)]
    return float(np.mean(scores))


def psnr_db(pipe: Any, finals: np.ndarray, others: np.ndarray) -> float:
    pairs = zip(pixels(pipe, finals), pixels(pipe, others), strict=True)
    return float(np.mean([metrics.psnr_db(other, own) for own, other in pairs]))


def teacher(pipe: Any, prompts: list[str]) -> np.ndarray:
    """Latents of 100 steps of TEACHER, whose table is compiled here."""
    from sdcompile.samplers import SAMPLERS
    from sdcompile.steps import sampler

    row = SAMPLERS[TEACHER]
    with tempfile.TemporaryDirectory() as folder:
        source = sampler.source_config(tiny.path(), row.scheduler)
        table = sampler.table(row.scheduler, source, 100, row.config)
        tables.save(Path(folder), "teacher", [table])
        entry = pipe.model.samplers[TEACHER].model_copy(update={"num_inference_steps": (100,)})
        own = pipe.model
        pipe.model = replace(own, tables=Path(folder), samplers={"teacher": entry})
        try:
            return latents(pipe, prompts, {"sampler": "teacher"})[0]
        finally:
            pipe.model = own


def cpu_ratios(pipes: dict[str, Any], prompts: list[str], started: np.ndarray) -> dict[str, float]:
    """Median over rounds of each row's CPU seconds over the first row's of the same round."""
    spent: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(ROUNDS):
        for name, pipe in pipes.items():
            began = time.process_time()
            for seed, prompt in enumerate(prompts[:TIMED_PROMPTS]):
                options = asked(ROWS[name], Starts(started, range(seed, seed + 1)))
                pipe(prompt, seed=seed, output_type="np", **options)
            spent[name].append(time.process_time() - began)
    first = spent[next(iter(pipes))]
    return {name: statistics.median(a / b for a, b in zip(own, first, strict=True)) for name, own in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "bundles", nargs="+", type=Path, help="bundles of the tiny model; a row runs on the first that can"
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rows", default="", help="only rows whose name holds this pattern, and the first")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "generation.json")
    parser.add_argument("--only", choices=("options", "seams", "serving"), help="measure one of the tables anew")
    parser.add_argument("--pictures", type=Path, help="where to write some of the tiled pictures")
    given = parser.parse_args()
    opened = [load(path, memory="high") for path in given.bundles]
    prompts = tiny.prompts(given.prompts, seed=2024)
    content = json.loads(given.to.read_text(encoding="utf-8")) if given.to.is_file() else {}
    tables: dict[str, Callable[[], dict[str, Any]]] = {
        "options": lambda: options(opened, prompts, given.rows),
        "seams": lambda: {"seams": seam_figures.measure(opened[0], prompts, say, given.pictures)},
        "serving": lambda: {"serving": serving_figures.measure(given.bundles[0], prompts, say)},
    }
    for name, measured in tables.items():
        if given.only in (None, name):
            content |= measured()
    given.to.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def options(opened: list[Any], prompts: list[str], pattern: str) -> dict[str, Any]:
    """The table of options; only rows whose name holds `pattern`, and the first."""
    wanted = teacher(opened[0], prompts)
    started = pixels(opened[0], wanted)
    say(f"teacher: {TEACHER}, 100 steps: alignment {alignment(opened[0], wanted, prompts):.3f}")
    pipes: dict[str, Any] = {}
    for number, name in enumerate(ROWS):
        if number and not re.search(pattern, name):
            continue
        able = [pipe for pipe in opened if can(pipe, name)]
        if able:
            pipes[name] = able[0]
        else:
            say(f"{name}: no bundle can")
    ratios = cpu_ratios(pipes, prompts, started)
    figures = []
    for name, pipe in pipes.items():
        finals, rows = latents(pipe, prompts, ROWS[name], started)
        figure = {
            "row": name, "options": {key: told(value) for key, value in ROWS[name].items()},
            "denoiser_rows": round(sum(rows) / len(prompts), 1),
            "cpu_ratio": round(ratios[name], 3), "alignment": round(alignment(pipe, finals, prompts), 4),
        }  # fmt: skip
        if finals.shape == wanted.shape and "image" not in ROWS[name]:
            snr = [metrics.snr_db(w, f) for w, f in zip(wanted, finals, strict=True)]
            figure["snr_db"] = round(float(np.mean(snr)), 2)
        if "step_cache" in ROWS[name]:
            whole, _ = latents(pipe, prompts, {**ROWS[name], "step_cache": "off"})
            figure["uncached_psnr_db"] = round(psnr_db(pipe, finals, whole), 2)
        if "mask_image" in ROWS[name]:
            figure["kept_psnr_db"] = round(kept_psnr_db(pixels(pipe, finals), started), 2)
        figures.append(figure)
        say("| " + " | ".join(str(value) for key, value in figure.items() if key != "options") + " |")
    return {"teacher": f"{TEACHER}, 100 steps", "prompts": len(prompts), "rows": figures}


def can(pipe: Any, name: str) -> bool:
    """Has this bundle what the row needs?"""
    row, components = ROWS[name], pipe.model.components
    light = pipe.model.name.endswith("-light")
    return (
        row.get("sampler", TEACHER) in pipe.model.samplers
        and ("step_cache" not in row or pipe.family.shallow in components)
        and ("image" not in row or "vae_encoder" in components)
        and light == (name == "light decoder")
    )


def told(value: Any) -> Any:
    """An option's value as the file has it."""
    return value.__doc__.strip() if callable(value) else value


def kept_psnr_db(images: np.ndarray, started: np.ndarray) -> float:
    """Mean PSNR of the left quarter of `images` to that of what they began from: away from the mask's edge."""
    side = images.shape[2] // 4
    pairs = zip(started[:, :, :side], images[:, :, :side], strict=True)
    return float(np.mean([metrics.psnr_db(a, b) for a, b in pairs]))


if __name__ == "__main__":
    main()
