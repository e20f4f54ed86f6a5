"""Charts as SVG text for a page that is read in light and dark: matplotlib draws, CSS colours.

Every colour is drawn as a placeholder and written as a CSS variable of the page (`--ink`, `--grid`,
`--c1` ...). Text stays text. The same data give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sdcompile.errors import HostError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_VARIABLES = {"ink": "#010101", "muted": "#020202", "grid": "#030303", "surface": "#040404"} | {
    f"c{number}": f"#0000a{number}" for number in range(1, 7)
}
_SERIES = tuple(_VARIABLES[f"c{number}"] for number in range(1, 7))
_WIDTH = 7.2  # inches; the page scales it
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)))


@contextmanager
def _axes(height: float, svgs: list[str], salt: str) -> Iterator[Axes]:
    """Axes to draw on; afterwards the SVG is appended to `svgs`."""
    try:
        import matplotlib
        from cycler import cycler

        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError as error:
        raise HostError(f"charts cannot be drawn here: {error}", "pip install 'sdcompile[report]'") from error
    look: Any = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9.5, "font.family": "sans-serif",
        "text.color": _VARIABLES["ink"], "axes.labelcolor": _VARIABLES["muted"], "axes.edgecolor": _VARIABLES["grid"],
        "xtick.color": _VARIABLES["muted"], "ytick.color": _VARIABLES["muted"], "grid.color": _VARIABLES["grid"],
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "grid.linewidth": 0.6, "legend.frameon": False, "axes.prop_cycle": cycler(color=_SERIES),
        "figure.facecolor": "none", "axes.facecolor": "none",
    }  # fmt: skip
    with matplotlib.rc_context(look):
        figure, axes = pyplot.subplots(figsize=(_WIDTH, height), layout="constrained")
        try:
            yield axes
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        finally:
            pyplot.close(figure)
    svgs.append(_themed(buffer.getvalue()))


def _themed(svg: str) -> str:
    """Placeholders -> variables; the size is left to the page, the font too."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    for name, colour in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)


def _draw(height: float, salt: str, paint: Callable[[Axes], None]) -> str:
    svgs: list[str] = []
    with _axes(height, svgs, salt) as axes:
        paint(axes)
    return svgs[0]


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, floors: Mapping[str, float] | None = None
) -> str:
    """Points per series, joined where they are lowest, each with a dash and colour; `floors` as thin lines."""

    def paint(axes: Axes) -> None:
        for number, (name, points) in enumerate(series.items()):
            colour, dash = _SERIES[number % 6], _DASHES[number % 6]
            lowest = {place: min(value for at, value in points if at == place) for place, _ in sorted(points)}
            axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=4)
            axes.plot(list(lowest), list(lowest.values()), color=colour, linestyle=dash, linewidth=1.4, label=name)
            if floors and name in floors:
                axes.axhline(floors[name], color=colour, linewidth=0.9, linestyle=":")
                axes.annotate(
                    f"floor of {name}", (1, floors[name]), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                    fontsize=8, color=_VARIABLES["muted"],
                )  # fmt: skip
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if len(series) > 1:
            axes.legend(loc="best", fontsize=8.5)

    return _draw(3.2, f"lines {x} {y} {' '.join(series)}", paint)


def bars(rows: Sequence[tuple[str, float, float, float]], *, x: str, chosen: str = "", digits: int = 2) -> str:
    """Horizontal bars (name, value, low, high) from top to bottom, with whiskers; `chosen` stands out."""

    def paint(axes: Axes) -> None:
        names = [row[0] for row in rows]
        values = [row[1] for row in rows]
        colours = [_SERIES[1] if name == chosen else _SERIES[0] for name in names]
        places = range(len(rows))
        axes.barh(places, values, color=colours, height=0.62)
        errors = [[max(0.0, v - low) for _, v, low, _ in rows], [max(0.0, high - v) for _, v, _, high in rows]]
        axes.errorbar(values, places, xerr=errors, fmt="none", ecolor=_VARIABLES["ink"], elinewidth=1, capsize=2.5)
        for place, (_, value, _, high) in enumerate(rows):
            axes.annotate(
                f" {value:.{digits}f}", (max(value, high), place), va="center", fontsize=8.5, color=_VARIABLES["ink"]
            )
        axes.set_yticks(list(places), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.14)
        axes.set_xlim(left=0)
        axes.set_xlabel(x)

    return _draw(0.75 + 0.34 * len(rows), f"bars {x} {rows[0][0]} {len(rows)}", paint)


def pareto(points: Sequence[Mapping[str, Any]], *, x: str, y: str, floor: float | None = None) -> str:
    """Numbered points {"x", "y", "low", "high", "error", "front", "chosen"}; the front is joined, the chosen ringed."""

    def paint(axes: Axes) -> None:
        front = sorted((p for p in points if p["front"]), key=lambda p: p["x"])
        axes.plot(
            [p["x"] for p in front], [p["y"] for p in front], color=_SERIES[0], linewidth=1.2, drawstyle="steps-post"
        )
        for number, point in enumerate(points):
            colour = _SERIES[0] if point["front"] else _VARIABLES["muted"]
            axes.errorbar(
                point["x"], point["y"], xerr=[[point["x"] - point["low"]], [point["high"] - point["x"]]],
                yerr=point["error"], color=colour, marker="o", markersize=6, elinewidth=0.9,
            )  # fmt: skip
            if point["chosen"]:
                axes.plot(
                    point["x"], point["y"], "o", markersize=13, fillstyle="none", color=_SERIES[1], markeredgewidth=1.8
                )
            axes.annotate(
                str(number + 1), (point["x"], point["y"]), xytext=(7, 7), textcoords="offset points", fontsize=9.5,
                color=_VARIABLES["ink"],
            )  # fmt: skip
        if floor is not None:
            axes.axhline(floor, color=_SERIES[1], linewidth=1, linestyle=(0, (5, 3)))
            axes.annotate(
                "what is asked", (1, floor), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8,
                color=_VARIABLES["muted"],
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.margins(0.12)

    return _draw(3.8, f"pareto {x} {y}", paint)


def waterfall(rows: Sequence[tuple[str, float, float]], *, x: str) -> str:
    """Spans (name, begin, end) below each other, in the order in which they happened."""
    named = list(dict.fromkeys(name for name, _, _ in rows))

    def paint(axes: Axes) -> None:
        for number, (name, begin, end) in enumerate(rows):
            axes.barh(
                number, end - begin, left=begin, height=0.8, color=_SERIES[named.index(name) % 6],
                label=name if name not in axes.get_legend_handles_labels()[1] else None,
            )  # fmt: skip
        axes.invert_yaxis()
        axes.set_yticks([])
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(x)
        axes.legend(loc="upper right", fontsize=8.5)

    return _draw(0.9 + 0.1 * len(rows), f"waterfall {len(rows)}", paint)
