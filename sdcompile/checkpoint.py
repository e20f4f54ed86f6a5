"""The torch form on disk, and the only builder of torch modules.

A checkpoint folder holds `config.json` and safetensors weights as diffusers and transformers
read them; of a pruned model also `edits.json`, what was taken out of the model that config.json
means (see `sdcompile.edits`). This room knows neither recipes nor backends; which class a folder
becomes is the family's business.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile import edits
from sdcompile.errors import StageError
from sdcompile.families import FAMILIES
from sdcompile.files import link

if TYPE_CHECKING:
    from torch import nn


def load(family: str, component: str, folder: Path, params: Mapping[str, Any]) -> nn.Module:
    """The fp32 module of `component`, in eval mode, without gradients.

    fp32 weights stay memory-mapped. Raises StageError when the weights do not fit the config.
    """
    with _quiet():
        try:
            module = FAMILIES[family].load_module(component, folder, params)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise StageError(
                f"{component}: the weights in {folder.name} cannot be loaded: {error}",
                "check that config.json and the safetensors file of the source belong together",
            ) from error
    return module.eval().requires_grad_(False)


def save(
    model: nn.Module, source: Path, out: Path, made: Sequence[edits.Edit], fields: Mapping[str, Any] | None = None
) -> str:
    """Write `model`, which is what the config in `source`, with `fields`, means after the edits `made`, into `out`.

    Where an ordinary config can say the same, `out` is an ordinary diffusers folder, and "" is
    returned; else config.json is the source's (with `fields`), edits.json says the rest, and why is returned. Weights
    go out tensor by tensor.
    """
    config = {**json.loads((source / "config.json").read_text(encoding="utf-8")), **(fields or {})}
    plain, why = edits.in_config(config, made)
    if fields or (made and not why):
        (out / "config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    else:
        link(source / "config.json", out / "config.json")
    if why:
        edits.write(out, made)
    _write_tensors(out / "diffusion_pytorch_model.safetensors", model)
    return why


def relabel(source: Path, out: Path, made: Sequence[edits.Edit]) -> str:
    """The checkpoint in `source` with the edits `made`, all there are, where they leave the weights as they are."""
    for path in source.glob("*"):
        if path.name == "config.json" or path.suffix == ".safetensors":
            link(path, out / path.name)
    _, why = edits.in_config(json.loads((source / "config.json").read_text(encoding="utf-8")), made)
    if made:
        edits.write(out, made)
    return why


def _write_tensors(path: Path, model: nn.Module) -> None:
    """The parameters and buffers of `model` as a safetensors file, in fp32, one at a time."""
    import torch

    rows: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    state, end = model.state_dict(), 0
    for name in sorted(state):
        if state[name].dtype != torch.float32:
            raise StageError(f"{name} is {state[name].dtype}, where checkpoints of this stage are fp32")
        begin, end = end, end + 4 * state[name].numel()
        rows[name] = {"dtype": "F32", "shape": list(state[name].shape), "data_offsets": [begin, end]}
    with path.open("wb") as file:
        file.write(_header(rows))
        for name in sorted(state):
            file.write(state[name].detach().contiguous().numpy().data)


def _header(rows: Mapping[str, Any]) -> bytes:
    """A safetensors header: its length, then JSON padded to the eight bytes its data is aligned to."""
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def parameter_bytes(folder: Path) -> tuple[int, int]:
    """(parameters, bytes) of the safetensors files in `folder`, read from their headers alone."""
    parameters = size = 0
    for path in sorted(folder.glob("*.safetensors")):
        for entry in safetensors_header(path).values():
            begin, end = entry["data_offsets"]
            count = 1
            for side in entry["shape"]:
                count *= side
            parameters, size = parameters + count, size + end - begin
    return parameters, size


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file.

    The format starts with the header's length as a little-endian u64. Raises StageError when
    the file is not safetensors or is cut short.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        try:
            if length + 8 > size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        except ValueError as error:
            raise StageError(f"{path.name} is not a whole safetensors file: {error}") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise StageError(f"{path.name} is cut short: {size} bytes where its header promises {8 + length + end}")
    return header


def widen(path: Path) -> None:
    """Rewrite the safetensors file at `path` with its fp16 and bf16 tensors as fp32; exact, tensor by tensor.

    A wide file can be memory-mapped by every step that reads it; a half one would be widened in
    memory, once per step, beside its own pages. Hard links to the old file keep their content.
    """
    header = safetensors_header(path)
    if not {entry["dtype"] for entry in header.values()} & set(_HALVES):
        return
    import numpy as np

    old = np.memmap(path, np.uint8, mode="r", offset=8 + _header_length(path))
    rows = sorted(header.items(), key=lambda row: row[1]["data_offsets"][0])
    wide: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in rows:
        begin, size = end, entry["data_offsets"][1] - entry["data_offsets"][0]
        half = entry["dtype"] in _HALVES
        end = begin + (2 * size if half else size)
        wide[name] = {**entry, "dtype": "F32" if half else entry["dtype"], "data_offsets": [begin, end]}
    fresh = path.with_name(f".{path.name}")
    with fresh.open("wb") as file:
        file.write(_header(wide))
        for _, entry in rows:
            data = old[slice(*entry["data_offsets"])]
            file.write(_HALVES.get(entry["dtype"], bytes)(data))
    del old
    fresh.replace(path)


def _fp32_from_fp16(data: Any) -> bytes:
    wide: bytes = data.view("<f2").astype("<f4").tobytes()
    return wide


def _fp32_from_bf16(data: Any) -> bytes:
    """bf16 is the upper half of an fp32."""
    wide: bytes = (data.view("<u2").astype("<u4") << 16).tobytes()
    return wide


_HALVES = {"F16": _fp32_from_fp16, "BF16": _fp32_from_bf16}


def _header_length(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence loaders' advice and progress bars: the person at the terminal called us, not them."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    levels = {name: logging.getLogger(name).level for name in ("diffusers", "transformers", "accelerate")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()
