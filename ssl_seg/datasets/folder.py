"""A folder of images, and of masks beside it: the data set that people bring.

Ours, because torchvision's folders know no masks. Which files belong to it is told here, what is in masks by `masks`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import ClassVar

from pydantic import field_validator

from ssl_seg.config import UserError, user_path
from ssl_seg.datasets.masks import ask_for_classes, class_words
from ssl_seg.datasets.pairs import Pairs, some_names
from ssl_seg.files import read_json
from ssl_seg.images import ARRAY_SUFFIXES, IMAGE_SUFFIXES, MASK_SUFFIXES, show_path

# What commands of ours leave in a folder that they have written, and keys that tell it from a stranger's file.
MADE_BY_US = {
    "run.json": {"stage", "config"},
    "study.json": {"seeds", "cells"},
    "classes.json": {"classes", "model"},  # of `predict`
    "changed.json": set[str](),  # of `compare --pictures`
}
# Pictures that cameras and programs write and `images` does not read.
OTHER_SUFFIXES = frozenset(
    {".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".tga", ".exr", ".psd"}
    | {".dng", ".arw", ".cr2", ".cr3", ".nef", ".orf", ".raf", ".rw2"}
)
NAME = "{name}"  # in the word for masks: the image's name without its suffix
LOST_AND_FOUND = "lost+found"  # the file system's own, at the root of a disk, which only root may read


class Folder(Pairs):
    """Images under a folder, and class masks found by the same relative path without its suffix.

    Images are all files with a known suffix in the folder and its subfolders, ordered by relative path, as `find_files`
    finds them; a link to an image that is listed anyway is left out. `masks` may lie inside `images`, or be the same
    folder where the images are JPEGs. A mask without an image is no fault: labels are often published for more images
    than one keeps. `classes` are the names or their number, two at least; left out, the `class_names` of a dataset.json
    beside the masks, as `ssl-seg synth` writes it. A stored 255 is ignored, and so are the ids of `ignore`. The
    sequence of an image is its subfolder.

    `masks` may be a pattern in place of a folder, such as `annot/ann_{name}.png`, where masks are called otherwise than
    their images. The mask of `deep/a.jpg` is then `annot/deep/ann_a.png`.

    `mapping` turns stored values into classes: its keys are ids or colours ("#rrggbb" or "r,g,b"), its values class
    ids, class names or "ignore". An id it does not name keeps its value, unless another value is mapped to that class.
    `masks.how_to_read` says how palettes are read.

    `range` gives the stored values that become black and white in images of more than 8 bits a channel: one range for
    all images, since stretching each by its own values would hide how bright it is; of several channels also one for
    each. Left out, 65535 of 16 bits is white.

    Errors (UserError, one line): folders that are missing, cannot be read or hold no image, an image without a mask,
    two images or two masks for one stem, a mask of another size than its image, values that are no class.
    """

    since_0_1: ClassVar[tuple[str, ...]] = (*Pairs.since_0_1, "range", "only")
    only: tuple[str, ...] = ()  # images and subfolders, by their paths in `images`; none named: all that is there

    @field_validator("masks")
    @classmethod
    def _check_pattern(cls, masks: str | None) -> str | None:
        if masks is not None:
            Pattern.of(masks)
        return masks

    @field_validator("only")
    @classmethod
    def _inside(cls, only: tuple[str, ...]) -> tuple[str, ...]:
        outside = [name for name in only if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
        if outside:
            raise ValueError(f"{outside[0]} does not lie in images; name what does, by its path in there")
        return only

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._names_beside if self.masks is not None and self.classes is None else super().class_names

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return self._scanned.pairs

    def sequence(self, index: int) -> str:
        parent = str(PurePosixPath(self.name(index)).parent)
        return "" if parent == "." else parent

    @property
    def image_folder(self) -> Path:
        return user_path(self.images)

    @property
    def mask_folder(self) -> Path:
        assert self.masks is not None  # nobody asks before it is known that there are masks
        return user_path(Pattern.of(self.masks).folder)

    def notes(self, with_labels: bool = True) -> tuple[str, ...]:
        return self._scanned.notes + super().notes(with_labels)

    @cached_property
    def _names_beside(self) -> tuple[str, ...]:
        """The names in dataset.json. Raises UserError that says what the masks hold where there are none."""
        path = self.mask_folder.parent / "dataset.json"
        names = read_json(path).get("class_names") if os.path.isfile(path) else None
        if not isinstance(names, list) or not names:
            raise UserError(ask_for_classes(self.mask_folder, [mask for _, mask in self._scan().pairs]))
        try:
            words = class_words(names)
        except ValueError as error:
            raise UserError(f"{show_path(path)}: class_names: {error}") from error
        assert isinstance(words, tuple)  # as the names of a list are
        return words

    @cached_property
    def _scanned(self) -> Matched:
        """What is there; loader workers inherit it."""
        if self.masks is not None and self.classes is None:
            _ = self._names_beside  # which says what is missing
        return self._scan()

    def match(self) -> Matched:
        """The images with their masks, whatever is missing. Raises UserError as `match`."""
        pattern = None if self.masks is None else Pattern.of(self.masks)
        masks = None if pattern is None else self.mask_folder
        return match(self.image_folder, masks, self.image_suffixes, pattern=pattern, only=self.only)

    @property
    def image_suffixes(self) -> frozenset[str]:
        """Of the files that are images."""
        # Beside pictures of three channels an array is something else, as it was before there were others.
        return IMAGE_SUFFIXES if self.channels == 3 else IMAGE_SUFFIXES | ARRAY_SUFFIXES

    def _scan(self) -> Matched:
        return complete(self.match(), self.image_folder, None if self.masks is None else self.mask_folder)


@dataclass(frozen=True)
class Matched:
    """The images of a folder with their masks, and what a person should know of it."""

    pairs: tuple[tuple[str, str], ...]  # relative paths; '' for a mask that there is not
    notes: tuple[str, ...]
    without_image: tuple[str, ...] = ()  # masks
    clashes: tuple[str, ...] = ()  # a line for every two images, or masks, of which one alone could be meant


@dataclass(frozen=True)
class Pattern:
    """How masks are called: by `annot/ann_{name}.png` that of `a.jpg` is `annot/ann_a.png`."""

    folder: str
    before: str = ""
    after: str = ""
    suffix: str = ""  # '': any

    @classmethod
    def of(cls, masks: str) -> Pattern:
        """Raises ValueError for a pattern that says nothing, or too much."""
        if not re.search(r"\{\w*\}", masks):
            return cls(masks)
        folder, _, called = masks.rpartition("/")
        before, named, after = called.partition(NAME)
        if not named or re.search(r"\{\w*\}", folder + before + after):
            raise ValueError(
                f"'{masks}' is no pattern; write {NAME} once, for the image's name, behind the folder: masks/{NAME}.png"
            )
        suffix = PurePosixPath(f"a{after}").suffix
        suffix = suffix if suffix.lower() in IMAGE_SUFFIXES | MASK_SUFFIXES else ""
        return cls(folder or ".", before, after.removesuffix(suffix), suffix.lower())

    def stem(self, mask: str) -> str | None:
        """The stem of the image that a mask belongs to; None for a file that is called otherwise."""
        path = PurePosixPath(mask)
        stem = path.name.removesuffix(path.suffix)
        called = stem.startswith(self.before) and stem.endswith(self.after)
        if not called or len(stem) <= len(self.before + self.after) or self.suffix not in ("", path.suffix.lower()):
            return None
        own = stem.removeprefix(self.before).removesuffix(self.after)
        return unicodedata.normalize("NFC", (path.parent / own).as_posix())


def match(
    folder: Path,
    masks: Path | None = None,
    suffixes: frozenset[str] = IMAGE_SUFFIXES,
    mask_suffixes: frozenset[str] = MASK_SUFFIXES,
    pattern: Pattern | None = None,
    only: Sequence[str] = (),
) -> Matched:
    """The images of a folder, each with the mask of the same relative path, whatever is missing.

    Raises UserError for a folder that is missing, cannot be read or holds no image.
    """
    pattern = pattern or Pattern(str(masks))
    is_plain = not (pattern.before or pattern.after or pattern.suffix)
    together = masks is not None and (masks == folder or _is_same(masks, folder))
    # Where masks lie beside them, images are what masks cannot be, or what is not called as masks are.
    found = _find(folder, only, suffixes - mask_suffixes if together and is_plain else suffixes, masks)
    names = _without_aliases(folder, found.files)
    if together and not is_plain:
        names = [name for name in names if pattern.stem(name) is None]
    if together and not names:
        pictures = find_files(folder, suffixes).files
        near = min(pictures, key=len, default="a.png")
        raise UserError(
            f"{show_path(folder)}: is named for images and for masks, and nothing tells which of its {len(pictures)} "
            f"pictures is which; name the folder of the masks, or how they are called, such as masks: "
            f"{_pattern_beside(masks or folder, near)}"
        )
    _refuse_empty(folder, names, found, suffixes)
    if masks is None:
        return Matched(tuple((name, "") for name in names), found.notes(folder))
    found_masks = find_files(masks, mask_suffixes)
    images_by_stem, clashes = _by_stem(folder, names)
    called = [name for name in found_masks.files if pattern.stem(name) is not None]
    masks_by_stem, others = _by_stem(masks, called, pattern)
    pairs = tuple((name, masks_by_stem.get(stem, "")) for stem, name in images_by_stem.items())
    used = {*(mask for _, mask in pairs), *(names if together else ())}
    return Matched(
        pairs,
        tuple(dict.fromkeys(found.notes(folder) + found_masks.notes(masks))),
        () if only else tuple(name for name in found_masks.files if name not in used),
        (*clashes, *others),
    )


def scan(
    folder: Path,
    masks: Path | None,
    suffixes: frozenset[str] = IMAGE_SUFFIXES,
    mask_suffixes: frozenset[str] = MASK_SUFFIXES,
) -> Matched:
    """As `match`. Raises UserError too where an image has no mask, or two could be meant."""
    return complete(match(folder, masks, suffixes, mask_suffixes), folder, masks, mask_suffixes, takes_pattern=False)


def complete(
    matched: Matched,
    folder: Path,
    masks: Path | None,
    mask_suffixes: frozenset[str] = MASK_SUFFIXES,
    takes_pattern: bool = True,
) -> Matched:
    """What was matched. Raises UserError where an image has no mask, or two could be meant."""
    if matched.clashes:
        raise UserError(matched.clashes[0])
    missing = [name for name, mask in matched.pairs if not mask]
    if masks is not None and missing:
        raise UserError(_say_missing(folder, masks, missing, matched, mask_suffixes, takes_pattern))
    return matched


def likely_pattern(masks: Path, matched: Matched) -> str | None:
    """How masks seem to be called, where all images lack theirs and there is one word that gives each of them one."""
    missing = [name for name, mask in matched.pairs if not mask]
    if not missing or len(missing) < len(matched.pairs):
        return None
    called = _called_after(missing[0], matched.without_image)
    if called is None:
        return None
    pattern = Pattern.of(f"{masks}/{called}")
    stems = {pattern.stem(name) for name in matched.without_image}
    return f"{masks}/{called}" if {stem_of(name) for name in missing} <= stems else None


@dataclass(frozen=True)
class Found:
    """The files of a folder and its subfolders, and what was passed over."""

    files: tuple[str, ...]  # relative posix paths, sorted
    made_by_us: tuple[str, ...]  # subfolders that commands of ours have written
    loops: tuple[str, ...]  # links to folders that they lie in themselves
    unread: tuple[str, ...]  # pictures of OTHER_SUFFIXES

    def kinds(self) -> tuple[tuple[str, ...], ...]:
        """In the order of the fields."""
        return self.files, self.made_by_us, self.loops, self.unread

    def notes(self, folder: Path) -> tuple[str, ...]:
        """A line for each kind that was passed over."""
        passed_over = {
            "subfolders that a run or another command has written, which are left out": self.made_by_us,
            "links to a folder above them, which are not followed": self.loops,
            "pictures of a kind that is not read; convert them, or take them out": self.unread,
        }
        kinds = [(why, names) for why, names in passed_over.items() if names]
        return tuple(f"{show_path(folder)}: {why}: {len(names)} ({some_names(names)})" for why, names in kinds)


def find_files(folder: Path, suffixes: Collection[str], without: Path | None = None) -> Found:
    """All files with one of the lower-case `suffixes`, those below `without` aside; hidden ones are left out.

    Links to folders are followed, each real folder once: under its own name where it lies in `folder`, else under that
    of the first link. Folders that a run, a study or a prediction of ours has written are passed over, for what is in
    them was drawn. Raises UserError for a folder that is missing or cannot be read, and for a link that leads nowhere.
    """
    if not is_folder(folder):
        raise UserError(f"{show_path(folder)}: no such folder; check the path (it is taken from the working directory)")
    files: list[str] = []
    made_by_us: list[str] = []
    loops: list[str] = []
    unread: list[str] = []
    entered = {_identity(without)} - {_identity(folder)} if without is not None and is_folder(without) else set()
    waiting, links = [""], []
    while waiting or links:
        links.sort(reverse=True)
        by_link = not waiting  # last, so that what they lead to keeps its own name where it has one
        place = links.pop() if by_link else waiting.pop()
        identity = _identity(folder / place)
        if identity in entered:
            continue
        if by_link and _leads_back(folder / place):
            loops.append(place)
            continue
        entered.add(identity)
        entries = _entries(folder / place)
        if place and _is_made_by_us(folder / place, {entry.name for entry in entries}):
            made_by_us.append(place)
            continue
        for entry in entries:
            name = f"{place}/{entry.name}" if place else entry.name
            if entry.name.startswith(".") or entry.name == LOST_AND_FOUND:
                continue
            kind = _kind(folder / name, entry)
            suffix = PurePosixPath(entry.name).suffix.lower()
            if kind == "folder":
                (links if entry.is_symlink() else waiting).append(name)
            elif kind == "file" and suffix in suffixes:
                files.append(name)
            elif kind == "file" and suffix in OTHER_SUFFIXES:
                unread.append(name)
            elif kind == "gone" and (suffix in suffixes or not suffix):
                what = "a link to a file" if suffix else "a link to a folder or file"
                raise UserError(f"{show_path(folder / name)}: {what} that is missing; mend or remove it")
    return Found(*(tuple(sorted(names)) for names in (files, made_by_us, loops, unread)))


def _find(folder: Path, only: Sequence[str], suffixes: Collection[str], masks: Path | None) -> Found:
    """As `find_files`, but of the files and subfolders that are named alone, if any are."""
    if not only:
        return find_files(folder, suffixes, without=masks)
    parts = []
    for name in only:
        path = folder / name
        if is_folder(path):
            inner = find_files(path, suffixes, without=masks)
            parts.append([[f"{name}/{own}".removeprefix("./") for own in kind] for kind in inner.kinds()])
        elif not os.path.isfile(path):
            near = get_close_matches(
                PurePosixPath(name).name, os.listdir(path.parent) if is_folder(path.parent) else ()
            )
            raise UserError(f"{show_path(path)}: no such image{f'; the nearest is {near[0]}' if near else ''}")
        elif path.suffix.lower() not in suffixes:
            raise UserError(f"{show_path(path)}: is no image that is read ({' '.join(sorted(suffixes))}); convert it")
        else:
            parts.append([[name], [], [], []])
    return Found(*(tuple(sorted({name for part in parts for name in part[kind]})) for kind in range(4)))


def is_folder(path: Path) -> bool:
    """Whether there is a folder. Raises UserError where that cannot be found out."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a path with a zero byte is none
        return False
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{show_path(path)}: cannot be read ({error.strerror}), so nobody knows which images are in it; "
        "mend its permissions, or move it elsewhere"
    )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _kind(path: Path, entry: os.DirEntry[str]) -> str:
    """folder, file, other, or gone for a link that leads nowhere."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "gone" if entry.is_symlink() and not path.exists() else "other"
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return "gone"
        raise _unreadable(path, error) from error


def _is_same(folder: Path, other: Path) -> bool:
    return is_folder(folder) and is_folder(other) and _identity(folder) == _identity(other)


def _identity(folder: Path) -> tuple[int, int]:
    try:
        found = folder.stat()
    except OSError as error:
        raise _unreadable(folder, error) from error
    return found.st_dev, found.st_ino


def _leads_back(link: Path) -> bool:
    """Whether a link to a folder lies in that folder: with it everything would come in, from there on."""
    return link.parent.resolve().is_relative_to(link.resolve())


def _is_made_by_us(folder: Path, names: set[str]) -> bool:
    for name, keys in MADE_BY_US.items():
        if name in names:
            with suppress(UserError):
                if keys <= read_json(folder / name).keys():
                    return True
    return False


def _without_aliases(folder: Path, names: Sequence[str]) -> list[str]:
    """`names` without the links to a file that another name already stands for."""
    links = {name for name in names if (folder / name).is_symlink()}
    if not links:
        return list(names)
    real = {place: place.resolve() for place in {(folder / name).parent for name in names}}
    paths = [folder / name for name in names if name not in links]
    seen = {real[path.parent] / path.name for path in paths}
    kept = []
    for name in names:
        if name in links:
            target = (folder / name).resolve()
            if target in seen:
                continue
            seen.add(target)
        kept.append(name)
    return kept


def by_stem(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The names by their path without suffix. Raises UserError for two that would be one."""
    found, clashes = _by_stem(folder, names)
    if clashes:
        raise UserError(clashes[0])
    return found


def _by_stem(folder: Path, names: Iterable[str], pattern: Pattern | None = None) -> tuple[dict[str, str], list[str]]:
    """The first name of each stem, and a line for every other one."""
    found: dict[str, str] = {}
    clashes = []
    for name in names:
        stem = (pattern and pattern.stem(name)) or stem_of(name)
        if stem in found:
            same_letters = PurePosixPath(found[stem]).with_suffix("") == PurePosixPath(name).with_suffix("")
            how = "by their suffix only" if same_letters else "by how Unicode writes the same letters"
            both = f"{show_path(found[stem])} and {show_path(name)}"
            clashes.append(f"{show_path(folder)}: {both} differ {how}; rename or remove one of them")
        found.setdefault(stem, name)
    return found, clashes


def stem_of(name: str) -> str:
    """What an image and its mask have in common; macOS takes letters with accents apart (NFD), other systems do not."""
    return unicodedata.normalize("NFC", PurePosixPath(name).with_suffix("").as_posix())


def _refuse_empty(folder: Path, names: Sequence[str], found: Found, suffixes: Collection[str]) -> None:
    if not names:
        known = " ".join(sorted(suffixes))
        passed = "".join(f"; {note}" for note in found.notes(folder))
        raise UserError(f"{show_path(folder)}: no image in it or its subfolders ({known}); give another folder{passed}")


def _called_after(image: str, masks: Iterable[str]) -> str | None:
    """The name of a mask that has the image's name in it, with `{name}` for that; None where there is none."""
    stem = PurePosixPath(image).stem
    names = [PurePosixPath(mask).name for mask in masks]
    having = sorted((name for name in names if stem in name), key=len)
    return having[0].replace(stem, NAME, 1) if having else None


def _pattern_beside(masks: Path, name: str) -> str:
    """A pattern to write for masks that lie beside their images."""
    return f"{show_path(masks)}/{NAME}_mask{PurePosixPath(name).suffix}"


def _say_missing(
    folder: Path,
    masks: Path,
    missing: Sequence[str],
    matched: Matched,
    mask_suffixes: Collection[str],
    takes_pattern: bool,
) -> str:
    stems = {stem_of(name) for name in missing}
    lossy = [name for name in find_files(masks, IMAGE_SUFFIXES - MASK_SUFFIXES).files if stem_of(name) in stems]
    if lossy and masks != folder:
        path = show_path(masks / lossy[0])
        return f"{path}: masks in a lossy format have wrong ids along edges; make them anew as PNG"
    told = (
        f"{show_path(masks)}: no mask for {len(missing)} of the {len(matched.pairs)} images of {show_path(folder)} "
        f"({some_names(missing)}){'; it is named for images and for masks' if masks == folder else ''}"
    )
    called = _called_after(missing[0], matched.without_image)
    if takes_pattern and called is not None:
        seen = called.replace(NAME, PurePosixPath(missing[0]).stem)
        return f"{told}; there is {show_path(seen)}: if masks are called so, write masks: {show_path(masks)}/{called}"
    others = {PurePosixPath(name).stem: name for name in matched.without_image}
    near = get_close_matches(PurePosixPath(missing[0]).stem, others, n=1)
    nearest = f"; the nearest name is {show_path(others[near[0]])}" if near else ""
    return (
        f"{told}{nearest}; a mask has its image's relative path with {' '.join(sorted(mask_suffixes))}: add them or "
        "remove the images"
    )
