"""The README's five minutes, command by command, in a fresh folder."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.tiny


def tour() -> list[str]:
    block = re.search(r"```console tour\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert block is not None
    return block.group(1).strip().splitlines()


def test_every_command_of_the_tour_works(tmp_path):
    pytest.importorskip("openvino")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    environment = {k: v for k, v in os.environ.items() if k != "SDCOMPILE_STORE"} | {"PYTHONPATH": str(ROOT)}
    for line in tour():
        words = shlex.split(line)
        assert words[0] == "sdcompile"
        made = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert made.returncode == 0, f"{line}\n{made.stdout}\n{made.stderr}"
    with Image.open(next((tmp_path / "out").glob("*.png"))) as image:
        assert image.size == (64, 64)
    assert (tmp_path / "artifacts" / "tiny-openvino-bf16.sdc" / "manifest.json").is_file()
