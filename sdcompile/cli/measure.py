"""Commands that measure: speed, quality, layered experiments, and the page that shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdcompile.cli.words import STORE, Force, Json, Offline, StorePath, Target, app, reported

Bundles = Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="One or more bundle folders.")]
Source = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        help="The model the bundle was built from; COMPONENT=SOURCE: of a component that has its own.",
        metavar="SOURCE",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", help="Threads per process.", min=1)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of prompts and noise.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps.", min=1)]
Guidance = Annotated[float | None, typer.Option("--guidance-scale", help="How strongly the prompt guides.")]
Sampler = Annotated[str | None, typer.Option("--sampler", help="One of the bundle's samplers.")]
Size = Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT in pixels.", metavar="WxH")]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", help="Of bundles of several targets, one of them. Repeatable.  [default: what runs here]",
        metavar="NAME",
    ),
]  # fmt: skip
Results = Annotated[Path | None, typer.Option("--output", "-o", help="Write the figures as JSON.", metavar="FILE")]
Summary = Annotated[
    Path | None, typer.Option("--summary", help="Append a Markdown table, as for $GITHUB_STEP_SUMMARY.", metavar="FILE")
]


StepCache = Annotated[
    str | None, typer.Option("--step-cache", help="off, or N: one whole step in every N.", metavar="N")
]


@app.command(short_help="Seconds, memory and energy, in turns.", rich_help_panel="Measure")
@reported
def bench(
    bundles: Bundles,
    vs: Annotated[
        str | None,
        typer.Option(
            "--vs", help="Peers on the same weights: diffusers-fp32, torch-compile, optimum-intel, ...", metavar="NAMES"
        ),
    ] = None,
    source: Source = None,
    target: Targets = None,
    processes: Annotated[int, typer.Option("--processes", help="Fresh starts per contender.", min=1)] = 3,
    images: Annotated[int, typer.Option("--images", help="Timed images per process.", min=1)] = 5,
    batch: Annotated[
        str, typer.Option("--batch", help="Batch sizes whose images/s to measure, as in 1,4.", metavar="SIZES")
    ] = "",
    threads: Threads = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    sampler: Sampler = None,
    size: Size = None,
    step_cache: Annotated[
        str, typer.Option("--step-cache", help="Measure each bundle with each of these: off,3.", metavar="VALUES")
    ] = "",
    unet_width: Annotated[
        str, typer.Option("--unet-width", help="Measure each bundle at each of these: full,w75.", metavar="NAMES")
    ] = "",
    prompt: Annotated[str | None, typer.Option("--prompt", help="One prompt for all images.")] = None,
    seed: Seed = 0,
    memory: Annotated[str, typer.Option("--memory", help="How bundles are opened: auto, low, high.")] = "auto",
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="An earlier --output to compare with.", metavar="FILE")
    ] = None,
    max_regression: Annotated[
        str, typer.Option("--max-regression", help="How much slower than the baseline is allowed.", metavar="SHARE")
    ] = "5%",
    output: Results = None,
    summary: Summary = None,
    json: Json = False,
) -> None:
    """Measure bundles against each other, against peers on the same weights, and against an earlier result.

    Contenders run in processes of their own and take turns image by image. Exits with 6 when a
    bundle fell behind the baseline by more than is allowed and noise explains.

    Examples: `sdcompile bench artifacts/tiny-openvino-bf16.sdc --vs diffusers-fp32,torch-compile`,
    `sdcompile bench new.sdc old.sdc --images 10 --batch 1,4`,
    `sdcompile bench my.sdc --target openvino --target onnxruntime`,
    `sdcompile bench a.sdc --baseline a.json --max-regression 5%`
    """
    from sdcompile import console, machine
    from sdcompile.measure import baseline as baselines
    from sdcompile.measure import bench as benches
    from sdcompile.measure import contenders, sources, tables

    old = baselines.read(baseline) if baseline else None
    allowed = baselines.fraction(max_regression)
    height, width = _sides(size)
    ask = contenders.Ask(steps, guidance_scale, sampler, height, width)
    settings = benches.Settings(
        processes,
        images,
        threads or machine.threads(),
        benches.batch_sizes(batch),
        seed,
        prompt,
        memory,
        benches.step_caches(step_cache),
        benches.words(unet_width),
    )
    peers = list(dict.fromkeys(name.strip() for name in vs.split(","))) if vs else []
    model = sources.folders(bundles[0], source or ()) if peers else {}
    with console.progressing(json_mode=json) as say:
        result = benches.bench(
            bundles, peers, model=model, targets=tuple(target or ()), ask=ask, settings=settings, say=say
        )
    if old is not None:
        result["baseline"] = baselines.compare(result, old, allowed)
    _tell(result, tables.bench(result), output, summary, json)
    if old is not None:
        baselines.require(result["baseline"], allowed)


@app.command("eval", short_help="Quality over a fixed set of prompts.", rich_help_panel="Measure")
@reported
def evaluate(
    bundles: Bundles,
    source: Source = None,
    target: Targets = None,
    prompts: Annotated[int, typer.Option("--prompts", help="How many prompts.", min=1)] = 64,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts-file", help="Prompts to use instead, one a line.", metavar="FILE")
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Compare with what torch draws in fp32.")
    ] = True,
    features: Annotated[
        str | None,
        typer.Option(
            "--features", help="A vision model (CLIP, DINOv2, ...) for FID, KID, CLIP score.", metavar="MODEL"
        ),
    ] = None,
    real: Annotated[
        Path | None, typer.Option("--real", help="Folder of pictures FID and KID compare with.", metavar="DIR")
    ] = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    sampler: Sampler = None,
    size: Size = None,
    step_cache: StepCache = None,
    unet_width: Annotated[
        str | None, typer.Option("--unet-width", help="full, or a narrower width: w75.", metavar="NAME")
    ] = None,
    seed: Seed = 2024,
    min_alignment: Annotated[
        float | None, typer.Option("--min-alignment", help="Exit with 5 below this mean prompt alignment.")
    ] = None,
    min_psnr: Annotated[
        float | None, typer.Option("--min-psnr", help="Exit with 5 below this mean PSNR to the reference, in dB.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for eval.json and the pictures.", metavar="DIR")
    ] = None,
    store: StorePath = STORE,
    offline: Offline = False,
    summary: Summary = None,
    json: Json = False,
) -> None:
    """Judge a bundle's pictures of a fixed, seeded set of prompts.

    Prompt alignment (where the tiny model's checker can read the pictures), and PSNR, SSIM and GMSD
    to what the fp32 reference draws from the same noise. The worst pictures are named.

    Examples: `sdcompile eval artifacts/tiny-openvino-bf16.sdc --min-alignment 0.9`,
    `sdcompile eval my.sdc --source hf://org/model --features hf://openai/clip-vit-base-patch32`
    """
    from sdcompile import console
    from sdcompile.measure import contenders, tables
    from sdcompile.measure import evaluate as evaluating
    from sdcompile.store import Store

    height, width = _sides(size)
    asked = evaluating.Asked(
        contenders.Ask(steps, guidance_scale, sampler, height, width), prompts, prompts_file, seed, reference,
        features, real, step_cache, tuple(target or ()), unet_width,
    )  # fmt: skip
    sources = [source or ()] * len(bundles)
    with console.progressing(json_mode=json) as say:
        result = evaluating.evaluate(bundles, sources, asked, Store(store), offline=offline, say=say, output=output)
    _tell(result, tables.evaluation(result), None, summary, json)
    evaluating.require(result["bundles"], {"alignment": min_alignment, "psnr_db": min_psnr})


@app.command(short_help="A layered study, built and measured.", rich_help_panel="Measure")
@reported
def experiment(
    document: Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="The experiment file (YAML).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the result.  [default: STORE/NAME.experiment]")
    ] = None,
    store: StorePath = STORE,
    offline: Offline = False,
    force: Force = False,
    summary: Summary = None,
    json: Json = False,
) -> None:
    """Build every layer of a study, time all of them in one run, judge each, and pick one.

    Layers are `--set` overlays on a base recipe, each on top of the one before. What is in the store
    is not built again. Writes experiment.json, the pictures and report.html.

    Example: `sdcompile experiment recipes/experiments/layered.yaml`
    """
    from sdcompile import console
    from sdcompile.measure import experiment as experiments
    from sdcompile.measure import layers, tables, writing
    from sdcompile.measure import report as reports
    from sdcompile.store import Store

    target = output or store / f"{layers.load(document)[0].name}.experiment"
    observer, kept = console.observer(json_mode=json), Store(store)
    found = experiments.build_layers(document, kept, target, observer, offline=offline, force=force)
    with console.progressing(json_mode=json) as say:
        result = experiments.measure_layers(*found, document, kept, target, offline=offline, say=say)
    writing.write_text(target / "report.html", reports.of_experiment(target))
    _tell(result, tables.experiment(result), None, summary, json)
    console.note(f"wrote {target / 'report.html'}")


@app.command(short_help="One HTML page of a bundle or experiment.", rich_help_panel="Measure")
@reported
def report(
    target: Annotated[
        Path, typer.Argument(metavar="BUNDLE|EXPERIMENT", help="A bundle, or the folder of an experiment.")
    ],
    bench_result: Annotated[
        Path | None, typer.Option("--bench", help="A result of bench that holds the bundle.", metavar="FILE")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="A folder written by eval --output.", metavar="DIR")
    ] = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Make an image, to show where its time goes.")] = True,
    of_target: Target = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page.  [default: TARGET/report.html, or NAME.html]")
    ] = None,
) -> None:
    """Write one self-contained HTML page: what a bundle is, how it was verified, how fast and how good it is.

    It loads nothing from the network, follows the reader's light or dark mode and fits a phone.

    Examples: `sdcompile report artifacts/tiny-openvino-bf16.sdc --eval artifacts/eval`,
    `sdcompile report artifacts/tiny-layered.experiment`
    """
    from sdcompile import console
    from sdcompile.measure import baseline, writing
    from sdcompile.measure import report as reports

    if (target / "experiment.json").is_file():
        page, default = reports.of_experiment(target), target / "report.html"
    else:
        found = baseline.read(bench_result) if bench_result else None
        page = reports.of_bundle(target, found, evaluation, reports.timed(target, of_target) if run else None)
        default = target.parent / f"{target.resolve().name.removesuffix('.sdc')}.html"
    writing.write_text(output or default, page)
    console.note(f"wrote {output or default}")


def _sides(size: str | None) -> tuple[int | None, int | None]:
    """ "WxH" -> (height, width)."""
    from sdcompile.runtime import promptfiles

    sides = promptfiles.size(size, "--size ") if size else {}
    return sides.get("height"), sides.get("width")


def _tell(result: dict[str, Any], shown: Any, output: Path | None, summary: Path | None, json: bool) -> None:
    """Write the result where it was asked for, then show it."""
    from sdcompile import console
    from sdcompile.measure import tables, writing

    if output is not None:
        writing.write_json(output, result)
    if summary is not None:
        writing.append(summary, tables.markdown(shown))
    console.show_measured(result, shown, json_mode=json)
