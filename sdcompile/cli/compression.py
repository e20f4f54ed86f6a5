"""The command that tells which parts of a model bear int8."""

from __future__ import annotations

from sdcompile.cli.words import STORE, Force, Json, Offline, Only, RecipePath, Sets, StorePath, app, reported
from sdcompile.errors import RecipeError


@app.command(short_help="Which layers bear int8.", rich_help_panel="Understand")
@reported
def sensitivity(
    recipe: RecipePath,
    store: StorePath = STORE,
    set_: Sets = None,
    only: Only = None,
    offline: Offline = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Quantize one group of layers at a time and measure what it costs, by timestep region.

    Analyses the components of precision int8. A budget (`quantize: {budget: {min_snr_db: 20}}`) leaves the
    most sensitive groups in float by the same figures.

    Example: `sdcompile sensitivity recipes/tiny-openvino-int8.yaml`
    """
    import json as jsons

    from sdcompile import console, run, status
    from sdcompile.store import Store

    sets = tuple(set_ or ())
    names = status.quantized(run.prepare(recipe, sets, Store(store), offline=offline), only)
    if not names:
        raise RecipeError(f"{recipe} has no component of precision int8", "--set components.unet.precision=int8")
    components = dict.fromkeys(step.component for step in names.values())
    asked = tuple(f"components.{name}.quantize.sensitivity=true" for name in components)
    work = run.prepare(recipe, (*sets, *asked), Store(store), offline=offline)
    steps = {name: step.name for name, step in status.quantized(work, only).items()}
    observer = console.observer(json_mode=json)
    work.plan = work.plan.upstream_of(steps.values())
    with observer.watching(work.plan):
        paths = run.build(work, "quantize", observer, only=only, force=force)
    files = {name: paths[step] / "sensitivity.json" for name, step in steps.items()}
    found = {name: jsons.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}
    console.show_sensitivity(
        {"components": found, "files": {name: str(path) for name, path in files.items()}}, json_mode=json
    )
