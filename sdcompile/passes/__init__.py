"""Passes: rewritings of a model on its way to an engine, one file each, and the table of them.

A pass takes a folder of one form and writes the same form. Its heavy libraries are imported
inside `run`. It never sees the store, the recipe or a backend. Passes of one recipe run in the
order of the table.
"""

from __future__ import annotations

from collections.abc import Iterable

from sdcompile.passes import (
    blocks,
    cast,
    channels,
    heads,
    kv_pool,
    linear_attention,
    nncf_int8,
    recover,
    sliced_attention,
    token_merge,
    top_k,
    width,
)
from sdcompile.passes.base import Pass

__all__ = ["PASSES", "Pass", "quantization"]

_SMALLER = (blocks.PASS, width.PASS, heads.PASS, channels.PASS)
_SIMPLER = (token_merge.PASS, kv_pool.PASS, linear_attention.PASS, top_k.PASS, sliced_attention.PASS)

PASSES: dict[str, Pass] = {
    p.name: p for p in (*_SMALLER, *_SIMPLER, recover.PASS, nncf_int8.PASS, cast.FP16, cast.BF16)
}


def quantization(names: Iterable[str]) -> Pass | None:
    """Of the passes that realise a precision, the one a recipe's `quantize:` speaks to: it has parameters."""
    records = (PASSES[name] for name in names)
    return next((r for r in records if r.stage == "quantize" and r.section == "quantize"), None)


def casts(record: Pass) -> bool:
    """Is it a pass that a recipe's `cast:` speaks to?"""
    return record.section == "cast"
