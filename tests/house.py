"""The house: its rooms, the floors they stand on, and the drawing of them in docs/house.svg.

`python -m tests.house` draws it anew and prints its figures. `tests/test_imports.py` holds the imports against the
floors, and the drawing against this file.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path

from tests import ROOT

# A file may import what stands on a floor above its own, and what shares its room. What a room is for, in a few words.
FLOORS: tuple[Mapping[str, str], ...] = (
    {"yaml_text": "what a text may cost"},
    {
        "calibration": "how sure, how right",
        "config": "configs, plug-ins, errors",
        "rng": "keyed random numbers",
        "losses": "losses of one sample",
    },
    {
        "files": "atomic files, JSON",
        "images": "the only decoder",
        "mixing": "which part is another's",
        "scores": "confusion matrices",
        "tensor_files": "weights of any origin",
        "terminal": "progress and signals",
        "norm": "norm layers, conversion",
        "worlds": "drawn scenes",
    },
    {
        "contours": "how outlines fit",
        "datasets": "one source a file",
        "figures": "charts and sheets",
        "keys": "what each key means",
        "metrics": "figures on tensors",
        "models": "encoders, decoders",
        "runs": "the run folder",
    },
    {"evidence": "pairs, intervals, claims", "tasks": "the contract of a task", "weights": "exports and receipts"},
    {
        "data": "splits, crops, batches",
        "segment": "supervised task",
        "semisupervised": "tasks on pseudo-labels",
        "testing": "checks for plug-ins",
        "tracking": "MLflow's mirror",
    },
    {"training": "processes, learner, loop"},
    {"leaks": "the leak guard"},
    {"stages": "pretrain, finetune ..."},
    {"reports": "pages and tables"},
    {"studies": "many runs"},
    {"cli": "words in, a verb called"},
    {"__main__": "python -m ssl_seg"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
DRAWING = ROOT / "docs" / "house.svg"
MARGIN, GAP, STOREY, SIDE, ROOM = 16, 10, 60, 158, 48  # pixels; a room is SIDE wide and ROOM high


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "ssl_seg").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names of everything a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def own_modules(names: frozenset[str]) -> set[str]:
    """The modules of ssl_seg among imported names: `ssl_seg.data.loading.loader` is `data.loading`."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] != "ssl_seg":
            continue
        dotted = [".".join(parts[1:length]) for length in range(len(parts), 1, -1)]
        found |= {next((known for known in dotted if known in FILES), parts[-1])}
    return found


def room_of(name: str) -> str:
    """The package of a module, or the module itself at the top."""
    return name.partition(".")[0]


FILES = {module_name(path): path for path in sorted((ROOT / "ssl_seg").rglob("*.py")) if path.parent.name != "configs"}


@cache
def arrows() -> dict[str, set[str]]:
    """What each module imports of the others."""
    return {name: own_modules(imported(path)) - {name} for name, path in FILES.items()}


def between_rooms() -> set[tuple[str, str]]:
    """Every arrow from a room to another that it imports."""
    found = {(room_of(name), room_of(used)) for name, own in arrows().items() for used in own}
    return {(room, used) for room, used in found if room and room != used}


def figures() -> str:
    """The house in numbers."""
    rooms = {room_of(name) for name in FILES if name}
    at_top = [path for name, path in FILES.items() if "." not in name and path.name != "__init__.py"]
    lines = sum(len(path.read_text().splitlines()) for path in FILES.values())
    tests = sum(len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py"))
    pages = sum(len(path.read_text().splitlines()) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))
    return (
        f"{len(FILES)} modules, {len(at_top)} at the top, {len(rooms)} rooms on {len(FLOORS)} floors, "
        f"{len(between_rooms())} arrows between rooms; lines: {lines:,} of code, {tests:,} of tests, {pages:,} of pages"
    )


def drawing() -> str:
    """The floors from the ground (above) to the door, a box a room: SVG for a light or a dark page."""
    floors = [{room: purpose for room, purpose in rooms.items() if not room.startswith("_")} for rooms in FLOORS]
    floors = [rooms for rooms in floors if rooms]
    widest = max(len(rooms) for rooms in floors)
    width = 2 * MARGIN + widest * (SIDE + GAP) - GAP
    height = 2 * MARGIN + len(floors) * STOREY - (STOREY - ROOM)
    shapes = []
    for number, rooms in enumerate(floors):
        top = MARGIN + number * STOREY
        start = (width - len(rooms) * (SIDE + GAP) + GAP) // 2
        for place, (room, purpose) in enumerate(rooms.items()):
            left = start + place * (SIDE + GAP)
            middle = left + SIDE // 2
            shapes += [
                f'  <rect x="{left}" y="{top}" width="{SIDE}" height="{ROOM}" rx="6"/>',
                f'  <text class="room" x="{middle}" y="{top + 20}">{escape(room)}</text>',
                f'  <text x="{middle}" y="{top + 38}">{escape(purpose)}</text>',
            ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="The rooms of ssl_seg on their floors">',
            "  <style>",
            "    rect { fill: #f3f5f8; stroke: #8a96a8; }",
            "    text { font: 12px sans-serif; text-anchor: middle; fill: #3d4652; }",
            "    .room { font-weight: 600; font-size: 15px; fill: #111; }",
            "    @media (prefers-color-scheme: dark) {",
            "      rect { fill: #1e242d; stroke: #6b7789; } text { fill: #c3cad4; } .room { fill: #fff; }",
            "    }",
            "  </style>",
            *shapes,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    DRAWING.write_text(drawing())
    print(figures())
