"""checkpoint -> onnx, through torch's dynamo exporter.

Input names, axes and example sizes are derived from the ComponentSpec and its shapes; nothing
about a model is stated here a second time. Weights go to one external file beside the graph.
The graph keeps what later passes need (the torch module of every node) and drops what would
tie its bytes to a machine (stack traces with paths).
"""

from __future__ import annotations

import logging
import warnings
from ast import literal_eval
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdcompile import checkpoint
from sdcompile.errors import StageError
from sdcompile.spec import ComponentSpec, Job, Shapes, split

if TYPE_CHECKING:
    import onnx_ir as ir

REVISION = 1

MODULE = "module"
"""Key of a node's metadata_props that holds the path of the torch module it came from."""


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Export the module in `inputs["checkpoint"]` to `out/model.onnx` (+ model.onnx.data).

    job.params: family, opset, attention ("sdpa", or "mha" for ONNX Runtime's fused operator),
    multiples (shape letter -> what its value is always divisible by), and the component's own.
    """
    assert job.spec is not None
    params = job.params
    job.say("loading the torch module", None)
    module = checkpoint.load(params["family"], job.component, inputs["checkpoint"], params)
    job.say("tracing with torch.export", None)
    fused = _fused_attention() if params["attention"] == "mha" else nullcontext()
    with _quiet(), fused, torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                example(job.spec, job.shapes, params["multiples"]),
                dynamo=True,
                opset_version=params["opset"],
                dynamic_shapes=dynamic_shapes(job.spec, job.shapes, params["multiples"]),
                input_names=[t.name for t in job.spec.inputs],
                output_names=[t.name for t in job.spec.outputs],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise StageError(
                f"{job.component}: torch cannot export this module to ONNX opset {params['opset']}: {_cause(error)}",
                "try another `opset:` in the recipe (18 to 23)",
            ) from error
    assert program is not None
    name_nodes_by_module(program.model)
    job.say("writing model.onnx", None)
    program.save(out / "model.onnx", external_data=True)


def example(spec: ComponentSpec, shapes: Shapes, multiples: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
    """Zero inputs to trace with: every dynamic letter at least two of its units.

    torch.export takes a size of 1 for a constant, and would then refuse the axis as dynamic.
    """
    sizes = {
        letter: bounds.opt if bounds.is_static else max(bounds.opt, 2 * multiples.get(letter, 1))
        for letter, bounds in shapes.items()
    }
    return tuple(
        torch.zeros([_size(d, sizes) if isinstance(d, str) else d for d in t.dims], dtype=getattr(torch, t.dtype))
        for t in spec.inputs
    )


def _size(dim: str, sizes: Mapping[str, int]) -> int:
    letter, divisor = split(dim)
    return sizes[letter] // divisor


def dynamic_shapes(spec: ComponentSpec, shapes: Shapes, multiples: Mapping[str, int]) -> tuple[dict[int, Any], ...]:
    """Per input: axis -> torch.export dimension. Static letters are left out, so they become constants."""
    dims: dict[str, Any] = {}
    roots: dict[str, Any] = {}
    for dim in spec.dynamic_letters(shapes):
        letter, divisor = split(dim)
        multiple = multiples.get(letter, 1)
        # `8*h8` in the file says what sizes the graph takes; a bare `h` would promise too much. Half of it is `4*h8`.
        root = roots.setdefault(letter, torch.export.Dim(letter if multiple == 1 else f"{letter}{multiple}"))
        dims[dim] = root if multiple == divisor else multiple // divisor * root
    return tuple({axis: dims[d] for axis, d in t.letters().items() if d in dims} for t in spec.inputs)


def name_nodes_by_module(model: ir.Model) -> None:
    """Rename every node `<torch module path>/<OpType>_<n>` and keep only that path as metadata.

    `n` counts within a module, so that names survive changes elsewhere in the graph.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for node in model.graph.all_nodes():
        scopes = literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
        path = next((s for s in reversed(scopes[:-1]) if s and not s.startswith("_empty_nn_module")), "")
        node.metadata_props.clear()
        node.metadata_props[MODULE] = path
        node.name = f"{path or 'root'}/{node.op_type}_{counts[path, node.op_type]}"
        node.doc_string = None
        counts[path, node.op_type] += 1
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


@contextmanager
def _fused_attention() -> Iterator[None]:
    """While tracing, turn unmasked scaled_dot_product_attention into com.microsoft::MultiHeadAttention.

    ONNX Runtime runs it as flash attention, so the (T, T) scores are never written to memory.
    diffusers looks the function up on torch.nn.functional at every call, which is why patching
    it there reaches every attention processor.
    """
    plain: Callable[..., torch.Tensor] = torch.nn.functional.scaled_dot_product_attention

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **rest: Any,
    ) -> torch.Tensor:
        if attn_mask is not None or is_causal or rest.get("scale") is not None:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, **rest)
        batch, heads, length, width = query.shape

        def joined(t: torch.Tensor) -> torch.Tensor:
            return t.transpose(1, 2).reshape(batch, -1, heads * width)

        output = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (joined(query), joined(key), joined(value)),
            {"num_heads": heads},
            dtype=query.dtype,
            shape=(batch, length, heads * width),
            version=1,
        )
        return output.reshape(batch, length, heads, width).transpose(1, 2)

    functional: Any = torch.nn.functional
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks on torchvision and on torch's own deprecations."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The first line of the innermost error: the exporter wraps the reason several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
