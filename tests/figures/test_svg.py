"""Figures as files: well-formed SVG whatever the labels are, in the page's colours, the same bytes each time."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_seg.figures import charts
from ssl_seg.figures.charts import Band, Change, Curve, Row, Series, Style
from ssl_seg.figures.svg import COLOURS, plain
from tests.figures.test_charts import SVG, confusion, dots, texts

HOSTILE = [
    "<script>alert(1)</script>",
    '" onload="x',
    "$x_1$ and $y$",
    "Straße 道路 🚲",
    "a\nb\tc",
    "\x00\x0b\udc80",
    "&amp;",
]


def every_figure(label: str) -> list[str]:
    lines = [Curve((([1, 2, 3], [0.5, np.nan, 0.2]), ([1, 2], [0.4, 0.3])), Style("green", "s", "--"))]
    band = Band((5.0, 40.0), ((1.0, 2.0), ()), ((0.5, 2.5), None), Style())
    return [
        dots([label]),
        charts.bands("bands", [band], label, label, (-1.0, 3.0), by_logarithm=True, zero=True),
        charts.changes("changes", [label], [label, "b"], [[Change(1.0, True), None]], label, label, 2.0),
        charts.dots("gains", [Row(label, (-1.0, 2.0), Style(), "+0.5")], label, label, zero=True),
        charts.curves("curves", lines, label, by_logarithm=True),
        charts.classes("classes", [label, "car"], [Series(((1.0, 2.0), ()), Style())], label, label),
        confusion(np.array([[5, 1], [0, 0]]), [label, "car"]),
    ]


@pytest.mark.parametrize("label", HOSTILE)
def test_hostile_labels_are_text_and_nothing_else(label: str) -> None:
    for svg in every_figure(label):
        root = ElementTree.fromstring(svg)
        assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
            "svg", "g", "path", "defs", "use", "text", "tspan", "clipPath", "rect", "image",
        }  # fmt: skip
        names = {name for element in root.iter() for name in element.attrib}
        assert not [name for name in names if name.startswith("on")]
    shown = "".join(texts(dots([label]))).replace(" ", "")
    assert plain(label).replace(" ", "") in shown, "neither typeset as mathematics nor left out"


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=30))
def test_any_text_makes_a_well_formed_figure(label: str) -> None:
    ElementTree.fromstring(dots([label]))
    plain(label).encode()


def test_colours_are_the_pages_variables_and_fonts_are_its_own() -> None:
    for svg in every_figure("road"):
        assert not re.findall(r"#[0-9a-f]{6}", svg), "a colour that dark paper cannot change"
        used = set(re.findall(r"var\(--(\w+)\)", svg))
        assert used <= set(COLOURS)
        assert "muted" in used
        assert "font-family" not in svg
        assert "<style" not in svg, "it would hold for the whole page"


def test_no_two_figures_share_a_name_and_every_reference_finds_its_target() -> None:
    found: list[str] = []
    for svg in every_figure("road"):
        own = re.findall(r'\bid="([^"]+)"', svg)
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)) <= {
            pair for name in own for pair in ((name, ""), ("", name))
        }
        found += own
    assert found
    assert len(found) == len(set(found))


def test_the_same_figure_is_the_same_bytes() -> None:
    assert every_figure("road") == every_figure("road")
