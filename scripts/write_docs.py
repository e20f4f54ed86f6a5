"""Write docs/cli.md from `--help` and docs/recipe.md from the recipe's own field descriptions.

python scripts/write_docs.py            write both
python scripts/write_docs.py --check    exit 1 when one of them is not up to date
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sdcompile import recipe
from sdcompile.backends import BACKENDS
from sdcompile.passes import PASSES
from sdcompile.recipe.compression import PruneAcceptRecipe

DOCS = Path(__file__).parent.parent / "docs"


def cli_page() -> str:
    """typer's own rendering of every command."""
    made = subprocess.run(
        [sys.executable, "-m", "typer", "sdcompile.cli", "utils", "docs", "--name=sdcompile", "--title=Command line"],
        check=True, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "SDCOMPILE_STORE"} | {"COLUMNS": "100", "NO_COLOR": "1"},
    )  # fmt: skip
    return made.stdout.strip() + "\n"


def recipe_page() -> str:
    """One table per mapping of a recipe."""
    schema = recipe.schema()
    lines = ["# Recipe reference", "", "`sdcompile schema` prints the same for editors.", ""]
    lines += table("recipe", schema)
    for name, part in schema["$defs"].items():
        lines += table(name.removesuffix("Recipe").lower(), part)
    for name, backend in BACKENDS.items():
        lines += table(f"build: {name}", backend.options.model_json_schema())
    for record in PASSES.values():
        if record.stage == "prune":
            lines += table(f"prune: {record.name}", record.params.model_json_schema())
    lines += table("prune: accept_if", PruneAcceptRecipe.model_json_schema())
    return "\n".join(lines).strip() + "\n"


def table(title: str, schema: dict[str, Any]) -> list[str]:
    rows = [
        f"## {title}",
        "",
        text(schema.get("description")),
        "",
        "| field | what it may be | default | meaning |",
        "|---|---|---|---|",
    ]
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else shown(field.get("default"))
        rows.append(f"| `{name}` | {kind(field)} | {default} | {(field.get('description') or '').strip()} |")
    return [*rows, ""]


def text(description: str | None) -> str:
    """A docstring's first paragraph as prose, and its aligned list (if any) as it stands."""
    first, _, rest = (description or "").strip().partition("\n\n")
    return first + (f"\n\n```\n{rest}\n```" if rest else "")


_WORDS = {
    "string": "text", "object": "mapping", "integer": "whole number", "number": "number", "boolean": "true or false",
}  # fmt: skip


def kind(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[-1].removesuffix("Recipe").lower()
    if "enum" in field:
        return " · ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(kind(branch) for branch in field["anyOf"] if branch.get("type") != "null"))
    if field.get("type") == "array":
        items = field.get("items") or {}
        size = f" of {field['maxItems']}" if field.get("maxItems") == field.get("minItems") is not None else ""
        return f"list{size}: {kind(items)}" if items else "list"
    if "additionalProperties" in field and isinstance(field["additionalProperties"], dict):
        return f"mapping: {kind(field['additionalProperties'])}"
    return _WORDS.get(field.get("type", ""), "")


def shown(default: Any) -> str:
    return "" if default in (None, "", {}, []) else f"`{default}`"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is stale")
    arguments = parser.parse_args()
    stale = []
    for path, text in ((DOCS / "cli.md", cli_page()), (DOCS / "recipe.md", recipe_page())):
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if not arguments.check:
                path.write_text(text, encoding="utf-8")
    if stale:
        print(("stale: " if arguments.check else "wrote ") + ", ".join(stale))
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
