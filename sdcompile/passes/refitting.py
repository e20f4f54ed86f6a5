"""Least squares for a narrower model, layer by layer in the order of execution, beside the model it was cut from.

Both run on the same recorded inputs in step. When the narrow one comes to a layer, what it feeds it is known, and so is
what the whole one has there: the layer is set to come as near to that as can be, and the run goes on with it.
So each layer makes up for what those before it lost, for norms whose statistics moved, and where its output
is added to a stream, for what that stream has drifted so far. The room knows modules and their wiring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from sdcompile.passes import sites
from sdcompile.passes.streams import Kept, Wire, Wiring, outputs_of, places
from sdcompile.spec import Say

if TYPE_CHECKING:
    from torch import Tensor, nn

RIDGE = 1e-4
"""Share of the inputs' mean square that holds a layer to what was cut from the whole model's."""

_POSITIONS = 6144
"""Positions of a part of the rows that is unrolled at once; of each, `sites.ROWS` are taken at most."""


_ROWS = 4
"""Positions for each unknown of an output: a convolution with fewer is fitted through the channels it reads."""


class _Told(NamedTuple):
    """What the whole model has at a layer: its output with what is added to it, or where that is too little its input.

    output  is it the output, which the layer's own weights are fitted to?
    """

    name: str
    output: bool
    values: Tensor


class _Stopped(Exception):  # noqa: N818 - ends the other side's run, and is no fault
    pass


def refit(
    whole: Callable[..., Any], model: nn.Module, narrow: Callable[..., Any], thin: nn.Module, wiring: Wiring,
    kept: Kept, call: tuple[Tensor, ...], say: Say,
) -> None:  # fmt: skip
    """Set every layer of `thin`, the `kept` part of `model`, that reads a stream; `whole` and `narrow` run them."""
    import torch

    layers = {name: wire for name, wire in wiring.layers.items() if wire.reads}
    told: Queue[_Told | BaseException] = Queue(maxsize=1)
    stopped = Event()

    def hand_on(name: str, inputs: Tensor, output: Tensor, beside: Tensor | None) -> None:
        if stopped.is_set():
            raise _Stopped
        if _fits(thin.get_submodule(name), len(output)):
            wanted = output * wiring.gains.get(name, 1.0)
            told.put(_Told(name, True, wanted if beside is None else wanted + beside))
        else:
            told.put(_Told(name, False, inputs))

    def teach() -> None:
        try:
            with torch.no_grad(), _watched(model, layers, after=hand_on):
                whole(*call)
        except _Stopped:
            pass
        except BaseException as error:
            told.put(error)

    done = 0

    def set_layer(name: str, inputs: Tensor, beside: Tensor | None) -> None:
        nonlocal done
        found = told.get()
        if isinstance(found, BaseException):
            raise found
        assert found.name == name
        say(f"refitting {name}", 0.4 + 0.6 * done / len(layers))
        done += 1
        _set(thin.get_submodule(name), model.get_submodule(name), layers[name], kept, found, inputs, beside)

    teacher = Thread(target=teach, daemon=True)
    teacher.start()
    try:
        with torch.no_grad(), _watched(thin, layers, before=set_layer):
            narrow(*call)
    finally:
        stopped.set()
        while teacher.is_alive():
            if not told.empty():
                told.get()
            teacher.join(0.01)


@contextmanager
def _watched(
    model: nn.Module, layers: Mapping[str, Wire], before: Callable[..., None] | None = None,
    after: Callable[..., None] | None = None,
) -> Iterator[None]:  # fmt: skip
    """At each layer, call `before` (name, input, beside) ahead of it or `after` (name, input, output, beside)."""
    beside: dict[tuple[str, str], Tensor] = {}
    keys = {name: wire.beside for name, wire in layers.items() if wire.beside is not None}
    handles = []

    def keeper(key: tuple[str, str]) -> Callable[..., None]:
        def keep(module: Any, arguments: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            beside[key] = sites.channels_last(arguments[0] if output is None else output)

        return keep

    def caller(name: str, call: Callable[..., None]) -> Callable[..., None]:
        key = keys.get(name)

        def come(module: Any, arguments: tuple[Tensor, ...], *output: Tensor) -> None:
            rows = [sites.channels_last(value) for value in output]
            call(name, arguments[0], *rows, None if key is None else beside.pop(key))

        return come

    for key in keys.values():
        module = model.get_submodule(key[0])
        register = module.register_forward_pre_hook if key[1] == "input" else module.register_forward_hook
        handles.append(register(keeper(key)))
    for name in layers:
        module = model.get_submodule(name)
        if before is not None:
            handles.append(module.register_forward_pre_hook(caller(name, before)))
        if after is not None:
            handles.append(module.register_forward_hook(caller(name, after)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fits(layer: Any, positions: int) -> bool:
    """Can the layer's weights be fitted to `positions` outputs? A linear layer's always: nothing else is fewer."""
    taps = layer.weight[0, 0].numel()
    return taps == 1 or (sites.is_unfolded(layer.weight) and positions >= _ROWS * layer.weight[0].numel())


def _set(
    layer: Any, old: Any, wire: Wire, kept: Kept, told: _Told, inputs: Tensor, beside: Tensor | None
) -> None:  # fmt: skip
    """Fit `layer` on its own `inputs` to what `told` has of the whole model, whose layer is `old`."""
    import torch

    outputs = outputs_of(wire, kept, len(old.weight))
    if told.output:
        wanted = told.values[:, outputs] if beside is None else told.values[:, outputs] - beside
        found = fitted(_matrix(layer), layer.bias is not None, _parts(layer, inputs, wanted))
        weight, bias = found[:-1].T.view(layer.weight.shape), found[-1]
    else:
        # What the whole model reads, from what this one does; then the whole model's own weights.
        inside = places(wire.reads, kept)
        wanted = sites.channels_last(told.values)
        start = torch.zeros(len(inside) + 1, wanted.shape[1], dtype=torch.float64)
        start[range(len(inside)), inside] = 1.0
        mixed = fitted(start, True, _parts(None, inputs, wanted))
        own = old.weight[outputs].double()
        weight = torch.einsum("oi...,ki->ok...", own, mixed[:-1])
        bias = old.bias[outputs].double() + own.flatten(2).sum(2) @ mixed[-1]
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)


def _matrix(layer: Any) -> Tensor:
    """Weights and bias as (columns + 1, outputs) float64; the last row is the bias."""
    import torch

    weight = layer.weight.double().flatten(1)
    last = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
    return torch.cat([weight.T, last[None]])


def _parts(layer: Any, inputs: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of `inputs`, as the layer reads them or (None) by channel, and of `wanted`; a few images at a time."""
    per_image = len(wanted) // len(inputs)
    size = max(1, _POSITIONS // per_image)
    for part, told in zip(inputs.split(size), wanted.split(size * per_image), strict=True):
        reads = sites.channels_last(part) if layer is None else sites.unrolled(layer, part)
        yield sites.strided(reads), sites.strided(told)


def fitted(start: Tensor, with_bias: bool, parts: Iterator[tuple[Tensor, Tensor]], ridge: float = RIDGE) -> Tensor:
    """The matrix near `start` (columns + 1, outputs) of least squared error over rows of (inputs, wanted outputs).

    `ridge` times the inputs' mean square holds it to `start`.
    """
    import torch

    columns = len(start) - 1
    gram = torch.zeros(columns + 1, columns + 1, dtype=torch.float64)
    cross = torch.zeros_like(start)
    for reads, wanted in parts:
        # A sum over so few rows loses nothing in fp32 that the ridge would not; then float64.
        rows = torch.cat([reads, reads.new_ones(len(reads), 1)], 1)
        gram += (rows.T @ rows).double()
        cross += (rows.T @ wanted).double()
    size = columns + 1 if with_bias else columns
    diagonal = gram.diagonal()
    cross -= gram @ start
    diagonal[:-1] += (ridge + 1e-12) * diagonal[:-1].mean() + 1e-300
    found = start.clone()
    found[:size] += torch.linalg.solve(gram[:size, :size], cross[:size])
    return found
