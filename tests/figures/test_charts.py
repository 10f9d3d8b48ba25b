"""What figures show: dots at their values, bands, heat maps, a matrix, norm shares; and that all can be told apart."""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from ssl_seg.figures import charts
from ssl_seg.figures.charts import Band, Change, Row, Series, Style
from ssl_seg.figures.svg import COLOURS, to_png, to_svg
from ssl_seg.figures.svg import SVG as NAMESPACE
from ssl_seg.norm.convert import Shares

SVG = f"{{{NAMESPACE}}}"


def texts(svg: str) -> list[str]:
    """What a reader can read in a figure."""
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def dots(labels: list[str], name: str = "dots", values: tuple[float, ...] = (1.0, 2.0, 4.0)) -> str:
    return charts.dots(name, [Row(label, values, Style("blue")) for label in labels], "mIoU, %", "about")


def confusion(counts: np.ndarray, names: list[str]) -> str:
    return charts.confusion("matrix", counts, names, "about")


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    shares = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_everything_stands_out_from_the_paper(scheme: int) -> None:
    paper = COLOURS["paper"][scheme]
    least = {"ink": 7.0, "muted": 4.5, **dict.fromkeys(("base", *charts.GROUP_COLOURS), 3.0)}
    for name, ratio in least.items():
        assert contrast(COLOURS[name][scheme], paper) >= ratio, name
    assert contrast(COLOURS["on_cell"][scheme], COLOURS["cell"][scheme]) >= 4.5


def test_groups_look_different_and_baselines_are_grey() -> None:
    found = charts.styles([True, True] + [False] * 30)
    assert len(set(found)) == 32
    assert [style.colour for style in found[:2]] == ["base", "base"]
    assert "base" not in {style.colour for style in found[2:]}
    assert charts.styles([False, True])[0] == charts.styles([False])[0]


def test_every_run_is_a_dot_at_its_value() -> None:
    marks = ElementTree.fromstring(dots(["a"])).iter(f"{SVG}use")
    x = sorted(float(mark.get("x")) for mark in marks)
    assert len(x) == 3
    assert (x[1] - x[0]) * 2 == pytest.approx(x[2] - x[1], rel=1e-3), "values 1, 2 and 4"


def test_long_labels_are_wrapped_whole() -> None:
    label = " ".join(f"train.key_{number}=0.{number}" for number in range(20))
    lines = texts(dots([label]))
    assert max(len(line) for line in lines) <= charts.LABEL_WIDTH
    assert all(word in " ".join(lines) for word in label.split())


def test_a_class_without_figures_is_said_to_be_absent_and_one_of_zero_is_a_dot() -> None:
    series = [Series(((0.0,), (), (50.0,)), Style())]
    svg = charts.classes("classes", ["pole", "train", "road"], series, "IoU", "about")
    assert texts(svg).count("absent") == 1
    assert len(re.findall("<use ", svg)) == 2


def test_the_mean_line_ends_where_the_first_run_ends() -> None:
    steps, values = charts.mean_line([([1, 2, 3], [1.0, 2.0, 3.0]), ([1, 2], [3.0, 6.0])])
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [2.0, 4.0]


def test_thinning_keeps_the_mean_and_leaves_gaps() -> None:
    values = np.linspace(0, 1, 4 * charts.POINTS)
    steps, means = charts.thin(range(len(values)), values)
    assert len(steps) == len(means) == charts.POINTS
    assert means.mean() == pytest.approx(values.mean())
    values[:8] = np.nan
    _, means = charts.thin(range(len(values)), values)
    assert np.isnan(means[:2]).all()
    assert np.isfinite(means[2:]).all()
    assert charts.thin([], [])[0].size == 0


def test_a_confusion_matrix_shows_shares_of_each_row() -> None:
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 2, 998]])
    shown = texts(confusion(counts, ["sky", "pole", "road"]))
    assert [text for text in shown if text.isdigit()] == ["75", "25", "100"]
    assert shown.count("no such pixel") == 1


def test_a_matrix_of_many_classes_stays_small_and_names_some() -> None:
    counts = np.eye(150, dtype=int) * 7
    svg = confusion(counts, [f"class {number}" for number in range(150)])
    assert len(svg) < 60_000
    assert svg.count("data:image/png") == 1
    named = [text for text in texts(svg) if text.startswith("class")]
    assert 20 <= len(named) <= 2 * charts.NAMED


def test_the_shares_picture_shows_each_share_in_its_colour() -> None:
    layers = [Shares("a", 8, (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)), Shares("b", 8, (0.0, 1.0, 0.0), (0.5, 0.0, 0.5))] * 8
    figure = charts.norm_shares({"encoder": layers}, ("instance", "layer", "batch"))
    drawn = Image.open(io.BytesIO(to_png(figure))).convert("RGB")
    halves = np.split(np.asarray(drawn), 2, axis=1)
    colours = [tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5)) for colour, _ in charts.SHARE_COLOURS]
    counts = [[int((half == colour).all(-1).sum()) for colour in colours] for half in halves]
    row = (counts[1][0] + counts[1][2]) / 16  # pixels of a whole bar
    assert counts[0] == pytest.approx([8 * row, 8 * row, 0], abs=row)
    assert counts[1] == pytest.approx([4 * row, 0, 12 * row], abs=row)


def test_the_shares_of_a_page_keep_their_colours_and_take_its_ink() -> None:
    figure = charts.norm_shares({"encoder": [Shares("a", 8, (0.5, 0.3, 0.2), (0.2, 0.3, 0.5))]}, ("i", "l", "b"))
    svg = to_svg(figure, "norms", "about")
    assert all(colour.lower() in svg for colour, _ in charts.SHARE_COLOURS)
    assert "var(--ink)" in svg
    assert "50%" in texts(svg)


def bands(places: tuple[float, ...], by_logarithm: bool) -> list[tuple[str, float]]:
    """The ticks below the figure, with where they stand."""
    line = Band(places, ((1.0,),) * len(places), (None,) * len(places), Style())
    svg = charts.bands("bands", [line], "labels.count", "about", (0.0, 2.0), by_logarithm=by_logarithm)
    found = re.findall(r'x="([0-9.]+)"[^>]*>([0-9]+)</text>', svg)
    return [(text, float(x)) for x, text in found if float(text) in places]


def test_ticks_stand_where_values_are_known_evenly_by_their_ratio() -> None:
    for by_logarithm in (True, False):
        ticks = bands((5.0, 10.0, 20.0, 40.0), by_logarithm)
        assert [text for text, _ in ticks] == ["5", "10", "20", "40"]
        steps = np.diff([x for _, x in ticks])
        assert np.allclose(steps / steps[0], 1.0 if by_logarithm else [1, 2, 4], rtol=1e-3)


def test_figures_of_one_reach_have_one_scale() -> None:
    def zero(values: tuple[float, ...]) -> str:
        line = Band((1.0, 2.0), (values, values), (None, None), Style())
        svg = charts.bands("bands", [line], "steps", "about", (-5.0, 5.0), zero=True)
        return re.search(r'<text[^>]*y="([0-9.]+)"[^>]*>0</text>', svg)[1]

    assert zero((1.0, 2.0)) == zero((-4.0,))


def test_a_forecast_and_an_arrow_stay_within_the_figure() -> None:
    style = charts.styles([False])[0]
    ahead = ((10.0, 0.9, 1.0, 1.1), (40.0, 0.5, 1.0, 1.5))
    line = Band((5.0, 10.0), ((1.0,), (1.0,)), (None, None), style, ahead)

    def svg(**more: Any) -> str:
        return charts.bands("bands", [line], "labels.count", "about", (0.0, 2.0), by_logarithm=True, **more)

    assert "40" in texts(svg())
    reaches = [charts.Arrow(1.0, 5.0, tip, 5.0, high, style) for tip, high in ((8.0, 9.0), (np.inf, np.inf))]
    short, open_ended = (svg(arrow=arrow) for arrow in reaches)
    assert len({svg(), short, open_ended}) == 3
    assert not re.search(r"nan|inf", open_ended.replace("infinite", ""))


def test_where_no_interval_is_known_none_is_drawn() -> None:
    def shapes(intervals: tuple[tuple[float, float] | None, ...], values: tuple[tuple[float, ...], ...]) -> int:
        line = Band((1.0, 2.0, 3.0), values, intervals, Style())
        return charts.bands("bands", [line], "steps", "about", (0.0, 3.0)).count("<path")

    known = ((1.0, 2.0),) * 3
    whole = shapes(((0.5, 2.5),) * 3, known)
    assert shapes(((0.5, 2.5), None, None), known) == whole - 2
    assert shapes((None, None, None), known) == whole - 4, "and no band"
    charts.bands("bands", [Band((1.0,), ((),), (None,), Style())], "steps", "about", (0.0, 0.0))


def test_a_map_of_changes_tells_more_from_less_and_what_is_sure() -> None:
    cells = [[Change(2.0, True), Change(-2.0, False)], [None, Change(0.0, False)]]
    svg = charts.changes("changes", ["sky", "road"], ["5", "10"], cells, "labels.count", "about", 2.0)
    shown = texts(svg)
    assert [text for text in shown if text[0] in "+\N{MINUS SIGN}\N{EN DASH}"] == [
        "+2.0", "\N{MINUS SIGN}2.0", "\N{EN DASH}", "+0.0",
    ]  # fmt: skip
    assert re.findall(r"fill: var\(--(cell|vermilion)\)[^\"]*opacity: ([0-9.]+)", svg)[:2] == [
        ("cell", "0.62"),
        ("vermilion", "0.62"),
    ]
    bold = [
        text
        for weight, text in re.findall(r'style="([^"]*)"[^>]*>([^<]+)</text>', svg)
        if "bold" in weight or "700" in weight
    ]
    assert bold == ["+2.0"]
    half = charts.changes("changes", ["sky"], ["5"], [[Change(1.0, False)]], "labels.count", "about", 2.0)
    assert "opacity: 0.31" in half, "maps of one largest change share their colours"
    charts.changes("changes", ["sky"], ["5"], [[Change(0.0, False)]], "labels.count", "about", 0.0)


def test_cosines_over_time_are_a_picture_of_one_size() -> None:
    def drawn(count: int) -> str:
        values = np.linspace(-1.0, 1.0, 3 * count).reshape(3, count)
        values[2, 0] = np.nan
        return charts.cosines("affinity", ["encoder", "stem", "layer1"], range(0, 10 * count, 10), values, "about")

    few, many = drawn(20), drawn(2000)
    assert {"encoder", "stem", "layer1", "step", "190"} <= set(texts(few))
    assert len(many) < 2 * len(few), "neighbours are averaged"
    assert "NaN" not in few
    charts.cosines("affinity", ["encoder"], [5], np.array([[0.1]]), "about")


def test_a_reliability_diagram_shows_what_was_said_what_held_and_of_how_many_pixels() -> None:
    lines = [
        charts.Reliability([65.0, 97.0], [51.0, 90.0], [10.0, 90.0], Style("blue")),
        charts.Reliability([62.0], [60.0], [100.0], Style("blue", dash="--")),
    ]
    svg = charts.reliability("reliability", lines, "about")
    assert {"50", "100", "and is right, %"} <= set(texts(svg)), "the axes begin below the least"
    assert charts.reliability("reliability", lines[:1], "about").count("<use") < svg.count("<use")
    charts.reliability("reliability", [charts.Reliability([], [], [], Style())], "about")


def test_the_error_of_what_is_kept_is_drawn_from_all_to_nothing() -> None:
    line = charts.Curve((([0.0, 50.0, 99.0], [12.0, 3.0, 0.5]),), Style("blue"))
    assert {"0", "100", "least sure pixels left out, %"} <= set(texts(charts.leaving_out("left", [line], "about")))
