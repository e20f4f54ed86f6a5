"""What a student learns of its teacher in one call: the model's output, and what each block hands on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sdcompile.passes import pruning

if TYPE_CHECKING:
    from torch import Tensor


def loss(student: pruning.Subject, teacher: pruning.Subject, call: tuple[Tensor, ...], features: float) -> Tensor:
    """Relative squared error of the output, and `features` times that of the blocks' outputs on average."""
    import torch

    with _block_outputs(teacher.model) as wanted, torch.no_grad():
        target = teacher.module(*call)
    with _block_outputs(student.model) as got:
        output = student.module(*call)
    found = _relative(output, target)
    shared = [name for name in wanted if name in got and wanted[name].shape == got[name].shape]
    if features and shared:
        found = found + features * torch.stack([_relative(got[name], wanted[name]) for name in shared]).mean()
    return found


def _relative(value: Tensor, target: Tensor) -> Tensor:
    return (value - target).square().sum() / target.square().sum().clamp(min=1e-12)


@contextmanager
def _block_outputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Fills with what each down, mid and up block hands on while the model runs inside."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    blocks = {f"down_blocks.{i}": block for i, block in enumerate(model.down_blocks)}
    blocks |= {f"up_blocks.{i}": block for i, block in enumerate(model.up_blocks)}
    if model.mid_block is not None:
        blocks["mid_block"] = model.mid_block
    handles = [block.register_forward_hook(keep(name)) for name, block in blocks.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
