"""Measure the shipped tiny model and write docs/tiny.md, its JSON and the contact sheet.

    python scripts/tiny_figures.py            # everything: 200 prompts, 100 for the slow rows
    python scripts/tiny_figures.py --sheet    # the contact sheet alone

Prompts are held out from training; the noise of a prompt is seeded by its place in the list, so all
rows of a table start from the same noise.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that a fresh checkout runs without being installed

from sdcompile.models import tiny  # noqa: E402  (needs the path above)
from sdcompile.models.tiny import scenes  # noqa: E402

SEED = 2024
SAMPLERS = {
    "DDIM 50": (DDIMScheduler, 50),
    "DPM++ 20": (DPMSolverMultistepScheduler, 20),
    "UniPC 10": (UniPCMultistepScheduler, 10),
}
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5)
FEW_STEPS = (2, 4, 8)
BATCH = 50
FEWER = 100  # prompts of the slow rows: DDIM 50, the few-step table and the gauge


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def open_pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe, prompts: list[str], sampler: str, steps: int, guidance: float, seed: int = 0) -> np.ndarray:
    """(prompts, 64, 64, 3) floats; prompt i starts from the noise of seed + i."""
    pipe.scheduler = SAMPLERS[sampler][0].from_config(pipe.scheduler.config)
    made = []
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        noise = [torch.Generator().manual_seed(seed + start + index) for index in range(len(some))]
        made.append(
            pipe(some, num_inference_steps=steps, guidance_scale=guidance, generator=noise, output_type="np").images
        )
    return np.concatenate(made)


def judged(pipe, prompts: list[str], sampler: str, steps: int, guidance: float) -> dict:
    """Mean of the score and of each part, and the standard error of the score."""
    images = pictures(pipe, prompts, sampler, steps, guidance)
    parts = [tiny.alignment_parts(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    scores = np.array([part.score for part in parts])
    means = {
        name: float(np.mean([getattr(part, name) for part in parts if getattr(part, name) is not None]))
        for name in ("background", "count", "colour", "shape", "size", "relation", "strict")
    }
    return {"score": float(scores.mean()), "error": float(scores.std() / len(scores) ** 0.5), **means}


# --- the gauge: what the score says about a model somebody hurt ---


def rounded(unet, bits: int):
    """Weights of every layer to `bits` bits, one scale a tensor: as naive as quantization gets."""
    with torch.no_grad():
        for layer in unet.modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                top = 2 ** (bits - 1) - 1
                scale = layer.weight.abs().max() / top
                layer.weight.copy_((layer.weight / scale).round().clamp(-top, top) * scale)


def thinned(unet, share: float):
    """Zero the filters of least L1 norm in the first convolution of every residual block."""
    with torch.no_grad():
        for name, layer in unet.named_modules():
            if name.endswith("conv1"):
                order = layer.weight.abs().sum((1, 2, 3)).argsort()
                gone = order[: int(share * len(order))]
                layer.weight[gone], layer.bias[gone] = 0, 0


def beheaded(unet, kept: int, *, chosen: bool = True):
    """Keep the `kept` heads of greatest output weight in every attention, or without choice the last ones."""
    with torch.no_grad():
        for name, layer in unet.named_modules():
            if name.endswith(("attn1", "attn2")):
                weight = layer.to_out[0].weight
                split = weight.view(len(weight), layer.heads, -1)
                order = split.square().sum((0, 2)).argsort() if chosen else torch.arange(layer.heads)
                for head in order[: layer.heads - kept]:
                    split[:, head] = 0


HURTS: dict[str, Callable] = {
    "as shipped": lambda unet: None,
    "int8 weights, per tensor": lambda unet: rounded(unet, 8),
    "int6 weights, per tensor": lambda unet: rounded(unet, 6),
    "int5 weights, per tensor": lambda unet: rounded(unet, 5),
    "int4 weights, per tensor": lambda unet: rounded(unet, 4),
    "int3 weights, per tensor": lambda unet: rounded(unet, 3),
    "10 % of filters zeroed": lambda unet: thinned(unet, 0.1),
    "30 % of filters zeroed": lambda unet: thinned(unet, 0.3),
    "50 % of filters zeroed": lambda unet: thinned(unet, 0.5),
    "1 of 4 heads removed": lambda unet: beheaded(unet, 3),
    "2 of 4 heads removed": lambda unet: beheaded(unet, 2),
    "2 of 4 heads removed, the first two": lambda unet: beheaded(unet, 2, chosen=False),
}


def gauge(pipe, prompts: list[str], guidance: float) -> dict:
    whole, rows = pipe.unet, {}
    for name, hurt in HURTS.items():
        pipe.unet = copy.deepcopy(whole)
        hurt(pipe.unet)
        rows[name] = judged(pipe, prompts, "UniPC 10", 10, guidance)
        say(f"{name}: {rows[name]['score']:.3f}")
    pipe.unet = whole
    return rows


# --- the autoencoder and the clock ---


def best_s(run: Callable[[], object], rounds: int = 7) -> float:
    """The shortest of some runs, because other work on the machine only ever adds."""
    run()
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return min(spent)


@torch.no_grad()
def decoders(pipe) -> dict:
    light = AutoencoderTiny.from_pretrained(tiny.path() / "vae_light")
    rng = np.random.default_rng(SEED)
    drawn = np.stack([scenes.draw(scenes.sample_scene(rng, "held_out"), rng) for _ in range(200)])
    target = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = torch.cat([pipe.vae.encode(part).latent_dist.mode() for part in target.split(50)])
    factor = pipe.vae.config.scaling_factor
    ways = {"full": lambda z: pipe.vae.decode(z).sample, "light": lambda z: light.decode(z * factor).sample}
    rows = {}
    for name, decode in ways.items():
        decoded = torch.cat([decode(part) for part in latents.split(50)]).clamp(-1, 1)
        psnr_db = 10 * torch.log10(4 / (decoded - target).square().mean((1, 2, 3)))
        rows[name] = {
            "psnr_db": float(psnr_db.mean()),
            "least_db": float(psnr_db.min()),
            "ms": best_s(lambda decode=decode: decode(latents[:1])) * 1e3,
        }
        say(f"decoder {name}: {rows[name]}")
    files = {"full": pipe.vae.decoder, "light": light.decoder}
    for name, module in files.items():
        rows[name]["parameters"] = sum(weight.numel() for weight in module.parameters())
    return rows


def picture_s(pipe, prompt: str) -> float:
    """One picture, DPM++ 20 with guidance."""
    return best_s(lambda: pictures(pipe, [prompt], "DPM++ 20", 20, 2.0), rounds=5)


# --- what comes out ---


def contact_sheet(pipe, guidance: float, to: Path) -> None:
    """16 held-out prompts, never picked by hand: the first of a seed."""
    prompts = tiny.prompts(16, 7)
    images = pictures(pipe, prompts, "DPM++ 20", 20, guidance)
    zoom, gap, words = 3, 10, 46
    cell = 64 * zoom
    sheet = Image.new("RGB", (4 * (cell + gap) + gap, 4 * (cell + words + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        left = gap + index % 4 * (cell + gap)
        top = gap + index // 4 * (cell + words + gap)
        tile = Image.fromarray((image * 255).round().astype(np.uint8))
        sheet.paste(tile.resize((cell, cell), Image.Resampling.NEAREST), (left, top))
        lines, line = [], ""
        for word in prompt.split():
            if pen.textlength(f"{line} {word}") > cell:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        text = "\n".join([*lines, f"{line}  [{tiny.alignment(image, prompt):.2f}]"])
        pen.multiline_text((left, top + cell + 2), text, fill="black", spacing=2)
    sheet.save(to, optimize=True)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(found: dict) -> str:
    """docs/tiny.md from the figures."""
    best = found["guidance"]
    row = found["table"]["DPM++ 20"][str(best)]
    parts = [name for name in row if name not in ("score", "error")]
    full, light = found["decoders"]["full"], found["decoders"]["light"]
    blocks = [
        "# The tiny model, measured",
        "Written by `python scripts/tiny_figures.py`; the numbers beside it are in `tiny.json`. Measured with "
        f"diffusers in fp32 on {found['machine']}. Scores are means of `sdcompile.models.tiny.alignment` over "
        f"{found['prompts']} held-out prompts (seed {SEED}); their standard error is about "
        f"{row['error']:.3f}, so differences below {2 * row['error']:.2f} mean little.",
        "## Sampler, steps and guidance",
        f"DDIM 50, being slow, is on the first {FEWER} of the prompts.",
        table(
            ["guidance", *(f"{guidance:g}" for guidance in GUIDANCES)],
            [[name, *(f"{line[str(g)]['score']:.3f}" for g in GUIDANCES)] for name, line in found["table"].items()],
        ),
        f"The best guidance with DPM++ 20 is {best:g}, chosen on these same prompts; 200 other held-out "
        f"prompts and other noise give {found['other']['score']:.3f} there, and 200 prompts of training compositions "
        f"{found['trained']['score']:.3f}. The parts at guidance {best:g} (strict: the share of "
        "pictures without any fault):",
        table(parts, [[f"{row[name]:.3f}" for name in parts]]),
        f"Few steps, at guidance {best:g}, on the first {FEWER} prompts:",
        table(
            ["steps", *(str(steps) for steps in FEW_STEPS)],
            [[name, *(f"{value:.3f}" for value in line)] for name, line in found["few"].items()],
        ),
        "What the checker says of drawings made from the captions, which is the most a model can reach, and "
        "of those drawings after the autoencoder:",
        table(
            ["drawings", "through the autoencoder", "against other captions"],
            [[f"{found['ceiling'][name]:.3f}" for name in ("drawn", "decoded", "other")]],
        ),
        "## As a gauge",
        f"The UNet is hurt, nothing is trained again; UniPC 10 at guidance {best:g}, the first {FEWER} "
        "prompts, always the same noise. "
        "Filters: of least L1 norm in the first convolution of each residual block. Heads: of least output weight, in "
        "self- and cross-attention; in the last row without such a choice. Only weights are rounded, with one scale a "
        "tensor. Within each family the score falls with the damage. Half of the heads, chosen by weight, hurt "
        "less than 30 % of the filters; taken without choice they can hurt more than half of the filters.",
        table(
            ["change", "score", "shape", "relation", "strict"],
            [
                [name, *(f"{line[part]:.3f}" for part in ("score", "shape", "relation", "strict"))]
                for name, line in found["gauge"].items()
            ],
        ),
        "## Decoders",
        table(
            ["decoder", "parameters", "PSNR, mean", "PSNR, least", "one picture"],
            [
                [
                    name,
                    f"{line['parameters'] / 1e6:.2f} M",
                    f"{line['psnr_db']:.1f} dB",
                    f"{line['least_db']:.1f} dB",
                    f"{line['ms']:.1f} ms",
                ]
                for name, line in (("full", full), ("light", light))
            ],
        ),
        "PSNR is over 200 held-out drawings, peak 255. The light decoder is in `vae_light/` (AutoencoderTiny; it takes "
        "scaled latents).",
        f"One picture of 64 x 64 px with 20 guided steps takes {found['picture_s']:.2f} s; the checker takes "
        f"{found['checker_ms']:.1f} ms.",
        "## Contact sheet",
        "Sixteen held-out prompts (the first of seed 7), DPM++ 20, with the score of each.",
        "![Sixteen pictures with their prompts](tiny_contact_sheet.png)",
    ]
    return "\n\n".join(blocks) + "\n"


def ceiling(pipe, count: int) -> dict:
    """What the checker says of drawings, of drawings through the autoencoder, and of wrong captions."""
    rng = np.random.default_rng(SEED)
    drawn = [scenes.sample_scene(rng, "held_out") for _ in range(count)]
    captions = [scenes.caption(scene) for scene in drawn]
    images = np.stack([scenes.draw(scene, rng) for scene in drawn])
    target = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        parts = [pipe.vae(part).sample for part in target.split(50)]
    decoded = (torch.cat(parts).clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()

    def mean(some, told) -> float:
        return float(np.mean([tiny.alignment(image, text) for image, text in zip(some, told, strict=True)]))

    other = [*captions[1:], captions[0]]
    start = time.perf_counter()
    exact = mean(images, captions)
    spent_ms = (time.perf_counter() - start) / count * 1e3
    return {"drawn": exact, "decoded": mean(decoded, captions), "other": mean(images, other), "ms": spent_ms}


def main() -> None:
    words = argparse.ArgumentParser(description="Measure the shipped tiny model.")
    words.add_argument("--sheet", action="store_true", help="make the contact sheet alone")
    words.add_argument("--guidance", type=float, default=2.0, help="of the contact sheet made alone")
    words.add_argument("--prompts", type=int, default=200)
    words.add_argument("--threads", type=int, default=2)
    words.add_argument("--to", type=Path, default=ROOT / "docs")
    words.add_argument("--machine", default=f"{platform.machine()}, {torch.get_num_threads()} threads")
    asked = words.parse_args()
    torch.set_num_threads(asked.threads)
    asked.to.mkdir(parents=True, exist_ok=True)
    pipe, sheet = open_pipeline(), asked.to / "tiny_contact_sheet.png"
    if asked.sheet:
        contact_sheet(pipe, asked.guidance, sheet)
        return
    prompts = tiny.prompts(asked.prompts, SEED)
    found: dict = {"machine": asked.machine, "prompts": asked.prompts, "table": {}, "few": {}}
    for name, (_, steps) in reversed(SAMPLERS.items()):
        found["table"][name] = {}
        some = prompts[:FEWER] if steps > 20 else prompts
        for guidance in GUIDANCES:
            row = judged(pipe, some, name, steps, guidance)
            found["table"][name][str(guidance)] = row
            say(f"{name}, guidance {guidance:g}: {row['score']:.3f} +- {row['error']:.3f}")
    scores = {guidance: found["table"]["DPM++ 20"][str(guidance)]["score"] for guidance in GUIDANCES}
    best = found["guidance"] = max(scores, key=scores.get)
    for name in SAMPLERS:
        found["few"][name.split()[0]] = [
            judged(pipe, prompts[:FEWER], name, steps, best)["score"] for steps in FEW_STEPS
        ]
    found["other"] = judged(pipe, tiny.prompts(asked.prompts, SEED + 1), "DPM++ 20", 20, best)
    found["trained"] = judged(pipe, tiny.prompts(asked.prompts, SEED + 1, "train"), "DPM++ 20", 20, best)
    found["ceiling"] = ceiling(pipe, asked.prompts)
    found["checker_ms"] = found["ceiling"].pop("ms")
    found["gauge"] = gauge(pipe, prompts[:FEWER], best)
    found["decoders"] = decoders(pipe)
    found["picture_s"] = picture_s(pipe, prompts[0])
    contact_sheet(pipe, best, sheet)
    (asked.to / "tiny.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (asked.to / "tiny.md").write_text(page(found), "utf-8")
    say(page(found))


if __name__ == "__main__":
    main()
