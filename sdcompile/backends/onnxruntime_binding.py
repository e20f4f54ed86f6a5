"""An ONNX Runtime session whose inputs and outputs stay at fixed places on its device: one binding per shape.

Read-only arrays (a prompt's embeddings) are sent once. With CUDA graphs each shape is captured under a number of its
own; ONNX Runtime asks for fixed addresses, which these are, and for calls one after another
(microsoft/onnxruntime#10859, #19636). It knows no provider.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdcompile.backends.base import is_constant

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime as ort

SHAPES = 8
"""Shapes whose bindings are kept, and graphs captured in the life of a session: it cannot forget one."""

_GRAPH = "gpu_graph_id"
_NO_GRAPH = "-1"

Key = tuple[tuple[tuple[int, ...], str], ...]


class Bindings:
    """The bindings of one session. `device` is ONNX Runtime's word for where arrays lie: "cuda" or "cpu"."""

    def __init__(self, session: ort.InferenceSession, outputs: Sequence[str], device: str, graphs: bool) -> None:
        self._session, self._outputs, self._device = session, tuple(outputs), device
        self._bound: OrderedDict[Key, _Bound] = OrderedDict()
        self._numbers = iter(range(1, SHAPES + 1 if graphs else 1))

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs for `arrays`, which belong to the caller."""
        key = tuple((array.shape, array.dtype.str) for array in arrays.values())
        if key not in self._bound:
            while len(self._bound) >= SHAPES:
                self._bound.popitem(last=False)
            self._bound[key] = _Bound(self._session, arrays, self._outputs, self._device)
        self._bound.move_to_end(key)
        return self._bound[key](arrays, self._numbers)


class _Bound:
    """Arrays of fixed shapes, at fixed places."""

    def __init__(
        self, session: ort.InferenceSession, arrays: Mapping[str, np.ndarray], outputs: Sequence[str], device: str
    ) -> None:
        import onnxruntime as ort

        self._session, self._binding, self._options = session, session.io_binding(), ort.RunOptions()
        self._inputs = {
            name: ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, device, 0)
            for name, array in arrays.items()
        }
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        # The first call finds out the shapes of outputs; ONNX Runtime allocates them, and they are kept.
        for name in outputs:
            self._binding.bind_output(name, device, 0)
        self._options.add_run_config_entry(_GRAPH, _NO_GRAPH)
        self._names, self._results = outputs, list[Any]()
        self._captures = False
        # Input -> the array the device has, if that cannot change.
        self._fed: dict[str, np.ndarray] = {}

    def __call__(self, arrays: Mapping[str, np.ndarray], numbers: Any) -> list[np.ndarray]:
        for name, array in arrays.items():
            if array is not self._fed.pop(name, None):
                self._inputs[name].update_inplace(array)
            if is_constant(array):
                self._fed[name] = array
        if self._results and not self._captures:
            self._captures = True
            if (number := next(numbers, None)) is not None:
                self._options.add_run_config_entry(_GRAPH, str(number))
        self._session.run_with_iobinding(self._binding, self._options)
        if not self._results:
            self._results = self._binding.get_outputs()
            for name, value in zip(self._names, self._results, strict=True):
                self._binding.bind_ortvalue_output(name, value)
        # On the CPU `numpy` is a view.
        return [value.numpy().copy() for value in self._results]
