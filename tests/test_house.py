"""House rules: who imports whom and when, how long a room may be, and that shipped recipes and pages are true."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sdcompile
from sdcompile.backends import BACKENDS, Probe
from sdcompile.plan import Machine, resolve
from sdcompile.recipe import load
from sdcompile.steps import OPS

ROOT = Path(__file__).parent.parent
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "onnxscript", "scipy",
         "matplotlib", "torchmetrics"}  # fmt: skip
LIGHT_ROOMS = [
    "sdcompile", "sdcompile.spec", "sdcompile.errors", "sdcompile.machine", "sdcompile.bundle", "sdcompile.backends",
    "sdcompile.families", "sdcompile.recipe", "sdcompile.plan", "sdcompile.store", "sdcompile.run", "sdcompile.status",
    "sdcompile.console", "sdcompile.measure.experiment", "sdcompile.measure.report", "sdcompile.runtime",
    "sdcompile.passes", "sdcompile.models.tiny",
]  # fmt: skip


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    made = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*{{m.partition('.')[0] for m in sys.modules}})"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return set(made.stdout.split())


def test_rooms_import_only_what_lies_below_them():
    made = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.mark.parametrize("room", LIGHT_ROOMS)
def test_importing_a_room_of_the_plan_or_the_runtime_loads_nothing_heavy(room):
    assert not loaded_by(f"import {room}") & HEAVY


def test_help_needs_neither_numpy_nor_pydantic():
    assert not loaded_by("import sdcompile.cli") & (HEAVY | {"numpy", "pydantic", "ruamel", "filelock"})


def test_the_package_exports_what_it_says():
    public = {name for name in vars(sdcompile) if not name.startswith("_")}
    modules = {m.name for m in pkgutil.iter_modules(sdcompile.__path__)}
    assert public - modules - {"annotations", "Any", "TYPE_CHECKING"} == {"load"}
    assert set(sdcompile.__all__) == {"__version__", "load"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("sdcompile/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_room_is_longer_than_four_hundred_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_every_op_in_the_table_is_there_and_has_its_revision():
    import ast

    for name, op in OPS.items():
        path = ROOT / Path(*op.module.split(".")).with_suffix(".py")
        assert path.is_file(), name
        defined = {
            node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
        }
        assert op.function in defined, name


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_shipped_recipe_is_valid_and_plans(path, source):
    recipe = load(path)
    assert path.read_text(encoding="utf-8").splitlines()[0] == f"# sdcompile build {path.relative_to(ROOT)}"
    assert recipe.name == path.stem
    machine = Machine(
        versions={}, probes={name: Probe(available=True) for name in BACKENDS}, identity={"machine": "x86_64"}
    )
    plan = resolve(recipe, source if not recipe.source.startswith("builtin:") else _tiny(), machine)
    assert plan.steps[-1].name == "pipeline.package.bundle"


def _tiny():
    from sdcompile.steps import fetch

    return fetch.describe(
        "builtin:tiny",
        base=ROOT,
        folders=("text_encoder", "unet", "vae"),
        offline=True,
        hash_file=lambda path: "0" * 64,
    )


@pytest.mark.tiny
def test_the_generated_pages_are_up_to_date():
    made = subprocess.run(
        [sys.executable, ROOT / "scripts" / "write_docs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout + made.stderr + "\nrun: make docs"


def test_every_command_in_the_readme_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"^\s*(?:\.venv/bin/)?sdcompile ([a-z]+)", text, flags=re.MULTILINE))
    known = set(
        re.findall(
            r"^## `sdcompile ([a-z]+)`", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE
        )
    )
    assert commands
    assert commands <= known


def test_onnx_runtime_for_the_cpu_and_for_gpus_are_never_installed_together():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def distributions(extra: str) -> set[str]:
        found = set()
        for line in extras[extra]:
            name, inner = re.fullmatch(r"([\w-]+)(?:\[(.*)\])?.*", line).groups()
            found |= set().union(*map(distributions, inner.split(","))) if name == "sdcompile" else {name}
        return found

    either = {"onnxruntime", "onnxruntime-gpu"}
    assert distributions("compile") - either == distributions("compile-gpu") - either
    assert distributions("compile") & either == {"onnxruntime"}
    assert distributions("compile-gpu") & either == {"onnxruntime-gpu"}
    assert all(len(distributions(extra) & either) <= 1 for extra in extras)
