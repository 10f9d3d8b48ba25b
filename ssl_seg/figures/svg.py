"""From a figure of matplotlib's to a file: SVG that takes a page's colours, light or dark, or PNG.

Ours is the step from matplotlib's SVG to one that lives inside a page: it has fixed colours, fonts and names that would
collide with those of the next figure. Labels are foreign text: never mathtext, never trusted to have glyphs in the
font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

# A page sets each as a CSS variable: (on light, on dark). The hues are those of Okabe and Ito, 2008, which colour-blind
# readers tell apart too, darkened or lightened until they stand out from the paper by 3 to 1 (WCAG 2, graphics).
COLOURS = {
    "paper": ("#fdfdfb", "#16181c"),
    "ink": ("#1b1e22", "#e9e7e2"),
    "muted": ("#5a626b", "#a7aeb7"),
    "line": ("#d3d7dc", "#3b4149"),
    "cell": ("#0071b1", "#3d9fdc"),
    "on_cell": ("#fefefe", "#0d0f12"),
    "base": ("#6f7782", "#949ca6"),
    "blue": ("#0072b2", "#5ab0e8"),
    "vermilion": ("#c44f00", "#f07f3c"),
    "green": ("#00805b", "#2fbd92"),
    "purple": ("#b0528a", "#dd93bd"),
    "amber": ("#a06c00", "#e3a72f"),
    "sky": ("#2c8fc4", "#8fd0f5"),
}
VARIABLES = {on_light: f"var(--{name})" for name, (on_light, _) in COLOURS.items()}
VARIABLE = re.compile("|".join(VARIABLES))

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", SVG)


def light(colour: str) -> str:
    """A colour of the page by its name, as on light paper: what `to_svg` knows it by."""
    return COLOURS[colour][0]


def to_png(figure: Figure) -> bytes:
    """On white, in the colours of light paper."""
    file = io.BytesIO()
    with _foreign_text(figure):
        figure.savefig(file, format="png")
    return file.getvalue()


def to_svg(figure: Figure, name: str, about: str | None) -> str:
    """An `<svg>` to stand inside an HTML page: the same bytes for the same figure.

    Colours are the page's variables, letters the page's font, names begin with `name`, so that no two figures of a page
    share one. `about` says what it shows to those who cannot see it; None for one that only decorates.
    """
    file = io.StringIO()
    figure.patch.set_visible(False)
    with _foreign_text(figure, name):
        figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for unwanted in root.findall(f"{{{SVG}}}metadata"):
        root.remove(unwanted)
    for definitions in root.iter(f"{{{SVG}}}defs"):
        for style in definitions.findall(f"{{{SVG}}}style"):
            definitions.remove(style)  # it would hold for the whole page
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', file.getvalue()))
    for element in root.iter():
        _settle_in(element, name, wanted)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "style": "stroke-linejoin: round"})
    root.attrib.update({"aria-hidden": "true"} if about is None else {"role": "img", "aria-label": plain(about)})
    return ElementTree.tostring(root, encoding="unicode")


def plain(text: str) -> str:
    """Foreign text in one line that any XML file can hold; what it cannot is shown as the replacement character."""
    one_line = " ".join(text.split())
    return "".join(letter if _is_xml(letter) else "\ufffd" for letter in one_line)


def with_minus(number: str) -> str:
    """A number in print: its sign as wide as a plus."""
    return number.replace("-", "\N{MINUS SIGN}")


def _settle_in(element: ElementTree.Element, name: str, wanted: set[str]) -> None:
    """One element of matplotlib's, with the page's colours and font and without names that nothing refers to."""
    own = element.attrib.pop("id", None)
    if own in wanted:
        element.set("id", f"{name}-{own}")
    link = element.attrib.pop(f"{{{XLINK}}}href", None)
    if link is not None:
        element.set("href", f"#{name}-{link[1:]}" if link.startswith("#") else link)
    if "clip-path" in element.attrib:
        element.set("clip-path", element.attrib["clip-path"].replace("url(#", f"url(#{name}-"))
    if "style" in element.attrib:
        unfonted = re.sub(r"font-family:[^;]*;? ?", "", element.attrib["style"])
        element.set("style", VARIABLE.sub(lambda found: VARIABLES[found[0]], unfonted))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if "d" in element.attrib:
        element.set("d", " ".join(element.attrib["d"].split()))
    if not (element.text or "").strip():
        element.text = None
    element.tail = None  # letters stand in elements without others inside, so this is white space


@contextmanager
def _foreign_text(figure: Figure, salt: str = "") -> Iterator[None]:
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    # Those of ticks come into being while it is drawn. Text stays text in SVG: whether a letter can be shown is up to
    # the reader's fonts, not to matplotlib's.
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def _is_xml(letter: str) -> bool:
    """https://www.w3.org/TR/xml/#charsets, without line breaks and tabs."""
    return " " <= letter <= "\ud7ff" or "\ue000" <= letter <= "\ufffd" or letter >= "\U00010000"
