"""Draw a synthetic world to files, so that it can be looked at and used by other tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssl_seg import images, pictures
from ssl_seg.config import UserError, load
from ssl_seg.datasets.synthetic import Synthetic

SHEET_ROWS = 4
SHEET_COLUMNS = 4  # image and mask count as two


@dataclass(frozen=True)
class Drawn:
    """`out/images/*.png`, `out/masks/*.png` with class ids, `out/sheet.png` to look at."""

    out: Path
    count: int
    class_names: tuple[str, ...]


def synth(kind: str, count: int, size: tuple[int, int], out: str | Path, seed: int = 0) -> Drawn:
    """Write `count` images of `size` (H, W) and their exact masks; the same pixels for a seed, always."""
    world = load(Synthetic, {"kind": kind, "count": count, "size": size, "seed": seed})
    out = Path(out)
    if out.exists():
        raise UserError(f"--out {out}: exists already; name a new folder")
    colours = pictures.palette(len(world.class_names))
    panels = []
    for index in range(len(world)):
        example = world.read(index)
        images.write_image(out / "images" / f"{example.name}.png", example.image)
        images.write_mask(out / "masks" / f"{example.name}.png", example.label, colours)
        if len(panels) < SHEET_ROWS * SHEET_COLUMNS:
            panels += [example.image, colours[example.label]]
    rows = [panels[start : start + SHEET_COLUMNS] for start in range(0, len(panels), SHEET_COLUMNS)]
    images.write_image(out / "sheet.png", pictures.grid(rows))
    return Drawn(out, count, world.class_names)
