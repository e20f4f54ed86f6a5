"""The command that makes images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcompile.cli.words import BundlePath, Json, app, reported
from sdcompile.errors import RecipeError


@app.command(short_help="Make images with a bundle.", rich_help_panel="Run")
@reported
def generate(
    bundle: BundlePath,
    prompt: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts.")],
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", help="What the images should not show.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", help="How strongly the prompt guides.")
    ] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="One of the bundle's samplers.")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The same seed gives the same picture (default: a new one, shown).")
    ] = None,
    size: Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT in pixels.", metavar="WxH")] = None,
    count: Annotated[int, typer.Option("-n", "--count", help="Images per prompt.", min=1)] = 1,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNGs.", metavar="DIR")] = Path("out"),
    latents: Annotated[
        Path | None, typer.Option("--latents", help="Initial noise, .npy (N, C, h, w) float32.", metavar="FILE")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads per engine.", min=1)] = None,
    json: Json = False,
) -> None:
    """Make images with a bundle. No torch is needed.

    Example: `sdcompile generate artifacts/tiny-openvino-bf16.sdc "a red circle" --seed 1 --steps 20`
    """
    from sdcompile import console, load
    from sdcompile.runtime.saving import generate_files

    height, width = size_of(size)
    pipeline = load(bundle, threads=threads)
    with console.generating(len(prompt) * count, json_mode=json) as progress:
        files = generate_files(
            pipeline, prompt, output, negative_prompt=negative_prompt, num_inference_steps=steps,
            guidance_scale=guidance_scale, sampler=sampler, seed=seed, height=height, width=width,
            num_images_per_prompt=count, latents=latents, progress=progress,
        )  # fmt: skip
    console.show_images(files, json_mode=json)


def size_of(text: str | None) -> tuple[int | None, int | None]:
    """ "WxH" -> (height, width)."""
    if text is None:
        return None, None
    width, _, height = text.lower().partition("x")
    if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise RecipeError(f"--size {text}: not a size", "write WIDTHxHEIGHT, e.g. --size 512x512")
    return int(height), int(width)
