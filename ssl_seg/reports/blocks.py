"""The page of a report: what it is made of, and how that becomes one HTML file that needs no network.

It has no script and forbids any. Names, labels and config values are foreign text: jinja2 escapes them, and `svg`
those inside figures.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import cv2
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ssl_seg import images
from ssl_seg.evidence.claims import RULES, Answer, count_of, state
from ssl_seg.evidence.compare import Comparison, Group
from ssl_seg.evidence.pairs import Spread
from ssl_seg.figures import charts
from ssl_seg.figures.charts import Style
from ssl_seg.figures.svg import COLOURS, plain
from ssl_seg.leaks import guard
from ssl_seg.runs.folder import RunFolder

SHOWN = 8  # groups with pictures, matrices and config: with those of forty nobody could load the page
OPEN = 3  # of these, unfolded at first
MAX_SIDE = 900  # pixels of a picture's longer side on the page
PAIRS = 20  # of leaking images that are listed
QUALITY = 86  # of JPEG, at full colour resolution: masks have hard coloured edges


@dataclass(frozen=True)
class Text:
    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Heading:
    text: str
    kind: str = "heading"


@dataclass(frozen=True)
class TableRow:
    head: str
    cells: tuple[str, ...]
    mark: Markup | None = None
    link: str | None = None  # where the head leads, relative to the page


@dataclass(frozen=True)
class Table:
    caption: str
    columns: tuple[str, ...]  # the first is that of the heads
    rows: tuple[TableRow, ...]
    words: bool = False  # cells hold text, not numbers
    kind: str = "table"


@dataclass(frozen=True)
class Panel:
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Panels:
    figures: tuple[Panel, ...]
    legend: tuple[tuple[Markup, str], ...] = ()
    shape: Literal["small", "wide", "full"] = "small"
    kind: str = "panels"


@dataclass(frozen=True)
class Shot:
    """A picture with its bytes inside, as a data: URI."""

    source: str
    width: int
    height: int
    about: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    shots: tuple[Shot, ...]
    wide: bool = False
    kind: str = "gallery"


@dataclass(frozen=True)
class Listing:
    text: str
    kind: str = "listing"


@dataclass(frozen=True)
class Fold:
    title: str
    blocks: tuple[Any, ...]
    is_open: bool = False
    mark: Markup | None = None
    kind: str = "fold"


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    blocks: tuple[Any, ...]


@dataclass(frozen=True)
class Arm:
    """A group of a comparison as the page shows it; where nothing is finished yet, a single run."""

    label: str
    style: Style
    mark: Markup
    group: Group | None
    runs: tuple[RunFolder, ...]
    shown: RunFolder  # whose pictures and config stand for all: the median one by the main score

    @property
    def stage(self) -> str:
        return self.runs[0].stage

    @cached_property
    def metrics(self) -> list[list[dict[str, float]]]:
        return [run.metrics() for run in self.runs]


@dataclass(frozen=True)
class Page:
    """What every section is made from."""

    runs: tuple[RunFolder, ...]
    comparison: Comparison
    arms: tuple[Arm, ...]

    @property
    def score(self) -> str | None:
        return self.comparison.main_score

    @property
    def part(self) -> str:
        return "val" if self.score is None else self.score.partition("/")[0]

    def gain(self, arm: Arm, score: str) -> Spread | None:
        return None if arm.group is None else self.comparison.gain(arm.group, score)

    def spread(self, arm: Arm, score: str) -> Spread | None:
        return None if arm.group is None else arm.group.spread(score)


@dataclass(frozen=True)
class Front:
    """What stands above the sections."""

    title: str
    counts: str  # `12 runs in 3 groups`
    told: Answer
    marks: Mapping[str, Markup]  # of the groups that `told` names
    unfinished: tuple[tuple[str, str], ...] = ()  # what has no result, and why
    rules: tuple[str, ...] = RULES


def make_page(runs: Sequence[RunFolder], comparison: Comparison) -> Page:
    """The groups of a comparison with their runs, each with its look."""
    return Page(tuple(runs), comparison, tuple(_arms(comparison, runs)))


def make_front(page: Page, told: Answer) -> Front:
    """The head of a page about runs."""
    marks = {arm.label: arm.mark for arm in page.arms}
    unfinished = tuple((run.name, state(run)) for run in page.runs if not run.is_done)
    return Front(_title(page.runs), _counts(page), told, marks, unfinished)


def render(front: Front, sections: Sequence[Section]) -> bytes:
    """The HTML file; sections without content are left out."""
    environment = Environment(
        loader=PackageLoader("ssl_seg"), autoescape=True, trim_blocks=True, lstrip_blocks=True, auto_reload=False
    )
    text = environment.get_template("report.html").render(
        front=front,
        single=[(front.marks.get(label), words) for label, words in front.told.single],
        sections=[section for section in sections if section.blocks],
        colours=COLOURS,
        version=metadata.version("ssl_seg"),
    )
    lines = (plain(line) if _has_control(line) else line for line in text.split("\n"))
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def _has_control(line: str) -> bool:
    """Foreign text may hold what no page may: control characters and halves of surrogate pairs."""
    return not line.isprintable() and any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in line)


def _title(runs: Sequence[RunFolder]) -> str:
    if len(runs) == 1:
        return runs[0].name
    return common_folder(runs).name or "runs"


def common_folder(runs: Sequence[RunFolder]) -> Path:
    """The nearest folder that all of them lie in."""
    return Path(os.path.commonpath([run.folder.resolve().parent for run in runs]))


def _counts(page: Page) -> str:
    groups = f" in {len(page.arms)} groups" if 1 < len(page.arms) < len(page.runs) else ""
    return f"{count_of(len(page.runs), 'run')}{groups}"


def _arms(comparison: Comparison, runs: Sequence[RunFolder]) -> Iterator[Arm]:
    if not comparison.groups:
        looks = charts.styles([False] * len(runs))
        for run, style in zip(runs, looks, strict=True):
            yield Arm(run.name, style, Markup(charts.swatch(style)), None, (run,), run)
        return
    by_name = {str(run.folder): run for run in runs}
    looks = charts.styles([group.from_scratch for group in comparison.groups])
    for group, style in zip(comparison.groups, looks, strict=True):
        own = tuple(by_name[outcome.name] for outcome in group.outcomes)
        mark = Markup(charts.swatch(style))
        yield Arm(group.label, style, mark, group, own, by_name[_median(group, comparison.main_score)])


def _median(group: Group, score: str | None) -> str:
    """The name of the run in the middle by the main score, the lower one of two; the first where there is no score."""
    scored = [outcome for outcome in group.outcomes if score in outcome.scores]
    if not scored:
        return group.outcomes[0].name
    return sorted(scored, key=lambda outcome: outcome.scores[score])[(len(scored) - 1) // 2].name


def legend(arms: Sequence[Arm]) -> tuple[tuple[Markup, str], ...]:
    """Mark and label of each group; a group alone needs none."""
    return tuple((arm.mark, arm.label) for arm in arms) if len(arms) > 1 else ()


def folds(arms: Sequence[Arm], blocks_of: Callable[[Arm], Sequence[Any]], num_open: int = OPEN) -> list[Any]:
    """A fold a group that has such blocks, the first ones open; no more groups than a page can bear."""
    folds: list[Any] = []
    left = []
    for arm in arms:
        if len(folds) == SHOWN:
            left.append(arm)
        elif blocks := blocks_of(arm):
            folds.append(Fold(f"{arm.label}: {which(arm)}", tuple(blocks), len(folds) < num_open, arm.mark))
    return [*folds, *not_shown(left)]


def not_shown(arms: Sequence[Arm]) -> list[Text]:
    labels = ", ".join(arm.label for arm in arms)
    return [Text(f"Left out here, to keep the page small; name fewer runs to see more: {labels}.")] if arms else []


def which(arm: Arm) -> str:
    if len(arm.runs) == 1:
        return arm.shown.name
    of = "the median run" if arm.stage != "pretrain" else "the first"
    return f"{arm.shown.name}, {of} of {len(arm.runs)}"


def leak_blocks(found: Iterable[tuple[Mapping[str, Any] | None, RunFolder]], within: Path | None = None) -> list[Any]:
    """What leaks.json says, of each run or None: a sentence for all that say the same, then the pairs of each.

    The picture of the worst pairs is taken from `within`, by default the run: a page must not carry what a link in a
    stranger's folder points at.
    """
    records: dict[str, Mapping[str, Any]] = {}
    runs_of: dict[str, list[RunFolder]] = {}
    for record, run in found:
        words = guard.sentence(record)
        records.setdefault(words, record or {})
        runs_of.setdefault(words, []).append(run)
    told = [Text(f"{f'{len(runs)} runs: ' if len(runs) > 1 else ''}{words}") for words, runs in runs_of.items()]
    pairs = [_leaking_pairs(record.get("leaks", ()), runs_of[words], within) for words, record in records.items()]
    return [*told, *(block for blocks in pairs for block in blocks)]


def _leaking_pairs(
    pairs: Sequence[Mapping[str, Any]], runs: Sequence[RunFolder], within: Path | None
) -> Iterator[Fold | Gallery]:
    if not pairs:
        return
    rows = tuple(_leak_row(pair) for pair in pairs[:PAIRS])
    caption = f"The worst {len(rows)} of {count_of(len(pairs), 'pair')}."
    yield Fold("The pairs", (Table(caption, ("Trained on", "Scored", "Kind", "How", "Allowed"), rows, words=True),))
    sheets = [path for run in runs if is_own(path := run.folder / "leaks.png", within or run.folder)]
    if sheets:
        yield Gallery((shot(sheets[0], "The worst pairs side by side."),), wide=True)


def _leak_row(pair: Mapping[str, Any]) -> TableRow:
    trained, scored = (f"{pair[part]}: {pair[name]}" for part, name in (("part", "name"), ("scored_part", "scored")))
    return TableRow(trained, (scored, pair["kind"], pair["detail"], "yes" if pair["allowed"] else "no"))


def is_own(path: Path, folder: Path) -> bool:
    """Whether a file is one of the folder's own, and no link out of it."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def drawn(draw: Callable[..., str], *arguments: Any, **options: Any) -> Markup:
    """A figure of `plots`, in which `svg` has escaped what is foreign."""
    return Markup(draw(*arguments, **options))


def shot(path: Path, caption: str) -> Shot:
    """A picture as the page carries it: no larger than it is looked at, in the smaller of two formats."""
    array = images.read_image(path)
    height, width = array.shape[:2]
    shrink = min(1.0, MAX_SIDE / max(height, width))
    if shrink < 1.0:
        height, width = max(1, round(height * shrink)), max(1, round(width * shrink))
        array = images.resize_image(array, (height, width))
    ordered = cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    jpeg = cv2.imencode(".jpg", ordered, options)[1].tobytes()
    png = cv2.imencode(".png", ordered)[1].tobytes()
    kind, payload = ("png", png) if len(png) <= len(jpeg) else ("jpeg", jpeg)
    source = f"data:image/{kind};base64,{base64.b64encode(payload).decode()}"
    return Shot(source, width, height, caption, caption)
