"""A folder of images, and of masks beside it: the data set that people bring.

Ours, because torchvision's folders know no masks and because masks in the wild come as ids, palettes, three equal
channels, colours or 0 and 255: each is mapped by a table, or refused in one line that shows the table to write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

import numpy as np
from pydantic import (
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ssl_seg.config import PathText, UserError, user_path
from ssl_seg.datasets import Dataset, Example
from ssl_seg.files import read_json
from ssl_seg.images import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Range,
    doubt,
    largest_value,
    orientation,
    read_image,
    read_mask,
    show_path,
)

IGNORE = 255
MAX_CLASSES = 255  # ids 0 to 254; 255 is ignored
MAX_STORED = 65535  # the largest value of 16 bits
SAME_SIDES = (2, 3, 4)  # EXIF orientations that keep height and width: mirrored, turned by 180 degrees, upside down
PROBED_MASKS = 10  # how many are read to say which ids there are
PROBED_IMAGES = 8  # how many are read to say how much of their 16 bits is used
LEAST_USED = 0.1  # of 16 bits: 12 bits fill a sixteenth

StoredId = Annotated[int, Field(ge=0, le=MAX_STORED)]


class Folder(Dataset):
    """Images under a folder, and class masks found by the same relative path without its suffix.

    Images are all files with a known suffix in the folder and its subfolders, ordered by relative path; hidden files
    are skipped, links to folders are not followed, and a link to an image that is listed anyway is left out. `masks`
    may lie inside `images`, or be the same folder where the images are JPEGs. A mask without an image is no fault:
    labels are often published for more images than one keeps. `classes` are the names or their number; left out, the
    `class_names` of a dataset.json beside the masks, as `ssl-seg synth` writes it. A stored 255 is ignored, and so are
    the ids of `ignore`. The sequence of an image is its subfolder.

    `mapping` turns stored values into classes: its keys are ids or colours ("#rrggbb" or "r,g,b"), its values class
    ids, class names or "ignore". An id it does not name keeps its value, unless another value is mapped to that class.

    `range` gives the stored values that become black and white in images of more than 8 bits a channel: one range for
    all, since stretching each by its own values would hide how bright it is. Left out, 65535 of 16 bits is white.

    Errors (UserError, one line): folders that are missing or hold no image, an image without a mask, two images or
    two masks for one stem, a mask of another size than its image, values that are no class.
    """

    images: PathText
    masks: PathText | None = None
    classes: tuple[str, ...] | int | None = None
    ignore: tuple[StoredId, ...] = ()
    mapping: dict[str, int | str] | None = None
    range: tuple[FiniteFloat, FiniteFloat] | None = None

    @field_validator("classes", mode="before")
    @classmethod
    def _check_classes(cls, value: Any) -> Any:
        if value is None:
            return value
        if isinstance(value, int) and 1 <= value <= MAX_CLASSES:
            return value
        if isinstance(value, list | tuple) and 1 <= len(value) <= MAX_CLASSES:
            names = [str(name) for name in value]
            if len(set(names)) == len(names):
                return tuple(names)
        raise ValueError(f"give 1 to {MAX_CLASSES} different names, or their number, not {value!r}")

    @field_validator("mapping", mode="before")
    @classmethod
    def _normalize_mapping(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        keys = [_stored_value(key) for key in value]
        if len(set(keys)) < len(keys):
            raise ValueError("two keys mean the same stored value; keep one")
        return dict(zip(keys, [_number_or_word(word) for word in value.values()], strict=True))

    @field_validator("range")
    @classmethod
    def _check_range(cls, value: Range | None) -> Range | None:
        if value is not None and value[0] >= value[1]:
            raise ValueError(f"black ({value[0]:g}) has to be less than white ({value[1]:g})")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        labelled = {"classes": self.classes, "ignore": self.ignore, "mapping": self.mapping}
        given = [key for key, value in labelled.items() if value]
        if self.masks is None and given:
            raise ValueError(f"{given[0]} is given without masks; add masks, the folder of the masks")
        twice = sorted({str(value) for value in self.ignore} & set(self.mapping or {}))
        if twice:
            raise ValueError(f"id {twice[0]} is in ignore and in mapping; keep one")
        if self.classes is not None:
            self._class_of_stored()
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """`range` is written where it is used alone: runs of earlier versions, which had none, stay of one group."""
        return {name: value for name, value in dump(self).items() if name != "range" or value is not None}

    @property
    def class_names(self) -> tuple[str, ...]:
        if self.masks is None:
            return ()
        if self.classes is None:
            return self._names_beside
        if isinstance(self.classes, int):
            return tuple(f"class_{index}" for index in range(self.classes))
        return self.classes

    def __len__(self) -> int:
        return len(self._files)

    def image(self, index: int) -> Example:
        image_name = self.name(index)
        return Example(read_image(self._image_folder / image_name, self.range), None, image_name)

    def read(self, index: int) -> Example:
        if self.masks is None:
            return self.image(index)
        image_name, mask_name = self._files[index]
        image_path = self._image_folder / image_name
        image = read_image(image_path, self.range)
        mask_path = self._mask_folder / mask_name
        stored = read_mask(mask_path)
        if stored.shape[:2] != image.shape[:2]:
            raise UserError(
                f"{show_path(mask_path)}: {stored.shape[0]} x {stored.shape[1]} pixels (H x W), but its image "
                f"{show_path(image_path)} has {image.shape[0]} x {image.shape[1]}; {_mend_size(image_path, stored)}"
            )
        try:
            label = self._label(stored)
        except ValueError as error:
            raise UserError(f"{show_path(mask_path)} (mask of {show_path(image_path)}): {error}") from error
        return Example(image, label, image_name)

    def name(self, index: int) -> str:
        return self._files[index][0]

    def sequence(self, index: int) -> str:
        parent = str(PurePosixPath(self.name(index)).parent)
        return "" if parent == "." else parent

    def doubt(self, index: int) -> str:
        image_name, mask_name = self._files[index]
        image_path = self._image_folder / image_name
        found = doubt(image_path)
        if found or not mask_name:
            return found
        turn, (height, width) = orientation(image_path)
        fits_either_way = turn in SAME_SIDES or (turn > 1 and height == width)
        if fits_either_way and orientation(self._mask_folder / mask_name)[0] == 1:
            return "turned by its EXIF orientation, and its mask is taken to be drawn on the turned picture"
        return ""

    def caution(self) -> str:
        if self.range is not None:
            return ""
        probed = range(0, len(self), max(1, len(self) // PROBED_IMAGES))[:PROBED_IMAGES]
        found = [largest_value(self._image_folder / self.name(index)) for index in probed]
        largest = [value for value in found if value is not None]
        if not any(largest) or max(largest) >= LEAST_USED * MAX_STORED:
            return ""
        white = 2 ** max(largest).bit_length() - 1
        return (
            f"{show_path(self._image_folder)}: nearly black: in {len(largest)} images of 16 bits that were read no "
            f"value is above {max(largest)} of {MAX_STORED}; if less than that is white, write range: [0, {white}]"
        )

    @property
    def _image_folder(self) -> Path:
        return user_path(self.images)

    @property
    def _mask_folder(self) -> Path:
        assert self.masks is not None  # nobody asks before it is known that there are masks
        return user_path(self.masks)

    @cached_property
    def _names_beside(self) -> tuple[str, ...]:
        """The names in dataset.json. Raises UserError that says what the masks hold where there are none."""
        path = self._mask_folder.parent / "dataset.json"
        names = read_json(path).get("class_names") if path.is_file() else None
        if not isinstance(names, list) or not names:
            raise UserError(self._ask_for_classes(self._scan()))
        return tuple(str(name) for name in names)

    @cached_property
    def _files(self) -> tuple[tuple[str, str], ...]:
        """The relative paths of each image and its mask ('' where there are no masks); loader workers inherit them."""
        if self.masks is not None and self.classes is None:
            _ = self._names_beside  # which says what is missing
        return self._scan()

    def _scan(self) -> tuple[tuple[str, str], ...]:
        folder = self._image_folder
        masks = None if self.masks is None else self._mask_folder
        found = _without_aliases(folder, find_files(folder, IMAGE_SUFFIXES))
        if masks is None:
            _refuse_empty(folder, found)
            return tuple((name, "") for name in found)
        found = [name for name in found if not _is_mask(folder / name, folder, masks)]
        _refuse_empty(folder, found)
        images_by_stem = _by_stem(folder, found)
        masks_by_stem = _by_stem(masks, find_files(masks, MASK_SUFFIXES))
        missing = [name for stem, name in images_by_stem.items() if stem not in masks_by_stem]
        if missing:
            raise UserError(_say_missing(folder, masks, missing, len(found)))
        return tuple((name, masks_by_stem[stem]) for stem, name in images_by_stem.items())

    def _label(self, stored: np.ndarray) -> np.ndarray:
        """Class ids `(H, W)` uint8 from stored values. Raises ValueError that says which values are no class."""
        ids, colours = self._tables
        if stored.ndim == 3 and not colours:
            stored = _one_channel(stored)
        if stored.ndim == 3:
            values = _colour_codes(stored)
            shifted = _colour_table(colours)[values]
        elif colours and not ids:
            raise ValueError(
                f"holds ids ({_some(np.unique(stored))}), but mapping names colours only; add the ids to it"
            )
        else:
            self._refuse_two_values(stored)
            values = stored
            shifted = _id_table(len(self.class_names), ids)[values]
        if shifted.min() == 0:
            raise ValueError(self._say_unknown(values[shifted == 0], stored.ndim == 3))
        return (shifted - 1).astype(np.uint8)

    def _refuse_two_values(self, stored: np.ndarray) -> None:
        """With two classes 0 and 255 may mean black and white as well as background and ignored: ask, do not guess."""
        settled = IGNORE in self.ignore or str(IGNORE) in (self.mapping or {})
        if settled or len(self.class_names) != 2:
            return
        if (stored == IGNORE).any() and ((stored == 0) | (stored == IGNORE)).all():
            raise ValueError(
                f"holds only 0 and 255 for two classes; write mapping: {{255: 1}} if 255 is {self.class_names[1]!r}, "
                "or mapping: {255: ignore} if it is to be ignored"
            )

    def _say_unknown(self, unknown: np.ndarray, coloured: bool) -> str:
        values = np.unique(unknown)
        names = self.class_names
        if coloured:
            shown = [_colour_name(value) for value in values]
            return f"colours {_some(shown)} are in no mapping; add lines such as mapping: {{'{shown[0]}': ignore}}"
        first = values[0]
        if first < len(names):
            return (
                f"id {first} is not in mapping, which gives its class {names[first]!r} to another id; "
                f"add mapping: {{{first}: {first}}} if both are meant, or mapping: {{{first}: ignore}}"
            )
        return (
            f"ids {_some(values)} are no class (0 is {names[0]!r} to {len(names) - 1} is {names[-1]!r}, "
            f"255 is ignored); raise classes, or add lines such as mapping: {{{first}: ignore}}"
        )

    def _ask_for_classes(self, files: Sequence[tuple[str, str]]) -> str:
        folder = self._mask_folder
        probed = files[:: max(1, len(files) // PROBED_MASKS)][:PROBED_MASKS]
        ids: set[int] = set()
        colours: set[str] = set()
        for _, mask_name in probed:
            stored = read_mask(folder / mask_name)
            if stored.ndim == 3 and not _is_grey(stored):
                colours.update(_colour_name(code) for code in np.unique(_colour_codes(stored)))
            else:
                ids.update(np.unique(stored.reshape(*stored.shape[:2], -1)[..., 0]).tolist())
        lead = f"{show_path(folder)}: classes is missing; {len(probed)} of {len(files)} masks hold"
        if colours:
            first = min(colours)
            return f"{lead} colours {_some(sorted(colours))}: write classes and mapping: {{'{first}': 0, ...}}"
        if ids == {0, IGNORE}:
            return f"{lead} ids 0 and 255: write classes: 2 and mapping: {{255: 1}}"
        count = max(ids - {IGNORE}, default=0) + 1
        return f"{lead} ids {_some(sorted(ids))}: write classes: {count}, or a list of {count} names"

    @cached_property
    def _tables(self) -> tuple[Pairs, Pairs]:
        """The pairs (stored id, class id) and (colour code, class id) that `ignore` and `mapping` give."""
        classes = self._class_of_stored()
        ids = [(value, IGNORE) for value in self.ignore]
        ids += [(int(key), value) for key, value in classes.items() if not key.startswith("#")]
        colours = [(int(key[1:], 16), value) for key, value in classes.items() if key.startswith("#")]
        return tuple(ids), tuple(colours)

    def _class_of_stored(self) -> dict[str, int]:
        """`mapping` with class ids for values. Raises ValueError for one that is no class."""
        names = self.class_names
        return {key: _class_id(key, value, names) for key, value in (self.mapping or {}).items()}


Pairs = tuple[tuple[int, int], ...]


def find_files(folder: Path, suffixes: Iterable[str]) -> list[str]:
    """The relative posix paths of all files with one of the lower-case `suffixes`, sorted; hidden ones are left out.

    Links to folders are not followed, so a link to a parent cannot list a file twice. Raises UserError for a folder
    that is missing and for a link to a file that is.
    """
    if not folder.is_dir():
        raise UserError(f"{show_path(folder)}: no such folder; check the path (it is taken from the working directory)")
    names = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.suffix.lower() not in suffixes or any(part.startswith(".") for part in relative.parts):
            continue
        if path.is_file():
            names.append(relative.as_posix())
        elif not path.exists():
            raise UserError(f"{show_path(path)}: a link to a file that is missing; mend or remove it")
    return sorted(names)


def _without_aliases(folder: Path, names: list[str]) -> list[str]:
    """`names` without the links to a file that another name already stands for."""
    links = {name for name in names if (folder / name).is_symlink()}
    seen = {folder.resolve() / name for name in names if name not in links} if links else set()
    kept = []
    for name in names:
        if name in links:
            target = (folder / name).resolve()
            if target in seen:
                continue
            seen.add(target)
        kept.append(name)
    return kept


def _is_mask(path: Path, folder: Path, masks: Path) -> bool:
    """Whether a file of the image folder is a mask: of a mask folder inside it, or side by side with the images."""
    if masks == folder:
        return path.suffix.lower() in MASK_SUFFIXES
    return folder in masks.parents and masks in path.parents


def _by_stem(folder: Path, names: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        stem = _stem(name)
        if stem in found:
            both = f"{show_path(found[stem])} and {show_path(name)}"
            raise UserError(f"{show_path(folder)}: {both} differ by their suffix only; rename or remove one of them")
        found[stem] = name
    return found


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _mend_size(image_path: Path, stored: np.ndarray) -> str:
    """What to do about a mask that does not fit its image."""
    turn, size = orientation(image_path)
    if turn == 1 or size != stored.shape[:2]:
        return "make the mask anew or remove both"
    return (
        f"the image is turned by its EXIF orientation ({turn}), and the mask was drawn on it as it is stored: turn the "
        "mask too, or take the orientation out of the image"
    )


def _refuse_empty(folder: Path, names: Sequence[str]) -> None:
    if not names:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{show_path(folder)}: no image in it or its subfolders ({known}); give another folder")


def _say_missing(folder: Path, masks: Path, missing: Sequence[str], count: int) -> str:
    stems = {_stem(name) for name in missing}
    lossy = [name for name in find_files(masks, IMAGE_SUFFIXES - MASK_SUFFIXES) if _stem(name) in stems]
    if lossy and masks != folder:
        path = show_path(masks / lossy[0])
        return f"{path}: masks in a lossy format have wrong ids along edges; make them anew as PNG"
    shown = _some([show_path(name) for name in missing], limit=3)
    return (
        f"{show_path(masks)}: no mask for {len(missing)} of the {count} images of {show_path(folder)} ({shown}); "
        f"a mask has its image's relative path with {' '.join(sorted(MASK_SUFFIXES))}: add them or remove the images"
    )


def _stored_value(key: Any) -> str:
    """A mapping key in one spelling: '17' for an id, '#ff0080' for a colour."""
    text = str(key).strip().lower()
    if re.fullmatch(r"#[0-9a-f]{6}", text):
        return text
    if re.fullmatch(r"\d{1,5}", text) and int(text) <= MAX_STORED:
        return str(int(text))
    channels = [int(part) for part in text.split(",")] if re.fullmatch(r"\d+(\s*,\s*\d+){2}", text) else []
    if channels and max(channels) <= 255:
        return "#{:02x}{:02x}{:02x}".format(*channels)
    raise ValueError(f"key {key!r} is no stored value; write an id (255), '#rrggbb' or 'r,g,b' in quotes")


def _number_or_word(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _class_id(key: str, value: int | str, names: Sequence[str]) -> int:
    if value in ("ignore", IGNORE):
        return IGNORE
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, int) and 0 <= value < len(names):
        return value
    raise ValueError(f"mapping {key}: {value!r} is no class; write 0 to {len(names) - 1}, a class name or ignore")


@lru_cache(maxsize=8)  # of the process, not the object: an object travels to the workers by pickle
def _id_table(num_classes: int, pairs: Pairs) -> np.ndarray:
    """Class id + 1 for every stored id, `(65536,)` int16; 0 where it is no class."""
    table = np.zeros(MAX_STORED + 1, dtype=np.int16)
    table[:num_classes] = np.arange(1, num_classes + 1)
    table[IGNORE] = IGNORE + 1
    taken = [class_id for _, class_id in pairs if class_id != IGNORE]
    table[taken] = 0  # where 7 is mapped to class 0, a stored 0 is hardly the same class
    for stored, class_id in pairs:
        table[stored] = class_id + 1
    return table


@lru_cache(maxsize=8)
def _colour_table(pairs: Pairs) -> np.ndarray:
    """Class id + 1 for every colour code, `(2^24,)` int16; its zeros take no memory until they are looked up."""
    table = np.zeros(2**24, dtype=np.int16)
    for code, class_id in pairs:
        table[code] = class_id + 1
    return table


def _one_channel(stored: np.ndarray) -> np.ndarray:
    """`(H, W)` of three equal channels. Raises ValueError that lists the colours if they differ."""
    if _is_grey(stored):
        return stored[..., 0]
    shown = [_colour_name(code) for code in np.unique(_colour_codes(stored))]
    raise ValueError(f"holds colours ({_some(shown)}); say what they mean: mapping: {{'{shown[0]}': 0, ...}}")


def _is_grey(stored: np.ndarray) -> bool:
    return bool((stored == stored[..., :1]).all())


def _colour_codes(stored: np.ndarray) -> np.ndarray:
    """`(H, W)` int32: 0xRRGGBB."""
    red, green, blue = np.moveaxis(stored.astype(np.int32), -1, 0)
    return (red << 16) | (green << 8) | blue


def _colour_name(code: int) -> str:
    return f"#{code:06x}"


def _some(items: Iterable[Any], limit: int = 12) -> str:
    """The first of some items, and how many more there are."""
    words = [str(item) for item in items]
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more
