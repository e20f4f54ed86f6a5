"""What an engine says it spends where: by kernel, in words from which the module can be told."""

from __future__ import annotations

import pytest

from sdcompile.backends import BACKENDS
from sdcompile.steps.race import by_group

pytestmark = pytest.mark.tiny


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.profile])
def test_nearly_all_of_a_call_is_told_by_module(name, forms, tmp_path):
    if not BACKENDS[name].probe().available:
        pytest.skip(f"{name} is not installed")
    unet = forms("unet")
    folder = unet.build(name, tmp_path / "engine")
    before = {path.name: path.stat().st_size for path in folder.iterdir()}
    rows = BACKENDS[name].profile(folder, unet.feeds(), 3)
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == before, "nothing is left behind"
    assert min(seconds for _, seconds in rows) >= 0
    spent = by_group(rows)
    attention = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert {"conv_in", "conv_out", "mid_block.resnets.0", f"{attention}.attn1", f"{attention}.ff"} <= set(spent)
    assert spent["conv_in"] > 0
    assert spent[""] < 0.2 * sum(spent.values())
    # Without the names of modules nothing could be told.
    assert set(by_group((names.replace(".", "_"), seconds) for names, seconds in rows)) == {""}
