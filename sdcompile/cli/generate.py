"""The commands that run a bundle: making images, and looking at prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdcompile.cli.words import BundlePath, Json, Target, app, reported
from sdcompile.errors import RecipeError

_PROMPT = "The prompt"
_GUIDANCE = "Guidance"
_SAMPLING = "Sampling"
_LARGE = "Large images"
_MANY = "Many images"
_PICTURE = "A picture to start from"


def _text(flag: str, text: str, metavar: str | None = None, panel: str | None = None) -> Any:
    return typer.Option(flag, help=text, metavar=metavar, rich_help_panel=panel)


@app.command(short_help="Make images with a bundle.", rich_help_panel="Run")
@reported
def generate(
    bundle: BundlePath,
    prompt: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="One or more prompts.")] = None,
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
    prompts: Annotated[
        Path | None, _text("--prompts", "A .txt, .csv or .jsonl file, one row an image.", "FILE", _PROMPT)
    ] = None,
    prompt_weighting: Annotated[
        str | None, _text("--prompt-weighting", "off, or a1111: (word:1.3), [word], BREAK.", "WORD", _PROMPT)
    ] = None,
    guidance_schedule: Annotated[
        str | None, _text("--guidance-schedule", "constant, linear, cosine or phases:5,7,9.", "KIND", _GUIDANCE)
    ] = None,
    guidance_interval: Annotated[
        str | None,
        _text(
            "--guidance-interval", "Guide only there: 0.2..0.8 of the steps, or timesteps t200..800.", "A..B", _GUIDANCE
        ),
    ] = None,
    guidance_rescale: Annotated[
        float | None, _text("--guidance-rescale", "Against overexposure, 0 (off) to 1.", None, _GUIDANCE)
    ] = None,
    stages: Annotated[
        str | None, _text("--stages", "Samplers in a row: dpmpp_2m:6@7,euler_ancestral@9.", "LIST", _SAMPLING)
    ] = None,
    early_stop: Annotated[
        str | None, _text("--early-stop", "Finish an image that changes by less: 1e-4, or 1e-4:5.", "NUMBER", _SAMPLING)
    ] = None,
    step_cache: Annotated[
        str | None, _text("--step-cache", "off, or N: one whole step in every N, shallow ones between.", "N", _SAMPLING)
    ] = None,
    unet_width: Annotated[
        str | None, _text("--unet-width", "full, or a narrower width of the bundle: w75.", "NAME", _SAMPLING)
    ] = None,
    image: Annotated[Path | None, _text("--image", "A picture to start from.", "FILE", _PICTURE)] = None,
    mask_image: Annotated[
        Path | None, _text("--mask-image", "Where to paint it anew: white; black is kept.", "FILE", _PICTURE)
    ] = None,
    strength: Annotated[
        float | None, _text("--strength", "How far to leave the picture, 0 to 1.", None, _PICTURE)
    ] = None,
    tiling: Annotated[
        str | None, _text("--tiling", "off, or auto: sizes beyond the built ones are made of tiles.", "WORD", _LARGE)
    ] = None,
    hires: Annotated[
        str | None, _text("--hires", "Make it small, then larger: 2@0.6 (scale@strength).", "NUMBER", _LARGE)
    ] = None,
    profile: Annotated[
        str | None, _text("--profile", "One of the bundle's profiles: draft, balanced, quality.", "NAME")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            rich_help_panel=_MANY,
            help="Processes that share the work; the folder keeps an index, and the same command goes on from it.",
        ),
    ] = None,
    prompt_cache: Annotated[
        Path | None, _text("--prompt-cache", "Keep prompt embeddings here, for all processes.", "DIR", _MANY)
    ] = None,
    image_cache: Annotated[
        Path | None,
        _text(
            "--image-cache", "Keep finished images here: the same request and seed gives them at once.", "DIR", _MANY
        ),
    ] = None,
    image_cache_mib: Annotated[
        int, typer.Option("--image-cache-mib", min=1, help="Most MiB of them.", rich_help_panel=_MANY)
    ] = 1024,
    warm_up: Annotated[
        bool, typer.Option("--warm-up", help="Run every engine once before the first image.", rich_help_panel=_MANY)
    ] = False,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads per engine.", min=1)] = None,
    target: Target = None,
    json: Json = False,
) -> None:
    """Make images with a bundle. No torch is needed.

    Example: `sdcompile generate artifacts/tiny-openvino-bf16.sdc "a red circle" --seed 1 --steps 20`
    """
    from sdcompile import console, load
    from sdcompile.runtime import promptfiles
    from sdcompile.runtime.many import generate_many
    from sdcompile.runtime.options import Options
    from sdcompile.runtime.saving import generate_files

    sides = promptfiles.size(size, "--size ") if size else {}
    common = Options(
        negative_prompt=negative_prompt, num_inference_steps=steps, guidance_scale=guidance_scale, sampler=sampler,
        seed=seed, num_images_per_prompt=count, prompt_weighting=prompt_weighting,
        guidance_schedule=guidance_schedule, guidance_interval=guidance_interval, guidance_rescale=guidance_rescale,
        stages=stages, early_stop=early_stop, step_cache=step_cache, unet_width=unet_width, image=image,
        mask_image=mask_image, strength=strength, profile=profile, tiling=tiling, hires=hires, **sides,
    )  # fmt: skip
    rows = [promptfiles.Row(text) for text in prompt or ()] + (promptfiles.read(prompts) if prompts else [])
    if not rows:
        raise RecipeError("no prompt was given", 'write one, or name a file: --prompts FILE; an empty prompt is ""')
    if workers and latents:
        raise RecipeError("--latents is for one process", "leave --workers out")
    total = sum(row.options.num_images_per_prompt or count for row in rows)
    caches: dict[str, Any] = {"prompt_cache": prompt_cache}
    if image_cache is not None:
        caches |= {"image_cache": image_cache, "image_cache_bytes": image_cache_mib << 20}
    with console.generating(total, json_mode=json) as progress:
        if workers:
            files = generate_many(
                bundle, rows, output, common=common, count=workers, threads=threads, caches=caches, target=target,
                progress=progress,
            )  # fmt: skip
        else:
            pipeline = load(bundle, threads=threads, target=target, **caches)
            if pipeline.why:
                console.note(f"target {pipeline.why}")
            if warm_up:
                console.note(f"warm after {pipeline.warm_up():.1f} s")
            files = generate_files(pipeline, rows, output, common=common, latents=latents, progress=progress)
    console.show_images(files, json_mode=json)


@app.command("lint-prompt", short_help="What a bundle reads in a prompt.", rich_help_panel="Run")
@reported
def lint_prompt(
    bundle: BundlePath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt.")],
    prompt_weighting: Annotated[
        str | None, _text("--prompt-weighting", "off or a1111 (default: the bundle's).", "WORD")
    ] = None,
    json: Json = False,
) -> None:
    """Show the tokens of a prompt, what is cut, and what looks like a slip: empty or conflicting weights, repetitions.

    Example: `sdcompile lint-prompt artifacts/tiny-openvino-bf16.sdc "a (red:1.3) circle" --prompt-weighting a1111`
    """
    from dataclasses import asdict

    from sdcompile import bundle as bundles
    from sdcompile import console
    from sdcompile.runtime import values
    from sdcompile.runtime.linting import lint
    from sdcompile.runtime.model import Model
    from sdcompile.runtime.request import defaults_of
    from sdcompile.runtime.tokens import Tokenizer

    model = Model.from_bundle(bundle, bundles.read(bundle))
    weighting = values.prompt_weighting(prompt_weighting or defaults_of(model).prompt_weighting)
    tokenizer = Tokenizer(model.tokenizer_file, model.tokenizer)
    chunks = max(1, model.shapes["T"].max // model.tokenizer.max_length)
    console.show_prompt(asdict(lint(prompt, tokenizer, weighting, chunks)), json_mode=json)
