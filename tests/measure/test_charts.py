"""Charts and pages: themed, self-contained, the same for the same data."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from sdcompile.measure import html, pictures, tables

charts = pytest.importorskip("matplotlib") and __import__("sdcompile.measure.charts", fromlist=["charts"])

POINTS = [
    {"x": 1.0, "y": 0.9, "low": 0.9, "high": 1.2, "error": 0.01, "front": True, "chosen": False},
    {"x": 0.3, "y": 0.8, "low": 0.2, "high": 0.4, "error": 0.02, "front": True, "chosen": True},
]
DRAWN = {
    "lines": lambda: charts.lines({"unet": [(900, 30), (100, 45)]}, x="t", y="dB", floors={"unet": 24}),
    "bars": lambda: charts.bars([("a", 1.0, 1.0, 1.0), ("b", 0.5, 0.4, 0.6)], x="x", chosen="b"),
    "pareto": lambda: charts.pareto(POINTS, x="s", y="alignment", floor=0.7),
    "waterfall": lambda: charts.waterfall([("text", 0, 1), ("step", 1, 5), ("step", 5, 9)], x="ms"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_chart_is_svg_in_the_page_s_colours_and_the_same_twice(name):
    svg = DRAWN[name]()
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib
    colours = set(re.findall(r"#[0-9a-f]{6}", svg))
    assert colours <= {"#ffffff", "#000000"}, "what is not a variable is dark on dark for somebody"
    assert re.findall(r"(?:fill|stroke): var\(--c\d\)", svg)
    assert svg == DRAWN[name]()


def test_the_page_escapes_and_loads_nothing():
    shown = tables.Table("t", ("", "x<y"), (("<script>", "1"),), ("a & b",))
    body = [html.section("<s>", html.table(shown), html.facts({"<a>": "<b>"})), html.paragraph("<p>")]
    page = html.page("<title>", body)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|url\(|@import|https?://", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_pictures_are_embedded_small_ones_exactly(tmp_path):
    small = Image.new("RGB", (64, 64), (10, 200, 30))
    small.save(tmp_path / "a.png")
    assert pictures.embedded(pictures.read(tmp_path / "a.png"))[1] is True
    uri, is_small = pictures.embedded(Image.new("RGB", (512, 512)))
    assert uri.startswith("data:image/jpeg;base64,")
    assert is_small is False


def test_a_difference_is_magnified_and_black_where_there_is_none():
    first = Image.new("RGB", (4, 4), (100, 100, 100))
    second = Image.new("RGB", (4, 4), (103, 100, 60))
    assert pictures.difference(first, first).getextrema() == ((0, 0), (0, 0), (0, 0))
    assert pictures.difference(first, second).getpixel((0, 0)) == (3 * pictures.GAIN, 0, 255)


def test_markdown_escapes_what_would_end_a_cell():
    text = tables.markdown([tables.Table("T", ("", "a"), (("x|y", "1"),))])
    assert "| x\\|y | 1 |" in text
    assert "|---|---:|" in text


def test_a_report_shows_what_passes_did_and_what_int8_costs_worst_first(tmp_path):
    import json
    from types import SimpleNamespace

    from sdcompile.measure import report

    effect = {"pass": "nncf_int8", "parameters": [10, 10], "bytes": [40, 10], "snr_db": {"early": 21.5}}
    heads = {"pass": "heads", "parameters": [20, 10], "bytes": [80, 40], "macs": [1000, 750], "snr_db": {}}
    race = {"name": "int8", "rival": "bf16", "speedup": 1.43, "wanted": 1.05}
    unet = SimpleNamespace(effects=[heads, effect], races=[race])
    manifest = SimpleNamespace(components={"unet": unet}, reports="reports")
    groups = [{"name": f"group.{n}", "operators": 1, "snr_db": {"early": 30.0 + n, "late": 40.0}} for n in range(3)]
    told = {"all": {"early": 19.0, "late": 28.0}, "left_out": ["group.0"], "groups": groups[::-1]}
    (tmp_path / "reports").mkdir()
    assert "<svg" not in "".join(report._compression(tmp_path, manifest))
    (tmp_path / "reports" / "unet-sensitivity.json").write_text(json.dumps(told))
    page = "".join(report._compression(tmp_path, manifest))
    assert "10 of 40" in page
    assert "750 of 1,000" in page
    assert "int8 is 1.43 times as fast as bf16" in page
    unet.races = []
    assert "times as fast" not in "".join(report._compression(tmp_path, manifest))
    assert "early 21.5" in page
    names = re.findall(r"group\.\d(?: \(left in float\))?", page)
    assert names[:3] == ["group.0 (left in float)", "group.1", "group.2"]
    assert "together give 19.0 dB" in page
