"""Making a model narrower: how many units each site loses, which ones, and what makes up for them.

What `heads` and `channels` share. One pass over the recorded inputs gives every site's moments, and
from those the whole curve of what it loses with each unit; one more, short, run per site gives how
much of that the model's output feels. A greedy allocation then spends the budget where a unit's
cost in work buys the least error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from sdcompile import edits
from sdcompile.errors import StageError
from sdcompile.passes import compensation, importance, sites
from sdcompile.passes.compensation import Layer, Moments, Removal
from sdcompile.passes.sites import Site
from sdcompile.spec import Say, say_nothing

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

Calls = Sequence[tuple["Tensor", ...]]
"""Recorded inputs of the module, one tuple of tensors per call."""

Run = Callable[..., "Tensor"]
"""The model as a function of one recorded call's tensors."""

RIDGE = 1e-3
"""Share of the inputs' mean square: enough that a few thousand rows never make a wild solution."""

PROBES = 4
"""Calls that each site's sensitivity is measured on."""

PROBED = 4096
"""Latent positions of each of them: 16 rows of 16 x 16, one of 64 x 64. The whole model runs on them once a site."""


@dataclass(frozen=True)
class Request:
    """What to remove.

    ratio       share of the sites' work (multiply-accumulates of the recorded calls) to remove, [0, 1)
    uniform     the same share of every site's units; else by sensitivity, under the one budget
    importance  which units of a site go first
    merge       keep one unit of every cluster of similar ones, whatever `importance` says
    compensate  least-squares update of the reader
    round_to    what stays of a site is a multiple of this many inputs (heads excepted)
    most        no site loses a larger share of its units
    """

    ratio: float
    uniform: bool = False
    importance: importance.Importance = "reconstruction"
    merge: bool = False
    compensate: bool = True
    round_to: int = 1
    most: float = 0.75
    ridge: float = RIDGE


@dataclass
class Study:
    """What is known of one site: its matrix and moments, its removal curve, its work, its sensitivity.

    products      multiply-accumulates of an attention head's two products over the recorded calls
    cost          all multiply-accumulates of one unit over them
    sensitivity   relative squared error of the model's output per relative squared error of the reader's
    """

    site: Site
    layer: Layer
    moments: Moments
    positions: dict[str, int] = field(default_factory=dict)
    removal: Removal | None = None
    products: float = 0.0
    cost: float = 0.0
    sensitivity: float = 1.0


@dataclass(frozen=True)
class Row:
    """What became of one site.

    work          share of all sites' multiply-accumulates that left with its units
    error         relative squared error of the reader's output on the recorded inputs
    sensitivity   see `Study`
    edit          None where nothing was removed
    """

    site: Site
    removed: int
    work: float = 0.0
    error: float = 0.0
    sensitivity: float = 1.0
    edit: dict[str, Any] | None = None


def narrow(
    run: Run, model: nn.Module, places: Sequence[Site], calls: Calls, request: Request, say: Say = say_nothing
) -> list[Row]:
    """Prune `model` in place; returns what became of every site.

    `run` calls the model; `calls` are recorded inputs of it. A ratio of 0 changes nothing. Raises StageError when the
    ratio cannot be reached with legal counts, or the recorded inputs are not finite.
    """
    if request.ratio <= 0.0:
        return [Row(site, 0) for site in places]
    studies = observe(run, model, places, calls, say)
    scores = _scores(run, model, studies, calls, request, say)
    equal = _uniform(studies, request) if request.uniform else None
    for number, study in enumerate(studies):
        say(f"which units of {study.site.module} to remove", 0.3 + 0.4 * number / len(studies))
        chosen = scores.get(study.site.module)
        most = max(_legal(study, request)) if equal is None else equal[study.site.module]
        study.removal = compensation.removal(study.layer, study.moments, _ridge(request), chosen, most)
    counts = _budgeted(run, model, studies, calls, request, say) if equal is None else equal
    if not any(counts.values()):
        raise StageError(
            f"nothing can be removed at a ratio of {request.ratio:g}: the smallest legal step of every layer is larger",
            "ask for a larger ratio, or a smaller `round_to`",
        )
    rows = []
    whole = _work(studies)
    for study in studies:
        count = counts[study.site.module]
        assert study.removal is not None
        if not count:
            rows.append(Row(study.site, 0, sensitivity=study.sensitivity))
            continue
        keep = study.removal.kept(count, study.layer.units)
        edit = study.site.edit(keep)
        weight, bias = compensation.solved(study.layer, study.moments, keep, _ridge(request))
        error = compensation.relative_error(study.layer, study.moments, weight, bias)
        rows.append(Row(study.site, count, count * study.cost / whole, error, study.sensitivity, edit))
        sites.assign(model, study.site, weight, bias)
        edits.replay(model, [edit])
    return rows


def edits_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [row.edit for row in rows if row.edit is not None]


def told(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON, for effect.json."""
    return [
        {
            "module": row.site.module, "op": row.site.op, "units": row.site.units, "removed": row.removed,
            "work": row.work, "relative_error": row.error, "sensitivity": row.sensitivity,
        }
        for row in rows
    ]  # fmt: skip


def observe(run: Run, model: nn.Module, places: Sequence[Site], calls: Calls, say: Say = say_nothing) -> list[Study]:
    """Every site's moments over `calls`, and how many positions its layers work on."""
    studies = []
    handles = []
    for site in places:
        layer = sites.layer_of(model, site)
        study = Study(site, layer, Moments(layer.weight.shape[1]))
        studies.append(study)
        reader = model.get_submodule(site.reader)
        handles.append(reader.register_forward_pre_hook(_adder(study)))
        for name in (site.reader, *site.writers):
            handles.append(model.get_submodule(name).register_forward_hook(_counter(study, name)))
        if site.op == "heads":
            for name, hook in zip(site.writers, _product_counters(study), strict=False):
                handles.append(model.get_submodule(name).register_forward_hook(hook))
    play(run, calls, handles, say)
    for study in studies:
        weights = {name: cast("Any", model.get_submodule(name)).weight.numel() for name in study.positions}
        layers = sum(weights[name] * count / study.layer.units for name, count in study.positions.items())
        study.cost = layers + study.products
    return studies


def play(run: Callable[..., Any], calls: Calls, handles: Sequence[RemovableHandle], say: Say) -> None:
    """Run every recorded call without gradients while hooks look on; they are removed, whatever happens."""
    import torch

    try:
        with torch.no_grad():
            for number, call in enumerate(calls):
                say(f"recorded call {number + 1} of {len(calls)}", 0.3 * number / len(calls))
                run(*call)
    finally:
        for handle in handles:
            handle.remove()


def _adder(study: Study) -> Callable[..., None]:
    def add(reader: Any, arguments: tuple[Tensor, ...]) -> None:
        study.moments.add(sites.rows_of(reader, arguments[0]))

    return add


def _counter(study: Study, name: str) -> Callable[..., None]:
    def count(layer: Any, arguments: Any, output: Tensor) -> None:
        channels = layer.weight.shape[0]
        study.positions[name] = study.positions.get(name, 0) + output.numel() // channels

    return count


def _product_counters(study: Study) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks of to_q and of to_k, which runs after it: a head multiplies its width by queries x keys of every row of
    the batch, once for the scores and once for the sums of values."""
    queries = 0

    def of_queries(layer: Any, arguments: Any, output: Tensor) -> None:
        nonlocal queries
        queries = output.shape[0] * output.shape[1]

    def of_keys(layer: Any, arguments: Any, output: Tensor) -> None:
        study.products += 2.0 * queries * output.shape[1] * study.site.width

    return of_queries, of_keys


def _ridge(request: Request) -> float | None:
    return request.ridge if request.compensate else None


def _scores(
    run: Run, model: nn.Module, studies: Sequence[Study], calls: Calls, request: Request, say: Say
) -> dict[str, Tensor]:
    """Site -> importance of each unit; nothing where the compensated loss itself gives the order."""
    if request.merge:
        return {s.site.module: importance.redundancy(s.layer, s.moments) for s in studies}
    if request.importance == "taylor":
        say("gradients", 0.3)
        return importance.taylor(run, model, [s.site for s in studies], calls)
    if request.importance == "reconstruction":
        return {} if request.compensate else {s.site.module: importance.output(s.layer, s.moments) for s in studies}
    power = {"l1": 1.0, "l2": 2.0}[request.importance]
    return {s.site.module: importance.norm(model, s.site, power) for s in studies}


# --- how many ---


def _work(studies: Sequence[Study]) -> float:
    """Multiply-accumulates of all sites over the recorded calls."""
    return sum(study.cost * study.site.units for study in studies)


def _legal(study: Study, request: Request) -> list[int]:
    most = int(request.most * study.site.units)
    return [count for count in study.site.counts(request.round_to) if count <= most]


def _uniform(studies: Sequence[Study], request: Request) -> dict[str, int]:
    """The legal count nearest to the ratio, site by site; of two, the smaller."""
    return {
        s.site.module: min(_legal(s, request), key=lambda count: (abs(count - request.ratio * s.site.units), count))
        for s in studies
    }


def _budgeted(
    run: Run, model: nn.Module, studies: Sequence[Study], calls: Calls, request: Request, say: Say
) -> dict[str, int]:
    """Counts per site that remove `ratio` of the work for the least total error, as far as is known.

    Errors of different sites are taken to add up. Of all sites' next steps the one of least error per
    work is taken, until none fits the budget; a step may jump over counts that would only cost more.
    """
    whole = _work(studies)
    budget, most = request.ratio * whole, sum(max(_legal(study, request)) * study.cost for study in studies)
    counts = {study.site.module: 0 for study in studies}
    if not most:
        return counts
    if budget > most * (1 + 1e-9):
        raise StageError(
            f"a ratio of {request.ratio:g} cannot be reached: the layers may lose {most / whole:.3g} of their work",
            "ask for less, or for a larger `max_ratio`, a smaller `round_to` or more `layers`",
        )
    measure_sensitivity(run, model, studies, calls, request, say)
    spent = 0.0
    while True:
        steps = []
        for study in studies:
            assert study.removal is not None
            now, error = counts[study.site.module], study.removal.error
            for count in _legal(study, request):
                work = (count - now) * study.cost
                if count > now and spent + work <= budget * (1 + 1e-9):
                    slope = study.sensitivity * (error[count] - error[now]) / work
                    steps.append((slope, study.site.module, count, work))
        if not steps:
            return counts
        _, name, count, work = min(steps)
        counts[name], spent = count, spent + work


def measure_sensitivity(
    run: Run, model: nn.Module, studies: Sequence[Study], calls: Calls, request: Request, say: Say = say_nothing
) -> None:
    """Set every study's `sensitivity`: prune it alone to about the ratio, and see what the output feels."""
    probes = probes_of(calls)
    wanted = outputs(run, probes)
    for number, study in enumerate(studies):
        say(f"sensitivity of {study.site.module}", 0.7 + 0.3 * number / len(studies))
        assert study.removal is not None
        count = min(len(study.removal.order), max(1, round(request.ratio * study.site.units)))
        keep = study.removal.kept(count, study.layer.units)
        with _replaced(model, study, *compensation.solved(study.layer, study.moments, keep, _ridge(request))):
            change = relative_error(wanted, outputs(run, probes))
        own = study.removal.error[count]
        study.sensitivity = change / own if own > 1e-12 else 1.0


def probes_of(calls: Calls) -> Calls:
    """Some rows of a few of the calls, spread over them."""
    some = calls[:: max(1, len(calls) // PROBES)][:PROBES]
    rows = [max(1, PROBED // math.prod(call[0].shape[2:])) for call in some]
    return [tuple(part[:count] for part in call) for call, count in zip(some, rows, strict=True)]


def outputs(run: Run, calls: Calls) -> list[Tensor]:
    import torch

    with torch.no_grad():
        return [run(*call) for call in calls]


def relative_error(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Sum of squared differences over the sum of squares of `wanted`."""
    change = sum(float((a - b).double().square().sum()) for a, b in zip(wanted, got, strict=True))
    return change / max(sum(float(a.double().square().sum()) for a in wanted), 1e-300)


@contextmanager
def _replaced(model: nn.Module, study: Study, weight: Tensor, bias: Tensor) -> Iterator[None]:
    """The reader with another matrix. Zero columns compute what a smaller layer would: what stays is unchanged."""
    reader: Any = model.get_submodule(study.site.reader)
    old = reader.weight, reader.bias
    sites.assign(model, study.site, weight, bias)
    try:
        yield
    finally:
        reader.weight, reader.bias = old
