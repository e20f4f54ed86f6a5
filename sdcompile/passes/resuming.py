"""What a long training saves to go on from: tensors and a few words, in one file that is whole or not there.

The file is written beside the old one and takes its place by a rename, so that a process killed at any
moment leaves the last whole one. It knows no model and no optimiser.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FILE = "state.safetensors"


def save(folder: Path, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
    """Put `tensors` and `told` (JSON data) in place of what `folder` holds."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".{FILE}"
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, fresh, {"told": json.dumps(told)}
    )
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    fresh.replace(folder / FILE)


def restore(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `save` put into `folder`, bit for bit; None where there is nothing, or nothing that can be read.

    Tensors are copies of their own: kernels may round differently on memory that is aligned differently.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / FILE, framework="pt") as file:
            told = json.loads(file.metadata()["told"])
            return {name: file.get_tensor(name).clone() for name in file.keys()}, told  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
