"""Compare bundles of the tiny model: prompt alignment, size, and processor time of the denoiser.

python scripts/compression_figures.py artifacts/tiny-openvino-bf16.sdc artifacts/tiny-openvino-int8.sdc ...

Every bundle makes the same held out prompts with the same seeds. Times are medians of processor time,
the bundles taking turns call by call; the first bundle is the unit.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import numpy as np

from sdcompile import bundle as bundles
from sdcompile import load
from sdcompile.models import tiny
from sdcompile.runtime.pipeline import Pipeline


def aligned(pipeline: Pipeline, prompts: list[str], steps: int) -> list[float]:
    """The alignment score of every prompt's picture; prompt n has seed n."""
    return [
        tiny.alignment(pipeline(prompt, seed=n, num_inference_steps=steps, output_type="np").images[0], prompt)
        for n, prompt in enumerate(prompts)
    ]


def denoiser_ms(pipelines: dict[str, Pipeline], calls: int) -> dict[str, float]:
    """Median processor time of one denoiser call, guided, at the model's own size."""
    engines = {name: p.engine(p.family.denoiser) for name, p in pipelines.items()}
    draw = np.random.default_rng(0)
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for call in range(calls):
        for name, engine in engines.items():
            sizes = {letter: bounds.opt for letter, bounds in pipelines[name].model.shapes.items()} | {"R": 2}
            shapes = {t: [sizes[d] if isinstance(d, str) else d for d in t.dims] for t in engine.inputs}
            feeds = {t.name: draw.standard_normal(shape).astype(t.dtype) for t, shape in shapes.items()}
            begin = time.process_time()
            engine(feeds)
            if call >= 3:
                spent[name].append(1000 * (time.process_time() - begin))
    return {name: statistics.median(times) for name, times in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--calls", type=int, default=60)
    arguments = parser.parse_args()
    prompts = tiny.prompts(arguments.prompts, seed=100)
    pipelines = {path.stem: load(path) for path in arguments.bundles}
    times = denoiser_ms(pipelines, arguments.calls)
    unit = next(iter(times.values()))
    print("| bundle | alignment ± standard error | paired change | denoiser CPU time | its bytes | SNR | image PSNR |")
    print("|---|---|---|---|---|---|---|")
    first: list[float] = []
    for path in arguments.bundles:
        manifest = bundles.read(path)
        scores = aligned(pipelines[path.stem], prompts, arguments.steps)
        first = first or scores
        change = [a - b for a, b in zip(scores, first, strict=True)]
        held = sum(f.bytes for name, f in manifest.files.items() if name.startswith("components/unet/"))
        entry = manifest.components["unet"]
        print(
            f"| {path.stem} | {_mean(scores)} | {_mean(change)} | {times[path.stem] / unit:.2f} | {held / 1e6:.1f} MB "
            f"| {entry.verification['worst']['snr_db']:.1f} dB "
            f"| {manifest.verification['images']['worst']['psnr_db']:.1f} dB |"
        )


def _mean(values: list[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
