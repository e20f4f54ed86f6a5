"""Small pieces of HTML, escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from sdcompile.measure.tables import Table

STYLE = Path(__file__).with_name("page.css")


def page(title: str, body: Iterable[str]) -> str:
    """A whole document that loads nothing from anywhere."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    inside = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{inside}</section>" if inside else ""


def paragraph(text: str, style: str = "") -> str:
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def facts(rows: Mapping[str, str]) -> str:
    return (
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items()) + "</dl>"
    )


def figure(svg: str, caption: str) -> str:
    drawn = f'<div class="scroll" role="img" aria-label="{escape(caption)}">{svg}</div>'
    return f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def table(shown: Table, *, prose: Sequence[int] = ()) -> str:
    """A table with its notes; columns in `prose` hold sentences."""
    head = "".join(f"<th>{escape(name)}</th>" for name in shown.columns)
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td class="text">{escape(cell)}</td>' if number in prose else f"<td>{escape(cell)}</td>"
            for number, cell in enumerate(row)
        )
        + "</tr>"
        for row in shown.rows
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in shown.notes)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{notes}'


def folded(title: str, inside: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def sheet(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A grid of cells (HTML) under column heads."""
    heads = "".join(f'<div class="head">{escape(name)}</div>' for name in columns)
    cells = "".join(f"<div>{cell}</div>" for row in rows for cell in row)
    style = f"grid-template-columns: repeat({len(columns)}, minmax(5.5rem, 1fr))"
    return f'<div class="scroll"><div class="sheet" style="{style}">{heads}{cells}</div></div>'


def picture(uri: str, alt: str, *, small: bool) -> str:
    return f'<img src="{uri}" alt="{escape(alt)}"{" class=small" if small else ""}>'
