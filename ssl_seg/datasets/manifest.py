"""A list of images and masks: a table (CSV, TSV) or JSON that says which file is whose mask, and which go together.

Where files lie in many folders, or a table says which patient, which split an image is of. Ours is what a table means
here; it is read by the standard library, since a data frame would be another dependency for some lines.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path, PurePosixPath

from pydantic import Field

from ssl_seg import files
from ssl_seg.config import Config, PathText, UserError, user_path
from ssl_seg.datasets.pairs import Pairs, some_names
from ssl_seg.images import ARRAY_SUFFIXES, IMAGE_SUFFIXES, MASK_SUFFIXES, show_path

TABLES = {".csv": ",", ".tsv": "\t"}
LISTS = (".json", ".jsonl")
LARGEST = 2**28  # bytes: some million lines
MANY = 40  # letters of a value that a message repeats


class Columns(Config):
    """What the columns of a list are called."""

    image: str = "image"  # the image's path, from the list's folder or `root`
    mask: str = "mask"  # its mask's; looked at where `classes` are given
    group: str = "group"  # what an image is of: a patient, a drive. Splits keep a group whole; need not be there


@dataclass(frozen=True)
class Row:
    """A line of a list."""

    number: int  # as an editor counts lines, or from 1 in JSON
    values: Mapping[str, str]


class Manifest(Pairs):
    """Images that a list names, each with its mask: `images: list.csv`, whose first line names its columns.

    CSV (commas, or semicolons as spreadsheets in many languages write them), TSV, JSON (a list of mappings) or a JSON
    mapping in each line (`.jsonl`). Paths begin at the list's folder unless `root` says where. `where: {split: train}`
    takes the lines alone that say so. The sequence of an image is its group. Order is that of the list.

    Masks are read where `classes` are given; without, the images are unlabelled.

    Errors (UserError, one line): a list that cannot be read, lacks a column, or of which no line is left; files that
    are missing or not named, an image twice.

    >>> Manifest.model_validate({"type": "manifest", "images": "all.csv", "where": {"split": "val"}}).class_names
    ()
    """

    columns: Columns = Columns()
    root: PathText | None = None  # what paths begin from; None: the folder of the list
    # Columns, and what a line has to hold there to be taken: {split: train}. Empty: all lines are.
    where: dict[str, str] = Field(default_factory=dict)

    def _check_given(self) -> None:
        if self.masks is not None:
            raise ValueError(f"masks: the list names them, in its column {self.columns.mask}; drop the key")
        if PurePosixPath(self.images).suffix.lower() not in (*TABLES, *LISTS):
            known = " ".join((*TABLES, *LISTS))
            raise ValueError(f"images: {self.images} is no list ({known}); of a folder write type: folder")
        if self.classes is None and (self.ignore or self.mapping):
            raise ValueError("classes: missing, so masks are not read; name them, or drop ignore and mapping")

    @property
    def image_folder(self) -> Path:
        return self.listing.parent if self.root is None else user_path(self.root)

    @property
    def mask_folder(self) -> Path:
        return self.image_folder

    @property
    def has_masks(self) -> bool:
        return self.classes is not None

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return self._read.pairs

    @property
    def listing(self) -> Path:
        """The list's file."""
        return user_path(self.images)

    def name(self, index: int) -> str:
        return self._read.names[index]

    def sequence(self, index: int) -> str:
        return self._read.groups[index]

    @cached_property
    def _read(self) -> _Listed:
        """What the list says; loader workers inherit it."""
        rows = [row for row in _rows(self.listing) if self._is_wanted(row)]
        if not rows:
            said = ", ".join(f"{key}: {value}" for key, value in self.where.items())
            raise UserError(
                f"{show_path(self.listing)}: no line" + (f" of {said}; change where" if said else "; fill it")
            )
        columns = self.columns
        self._refuse_unknown(columns.image, rows)
        images = [_path(self.listing, row, columns.image) for row in rows]
        if self.has_masks:
            self._refuse_unknown(columns.mask, rows)
            masks = [_path(self.listing, row, columns.mask) for row in rows]
            self._refuse_files(rows, masks, MASK_SUFFIXES)
        else:
            masks = [""] * len(rows)
        self._refuse_files(rows, images, IMAGE_SUFFIXES | ARRAY_SUFFIXES)
        names = [_name(image) for image in images]
        (common, times), *_ = Counter(names).most_common(1)
        if times > 1:
            numbers = [row.number for row, name in zip(rows, names, strict=True) if name == common]
            raise UserError(
                f"{show_path(self.listing)}: lines {numbers[0]} and {numbers[1]} are both of {show_path(common)}; "
                "keep one"
            )
        if columns.group != Columns().group:
            self._refuse_unknown(columns.group, rows)
        groups = [row.values.get(columns.group, "").strip() for row in rows]
        return _Listed(tuple(zip(images, masks, strict=True)), tuple(names), tuple(groups))

    def _is_wanted(self, row: Row) -> bool:
        for column, value in self.where.items():
            self._refuse_unknown(column, [row])
            if row.values[column].strip() != value:
                return False
        return True

    def _refuse_unknown(self, column: str, rows: Sequence[Row]) -> None:
        if column in rows[0].values:
            return
        known = [*rows[0].values]
        near = get_close_matches(column, known, n=1)
        hint = (
            f"did you mean {near[0]}?" if near else f"it has {some_names(known, limit=8)}: say by columns which it is"
        )
        raise UserError(f"{show_path(self.listing)}: no column {column}; {hint}")

    def _refuse_files(self, rows: Sequence[Row], paths: Sequence[str], suffixes: frozenset[str]) -> None:
        """Raise UserError for files that are missing, or of a kind that is not read."""
        missing = [
            (row, path) for row, path in zip(rows, paths, strict=False) if not os.path.isfile(self.image_folder / path)
        ]
        if missing:
            row, path = missing[0]
            raise UserError(
                f"{show_path(self.listing)}: line {row.number}: no file {show_path(self.image_folder / path)} "
                f"({len(missing)} of {len(rows)} are missing); mend the list, or give root, where paths begin"
            )
        for row, path in zip(rows, paths, strict=False):
            if PurePosixPath(path).suffix.lower() not in suffixes:
                raise UserError(
                    f"{show_path(self.listing)}: line {row.number}: {show_path(path)}: is of a kind that is not read "
                    f"({' '.join(sorted(suffixes))}); convert it"
                )


@dataclass(frozen=True)
class _Listed:
    pairs: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    groups: tuple[str, ...]


def _rows(path: Path) -> list[Row]:
    """The lines of a list. Raises UserError for what is none."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(
                f"{show_path(path)}: is larger than {LARGEST >> 20} MiB, so no list of images; check the path"
            )
        text = files.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{show_path(path)}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{show_path(path)}: cannot be read ({error.strerror}); check the path") from error
    suffix = path.suffix.lower()
    return _of_table(path, text, TABLES[suffix]) if suffix in TABLES else _of_json(path, text, suffix)


def _of_table(path: Path, text: str, delimiter: str) -> list[Row]:
    first = text.partition("\n")[0]
    if delimiter == "," and ";" in first and "," not in first:
        delimiter = ";"
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        head = [name.strip() for name in next(reader, [])]
        if len(set(head)) < len(head):
            raise UserError(f"{show_path(path)}: names a column twice in its first line; rename one")
        rows = []
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(head):
                raise UserError(
                    f"{show_path(path)}: line {reader.line_num}: {len(cells)} columns, but the first has "
                    f"{len(head)}; put what holds a comma in quotes"
                )
            rows.append(Row(reader.line_num, dict(zip(head, cells, strict=True))))
    except csv.Error as error:
        raise UserError(f"{show_path(path)}: line {reader.line_num}: {error}; mend it") from error
    return rows


def _of_json(path: Path, text: str, suffix: str) -> list[Row]:
    try:
        if suffix == ".jsonl":
            entries = [(number, json.loads(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        else:
            entries = list(enumerate(json.loads(text), 1))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{show_path(path)}: is no list in JSON ({error}); mend it") from error
    for number, entry in entries:
        if not isinstance(entry, dict) or not all(isinstance(own, str | int | None) for own in entry.values()):
            shown = json.dumps(entry)[:MANY]
            raise UserError(
                f'{show_path(path)}: entry {number} is {shown}, not {{"image": "a.jpg", "mask": "a.png"}}; mend it'
            )
    return [
        Row(number, {key: "" if own is None else str(own) for key, own in entry.items()}) for number, entry in entries
    ]


def _path(path: Path, row: Row, column: str) -> str:
    value = row.values.get(column, "").strip()
    if not value or "\0" in value:
        raise UserError(f"{show_path(path)}: line {row.number} has no {column}; fill it, or remove the line")
    return value


def _name(path: str) -> str:
    """What an image is called wherever something is said or written of it: its path, but for what leads outside."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("..", "/")]
    return "/".join(parts)
