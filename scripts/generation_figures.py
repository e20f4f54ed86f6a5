"""Measure what each generation feature costs and gives on the tiny model; writes docs/generation.json and a table.

    sdcompile build recipes/tiny-openvino-bf16.yaml && sdcompile build recipes/tiny-openvino-fitted.yaml
    python scripts/generation_figures.py artifacts/tiny-openvino-bf16.sdc artifacts/tiny-openvino-fitted.sdc

    sdcompile build recipes/tiny-openvino-stepcache.yaml
    python scripts/generation_figures.py artifacts/tiny-openvino-stepcache.sdc --rows "step_cache|2m, .* steps" \
        --to stepcache.json

Quality is taken over held-out prompts, each with a seed of its own: prompt alignment, and the distance of
the final latents from those of 100 steps (mean SNR in dB; the teacher is compiled here, from the same
scheduler). CPU seconds are those of the process while a row's images are made, one after the other for a few
prompts, rows taken in turn and all repeated; a row's figure is the median of its ratios to the first row.
Rows with cached steps also have the mean PSNR of their pictures to those of the same call without.
Seams of tiled pictures are in seam_figures.py.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from dataclasses import replace
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

BATCH = 4
TEACHER = "dpmpp_2m"
TIMED_PROMPTS, ROUNDS = 4, 5

# Name -> options; the first row is what others are compared with.
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
    "ddim, 50 steps": {"sampler": "ddim", "num_inference_steps": 50},
    "ddim, 50 steps, step_cache 3": {"sampler": "ddim", "num_inference_steps": 50, "step_cache": 3},
    "ddim, 50 steps, step_cache 5": {"sampler": "ddim", "num_inference_steps": 50, "step_cache": 5},
}


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def latents(pipe: Any, prompts: list[str], options: dict[str, Any]) -> tuple[np.ndarray, list[int]]:
    """Final latents, prompt i from seed i, and the denoiser rows of all."""
    made, rows = [], []
    options = {"step_cache": "off", **options}  # whatever the bundle's default is
    for first in range(0, len(prompts), BATCH):
        some = prompts[first : first + BATCH]
        seeds = list(range(first, first + len(some)))
        output = pipe(some, seed=seeds, output_type="latent", **options)
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


def cpu_ratios(pipes: dict[str, Any], prompts: list[str]) -> dict[str, float]:
    """Median over rounds of each row's CPU seconds over the first row's of the same round."""
    spent: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(ROUNDS):
        for name, pipe in pipes.items():
            began = time.process_time()
            for seed, prompt in enumerate(prompts[:TIMED_PROMPTS]):
                pipe(prompt, seed=seed, output_type="np", **{"step_cache": "off", **ROWS[name]})
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
    parser.add_argument("--only", choices=("options", "seams"), help="measure one of the two tables anew")
    parser.add_argument("--pictures", type=Path, help="where to write some of the tiled pictures")
    asked = parser.parse_args()
    opened = [load(path, memory="high") for path in asked.bundles]
    prompts = tiny.prompts(asked.prompts, seed=2024)
    content = json.loads(asked.to.read_text(encoding="utf-8")) if asked.to.is_file() else {}
    if asked.only != "seams":
        content |= options(opened, prompts, asked.rows)
    if asked.only != "options":
        content["seams"] = seam_figures.measure(opened[0], prompts, say, asked.pictures)
    asked.to.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def options(opened: list[Any], prompts: list[str], pattern: str) -> dict[str, Any]:
    """The table of options; only rows whose name holds `pattern`, and the first."""
    wanted = teacher(opened[0], prompts)
    say(f"teacher: {TEACHER}, 100 steps: alignment {alignment(opened[0], wanted, prompts):.3f}")

    pipes: dict[str, Any] = {}
    for number, (name, options) in enumerate(ROWS.items()):
        if number and not re.search(pattern, name):
            continue
        needed = str(options.get("sampler", "dpmpp_2m"))
        able = [pipe for pipe in opened if needed in pipe.model.samplers]
        if "step_cache" in options:
            able = [pipe for pipe in able if pipe.family.shallow in pipe.model.components]
        if able:
            pipes[name] = able[0]
        else:
            say(f"{name}: no bundle has {needed}{' and cached steps' if 'step_cache' in options else ''}")
    ratios = cpu_ratios(pipes, prompts)
    figures = []
    for name, pipe in pipes.items():
        finals, rows = latents(pipe, prompts, ROWS[name])
        snr = float(np.mean([metrics.snr_db(w, f) for w, f in zip(wanted, finals, strict=True)]))
        figures.append({
            "row": name, "options": ROWS[name], "denoiser_rows": round(sum(rows) / len(prompts), 1),
            "cpu_ratio": round(ratios[name], 3), "alignment": round(alignment(pipe, finals, prompts), 4),
            "snr_db": round(snr, 2),
        })  # fmt: skip
        if "step_cache" in ROWS[name]:
            whole, _ = latents(pipe, prompts, {**ROWS[name], "step_cache": "off"})
            figures[-1]["uncached_psnr_db"] = round(psnr_db(pipe, finals, whole), 2)
        say(
            "| {row} | {denoiser_rows:g} | {cpu_ratio:.2f} | {alignment:.3f} | {snr_db:.1f} |".format(**figures[-1])
            + (" {uncached_psnr_db:.1f} |".format(**figures[-1]) if "uncached_psnr_db" in figures[-1] else "")
        )
    return {"teacher": f"{TEACHER}, 100 steps", "prompts": len(prompts), "rows": figures}


if __name__ == "__main__":
    main()
