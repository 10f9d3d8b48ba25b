"""How many planted leaks the leak guard finds, and how many clean images it flags.

    python experiments/leaks/measure.py --photographs FOLDER [FOLDER ...] --camvid FOLDER

Copies are written to files and read again, as a run reads them. Names are not looked at, so pictures alone decide.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import cv2
import numpy as np

from ssl_seg.config import load
from ssl_seg.data.splits import Subset
from ssl_seg.datasets import Example
from ssl_seg.datasets.camvid import Camvid
from ssl_seg.datasets.folder import Folder
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.leaks.guard import Leaks, compare
from ssl_seg.leaks.near_duplicates import SIDE, Fingerprints, Images, fingerprint
from ssl_seg.leaks.record import Leak

T = TypeVar("T")
DRIVES = ("0001TP", "0006R0", "0016E5")
SMALLEST, LARGEST = 0.6, 0.8  # of the area that crops keep
# Every shape of crop: at most this power of the side's share goes to one of the two sides.
STRETCH = 1.0


def finished(work: Generator[None, None, T]) -> T:
    """What a generator returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def alike(leak: Leak) -> float:
    """What two pictures have in common: every leak has it where names are not looked at."""
    assert leak.alike is not None
    return leak.alike


# ---- copies ----


def crop(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A part of 60 to 80 % of the area, of any shape, anywhere."""
    side = np.sqrt(random.uniform(SMALLEST, LARGEST))
    stretch = side ** random.uniform(-STRETCH, STRETCH)
    height = round(image.shape[0] * min(1.0, side * stretch))
    width = round(image.shape[1] * min(1.0, side / stretch))
    top = random.integers(image.shape[0] - height + 1)
    left = random.integers(image.shape[1] - width + 1)
    return image[top : top + height, left : left + width]


def strip(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """60 % of the height or of the width, anywhere, and all of the other."""
    height, width = image.shape[:2]
    if random.random() < 0.5:
        top = random.integers(height - round(SMALLEST * height) + 1)
        return image[top : top + round(SMALLEST * height)]
    left = random.integers(width - round(SMALLEST * width) + 1)
    return image[:, left : left + round(SMALLEST * width)]


def lower(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The lower 60 %: of a street little more than road and cars."""
    return image[-round(SMALLEST * len(image)) :]


def resize(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def tone(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Another contrast and brightness; every second one is blurred too."""
    mean = image.mean()
    toned = ((image - mean) * random.uniform(0.7, 1.3) + mean) * random.uniform(0.75, 1.25)
    toned = np.clip(toned, 0, 255).astype(np.uint8)
    return cv2.GaussianBlur(toned, (0, 0), 1.0) if random.random() < 0.5 else toned


Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
JPEG_50 = (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 50])
JPEG_60 = (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 60])
PNG = (".png", [])
COPIES: dict[str, tuple[Change, tuple[str, list[int]]]] = {
    "exact copy": (lambda image, random: image, PNG),
    "PNG, packed anew": (lambda image, random: image, (".png", [cv2.IMWRITE_PNG_COMPRESSION, 9])),
    "JPEG, quality 50": (lambda image, random: image, JPEG_50),
    "half the size": (lambda image, random: resize(image, 0.5), PNG),
    "mirrored, JPEG 50": (lambda image, random: image[:, ::-1], JPEG_50),
    "cropped": (crop, PNG),
    "cropped, resized, JPEG 60": (lambda image, random: resize(crop(image, random), random.uniform(0.5, 1)), JPEG_60),
    "tone, blur": (tone, PNG),
    "a strip of 60 %": (strip, PNG),
    "the lower 60 %": (lower, PNG),
}


def plant(examples: Images, chosen: Sequence[int], kind: str, folder: Path, seed: int) -> Folder:
    """Copies of the chosen images as files, named by their numbers."""
    change, (suffix, options) = COPIES[kind]
    folder.mkdir()
    for index in chosen:
        image = examples.image(index).image
        changed = np.ascontiguousarray(change(image, np.random.default_rng([seed, index])))
        cv2.imwrite(str(folder / f"{index:06d}{suffix}"), cv2.cvtColor(changed, cv2.COLOR_RGB2BGR), options)
    return Folder(images=str(folder))


def recall(name: str, examples: Images, count: int, config: Leaks) -> None:
    """Print how many copies of each kind are found, and found for the image that they were made of."""
    scored = finished(fingerprint(examples))
    for seed, kind in enumerate(COPIES):
        random = np.random.default_rng(seed)
        chosen = sorted(random.choice(len(examples), min(count, len(examples)), replace=False).tolist())
        with TemporaryDirectory() as folder:
            copies = finished(fingerprint(plant(examples, chosen, kind, Path(folder) / "copies", seed)))
        found = finished(compare("pool", copies, "val", scored, config))
        right = sum(scored.names.index(leak.scored) == int(Path(leak.name).stem) for leak in found)
        missed = sorted(set(copies.names) - {leak.name for leak in found})
        lowest = min((alike(leak) for leak in found), default=0.0)
        print(f"{name:15} {kind:26} {len(found):4} of {len(chosen)}, right {right}, lowest {lowest:.2f} {missed[:5]}")


# ---- sets with one margin or mask ----

FRAMED = (360, 480)


def in_frame(grey: int, top: int, left: int) -> Callable[[np.ndarray], np.ndarray]:
    """An image within a margin of one grey."""

    def framed(image: np.ndarray) -> np.ndarray:
        height, width = FRAMED
        whole = np.full((height, width, 3), grey, dtype=np.uint8)
        size = (width - 2 * left, height - 2 * top)
        whole[top : height - top, left : width - left] = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return whole

    return framed


def through(mask: np.ndarray, blur: float = 0.0) -> Callable[[np.ndarray], np.ndarray]:
    """An image that is black outside a mask."""

    def masked(image: np.ndarray) -> np.ndarray:
        whole = cv2.resize(image, FRAMED[::-1], interpolation=cv2.INTER_AREA)
        return (cv2.GaussianBlur(whole, (0, 0), blur) if blur else whole) * mask[..., None].astype(np.uint8)

    return masked


DOWN, ACROSS = np.mgrid[: FRAMED[0], : FRAMED[1]]
CIRCLE = (DOWN - 180) ** 2 + (ACROSS - 240) ** 2 < 170**2
FRAMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "white margin": in_frame(255, 30, 40),
    "black frame": in_frame(0, 20, 20),
    "letterbox": in_frame(0, 45, 0),
    "circle": through(CIRCLE),
    "circle, blurred": through(CIRCLE, 10.0),
    "fan": through(np.abs(ACROSS - 240) < 40 + 0.55 * DOWN, 2.0),
}


@dataclass(frozen=True)
class Framed:
    """Other examples, each within the same frame."""

    examples: Images
    frame: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return len(self.examples)

    def name(self, index: int) -> str:
        return self.examples.name(index)

    def image(self, index: int) -> Example:
        return Example(self.frame(self.examples.image(index).image), None, self.name(index))

    def doubt(self, index: int) -> str:
        return self.examples.doubt(index)


# ---- clean images ----


def flagged(name: str, trained: Fingerprints, scored: Fingerprints, config: Leaks) -> tuple[int, int]:
    """Print how many images of the first are flagged against the second; gives that and how many there are."""
    started = time.monotonic()
    low = finished(compare("pool", trained, "val", scored, config.model_copy(update={"alike": 0.3})))
    seconds = time.monotonic() - started
    found = [leak for leak in low if alike(leak) >= config.alike]
    best = sorted((alike(leak) for leak in low), reverse=True)[:3]
    print(f"{name:36} {len(found)} of {len(trained)} (against {len(scored)}), best {best}, {seconds:.1f} s")
    for leak in found[:5]:
        print(f"    {leak.name} ~ {leak.scored}: {leak.alike} {leak.detail}")
    return len(found), len(trained)


def both_ways(name: str, one: Fingerprints, other: Fingerprints, config: Leaks) -> list[tuple[int, int]]:
    return [flagged(f"{name} >", one, other, config), flagged(f"{name} <", other, one, config)]


def drawn(kind: str, size: tuple[int, int], seed: int, count: int) -> Fingerprints:
    values = {"kind": kind, "count": count, "size": size, "seed": seed}
    return finished(fingerprint(load(Synthetic, values)))


def half(prints: Fingerprints, start: int) -> Fingerprints:
    return Fingerprints(prints.names[start::2], prints.digests[start::2], prints.pictures[start::2])


# ---- size ----


def many(count: int, scored: int, config: Leaks) -> None:
    """Time and memory of a large pool: smooth random pictures, whose spectra are those of photographs."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    frequency[0, 0] = 1

    def pictures(number: int) -> Fingerprints:
        thumbs = np.empty((number, SIDE, SIDE), dtype=np.uint8)
        for index in range(number):
            waves = np.fft.rfft2(random.standard_normal((SIDE, SIDE))) / frequency
            picture = np.fft.irfft2(waves)
            thumbs[index] = np.clip(128 + 50 * (picture - picture.mean()) / picture.std(), 0, 255)
        names = tuple(f"{chr(97 + number % 26)}_{index}" for index in range(number))
        return Fingerprints(names, tuple(f"{number} {index}" for index in range(number)), thumbs)

    trained, against = pictures(count), pictures(scored)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started, cpu = time.monotonic(), time.process_time()
    found = finished(compare("pool", trained, "val", against, config))
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count} against {scored}: {seconds:.0f} s, {cpu:.0f} s of CPU, peak {peak:.0f} MiB ({before:.0f} before)")
    print(f"    {len(found)} flagged")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--photographs", type=Path, nargs="*", default=[], help="folders of single photographs")
    words.add_argument("--camvid", type=Path, help="the folder that holds CamVid")
    words.add_argument("--copies", type=int, default=200, help="planted leaks of each kind and set")
    words.add_argument("--drawn", type=int, default=300, help="drawn images of a seed")
    words.add_argument("--many", type=int, default=0, help="pictures of the test of size, such as 100000")
    words.add_argument("--scored", type=int, default=1000, help="scored ones in the test of size")
    given = words.parse_args()
    config = Leaks(frames=0)
    if given.many:
        many(given.many, given.scored, config)
        return
    counts: list[tuple[int, int]] = []
    singles: list[Fingerprints] = []
    for folder in given.photographs:
        examples = Folder(images=str(folder))
        recall(folder.name, examples, given.copies, config)
        singles.append(finished(fingerprint(examples)))
        counts += both_ways(f"{folder.name}, halves", half(singles[-1], 0), half(singles[-1], 1), config)
        for name, frame in FRAMES.items():
            framed = Framed(examples, frame)
            recall(name, framed, given.copies, config)
            prints = finished(fingerprint(framed))
            counts += both_ways(f"{name}, halves", half(prints, 0), half(prints, 1), config)
    if given.camvid:
        whole = Camvid(root=str(given.camvid), split="train")
        rows = range(len(whole))
        parts = {drive: tuple(row for row in rows if whole.sequence(row) == drive) for drive in DRIVES}
        recall("camvid", whole, given.copies, config)
        drives = {drive: finished(fingerprint(Subset(whole, part))) for drive, part in parts.items()}
        for one, other in (("0001TP", "0006R0"), ("0001TP", "0016E5"), ("0006R0", "0016E5")):
            counts += both_ways(f"{one}, {other}", drives[one], drives[other], config)
        for single in singles:
            for drive, prints in drives.items():
                counts += both_ways(f"photographs, {drive}", single, prints, config)
    for kind, size in (("street", (120, 160)), ("shapes", (96, 128)), ("squares", (96, 96))):
        one, other = (drawn(kind, size, seed, given.drawn) for seed in (1, 2))
        counts += both_ways(f"{kind}, two seeds", one, other, config)
    wrong, images = (sum(column) for column in zip(*counts, strict=True))
    print(f"clean: {wrong} of {images} comparisons of an image with a set flagged")


if __name__ == "__main__":
    main()
