"""What a part of the data holds and what is told of it: faults that a run would stop at, and what is worth knowing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from ssl_seg import files, images
from ssl_seg.config import UserError, load
from ssl_seg.data.workers import Workers
from ssl_seg.datasets import Dataset
from ssl_seg.datasets.folder import Folder, find_files, likely_pattern, match, stem_of
from ssl_seg.datasets.guess import Held, guess
from ssl_seg.datasets.masks import IGNORE, MAX_STORED, Meaning, Reading, how_to_read
from ssl_seg.datasets.pairs import note_turned, say_sizes
from ssl_seg.figures import panels
from ssl_seg.images import IMAGE_SUFFIXES, MASK_SUFFIXES, Range, show_path
from ssl_seg.leaks.near_duplicates import Fingerprints
from ssl_seg.stages.finetune import FinetuneConfig
from ssl_seg.stages.inspection import Files, Seen, inspect
from ssl_seg.stages.pretrain import PretrainConfig

RARE = 0.01  # of the pixels: a class that covers less is told
WHOLE_PERCENT = 0.1  # from this share on it is told without decimals
DARK = 0.1  # of 16 bits, as the data set itself tells it
NAMED = 50  # images without a mask for which the nearest name is looked for
ON_SHEET, BAD_ON_SHEET = 12, 6  # images on the sheet, and how many of them may be those that are told
STRANGE = 254  # in the mask of a picture: a value that is no class


@dataclass(frozen=True)
class Finding:
    """Something that is told: a line, the files that it is about, and a word for programs."""

    part: str
    kind: str
    text: str
    files: tuple[str, ...] = ()  # as the data set names its images, or the paths of masks


@dataclass(frozen=True)
class Class:
    """A class by what the masks show of it."""

    name: str
    share: float  # of the pixels that count
    masks: int  # that show it

    @property
    def percent(self) -> str:
        """`31 %`, `0.43 %`."""
        return f"{self.share * 100:.0f} %" if self.share >= WHOLE_PERCENT else f"{self.share * 100:.2g} %"


@dataclass(frozen=True)
class Part:
    """What a part of the data holds. Sizes and kinds by how many images have them."""

    name: str
    images: int
    sizes: dict[str, int]  # width x height
    kinds: dict[str, int]
    used: Range | None  # the smallest and the largest stored value
    masks: int | None  # that can be read; None where there are to be none
    values: tuple[str, ...] = ()  # that masks hold, as they are stored
    classes: tuple[Class, ...] = ()
    ignored: float = 0.0  # share of the pixels
    suggested: dict[str, Any] = field(default_factory=dict)  # keys of the data set that were not given


Told = list[tuple[bool, Finding]]  # whether it is a fault


@dataclass
class Look:
    """A part that was read, and what its masks mean."""

    key: str
    files: Files
    seen: list[Seen]
    with_masks: bool
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()  # of the folder as a whole
    without_image: tuple[str, ...] = ()
    suggested: dict[str, Any] = field(default_factory=dict)
    meaning: Meaning | None = None
    reading: Reading = field(default_factory=Reading)
    ignored: float = 0.0  # share of the pixels; known once classes are counted

    @classmethod
    def at(cls, key: str, dataset: Dataset, workers: Workers, with_masks: bool, propose: bool, quiet: bool) -> Look:
        if not isinstance(dataset, Folder):
            names = dataset.class_names if with_masks else ()
            own = Files(dataset, None)
            look = cls(key, own, inspect(own, workers, quiet), with_masks, dataset.notes(with_masks))
            look.meaning = Meaning(names) if names else None
            return look
        has_masks = with_masks and dataset.masks is not None
        matched = (
            dataset.match()
            if has_masks
            else match(dataset.image_folder, None, dataset.image_suffixes, only=dataset.only)
        )
        pattern = likely_pattern(dataset.mask_folder, matched) if propose and has_masks else None
        suggested = {} if pattern is None else {"masks": pattern}
        if pattern is not None:
            dataset = load(type(dataset), {**dataset.dump(), **suggested})
            matched = replace(dataset.match(), notes=(*matched.notes, f"masks are taken to be called {pattern}"))
        own = Files(dataset, matched.pairs)
        told = (matched.notes, matched.clashes, matched.without_image)
        look = cls(key, own, inspect(own, workers, quiet), has_masks, *told, suggested=suggested)
        if propose:
            look._propose_range(workers, quiet)
        if has_masks:
            look._understand(propose)
        return look

    @property
    def dataset(self) -> Dataset:
        """As it is proposed."""
        return self.files.dataset

    def _propose_range(self, workers: Workers, quiet: bool) -> None:
        """Where 16 bits are hardly used, or values have no white, in all images; then these are read again."""
        good = [own for own in self.seen if own.kind]
        assert isinstance(self.dataset, Folder)
        if self.dataset.range is not None or not good or any(own.kind.startswith(("8 ", "1 ")) for own in good):
            return
        low, high = min(own.used[0] for own in good), max(own.used[1] for own in good)
        if not any(own.fault for own in good):
            if high >= DARK * MAX_STORED:
                return
            low, high = 0.0, float(2 ** int(high).bit_length() - 1)  # what the camera's bits can hold
        if high > low:
            self._lay_on({"range": [low, high]})
            self.seen = inspect(self.files, workers, quiet)

    def _understand(self, propose: bool) -> None:
        """What the masks mean: as given, else as `guess` proposes it."""
        folder = self.dataset
        assert isinstance(folder, Folder)
        masks = folder.mask_folder
        try:
            if propose and not folder.mapping and not folder.ignore:
                names = folder.classes if isinstance(folder.classes, tuple) else _names_beside(masks)
                proposed = guess(self._held(), names)
                self.notes += proposed.notes
                self.faults += (f"{show_path(masks)}: {proposed.fault}",) if proposed.fault else ()
                mapping = {str(key): value for key, value in proposed.mapping.items()}
                words = {"classes": list(proposed.classes), "mapping": mapping, "ignore": list(proposed.ignore)}
                self._lay_on({key: value for key, value in words.items() if value})
                if proposed.fault:
                    return
                folder = self.dataset
                assert isinstance(folder, Folder)
            self.meaning = Meaning.of(folder.class_names, folder.ignore, folder.mapping or {})
            readable = [pair[1] for pair, own in self._pairs() if own.values is not None]
            self.reading = how_to_read(self.meaning, masks, [masks / name for name in readable])
            self.notes += (self.reading.note,) if self.reading.note else ()
            good = [i for i, own in enumerate(self.seen) if own.values is not None and own.size[0]]
            sources = [(self.files.name(i), *self.files.paths(i)) for i in good]
            turned = [(name, image, mask) for name, image, mask in sources if mask]
            self.notes += note_turned(show_path(folder.image_folder), turned, folder.channels)
        except (UserError, ValueError) as error:
            self.faults += (str(error),)

    def _lay_on(self, words: dict[str, Any]) -> None:
        self.suggested |= words
        changed = load(type(self.dataset), {**self.dataset.dump(), **words})
        self.files = replace(self.files, dataset=changed)

    def _pairs(self) -> Iterator[tuple[tuple[str, str], Seen]]:
        yield from zip(self.files.pairs or (), self.seen, strict=True)

    def _held(self) -> Held:
        """What all masks hold."""
        masks = [own for own in self.seen if own.values is not None]
        coloured = any(own.coloured for own in masks)
        pixels, shown = Counter[int](), Counter[int]()
        for own in masks:
            factor = 0x010101 if coloured and not own.coloured else 1  # a grey is a colour too
            values = (_array(own.values) * factor).tolist()
            pixels.update(dict(zip(values, _array(own.pixels).tolist(), strict=True)))
            shown.update(values)
        thin = sum(own.thin for own in masks) / max(1, pixels[IGNORE])
        return Held(len(masks), coloured, {value: count for value, count in pixels.items() if count}, shown, thin)

    def _labels(self, own: Seen) -> np.ndarray:
        """The class of each value of a mask, (N,). Raises ValueError that lists those that are none."""
        assert self.meaning is not None
        values, coloured = _array(own.values), own.coloured
        if self.reading.by != "value" and own.painted is not None:
            coloured, values = self.reading.by == "colour", own.painted
            values = values if coloured else values & 0xFF
        if coloured:
            return self.meaning.label(np.stack([values >> 16, values >> 8 & 0xFF, values & 0xFF], -1)[None])[0]
        return self.meaning.label(values[None])[0]

    # ---- what is told ----

    def findings(self, config: FinetuneConfig | PretrainConfig) -> Told:
        return [
            *self._tell(True, "folder", [(text, ()) for text in self.faults]),
            *self._of_files(),
            *(self._of_masks() if self.meaning is not None else ()),
            *self._tell(False, "folder", [(text, ()) for text in self.notes]),
            *self._of_kinds(config),
        ]

    def _tell(self, is_fault: bool, kind: str, lines: Sequence[tuple[str, tuple[str, ...]]]) -> Told:
        return [(is_fault, Finding(self.key, kind, text, names)) for text, names in dict(lines).items()]

    def _of_files(self) -> Told:
        """Images and masks that cannot be read, or lack each other."""
        numbered = [(self.files.name(index), own) for index, own in enumerate(self.seen)]
        told = self._tell(True, "image", [(own.fault, (name,)) for name, own in numbered if own.fault])
        told += self._tell(True, "mask", [(own.mask_fault, (name,)) for name, own in numbered if own.mask_fault])
        sizes = []
        for index, (name, own) in enumerate(numbered):
            if own.size[0] and own.values is not None and own.size != own.mask_size:
                image, mask = self.files.paths(index) if self.files.pairs is not None else (Path(name), None)
                sizes.append((say_sizes(image, own.size, mask or Path(name), own.mask_size), (name,)))
        told += self._tell(True, "size", sizes)
        doubts = [(f"{show_path(name)}: {own.doubt}; look at it", (name,)) for name, own in numbered if own.doubt]
        return told + self._missing() + self._tell(False, "doubt", doubts)

    def _missing(self) -> Told:
        dataset = self.dataset
        if not self.with_masks or not isinstance(dataset, Folder) or dataset.masks is None:
            return []
        folder = dataset.mask_folder
        missing = [name for name, mask in self.files.pairs or () if not mask]
        lossy = {stem_of(name): name for name in find_files(folder, IMAGE_SUFFIXES - MASK_SUFFIXES).files if missing}
        free = {stem_of(name): name for name in self.without_image}
        told, near_ones = [], set[str]()
        for number, name in enumerate(missing):
            near = _nearest(stem_of(name), free) if number < NAMED else []
            near_ones.update(free[stem] for stem in near)
            if stem_of(name) in lossy and folder != dataset.image_folder:
                why = f"its mask {show_path(lossy[stem_of(name)])} is in a lossy format; make it anew as PNG"
            elif near:
                why = f"no mask of this name; the nearest is {show_path(free[near[0]])}: give it the image's name"
            else:
                why = "no mask of this name, and none that is near; add it, or take the image out"
            told.append((f"{show_path(name)}: {why}", (name,)))
        extra = [name for name in self.without_image if name not in near_ones]
        lines = [(f"{show_path(name)}: a mask without an image, which is not used", (name,)) for name in extra]
        return self._tell(True, "no mask", told) + self._tell(False, "no image", lines)

    def _of_masks(self) -> Told:
        """Values that are no class, and classes that hardly occur."""
        assert self.meaning is not None
        strange, empty, single = [], [], defaultdict[str, list[str]](list)
        for index, own in enumerate(self.seen):
            if own.values is None:
                continue
            name = self.files.name(index)
            try:
                classes = set(self._labels(own).tolist()) - {IGNORE}
            except ValueError as error:
                path = name if self.files.pairs is None else show_path(self.files.paths(index)[1] or "")
                strange.append((f"{path}: {error}", (name,)))
                continue
            if len(classes) == 1:
                single[self.meaning.names[classes.pop()]].append(name)
            elif not classes:
                empty.append((f"{show_path(name)}: every pixel of its mask is ignored; it teaches nothing", (name,)))
        told = self._tell(True, "ids", strange) + self._tell(False, "ignored", empty)
        count = sum(own.values is not None for own in self.seen)
        if single:
            kinds = ", ".join(f"{len(names)} {name} ({_first(names)})" for name, names in single.items())
            number = sum(map(len, single.values()))
            text = f"{number} of {count} masks show one class only: {kinds}"
            told += self._tell(False, "single", [(text, tuple(name for own in single.values() for name in own))])
        return told + self._tell(False, "class", [(text, ()) for text in map(_rare, self._classes()) if text])

    def _of_kinds(self, config: FinetuneConfig | PretrainConfig) -> Told:
        """Pictures of several kinds, dark ones, and those below the crop."""
        by_kind, small = defaultdict[str, list[str]](list), list[str]()
        crop = config.augment.crop
        for index, own in enumerate(self.seen):
            if own.kind:
                by_kind[own.kind].append(self.files.name(index))
            if own.size[0] and (own.size[0] < crop[0] or own.size[1] < crop[1]) and config.data.resize is None:
                small.append(self.files.name(index))
        told: Told = []
        if len(by_kind) > 1:
            kinds = "; ".join(f"{len(names)} of {kind} ({_first(names)})" for kind, names in by_kind.items())
            told += self._tell(
                False, "kinds", [(f"images of several kinds: {kinds}; see that they belong together", ())]
            )
        deep = [own.used[1] for own in self.seen if own.kind.startswith("16") and not own.fault]
        if deep and max(deep) < DARK * MAX_STORED:
            white = 2 ** int(max(deep)).bit_length() - 1
            text = f"nearly black: of 16 bits no value above {max(deep):.0f} is used in {len(deep)} images; range: [0, "
            has_one = isinstance(self.dataset, Folder) and self.dataset.range is not None
            ending = f"{white}] is taken" if "range" in self.suggested else f"{white}] makes them bright"
            told += [] if has_one and not self.suggested else self._tell(False, "dark", [(text + ending, ())])
        elif "range" in self.suggested:
            low, high = self.suggested["range"]
            text = f"values of {next(iter(by_kind))} have no white of their own; range: [{low:g}, {high:g}] is taken"
            told += self._tell(False, "dark", [(text, ())])
        if small:
            text = (
                f"{len(small)} images are smaller than the crop of {crop[0]} x {crop[1]} ({_first(small)}), and are "
                "scaled up for it; give a smaller augment.crop if that is not meant"
            )
            told += self._tell(False, "small", [(text, tuple(small))])
        return told

    def _classes(self) -> list[Class]:
        if self.meaning is None:
            return []
        names = self.meaning.names
        pixels, shown = np.zeros(256, np.int64), np.zeros(256, np.int64)
        for own in self.seen:
            try:
                labels = self._labels(own) if own.values is not None else np.zeros(0, np.uint8)
            except ValueError:
                continue
            counts = np.bincount(labels, own.pixels if len(labels) else None, minlength=256).astype(np.int64)
            pixels += counts
            shown += counts > 0
        self.ignored = float(pixels[IGNORE] / max(1, pixels.sum()))
        counted = max(1, pixels[: len(names)].sum())
        return [Class(name, float(pixels[i] / counted), int(shown[i])) for i, name in enumerate(names)]

    def part(self) -> Part:
        good = [own for own in self.seen if own.kind]
        sizes = Counter(f"{own.size[1]} x {own.size[0]}" for own in good if own.size[0])
        held = self._held()
        shown = [f"#{value:06x}" if held.coloured else str(value) for value in sorted(held.pixels)]
        classes = tuple(self._classes())
        return Part(
            self.key,
            len(self.seen),
            dict(sizes.most_common()),
            dict(Counter(own.kind for own in good).most_common()),
            (min(own.used[0] for own in good), max(own.used[1] for own in good)) if good else None,
            sum(own.values is not None for own in self.seen) if self.with_masks else None,
            tuple(shown),
            classes,
            self.ignored,
            self.suggested,
        )

    # ---- by pictures ----

    def prints(self) -> Fingerprints:
        """Of the images that can be read."""
        good = [index for index, own in enumerate(self.seen) if own.thumb is not None]
        names, digests = ([self.files.name(i) for i in good], [self.seen[i].digest for i in good])
        return Fingerprints(tuple(names), tuple(digests), np.array([_array(self.seen[i].thumb) for i in good]))

    def sheet(self, told: Told) -> np.ndarray:
        """Images beside their overlays, those that something is told of first, and the classes with their shares."""
        bad: dict[str, str] = {}
        for _, finding in sorted(told, key=lambda own: not own[0]):
            if finding.part == self.key and finding.kind in ("image", "mask", "size", "ids", "no mask", "ignored"):
                for name in finding.files:
                    bad.setdefault(name, finding.kind)
        index_of = {self.files.name(index): index for index in range(len(self.files))}
        chosen = [index_of[name] for name in bad if name in index_of][:BAD_ON_SHEET]
        rest = [index for index in range(len(self.seen)) if self.files.name(index) not in bad]
        few = np.linspace(0, len(rest) - 1, min(len(rest), ON_SHEET - len(chosen))).round().astype(int)
        pictures = []
        for index in [*chosen, *(rest[place] for place in few)]:
            name = self.files.name(index)
            image, ids = self._drawn(index)
            pictures.append((f"{bad[name].upper()}: {name}" if name in bad else name, image, ids))
        classes = self._classes()
        names = [f"{own.name} {own.percent}" for own in classes]
        return panels.contact_sheet(f"{self.key}: {len(self.seen)} images", pictures, names, STRANGE)

    def _drawn(self, index: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The image and the class of every pixel; None for what cannot be drawn."""
        own = self.seen[index]
        image = None
        if own.size[0]:
            image = self._read_again(index)
        if own.values is None or self.meaning is None:
            return image, None
        if self.files.pairs is None:
            return image, self.dataset.label(index)
        path = self.files.paths(index)[1]
        assert path is not None
        mask = self.reading.values(path)
        flat = mask.reshape(-1, *mask.shape[2:])
        values, places = np.unique(flat, axis=0, return_inverse=True)
        ids = np.full(len(values), STRANGE, np.uint8)
        for place, value in enumerate(values):
            try:
                ids[place] = self.meaning.label(value[None, None])[0, 0]
            except ValueError:
                continue
        return image, ids[places.ravel()].reshape(mask.shape[:2])

    def _read_again(self, index: int) -> np.ndarray:
        if self.files.pairs is None:
            return self.dataset.image(index).image
        assert isinstance(self.dataset, Folder)
        return images.read_image(self.files.paths(index)[0], self.dataset.range, self.dataset.channels)


# ---- words ----


def _names_beside(masks: Path) -> tuple[str, ...]:
    """The classes that a command of ours has written beside masks; () where there are none."""
    for name, key in (("dataset.json", "class_names"), ("classes.json", "classes")):
        path = masks.parent / name
        names = files.read_json(path).get(key) if path.is_file() else None
        if isinstance(names, list) and names:
            return tuple(map(str, names))
    return ()


def _rare(own: Class) -> str:
    if own.masks == 0:
        return f"class {own.name}: no mask shows it"
    if own.masks == 1:
        return f"class {own.name}: one mask alone shows it ({own.percent} of all); it cannot be learnt and scored too"
    if own.share >= RARE:
        return ""
    return f"class {own.name}: {own.percent} of the pixels, in {own.masks} masks; augment.rare=0.33 shows it more often"


def _nearest(stem: str, others: Collection[str]) -> list[str]:
    """The stem that is most like one, if any is: first one that goes on behind it, as `a_mask` does behind `a`."""
    longer = [other for other in others if other.startswith(stem) and not other[len(stem) :][:1].isalnum()]
    return longer[:1] or get_close_matches(stem, others, n=1)


def _first(names: Sequence[str]) -> str:
    return show_path(names[0]) + (" and others" if len(names) > 1 else "")


def _array(values: np.ndarray | None) -> np.ndarray:
    """Of a file that could be read."""
    assert values is not None
    return values
