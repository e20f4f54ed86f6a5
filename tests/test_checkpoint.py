"""The torch form on disk: headers, and half-precision weights made wide exactly."""

from __future__ import annotations

import numpy as np
import pytest

from sdcompile import checkpoint
from sdcompile.errors import StageError


@pytest.mark.tiny
def test_widening_is_exact_and_what_torch_reads(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    tensors = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "wide": torch.randn(2, 2),
        "whole": torch.arange(3),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    checkpoint.widen(tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor.float() if tensor.is_floating_point() else tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.tiny
def test_a_wide_file_is_left_alone_and_a_link_keeps_its_content(tmp_path):
    import os

    import torch
    from safetensors.torch import load_file, save_file

    save_file({"a": torch.ones(4)}, tmp_path / "wide.safetensors")
    before = (tmp_path / "wide.safetensors").stat().st_ino
    checkpoint.widen(tmp_path / "wide.safetensors")
    assert (tmp_path / "wide.safetensors").stat().st_ino == before
    save_file({"a": torch.ones(4).half()}, tmp_path / "source.safetensors")
    os.link(tmp_path / "source.safetensors", tmp_path / "linked.safetensors")
    checkpoint.widen(tmp_path / "linked.safetensors")
    assert load_file(tmp_path / "source.safetensors")["a"].dtype == torch.float16
    assert load_file(tmp_path / "linked.safetensors")["a"].dtype == torch.float32


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    whole = len(header).to_bytes(8, "little") + header + np.ones(4, np.float32).tobytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    assert checkpoint.parameter_bytes(tmp_path) == (4, 16)
    path.write_bytes(whole[:-1])
    with pytest.raises(StageError, match="cut short"):
        checkpoint.safetensors_header(path)
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(StageError, match="not a whole safetensors file"):
        checkpoint.safetensors_header(path)
