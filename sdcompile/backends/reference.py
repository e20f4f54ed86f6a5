"""The reference backend: the torch module itself, run eagerly on the CPU.

What every other engine is compared with; fp32 unless bf16 is asked for. It adds nothing to the
module and optimises nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from sdcompile.backends.base import Backend, Card, Host, Probe, card_from_job, read_card, write_card
from sdcompile.errors import HostError
from sdcompile.files import link_tree
from sdcompile.machine import version
from sdcompile.spec import Job

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

_WEIGHTS = "checkpoint"
_HINT = "pip install 'sdcompile[compile]'"


class Options(BaseModel):
    """The reference has no options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def probe() -> Probe:
    for package in ("torch", "diffusers", "transformers"):
        if version(package) is None:
            return Probe(available=False, reason=f"{package} is not installed", hint=_HINT)
    return Probe(available=True, version=version("torch"), devices=("cpu",))


def build(src: Path, out: Path, job: Job) -> None:
    """Put the checkpoint's files into `out/checkpoint` and describe the engine in engine.json."""
    link_tree(src, out / _WEIGHTS)
    write_card(out, card_from_job(BACKEND.name, job))


def open_engine(folder: Path, host: Host) -> ReferenceEngine:
    """The torch module in `folder`; fp32 weights stay memory-mapped.

    Raises HostError when torch, diffusers or transformers is missing, StageError when the folder
    or the weights in it are damaged.
    """
    found = probe()
    if not found.available:
        raise HostError(f"backend reference cannot run here: {found.reason}", found.hint)
    import torch

    from sdcompile import checkpoint

    card = read_card(folder, BACKEND.name)
    module = checkpoint.load(card.params["family"], card.component, folder / _WEIGHTS, card.params)
    if host.threads is not None:
        torch.set_num_threads(host.threads)
    return ReferenceEngine(card, module)


class ReferenceEngine:
    """A torch module as an engine.

    In bf16 the whole module is bf16 and float inputs are cast on entry, but for those of one
    axis: timesteps, which bf16 would round to multiples of 4, stay fp32 as in diffusers.
    """

    def __init__(self, card: Card, module: nn.Module) -> None:
        import torch

        self.inputs, self.outputs = card.spec.inputs, card.spec.outputs
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[card.precision]
        self._module: nn.Module | None = module.to(self._dtype)
        self.facts: Mapping[str, Any] = {
            "device": "cpu",
            "precision": card.precision,
            "threads": torch.get_num_threads(),
        }

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        assert self._module is not None, "the engine is closed"
        with torch.inference_mode():
            # torch.tensor copies, so that no module can write into a caller's array.
            arguments = [torch.tensor(feeds[t.name]) for t in self.inputs]
            cast = (a.to(self._dtype) if a.is_floating_point() and a.ndim > 1 else a for a in arguments)
            result = self._module(*cast)
            tensors = result if isinstance(result, tuple) else (result,)
            return {
                spec.name: tensor.to(getattr(torch, spec.dtype)).contiguous().numpy()
                for spec, tensor in zip(self.outputs, tensors, strict=True)
            }

    def close(self) -> None:
        self._module = None


BACKEND = Backend(
    name="reference",
    takes="checkpoint",
    realises={"fp32": (), "bf16": ()},
    options=Options,
    probe=probe,
    build=build,
    open=open_engine,
)
