"""Where an engine leaves its reference: the first torch module whose output comes out wrong.

Forward hooks give the reference's outputs by module name; the same values of the ONNX graph are
exposed as extra graph outputs, and the graph is built with the very backend that failed. A few
dozen modules are compared at a time, blocks before layers, and the search goes on between the last
module that agreed and the first that did not. It knows no family and no backend by name.

Exposing a value keeps a backend from fusing over it, so a fault that lives in a fused kernel can
vanish here; the finding then says so.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from sdcompile import checkpoint, metrics
from sdcompile.backends import Backend, Host
from sdcompile.backends.base import Card
from sdcompile.files import link
from sdcompile.spec import ComponentSpec, Job, Say, TensorSpec, say_nothing

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    Feeds = Mapping[str, NDArray[Any]]

MODULE = "module"
"""Key of a node's metadata_props that holds its torch module's path (written by `steps.export_onnx`)."""

OUTPUTS_AT_ONCE = 40
BYTES_AT_ONCE = 1 << 30
ROUNDS = 4


class Place(NamedTuple):
    """A torch module whose output is also a value of the ONNX graph."""

    module: str
    node: str
    value: str
    shape: tuple[int, ...]

    @property
    def depth(self) -> int:
        return self.module.count(".")

    @property
    def bytes(self) -> int:
        return 4 * int(np.prod(self.shape))


@dataclass(frozen=True)
class Suspect:
    """A failing component: where its torch form, its ONNX form and its backend are.

    card         of the engine that failed; the probes are built with its spec, shapes and params
    onnx         the folder the engine was built from
    """

    backend: Backend
    card: Card
    checkpoint: Path
    onnx: Path


def search(suspect: Suspect, feeds: Feeds, floor_db: float, scratch: Path, say: Say = say_nothing) -> dict[str, Any]:
    """The first module, in execution order, whose SNR is below `floor_db` (or not finite) after one that was not.

    Returns {"module", "node", "snr_db", "previous": {...} | None, "table": [...], "reason"}; `module`
    is None when every exposed value agrees, and `reason` then says what that means. The extra files
    live in a folder under `scratch` (hard links to the weights, no copy) and are removed.
    """
    card = suspect.card
    say("finding the first layer that diverges: running the reference", None)
    module = checkpoint.load(card.params["family"], card.component, suspect.checkpoint, card.params)
    graph = onnx.load(suspect.onnx / "model.onnx", load_external_data=False)
    places = comparable(graph, executed(module, card.spec, feeds))
    if not places:
        return _finding(None, None, {}, "no node of the ONNX graph carries the name of a torch module")
    low, high = -1, len(places)
    rows: dict[int, dict[str, Any]] = {}
    tried: set[int] = set()
    for number in range(ROUNDS):
        chosen = select(places, [i for i in range(low + 1, high) if i not in tried])
        if not chosen:
            break
        tried.update(chosen)
        say(f"finding the first layer that diverges: round {number + 1}, {len(chosen)} values", None)
        with tempfile.TemporaryDirectory(dir=scratch, prefix="probe-") as folder:
            got = _engine_values(suspect, graph, [places[i] for i in chosen], feeds, Path(folder))
        values = {places[i].module: value for i, value in zip(chosen, got, strict=True)}
        found = compare(module, card.spec, feeds, values)
        measured = {i: found[places[i].module] for i in chosen if places[i].module in found}
        rows |= {i: {"module": places[i].module, "node": places[i].node, **row} for i, row in measured.items()}
        bad = next((i for i in chosen if i in measured and not _agrees(measured[i], floor_db)), None)
        good = [i for i in chosen if i in measured and (bad is None or i < bad)]
        low, high = (good[-1] if good else low), (high if bad is None else bad)
    return _finding(places[high] if high < len(places) else None, rows.get(low), rows, _reason(high, places, rows))


def executed(module: nn.Module, spec: ComponentSpec, feeds: Feeds) -> dict[str, tuple[int, ...]]:
    """Module path -> output shape, in the order the modules finish; those called more than once are left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    calls: Counter[str] = Counter()

    def seen(name: str, output: torch.Tensor) -> None:
        calls[name] += 1
        shapes[name] = tuple(output.shape)

    _run_with_hooks(module, spec, feeds, seen)
    return {name: shape for name, shape in shapes.items() if calls[name] == 1}


def compare(
    module: nn.Module, spec: ComponentSpec, feeds: Feeds, values: Mapping[str, NDArray[Any]]
) -> dict[str, dict[str, Any]]:
    """Figures per module of `values`; a module whose output has another shape is left out.

    Each reference output is compared as it appears and not kept, so only the engine's are in memory.
    """
    rows: dict[str, dict[str, Any]] = {}

    def judge(name: str, output: torch.Tensor) -> None:
        value = values.get(name)
        if value is not None and value.shape == tuple(output.shape):
            reference = output.float().numpy()
            rows[name] = {"snr_db": round(metrics.snr_db(reference, value), 2), "finite": metrics.is_finite(value)}

    _run_with_hooks(module, spec, feeds, judge)
    return rows


def comparable(graph: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> list[Place]:
    """The modules of `shapes` whose output is a value of `graph`, in their order.

    A module's output is the last value that leaves its scope (is read outside it) and can have the
    module's output shape. Only float values count.
    """
    nodes = graph.graph.node
    scope = {output: (i, _module(node)) for i, node in enumerate(nodes) for output in node.output if output}
    readers: dict[str, list[str]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(_module(node))
    final = {output.name for output in graph.graph.output}
    dims = {v.name: v.type.tensor_type for v in (*graph.graph.value_info, *graph.graph.output)}
    leaving: dict[str, list[tuple[int, str]]] = {}
    for value, (i, path) in scope.items():
        parts = path.split(".") if path else []
        for length in range(1, len(parts) + 1):
            inside = ".".join(parts[:length])
            if value in final or any(not _within(reader, inside) for reader in readers.get(value, ())):
                leaving.setdefault(inside, []).append((i, value))
    places = []
    for module, shape in shapes.items():
        fitting = [(i, value) for i, value in leaving.get(module, ()) if _can_be(dims.get(value), shape)]
        if fitting:
            i, value = max(fitting)
            places.append(Place(module, nodes[i].name, value, shape))
    return places


def select(places: Sequence[Place], inside: Sequence[int]) -> list[int]:
    """Which of the places numbered `inside` to look at next: shallow modules first, evenly thinned where too many."""
    chosen: list[int] = []
    for depth in sorted({places[i].depth for i in inside}):
        level = [i for i in inside if places[i].depth == depth]
        room = OUTPUTS_AT_ONCE - len(chosen)
        if len(level) > room:
            level = [level[(k + 1) * len(level) // room - 1] for k in range(room)]
        chosen += level
        if len(chosen) >= OUTPUTS_AT_ONCE:
            break
    while len(chosen) > 1 and sum(places[i].bytes for i in chosen) > BYTES_AT_ONCE:
        chosen = sorted(chosen)[::2]
    return sorted(chosen)


def expose(graph: onnx.ModelProto, places: Sequence[Place]) -> onnx.ModelProto:
    """A copy of `graph` with each place's value as a further float32 output `probe_<n>`."""
    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    for i, place in enumerate(places):
        name = f"probe_{i}"
        # A cast, because a lowered graph's values may be half precision; of float32 it is nothing.
        probed.graph.node.append(helper.make_node("Cast", [place.value], [name], name=name, to=TensorProto.FLOAT))
        probed.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(place.shape)))
    return probed


def _engine_values(
    suspect: Suspect, graph: onnx.ModelProto, places: Sequence[Place], feeds: Feeds, folder: Path
) -> list[NDArray[Any]]:
    source, built = folder / "onnx", folder / "engine"
    source.mkdir()
    built.mkdir()
    for path in suspect.onnx.iterdir():
        if path.is_file() and path.name not in ("model.onnx", "artifact.json"):
            link(path, source / path.name)
    onnx.save(expose(graph, places), source / "model.onnx")
    card = suspect.card
    extra = tuple(TensorSpec(f"probe_{i}", place.shape, "float32") for i, place in enumerate(places))
    spec = ComponentSpec(card.component, card.spec.inputs, (*card.spec.outputs, *extra))
    job = Job(card.component, card.params, card.precision, spec, card.shapes)
    suspect.backend.build(source, built, job)
    engine = suspect.backend.open(built, Host())
    try:
        outputs = engine(feeds)
    finally:
        engine.close()
    return [outputs[t.name] for t in extra]


def _run_with_hooks(
    module: nn.Module, spec: ComponentSpec, feeds: Feeds, seen: Callable[[str, torch.Tensor], None]
) -> None:
    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(_module: nn.Module, _arguments: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None and tensor.is_floating_point():
                seen(name, tensor.detach())

        return after

    handles = [part.register_forward_hook(hook(name)) for name, part in module.named_modules() if name]
    try:
        with torch.inference_mode():
            module(*(torch.tensor(feeds[t.name]) for t in spec.inputs))
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(output: Any) -> torch.Tensor | None:
    """The tensor a module is judged by: its output, or the first of a tuple or of a diffusers output record."""
    while isinstance(output, (tuple, list, Mapping)):
        parts = list(output.values()) if isinstance(output, Mapping) else list(output)
        output = parts[0] if parts else None
    return output if isinstance(output, torch.Tensor) else None


def _module(node: onnx.NodeProto) -> str:
    named = next((p.value for p in node.metadata_props if p.key == MODULE), None)
    if named is not None:
        return named
    return node.name.partition("/")[0] if "/" in node.name else ""


def _within(path: str, scope: str) -> bool:
    return path == scope or path.startswith(scope + ".")


def _can_be(info: Any, shape: tuple[int, ...]) -> bool:
    """Whether a value of the graph may be a float tensor of `shape`, as far as the graph says."""
    if info is None:
        return True
    if info.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.UNDEFINED):
        return False
    if not info.HasField("shape"):
        return True
    dims = info.shape.dim
    return len(dims) == len(shape) and all(
        not d.HasField("dim_value") or d.dim_value == size for d, size in zip(dims, shape, strict=True)
    )


def _agrees(row: Mapping[str, Any], floor_db: float) -> bool:
    return bool(row["finite"]) and row["snr_db"] >= floor_db


def _reason(high: int, places: Sequence[Place], rows: Mapping[int, Any]) -> str:
    if high < len(places):
        return ""
    if not rows:
        return "no exposed value has the shape of its module's output"
    return (
        "with intermediate values exposed every module agrees with the reference: the fault is in how the backend "
        "fuses or schedules the whole graph"
    )


def _finding(
    place: Place | None, previous: Mapping[str, Any] | None, rows: Mapping[int, Any], reason: str
) -> dict[str, Any]:
    table = [rows[i] for i in sorted(rows)]
    first = next((row for row in table if place is not None and row["module"] == place.module), None)
    return {
        "module": place.module if place else None,
        "node": place.node if place else None,
        "snr_db": first["snr_db"] if first else None,
        "finite": first["finite"] if first else None,
        "previous": dict(previous) if previous else None,
        "table": table,
        "reason": reason,
    }
