"""The page of a report: what it is made of, and how that becomes one HTML file that needs no network.

It has no script and forbids any. Names, labels and config values are foreign text: jinja2 escapes them, and `svg`
those inside figures.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import cv2
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ssl_seg import files, images
from ssl_seg.config import UserError
from ssl_seg.evidence.claims import Answer
from ssl_seg.figures.svg import COLOURS, plain

MAX_SIDE = 900  # pixels of a picture's longer side on the page
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
class Front:
    """What stands above the sections."""

    title: str
    counts: str  # `12 runs in 3 groups`
    told: Answer
    marks: Mapping[str, Markup]  # of the arms that `told` names
    rules: tuple[str, ...]  # by which gains are told
    unfinished: tuple[tuple[str, str], ...] = ()  # what has no result, and why


@dataclass(frozen=True)
class Report:
    """What `report` gives back."""

    path: Path
    headline: str


def place_of(out: str | Path | None, default: Path) -> Path:
    """The file that a page is written to. Raises UserError for a folder."""
    path = default if out is None else Path(out)
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; name the file to write, such as {path / 'report.html'}")
    return path


def write(path: Path, front: Front, sections: Sequence[Section]) -> Report:
    """Raises UserError for a page that cannot be written."""
    files.write_atomic(path, render(front, sections))
    return Report(path, front.told.headline)


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
