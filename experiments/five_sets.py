"""The sets of real images that experiments measure on: their layout, the words of their masks, and tables of scores.

    python -m experiments.five_sets RAW --out DATA

RAW holds the sets as they are published: `camvid/{images,masks}/train` in the arrangement of the SegNet tutorial, and
`{nuclei,tiles,roads,wounds}/{pool,labelled,val}/images`, with `masks` beside those of the last two. DATA then has all
five as `<set>/{pool,labelled,val}/{images,masks}`, small: decoding photographs would take longer than the training.

`first` and `second` are the halves of `val`: what is chosen on the one is told by the other. `candidates` are those of
`labelled` from which experiments draw: of nuclei the forty that `ssl-seg select` names first, since a draw of ten from
all of them often holds one kind of image alone; of the other sets all. Neither there nor in `pool` is an image that
shows what is scored.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans

from ssl_seg import SelectConfig, images, load, select

STREET = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
# Of each set the words that name its masks. The five kinds of defect are one: some are on three images.
MASKS: dict[str, dict[str, Any]] = {
    "nuclei": {"classes": ["other", "nucleus"]},
    "wounds": {"classes": ["skin", "wound"]},
    "roads": {"classes": ["other", "road"]},
    "tiles": {"classes": ["sound", "defect"], "mapping": {0: "sound", **dict.fromkeys(range(1, 6), "defect")}},
    "camvid": {"classes": STREET, "ignore": [11]},
}
SHORTER_SIDE = {"nuclei": 192, "wounds": 160, "roads": 192, "tiles": 160, "camvid": 120}  # pixels
TRAINED, SCORED = ("0001TP", "0016E5"), ("0006R0",)  # drives of CamVid
CANDIDATES = {"nuclei": 40}
IMAGENET = {"name": "tf_efficientnet_lite0", "pretrained": "package"}  # the one network whose weights a package holds
GAP = 0.1  # share of the scored drive that lies between its halves: a tenth of its 101 frames is 10 s
# One start of the clustering, written down: by another number the halves are others, and scores of both no pairs.
BEGUN: dict[str, Any] = {"random_state": 0, "n_init": 1}
ALIKE = 4  # images of a cluster on average, none of which is parted: photographs of one patient, cuts of one slide


def part_of(data: Path, name: str, part: str) -> dict[str, Any]:
    """The config of one part of a set; of the pool the images alone."""
    folder = data / name / part
    config = {"type": "folder", "images": str(folder / "images")}
    return config if part == "pool" else {**config, "masks": str(folder / "masks"), **MASKS[name]}


def folder_of(files: Iterable[Path], out: Path) -> dict[str, Any]:
    """The config of a new folder of links to some images; one that is there is made anew."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for file in files:
        (out / file.name).symlink_to(file.resolve())
    return {"type": "folder", "images": str(out)}


def parser_of(doc: str | None, sets: Sequence[str]) -> argparse.ArgumentParser:
    """What every script that measures on the sets is told: DATA, --out, and --sets, by default `sets`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=[*sets], choices=MASKS)
    return parser


def shared(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """A parser whose script may run several times side by side, each with its `share` of the runs."""
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help="1 3: the second of three side by side")
    return parser


def table_of(options: argparse.Namespace, words: int, file: str = "scores.csv") -> Table:
    """The table that a script adds to, in the folder it was told; from here on it computes in one thread."""
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    return Table(options.out / file, words)


class Table:
    """Rows of a CSV file, each known by its first words: those that are there are not made again."""

    def __init__(self, path: Path, words: int) -> None:
        self.path = path
        self.words = words

    def __iter__(self) -> Iterator[list[str]]:
        if self.path.exists():
            with self.path.open(newline="") as file:
                yield from csv.reader(file)

    def has(self, *key: Any) -> bool:
        return any(row[: self.words] == [str(word) for word in key] for row in self)

    def add(self, *row: Any) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=[*MASKS], choices=MASKS)
    parser.add_argument("--scale", type=float, default=1.0, help="1.5 makes street frames of 240 x 180")
    options = parser.parse_args()
    for name in options.sets:
        side = round(SHORTER_SIDE[name] * options.scale)
        for part in ("pool", "labelled", "val"):
            pictures = _pictures(options.raw, name, part)
            for picture, mask in pictures:
                copy_smaller(picture, mask, options.out / name / part, side)
            print(f"{name}, {part}: {len(pictures)} images")
        for half, files in zip(("first", "second"), halves(options.out / name / "val", name), strict=True):
            for file in files:
                copy_smaller(file, file.parents[1] / "masks" / file.name, options.out / name / half, side)
            print(f"{name}, {half}: {len(files)} images")
        shown = _leaking(options.out, name, "pool")
        for own in shown:
            (options.out / name / "pool" / "images" / own).unlink()
        print(f"{name}, pool: {len(shown)} images show what is scored, and are left out")
        names = candidates(options.out, name)
        print(f"{name}, candidates: {len(names)} images")


def candidates(data: Path, name: str) -> tuple[str, ...]:
    """Make the part of `labelled` that labels are drawn from; gives the images' names."""
    folder = data / name / "labelled"
    with _chosen(data, name, "labelled") as chosen:
        names = chosen.names[: CANDIDATES.get(name)]
    for own, kind in product(names, ("images", "masks")):
        file = data / name / "candidates" / kind / own
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / kind / own, file)
    return names


def _leaking(data: Path, name: str, part: str) -> list[str]:
    """The images of a part that show what is scored."""
    with _chosen(data, name, part) as chosen:
        return json.loads((chosen.out / "selected.json").read_text())["left_out_as_scored"]


@contextmanager
def _chosen(data: Path, name: str, part: str) -> Iterator[Any]:
    """The images of a part in the order of `ssl-seg select`, without those that show what is scored."""
    pool = {"type": "folder", "images": str(data / name / part / "images")}
    config = {
        "data": {"pool": pool, "scored": part_of(data, name, "val")},
        "count": 10**6,
        "model": {"encoder": IMAGENET},
    }
    with tempfile.TemporaryDirectory() as folder:
        yield select(load(SelectConfig, config), Path(folder) / "chosen", quiet=True)


def halves(part: Path, name: str) -> tuple[list[Path], list[Path]]:
    """The images of `part` in two: of a drive its beginning and its end, else clusters of images that look alike."""
    files = sorted((part / "images").iterdir())
    if name == "camvid":
        each = round(len(files) * (1 - GAP) / 2)
        return files[:each], files[-each:]
    small = np.stack([images.resize_image(images.read_image(file), (8, 8)).ravel() for file in files])
    clusters = KMeans(max(2, len(files) // ALIKE), **BEGUN).fit_predict(small)
    sides: tuple[list[Path], list[Path]] = ([], [])
    # The largest first, each to the side that has fewer.
    for cluster in np.argsort(-np.bincount(clusters), kind="stable"):
        own = [file for file, its in zip(files, clusters, strict=True) if its == cluster]
        min(sides, key=len).extend(own)
    return sides


def _pictures(raw: Path, name: str, part: str) -> list[tuple[Path, Path | None]]:
    """The files of a part, and of their masks."""
    if name == "camvid":
        drives = SCORED if part == "val" else TRAINED
        files = sorted(raw.glob("camvid/images/train/*.jpg"))
        return [(own, raw / f"camvid/masks/train/{own.stem}.png") for own in files if own.stem.startswith(drives)]
    files = sorted((raw / name / part / "images").iterdir())
    if part == "pool":
        return [(own, None) for own in files]
    return [(own, raw / name / part / "masks" / f"{own.stem}.png") for own in files]


def copy_smaller(picture: Path, mask: Path | None, out: Path, side: int) -> None:
    """Write an image, and its mask, so small that the shorter side has `side` pixels; smaller ones stay as they are."""
    array = images.read_image(picture)
    factor = min(1.0, side / min(array.shape[:2]))
    size = (round(array.shape[0] * factor), round(array.shape[1] * factor))
    images.write_image(out / "images" / f"{picture.stem}.png", images.resize_image(array, size))
    if mask is not None:
        images.write_mask(out / "masks" / f"{picture.stem}.png", images.resize_mask(images.read_mask(mask), size))


if __name__ == "__main__":
    main()
