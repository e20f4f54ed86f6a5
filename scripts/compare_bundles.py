"""Compare bundles of the tiny model: size, processor time of one denoiser call, prompt alignment.

    python scripts/compare_bundles.py whole.sdc pruned.sdc ... [--prompts 100] [--json FILE]

The first bundle is what the others are divided by. Calls of the denoiser alternate between the bundles,
so that other work on the machine hits all of them alike, and processor time is taken, not the clock's.
Pictures: held-out prompts, UniPC with 10 steps at guidance 2, the noise of a prompt seeded by its place.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that a fresh checkout runs without being installed

import sdcompile  # noqa: E402  (needs the path above)
from sdcompile import bundle  # noqa: E402
from sdcompile.backends import BACKENDS, Host  # noqa: E402
from sdcompile.models import tiny  # noqa: E402

SEED = 2024
ROUNDS, CALLS = 15, 20


def call_s(folders: list[Path], threads: int) -> list[list[float]]:
    """Per bundle the processor seconds of a guided denoiser call, one figure per round."""
    engines, feeds = [], []
    draw = np.random.default_rng(0)
    for folder in folders:
        entry = bundle.read(folder).components["unet"]
        engines.append(BACKENDS[entry.backend].open(folder / "components" / "unet", Host(threads=threads)))
        shapes = {"sample": (2, 4, 16, 16), "timestep": (2,), "encoder_hidden_states": (2, 24, 128)}
        feeds.append({name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
    spent: list[list[float]] = [[] for _ in folders]
    for turn in range(ROUNDS + 1):
        for engine, feed, mine in zip(engines, feeds, spent, strict=True):
            start = time.process_time()
            for _ in range(CALLS):
                engine(feed)
            if turn:  # the first round warms caches and compiles what is compiled lazily
                mine.append((time.process_time() - start) / CALLS)
    for engine in engines:
        engine.close()
    return spent


def alignment(folder: Path, prompts: list[str]) -> tuple[float, float]:
    """Mean score and its standard error."""
    scores = []
    with sdcompile.load(folder) as pipe:
        for number, prompt in enumerate(prompts):
            options = {"num_inference_steps": 10, "guidance_scale": 2.0, "sampler": "unipc", "seed": number}
            image = pipe(prompt, output_type="np", **options).images[0]
            scores.append(tiny.alignment(np.asarray(image), prompt))
    return float(np.mean(scores)), float(np.std(scores) / len(scores) ** 0.5)


def main() -> None:
    words = argparse.ArgumentParser(description="Compare bundles of the tiny model.")
    words.add_argument("bundles", type=Path, nargs="+")
    words.add_argument("--prompts", type=int, default=100)
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--json", type=Path)
    asked = words.parse_args()
    prompts, found = tiny.prompts(asked.prompts, SEED), {}
    spent = call_s(asked.bundles, asked.threads)
    for folder, mine in zip(asked.bundles, spent, strict=True):
        ratios = [a / b for a, b in zip(mine, spent[0], strict=True)]
        score, error = alignment(folder, prompts)
        size = sum(path.stat().st_size for path in (folder / "components" / "unet").rglob("*") if path.is_file())
        found[folder.stem] = {
            "unet_bytes": size, "call_ms": 1e3 * statistics.median(mine), "ratio": statistics.median(ratios),
            "score": score, "error": error,
        }  # fmt: skip
        row = found[folder.stem]
        print(
            f"{folder.stem}: unet {size / 1e6:.2f} MB, call {row['call_ms']:.2f} ms (x {row['ratio']:.3f}), "
            f"alignment {score:.3f} +- {error:.3f}",
            flush=True,
        )
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
