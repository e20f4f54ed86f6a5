"""What tests of passes on torch modules start from: one small random UNet and recorded calls of it, read only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.passes.small_unet import recorded, saved


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="session")
def samples(small, tmp_path_factory) -> Path:
    return recorded(tmp_path_factory.mktemp("samples"), small)
