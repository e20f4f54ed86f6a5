"""What NVIDIA's compilers cannot build for which GPU: one table, read when a recipe is planned.

Source of every row: TensorRT-RTX 1.7.1.116 itself, given one MatMul or Conv of the type for the
target on a machine without a GPU. `tests/backends/test_trt_live.py` asks it again, row by row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple

from sdcompile.spec import Precision

PORTABLE = "portable"
"""The engine that is compiled to machine code where it is loaded, on any GPU from Ampere on."""

AMPERE_PLUS = "ampere_plus"
"""TensorRT's engine for every GPU from Ampere on, data centre or not."""

Target = Literal["portable", "sm75", "sm80", "sm86", "sm89", "sm120", "sm121"]
"""What TensorRT-RTX compiles for. It knows no data-centre GPU after the A100 (no sm90, no sm100)."""

_RUNS_PORTABLE = frozenset({"sm80", "sm86", "sm89", "sm120", "sm121"})


class Limit(NamedTuple):
    """A type of a graph's matrix products or convolutions that some targets do not take."""

    type: str
    targets: frozenset[str]
    reason: str


LIMITS = (
    Limit("float32", frozenset({"sm75"}), "Turing has no FP32 GEMM in TensorRT-RTX"),
    Limit("bfloat16", frozenset({"sm75"}), "Turing has no bf16 units"),
    Limit("int8", frozenset({"sm75"}), "int8 convolutions silently fall back to fp16 on Turing"),
    Limit("float8e4m3fn", frozenset({"sm75", "sm80", "sm86"}), "FP8 needs sm89 or later"),
    Limit("int4", frozenset({"sm75"}), "Turing has no int4 weights"),
)

_COMPUTES: Mapping[Precision, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}


def refused(precision: Precision, targets: Iterable[str]) -> list[str]:
    """Why engines of `precision` cannot be built for `targets`: one line per target that refuses."""
    rows = [row for row in LIMITS if row.type == _COMPUTES[precision]]
    return [
        f"{precision} engines cannot be built for {target}: {row.reason}"
        for target in targets
        for row in rows
        if target in row.targets
    ]


def name_of(capability: tuple[int, int]) -> str:
    """(8, 9) -> "sm89"."""
    return f"sm{capability[0]}{capability[1]}"


def choose(built: Collection[str], device: str) -> str | None:
    """Which of the `built` targets to run on a GPU of architecture `device` ("sm89"): its own, else one for many."""
    if device in built:
        return device
    if AMPERE_PLUS in built and int(device.removeprefix("sm")) >= 80:
        return AMPERE_PLUS
    return PORTABLE if PORTABLE in built and device in _RUNS_PORTABLE else None
