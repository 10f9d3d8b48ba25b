"""What a report's figures show: dots, curves, bands, heat maps, confusion matrices, and the shares of switch norm.

`svg` makes them files. Titles and legends are the page's: HTML wraps a long label, a figure does not.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Affine2D

from ssl_seg.figures.svg import light, plain, to_svg, with_minus

if TYPE_CHECKING:
    from ssl_seg.norm.convert import Shares

GROUP_COLOURS = ("blue", "vermilion", "green", "purple", "amber", "sky")
GROUND_COLOURS = ("base", "vermilion", "green", "purple", "amber", "sky")  # of a map, under what is blue
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
# Of the bar and of the number on it, the same on any paper.
SHARE_COLOURS = (("#0173B2", "white"), ("#E69F00", "black"), ("#009E73", "white"))
ROW, MARGIN, WIDTH = 0.2, 0.9, 10.0  # inches of the shares' picture: of a layer, around all of them, of the whole
NARROW = 0.06  # a share with less room than its own number
DOTS_PER_INCH = 130

PANEL = 4.4  # inches: at 1/72 inch a unit, text of 9 can be read where a telephone makes the panel 340 pixels wide
NARROW_PANEL = 3.7  # where three stand beside each other
SMALL, TEXT = 8.0, 9.0  # of numbers and of words
LABEL_WIDTH = 52  # letters of a label in a line
NUMBERED = 16  # classes up to which a confusion matrix has its numbers
NAMED = 48  # and up to which each class has its name
FEW_POINTS = 400  # of a map's ground: more cover each other
POINTS = 80  # of a line; more cannot be told apart in a panel
LEAST_DOT, MOST_DOT = 9.0, 220.0  # square points: of a bin with hardly a pixel, and what one with all has more
DEEPEST = 0.5  # the cosine of two tasks' gradients that has the deepest colour
WIDE_RANGE = 8  # from this ratio on a loss is drawn by its logarithm
Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Style:
    """How one group looks in every figure: colour by name, marker, dash."""

    colour: str = "ink"
    marker: str = "o"
    dash: str = "-"

    @property
    def hex(self) -> str:
        return light(self.colour)


@dataclass(frozen=True)
class Row:
    """A labelled line of dots; `note` stands at its right end."""

    label: str
    values: tuple[float, ...]
    style: Style
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """A figure over steps for the runs of one group: `(steps, values)` of each, nan where there is no number."""

    runs: tuple[tuple[Sequence[float], Sequence[float]], ...]
    style: Style


@dataclass(frozen=True)
class Reliability:
    """Of each bin of confidence that holds pixels, in per cent: what was said, what held, and its share of all."""

    said: Numbers
    held: Numbers
    shares: Numbers
    style: Style


@dataclass(frozen=True)
class Series:
    """For each class the figures of a group's runs, none where the class is absent."""

    values: tuple[tuple[float, ...], ...]
    style: Style


@dataclass(frozen=True)
class Band:
    """A figure of one group at several places of an axis: every value there, and the interval of their mean."""

    places: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]  # at each place; none where nothing is known
    intervals: tuple[tuple[float, float] | None, ...]
    style: Style
    ahead: tuple[tuple[float, float, float, float], ...] = ()  # places beyond, with low, middle and high of a forecast


@dataclass(frozen=True)
class Arrow:
    """How far apart two groups reach the same height; `low` and `high` are where its tip may be."""

    height: float
    start: float
    tip: float
    low: float
    high: float
    style: Style


@dataclass(frozen=True)
class Change:
    """A cell of a heat map: how much more or less, and whether its interval leaves 0 out."""

    value: float
    is_sure: bool


def styles(baselines: Sequence[bool]) -> list[Style]:
    """A style a group: grey for the baselines, else colours in turn; by marker and dash more can be told apart."""
    found, greys, coloured = [], 0, 0
    for is_baseline in baselines:
        if is_baseline:
            found.append(Style("base", MARKERS[greys % len(MARKERS)], DASHES[greys % len(DASHES)]))
            greys += 1
        else:
            colour, lap = GROUP_COLOURS[coloured % len(GROUP_COLOURS)], coloured // len(GROUP_COLOURS)
            found.append(Style(colour, MARKERS[lap % len(MARKERS)], DASHES[lap % len(DASHES)]))
            coloured += 1
    return found


# ---- figures of a report ----


def swatch(style: Style) -> str:
    """The mark of a group, for legends and tables: it may stand on a page many times, so nothing in it has a name."""
    figure = Figure(figsize=(0.36, 0.16))
    panel = figure.add_axes((0, 0, 1, 1), xlim=(0, 0.36), ylim=(-0.08, 0.08))  # inches
    panel.set_axis_off()
    panel.plot([0, 0.36], [0, 0], color=style.hex, linestyle=style.dash, linewidth=1.4, clip_on=False)
    marker = MarkerStyle(style.marker)
    outline = marker.get_path().transformed(marker.get_transform() + Affine2D().scale(0.084).translate(0.18, 0))
    panel.add_patch(PathPatch(outline, facecolor=style.hex, linewidth=0, clip_on=False))
    return to_svg(figure, "mark", None)


def dots(name: str, rows: Sequence[Row], axis: str, about: str, zero: bool = False) -> str:
    """Every single value of each row on one common axis, the mean as an upright stroke; `zero` draws a line there."""
    labels = [textwrap.wrap(plain(row.label), LABEL_WIDTH - len(row.note)) or [""] for row in rows]
    heights = [0.33 + 0.15 * len(lines) for lines in labels]
    figure, panel = _panel(sum(heights), bottom=0.46, left=0.12, right=0.16)
    top = 0.0
    for row, lines, height in zip(rows, labels, heights, strict=True):
        middle = top + height - 0.21
        panel.axhline(middle, color=light("line"), linewidth=0.8, zorder=0)
        if zero:
            panel.plot([0, 0], [middle - 0.14, middle + 0.14], color=light("muted"), linewidth=1.0, zorder=1)
        panel.plot(row.values, [middle] * len(row.values), **_dot(row.style, 5.5), alpha=0.72)
        if len(row.values) > 1:
            panel.plot([np.mean(row.values)] * 2, [middle - 0.1, middle + 0.1], color=row.style.hex, linewidth=2.2)
        for number, line in enumerate(lines):
            _beside(panel, 0.0, top + 0.06 + 0.15 * number, line, "left", "ink")
        _beside(panel, 1.0, top + 0.06, row.note, "right", "muted")
        top += height
    panel.set_ylim(top, -0.02)
    panel.set_yticks([])
    every = [value for row in rows for value in row.values]
    _fit_x(panel, [*every, 0.0] if zero else every, zero)
    _name_axis(panel, axis)
    return to_svg(figure, name, about)


def curves(name: str, lines: Sequence[Curve], about: str, by_logarithm: bool = False) -> str:
    """Figures over steps: the mean of a group's runs as a strong line, each single run as a thin one."""
    figure, panel = _panel(1.75, bottom=0.44, left=0.56, right=0.14, top=0.1, width=NARROW_PANEL)
    for curve in lines:
        for steps, values in curve.runs if len(curve.runs) > 1 else ():
            panel.plot(*thin(steps, values), color=curve.style.hex, linewidth=0.7, alpha=0.38)
        steps, values = thin(*mean_line(curve.runs))
        alone: dict[str, Any] = {"marker": curve.style.marker, "markersize": 4} if len(steps) < 8 else {}
        panel.plot(steps, values, color=curve.style.hex, linewidth=1.7, linestyle=curve.style.dash, **alone)
    values = [value for curve in lines for _, own in curve.runs for value in own if np.isfinite(value)]
    if by_logarithm and values and min(values) > 0 and max(values) > WIDE_RANGE * min(values):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        panel.yaxis.set_minor_locator(NullLocator())
    else:
        panel.yaxis.set_major_locator(MaxNLocator(5))
    panel.yaxis.set_major_formatter(FuncFormatter(_short))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(axis="y", color=light("line"), linewidth=0.6)
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    panel.set_xlabel("step", fontsize=TEXT, color=light("muted"))
    return to_svg(figure, name, about)


def reliability(name: str, lines: Sequence[Reliability], about: str) -> str:
    """How often right over how sure: on the diagonal a group is as good as it says, below it is over-confident.

    The area of a dot is the bin's share of the pixels (Guo et al. 2017, figure 1, with the counts in it).
    """
    side = PANEL - 0.7
    figure, panel = _panel(side, bottom=0.46, left=0.5, right=0.2, top=0.1)
    panel.plot([0, 100], [0, 100], color=light("muted"), linewidth=1.0, linestyle=":")
    for line in lines:
        panel.plot(line.said, line.held, color=line.style.hex, linewidth=1.3, linestyle=line.style.dash)
        areas = LEAST_DOT + MOST_DOT * np.asarray(line.shares) / 100
        looks = {"marker": line.style.marker, "color": line.style.hex, "alpha": 0.75, "linewidths": 0}
        panel.scatter(line.said, line.held, s=areas, clip_on=False, **looks)
    least = min((float(np.min(own)) for line in lines for own in (line.said, line.held) if len(own)), default=0.0)
    low = min(90.0, max(0.0, 10 * math.floor(least / 10)))
    panel.set(xlim=(low, 100), ylim=(low, 100))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(FuncFormatter(_short))
    panel.grid(color=light("line"), linewidth=0.6)
    _name_axis(panel, "it says, % (the share of the class taken)")
    panel.set_ylabel("and is right, %", fontsize=TEXT, color=light("muted"))
    return to_svg(figure, name, about)


def leaving_out(name: str, lines: Sequence[Curve], about: str) -> str:
    """The error of what is kept, in per cent, as the least sure pixels are left out: a risk-coverage curve."""
    figure, panel = _panel(PANEL - 0.7, bottom=0.46, left=0.5, right=0.2, top=0.1)
    for line in lines:
        for shares, errors in line.runs:
            panel.plot(shares, errors, color=line.style.hex, linewidth=1.7, linestyle=line.style.dash)
    panel.set_xlim(0, 100)
    panel.set_ylim(bottom=0)
    panel.xaxis.set_major_locator(MaxNLocator(6))
    panel.yaxis.set_major_locator(MaxNLocator(6))
    panel.yaxis.set_major_formatter(FuncFormatter(_short))
    panel.grid(color=light("line"), linewidth=0.6)
    _name_axis(panel, "least sure pixels left out, %")
    panel.set_ylabel("wrong among the others, %", fontsize=TEXT, color=light("muted"))
    return to_svg(figure, name, about)


def bands(
    name: str,
    lines: Sequence[Band],
    axis: str,
    about: str,
    reach: tuple[float, float],
    by_logarithm: bool = False,
    zero: bool = False,
    arrow: Arrow | None = None,
) -> str:
    """Figures over a numeric axis: mean as a line, its interval as a band, every value as a small dot.

    Only places that have values are ticks. Dots of several groups stand beside each other, or they would hide each
    other. `reach` is what the upright axis holds, so that figures can share it. `zero` draws a line there, and numbers
    have signs. An arrow that reaches out of the figure ends at its edge.
    """
    figure, panel = _panel(2.15, bottom=0.46, left=0.5, right=0.14, top=0.1)
    places = sorted({place for line in lines for place in (*line.places, *(own[0] for own in line.ahead))})
    to_axis, from_axis = (np.log, np.exp) if by_logarithm else (np.array, np.array)
    length = float(np.ptp(to_axis(places))) or 1.0
    for lane, line in enumerate(lines):
        aside = 0.016 * length * (lane - (len(lines) - 1) / 2)
        means = [float(np.mean(values)) if values else np.nan for values in line.values]
        low, high = np.array([own or (np.nan, np.nan) for own in line.intervals]).reshape(-1, 2).T
        panel.fill_between(line.places, low, high, color=line.style.hex, alpha=0.15, linewidth=0)
        panel.plot(line.places, means, color=line.style.hex, linewidth=1.7, linestyle=line.style.dash)
        panel.plot(line.places, means, **_dot(line.style, 4.6))
        for place, values, own in zip(line.places, line.values, line.intervals, strict=True):
            beside = [float(from_axis(to_axis(place) + aside))]
            panel.plot(beside * len(values), values, **_dot(line.style, 2.4), alpha=0.5)
            if own is not None:  # a band has no width at a single place
                panel.plot(beside * 2, own, color=line.style.hex, linewidth=0.8, alpha=0.6)
        if line.ahead:
            at, low, middle, high = np.array(line.ahead).T
            panel.fill_between(at, low, high, color=line.style.hex, alpha=0.08, linewidth=0)
            panel.plot(at, middle, color=line.style.hex, linewidth=1.3, linestyle=":")
    if zero:
        panel.axhline(0.0, color=light("muted"), linewidth=1.0, zorder=1)
    if by_logarithm:
        panel.set_xscale("log")
    ends = from_axis(to_axis([places[0], places[-1]]) + np.array([-0.07, 0.07]) * length)
    panel.set_xlim(*ends)
    if arrow is not None:
        low, tip, high = np.clip([arrow.low, arrow.tip, arrow.high], *ends)
        panel.plot([low, high], [arrow.height] * 2, color=arrow.style.hex, linewidth=6, alpha=0.25)
        shape = {"arrowstyle": "-|>", "color": arrow.style.hex, "shrinkA": 0, "shrinkB": 0}
        panel.annotate("", (tip, arrow.height), (arrow.start, arrow.height), arrowprops=shape)
    room = 0.05 * (reach[1] - reach[0]) or 0.5
    panel.set_ylim(reach[0] - room, reach[1] + room)
    panel.set_xticks(places, [_short(place) for place in places])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(MaxNLocator(6))
    panel.yaxis.set_major_formatter(FuncFormatter(_signed if zero else _short))
    panel.grid(axis="y", color=light("line"), linewidth=0.6)
    _name_axis(panel, axis)
    return to_svg(figure, name, about)


def changes(
    name: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[Change | None]],
    axis: str,
    about: str,
    largest: float,
) -> str:
    """A heat map of signed numbers, [row, column]: more is blue, less is orange, the deeper the farther from 0.

    `largest` is what has the deepest colour, so that several maps can share it. Numbers whose interval leaves 0 out are
    bold; None is a dash.
    """
    words = [_cut(plain(own), 22) for own in rows]
    heads = [_cut(plain(own), 18) for own in columns]
    upright = max(len(head) for head in heads) > 6
    left = 0.14 + 0.07 * max(len(word) for word in words)
    top = 0.14 + (0.07 * max(len(head) for head in heads) if upright else 0.1)
    width = max(PANEL, left + 0.42 * len(columns) + 0.1)
    figure, panel = _panel(0.19 * len(rows), bottom=0.3, left=left, right=0.1, top=top, width=width)
    for row, own in enumerate(cells):
        for column, change in enumerate(own):
            text = {"ha": "center", "va": "center", "fontsize": SMALL, "color": light("ink")}
            if change is None:
                panel.text(column, row, "\N{EN DASH}", **text)
                continue
            depth = 0.62 * min(1.0, abs(change.value) / largest) if largest else 0.0
            colour = light("cell" if change.value > 0 else "vermilion")
            panel.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, alpha=depth, linewidth=0))
            shown = with_minus(f"{change.value:+.1f}")
            panel.text(column, row, shown, fontweight="bold" if change.is_sure else "normal", **text)
    panel.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    panel.tick_params(labeltop=True, labelbottom=False)
    panel.set_xticks(range(len(columns)), heads, fontsize=SMALL, rotation=90 if upright else 0)
    panel.set_yticks(range(len(rows)), words, fontsize=SMALL)
    _name_axis(panel, axis)
    return to_svg(figure, name, about)


def cosines(name: str, rows: Sequence[str], steps: Sequence[float], values: np.ndarray, about: str) -> str:
    """A heat map of cosines `(rows, steps)` over time: blue where they are above 0, orange below, none where nan.

    The colour is deepest from DEEPEST on: cosines in thousands of dimensions are small. Neighbours in time are averaged
    where there are more than can be told apart.
    """
    places, *_ = zip(*(thin(steps, own) for own in values), strict=True)
    shown = np.stack([thin(steps, own)[1] for own in values])
    words = [_cut(plain(own), 18) for own in rows]
    left = 0.14 + 0.07 * max(len(word) for word in words)
    figure, panel = _panel(0.19 * len(rows), bottom=0.4, left=left, right=0.1)
    rgb = [[int(light(own)[start : start + 2], 16) / 255 for start in (1, 3, 5)] for own in ("cell", "vermilion")]
    depth = np.nan_to_num(np.minimum(1.0, np.abs(shown) / DEEPEST))
    pixels = np.concatenate([np.where(shown[..., None] > 0, *rgb), depth[..., None]], axis=-1)
    panel.imshow(pixels, interpolation="none", aspect="auto")
    for edge in (-0.5, 0.5, len(rows) - 0.5):  # the whole encoder stands apart from its stages
        panel.axhline(edge, color=light("line"), linewidth=0.6)
    chosen = np.unique(np.linspace(0, len(places[0]) - 1, 5).round().astype(int))
    panel.set_xticks(chosen, [f"{places[0][index]:,.0f}" for index in chosen], fontsize=SMALL)
    panel.set_yticks(range(len(rows)), words, fontsize=SMALL)
    _name_axis(panel, "step")
    return to_svg(figure, name, about)


def classes(
    name: str, names: Sequence[str], series: Sequence[Series], axis: str, about: str, zero: bool = False
) -> str:
    """A row a class, in the given order: for each group a mark at the mean, a line from the least to the most."""
    lane = 0.1 if len(series) <= len(GROUP_COLOURS) else 0.075
    row = max(0.24, lane * len(series) + 0.06)
    words = [_cut(plain(own), 22) for own in names]
    left = 0.14 + 0.07 * max(len(word) for word in words)
    is_long = len(names) > NUMBERED
    figure, panel = _panel(row * len(names), bottom=0.46, left=left, right=0.16, top=0.24 if is_long else 0.02)
    panel.tick_params(labeltop=is_long)
    for index in range(len(names)):
        panel.axhline(index - 0.5, color=light("line"), linewidth=0.6, zorder=0)
        offsets = np.linspace(-0.5, 0.5, len(series) + 2)[1:-1]
        for own, offset in zip(series, offsets, strict=True):
            values = own.values[index]
            if not values:
                continue
            panel.plot([min(values), max(values)], [index + offset] * 2, color=own.style.hex, linewidth=1.3, alpha=0.5)
            panel.plot([np.mean(values)], [index + offset], **_dot(own.style, 4.6))
        if not any(own.values[index] for own in series):
            _beside(panel, 0.01, index, "absent", "left", "muted", style="italic")
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_yticks(range(len(names)), words, fontsize=SMALL)
    every = [value for own in series for values in own.values for value in values]
    _fit_x(panel, [*every, 0.0], zero)
    if zero:
        panel.axvline(0.0, color=light("muted"), linewidth=1.0, zorder=1)
    panel.grid(axis="x", color=light("line"), linewidth=0.6)
    _name_axis(panel, axis)
    return to_svg(figure, name, about)


def confusion(name: str, counts: np.ndarray, names: Sequence[str], about: str) -> str:
    """`draw_confusion` to stand inside an HTML page."""
    return to_svg(draw_confusion(counts, names), name, about)


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """A heat map of `(K, K)` pixel counts, [truth, prediction], each row as shares of its truth.

    Numbers are per cent, those under half a per cent left out. More than NUMBERED classes have none, and a colour by
    the square root of the share; of more than NAMED only some have their name.
    """
    number = len(names)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    words = [_cut(plain(own), 18) for own in names]
    left = 0.36 + 0.066 * max(len(word) for word in words)
    side = PANEL - left - 0.1 if number <= NUMBERED else 5.6
    figure, panel = _panel(side, bottom=left - 0.02, left=left, right=0.1, width=side + left + 0.1, top=0.06)
    colour = [int(light("cell")[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    if number <= NUMBERED:
        for truth, prediction in np.argwhere(shares > 0).tolist():
            share = shares[truth, prediction]
            cell = Rectangle((prediction - 0.5, truth - 0.5), 1, 1, facecolor=light("cell"), alpha=share, linewidth=0)
            panel.add_patch(cell)
            ink = light("on_cell" if share > 0.7 else "ink")
            if share >= 0.005:
                text = {"ha": "center", "va": "center", "fontsize": SMALL, "color": ink}
                panel.text(prediction, truth, f"{share * 100:.0f}", **text)
    else:
        # One value a cell, and no smoothing: as paths the 22,500 cells of 150 classes would be megabytes.
        # By the square root, or a class that is spread over many others would look as if it were nowhere.
        pixels = np.concatenate([np.broadcast_to(colour, (number, number, 3)), np.sqrt(shares)[..., None]], axis=-1)
        panel.imshow(pixels, interpolation="none", aspect="auto")
    for truth in np.flatnonzero(totals[:, 0] == 0).tolist():
        if number <= NAMED:
            kind = {"ha": "left", "va": "center", "fontsize": SMALL, "color": light("muted"), "style": "italic"}
            panel.text(-0.35, truth, "no such pixel", **kind)
    every = 1 if number <= NAMED else -(-number // NAMED)
    size = SMALL if number <= NUMBERED else 7.0
    panel.set_xticks(range(0, number, every), words[::every], fontsize=size, rotation=90)
    panel.set_yticks(range(0, number, every), words[::every], fontsize=size)
    panel.set(xlim=(-0.5, number - 0.5), ylim=(number - 0.5, -0.5))
    for edge in np.arange(number + 1) - 0.5 if number <= NUMBERED else (-0.5, number - 0.5):
        panel.axvline(edge, color=light("line"), linewidth=0.6)
        panel.axhline(edge, color=light("line"), linewidth=0.6)
    panel.tick_params(length=0)
    panel.set_xlabel("predicted", fontsize=TEXT, color=light("muted"))
    panel.set_ylabel("truth", fontsize=TEXT, color=light("muted"))
    return figure


def plane(name: str, groups: Mapping[str, np.ndarray], about: str) -> str:
    """`draw_map` to stand inside an HTML page."""
    return to_svg(draw_map(groups), name, about)


def draw_map(groups: Mapping[str, np.ndarray], grounds: int = 1) -> Figure:
    """Images as points `(N, 2)`, alike ones close together; the first group lies on top, the last `grounds` below."""
    side = 5.6
    names = [f"{_cut(plain(name), LABEL_WIDTH)} ({len(points)})" for name, points in groups.items()]
    columns = min(len(names), 3) if max(map(len, names)) < LABEL_WIDTH / 2 else 1
    bottom = 0.3 + 0.2 * math.ceil(len(names) / columns)
    figure, panel = _panel(side, bottom=bottom, left=0.1, right=0.1, width=side + 0.2, top=0.1)
    above = len(names) - grounds
    looks = [Style("vermilion", "o"), Style("blue", "s")][-above:]
    looks += [Style(GROUND_COLOURS[place % len(GROUND_COLOURS)], ".") for place in range(grounds)]
    for place, (name, points, style) in reversed([*enumerate(zip(names, groups.values(), looks, strict=True))]):
        is_ground = place >= above
        size = 7.0 if not is_ground else 8.0 if len(points) < FEW_POINTS else 4.0
        panel.plot(
            *points.T, **_dot(style, size), alpha=0.5 if is_ground else 1.0, label=name, zorder=len(names) - place
        )
    panel.set_xticks([])
    panel.set_yticks([])
    anchor = (0.5, 0.0)  # below the panel; the reverse of how they are drawn is the order of `groups`
    looks_of_names = {"frameon": False, "fontsize": TEXT, "labelcolor": light("ink")}
    panel.legend(loc="upper center", bbox_to_anchor=anchor, ncols=columns, reverse=True, **looks_of_names)
    return figure


def thin(steps: Numbers, values: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points of a line: means of neighbours, nan where none of them is a number."""
    chunks = min(POINTS, len(steps))
    if chunks == 0:
        return np.zeros(0), np.zeros(0)
    places = np.array_split(np.asarray(steps, dtype=float), chunks)
    figures = np.array_split(np.asarray(values, dtype=float), chunks)
    return np.array([own.mean() for own in places]), np.array([_mean_of_finite(own) for own in figures])


def mean_line(runs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean at every step that all runs have: it ends where the first ends, and does not jump when one drops out."""
    tables = [dict(zip(steps, values, strict=True)) for steps, values in runs]
    common = sorted(set(tables[0]).intersection(*tables[1:])) if tables else []
    means = [float(np.mean([table[step] for table in tables])) for step in common]
    return np.array(common, dtype=float), np.array(means)


# ---- norm shares ----


def norm_shares(parts: Mapping[str, Sequence[Shares]], kinds: Sequence[str]) -> Figure:
    """A row per layer, first on top, under its part's name; a stacked bar of the shares of the `kinds` for the mean,
    one for the variance."""
    layers = [layer for own in parts.values() for layer in own]
    heads = _head_rows(parts)
    rows = [head + 1 + index for head, own in zip(heads, parts.values(), strict=True) for index in range(len(own))]
    height = MARGIN + ROW * (len(layers) + len(parts))
    figure = Figure(figsize=(WIDTH, height), dpi=DOTS_PER_INCH, layout="constrained")
    of_mean, of_var = figure.subplots(1, 2, sharey=True)
    bars = _draw_bars(of_mean, "shares in the mean", rows, [layer.mean for layer in layers])
    _draw_bars(of_var, "shares in the variance", rows, [layer.var for layer in layers])
    names = [f"{layer.name}  ({layer.channels})" for layer in layers]
    of_mean.set_yticks(rows, names, fontsize=7)
    of_mean.set_ylim(rows[-1] + 0.7, -0.7)
    for part, row in zip(parts, heads, strict=True):
        of_mean.text(0.0, row, part, fontsize=8, fontweight="bold", va="center", color=light("ink"))
    of_mean.text(-0.01, heads[0], "layer  (channels)", fontsize=7, ha="right", va="center", color=light("muted"))
    handles: Any = bars  # matplotlib draws a legend of bars too; its annotation knows single shapes alone
    legend = figure.legend(handles, kinds, loc="outside upper center", ncols=len(kinds), fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_color(light("ink"))
    return figure


def _draw_bars(panel: Axes, title: str, rows: Sequence[float], values: Sequence[Sequence[float]]) -> list[BarContainer]:
    bars = []
    lefts = [0.0] * len(rows)
    for index, (colour, ink) in enumerate(SHARE_COLOURS):
        shares = [value[index] for value in values]
        bars.append(panel.barh(rows, shares, left=lefts, color=colour, height=0.86))
        for row, left, share in zip(rows, lefts, shares, strict=True):
            if share >= NARROW:
                panel.text(left + share / 2, row, f"{share:.0%}", fontsize=6, color=ink, ha="center", va="center")
        lefts = [left + share for left, share in zip(lefts, shares, strict=True)]
    panel.set_title(title, fontsize=9, color=light("ink"))
    panel.set_xlim(0, 1)
    panel.set_xticks([0, 1 / 3, 2 / 3, 1], ["0", "1/3", "2/3", "1"], fontsize=7)
    panel.get_xticklabels()[-1].set_horizontalalignment("right")  # else it is cut off at the edge
    for equal in (1 / 3, 2 / 3):
        panel.axvline(equal, color=light("ink"), linewidth=0.6, linestyle=":")  # where a fresh layer starts
    _plain_axes(panel)
    panel.tick_params(labelsize=7)
    return bars


def _head_rows(parts: Mapping[str, Sequence[Shares]]) -> list[int]:
    """The row of each part's name, above those of its layers."""
    sizes = [len(layers) + 1 for layers in parts.values()]
    return [sum(sizes[:index]) for index in range(len(sizes))]


def _panel(
    height: float, bottom: float, left: float, right: float, top: float = 0.02, width: float = PANEL
) -> tuple[Figure, Axes]:
    """One set of axes of `height` inches with margins of fixed size, whatever its labels are."""
    whole = height + bottom + top
    figure = Figure(figsize=(width, whole))
    box = (left / width, bottom / whole, 1 - (left + right) / width, height / whole)
    panel = figure.add_axes(box)
    _plain_axes(panel)
    return figure, panel


def _plain_axes(panel: Axes) -> None:
    panel.set_facecolor("none")
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0, labelsize=SMALL, labelcolor=light("muted"), color=light("line"))
    panel.set_axisbelow(True)


def _dot(style: Style, size: float) -> dict[str, Any]:
    return {
        "color": style.hex,
        "marker": style.marker,
        "markersize": size,
        "linestyle": "none",
        "markeredgewidth": 0,
        "clip_on": False,
    }


def _beside(panel: Axes, x: float, y: float, text: str, side: str, colour: str, **more: Any) -> None:
    """Text at `x` of the axes' width and `y` of its data."""
    place = panel.get_yaxis_transform()
    panel.text(x, y, text, transform=place, ha=side, va="center", fontsize=TEXT, color=light(colour), **more)


def _name_axis(panel: Axes, name: str) -> None:
    panel.set_xlabel(_cut(plain(name), LABEL_WIDTH), fontsize=TEXT, color=light("muted"))


def _fit_x(panel: Axes, values: Sequence[float], zero: bool) -> None:
    """The axis holds all values with some room, also where they are all the same; with `zero` numbers have signs."""
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    room = 0.06 * (high - low) or max(0.5, 0.02 * abs(high))
    panel.set_xlim(low - room, high + room)
    panel.xaxis.set_major_locator(MaxNLocator(6))
    panel.xaxis.set_major_formatter(FuncFormatter(_signed if zero else _short))


def _short(value: float, _: object = None) -> str:
    return with_minus(f"{value:.4g}")


def _signed(value: float, _: object = None) -> str:
    return "0" if abs(value) < 1e-12 else with_minus(f"{value:+.4g}")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _mean_of_finite(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan
