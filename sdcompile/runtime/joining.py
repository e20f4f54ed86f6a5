"""Surgery on tables: beginning at a later step, and going on with another sampler.

Both lean on a table's `starts`, which its scheduler was asked for when it was compiled. It knows
tables alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sdcompile.errors import BundleError, RecipeError
from sdcompile.runtime.tables import OUTPUT, STATE, Call, Start, Table, Term

# Timesteps closer than this are the same one; schedulers round them to float32.
_SAME = 1e-3


def begun_at(table: Table, step: int) -> Table:
    """`table` begun after `step` steps, from noised clean latents: what diffusers' img2img runs.

    Raises BundleError when the table was compiled without starts.
    """
    _require_starts(table)
    start = table.starts[step]
    return Table(
        sampler=table.sampler,
        num_inference_steps=table.num_inference_steps - step,
        init_scale=start.noise,
        calls=(*start.lead, *table.calls[start.index + len(start.lead) :]),
        clean_scale=start.clean,
    )


def joined(tables: Sequence[Table], steps: Sequence[int]) -> tuple[Table, tuple[int, ...]]:
    """tables[i] makes steps[i] steps, the last one what is left; the whole, and the first call of each part.

    Where both of two neighbours have a call at the timestep at which the first is cut, the latents
    change from the scale of one sampler to that of the other and nothing else happens. Else one
    more call of the first is made, and a first-order (DDIM) step from it leads to the noise level
    of the first later call of the second. From there the second goes on as if it had begun: it does
    not look back at outputs of the first.

    Raises RecipeError where a part would be empty or the noise levels are not known, BundleError
    when a table that is to begin later was compiled without starts.
    """
    table, place, rows = tables[0], 0, tables[0].calls
    calls: list[Call] = []
    firsts = [0]
    for count, following in zip(steps, tables[1:], strict=True):
        begun, cut = _call_of(table, place), _call_of(table, place + count)
        at, part = table.calls[cut], list(rows[: cut - begun])
        place, start = _first_after(following, at)
        then = following.calls[start.index]
        if abs(then.timestep - at.timestep) <= _SAME:
            ratio = at.scale / then.scale
            terms = tuple(Term(kind, lag, value * ratio) for kind, lag, value in part[-1].terms)
            part[-1] = replace(part[-1], terms=terms)
        else:
            part.append(_bridge(at, then, table.sampler, following.sampler))
        calls += part
        firsts.append(len(calls))
        table, rows = following, (*start.lead, *following.calls[start.index + len(start.lead) :])
    name = "+".join(part.sampler for part in tables)
    whole = Table(name, tables[0].num_inference_steps, tables[0].init_scale, (*calls, *rows))
    return whole, tuple(firsts)


def _call_of(table: Table, step: int) -> int:
    """The first call of a step. Raises RecipeError where there is none."""
    if not 0 <= step < table.num_inference_steps:
        raise RecipeError(
            f"{table.sampler} has {table.num_inference_steps} steps: none is left after {step}",
            "give the stages fewer steps than num_inference_steps",
        )
    if len(table.calls) == table.num_inference_steps:
        return step
    _require_starts(table)
    return table.starts[step].index


def _first_after(table: Table, at: Call) -> tuple[int, Start]:
    """The first step of `table` that is not before the call `at`, and how to begin there."""
    _require_starts(table)
    for step, start in enumerate(table.starts):
        if table.calls[start.index].timestep <= at.timestep + _SAME:
            return step, start
    raise RecipeError(f"{table.sampler} has no step after timestep {at.timestep:g}", "give it more steps")


def _bridge(at: Call, then: Call, first: str, second: str) -> Call:
    """The call `at`, ended by a DDIM step to the noise level and scale of `then`."""
    here, there = signal(at), signal(then)
    if here is None or there is None or at.clean is None or here >= 1:
        raise RecipeError(
            f"{first} and {second} share no timestep there, and their noise levels are not known",
            "join samplers that have the same timestep spacing",
        )
    p, q = at.clean
    noise, noise_then = np.sqrt(1 - here**2), np.sqrt(1 - there**2)
    # scale * s = signal * clean + noise * eps, so eps is known from s and the predicted clean latents.
    latents = (there * p + noise_then * (at.scale - here * p) / noise) / then.scale
    output = (there * q - noise_then * here * q / noise) / then.scale
    return Call(at.timestep, at.scale, 0, (Term(STATE, 0, float(latents)), Term(OUTPUT, 0, float(output))), at.clean)


def signal(call: Call) -> float | None:
    """The share of the clean latents in the model input, sqrt(alpha_bar); None when not known.

    With an epsilon model p = scale / signal, with a v model p = scale * signal.
    """
    if call.clean is None or call.clean[0] <= 0:
        return None
    share = call.clean[0] / call.scale
    return min(share, 1 / share)


def _require_starts(table: Table) -> None:
    if not table.starts:
        raise BundleError(
            f"sampler {table.sampler} cannot begin at a later step: its table holds no starts",
            "choose another sampler, or rebuild the bundle",
        )
