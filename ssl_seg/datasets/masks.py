"""What the values in masks mean: ids, greys, colours and the indices of a palette become class ids.

Ours, because masks in the wild come as all of these, as three equal channels and as 0 and 255, and other readers take
one of them for granted. Each is mapped by a table, or refused in one line that shows the table to write. How palettes
are read is decided once a folder, from all of its masks: file by file it could differ between two of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssl_seg.config import UserError
from ssl_seg.images import Source, read_mask, read_palette, show_path

IGNORE = 255
MAX_CLASSES = 255  # ids 0 to 254; 255 is ignored
MAX_STORED = 65535  # the largest id that a 16-bit mask holds
PROBED_MASKS = 10  # how many are read to say which ids there are
BLACK_AND_WHITE = frozenset({0, IGNORE})

Pairs = tuple[tuple[int, int], ...]


# ---- the words of a config ----


def class_words(value: Any) -> tuple[str, ...] | int:
    """The names of classes, or their number, as a config gives them. Raises ValueError for what is neither."""
    names = tuple(plain_word(name) for name in value) if isinstance(value, list | tuple) else ()
    count = value if isinstance(value, int) and not isinstance(value, bool) else len(names)
    if not 1 <= count <= MAX_CLASSES or len(set(names)) < len(names):
        raise ValueError(f"give 2 to {MAX_CLASSES} different names, or their number, not {value!r}")
    return names or count


def plain_word(value: Any) -> str:
    """A name as it was written. Raises ValueError for a word that YAML has read as something else."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, bool):
        words = "yes, on and true" if value else "no, off and false"
        raise ValueError(f"{value} is what YAML makes of {words}; put the word in quotes: 'yes', 'no'")
    raise ValueError(f"{value!r} is no word; put names in quotes")


def stored_value(key: Any) -> str:
    """A mapping key in one spelling: '17' for an id, '#ff0080' for a colour. Raises ValueError for what is neither."""
    text = str(key).strip().lower()
    if re.fullmatch(r"#[0-9a-f]{6}", text):
        return text
    if re.fullmatch(r"\d{1,5}", text) and int(text) <= MAX_STORED:
        return str(int(text))
    channels = [int(part) for part in text.split(",")] if re.fullmatch(r"\d+(\s*,\s*\d+){2}", text) else []
    if channels and max(channels) <= 255:
        return "#{:02x}{:02x}{:02x}".format(*channels)
    raise ValueError(f"key {key!r} is no stored value; write an id (255), '#rrggbb' or 'r,g,b' in quotes")


def class_word(value: Any) -> int | str:
    """A mapping value: the id or the name of a class, or ignore. Raises ValueError as `plain_word` does."""
    word = plain_word(value)
    return int(word) if word.isdecimal() and str(int(word)) == word else word


# ---- one mask ----


@dataclass(frozen=True)
class Meaning:
    """The class of every stored value: those that are named, the others their own."""

    names: tuple[str, ...]
    ids: Pairs = ()  # (stored id, class id) that `ignore` and `mapping` give
    colours: Pairs = ()  # (colour code, class id)

    @classmethod
    def of(cls, names: tuple[str, ...], ignore: Sequence[int], mapping: Mapping[str, int | str]) -> Meaning:
        """Raises ValueError for a value of `mapping` that is no class."""
        classes = {key: _class_id(key, value, names) for key, value in mapping.items()}
        ids = [(value, IGNORE) for value in ignore]
        ids += [(int(key), value) for key, value in classes.items() if not key.startswith("#")]
        colours = [(int(key[1:], 16), value) for key, value in classes.items() if key.startswith("#")]
        return cls(names, tuple(ids), tuple(colours))

    def label(self, values: np.ndarray) -> np.ndarray:
        """Class ids `(H, W)` uint8 from ids `(H, W)` or colours `(H, W, 3)`; raises ValueError for what is no class."""
        if values.ndim == 3 and not self.colours:
            values = _one_channel(values)
        if values.ndim == 3:
            values = _colour_codes(values)
            return self._classes(values, _colour_table(self.colours), coloured=True)
        if self.colours and not self.ids:
            return self._of_greys(values)
        self._refuse_two_values(values)
        return self._classes(values, _id_table(len(self.names), self.ids), coloured=False)

    def knows(self, ids: Iterable[int]) -> bool:
        """Whether each is the id of a class or ignored."""
        return bool(_id_table(len(self.names), self.ids)[list(ids)].all())

    def names_ids(self, ids: Iterable[int]) -> bool:
        """Whether `ignore` and `mapping` speak of each."""
        return set(ids) <= {stored for stored, _ in self.ids}

    def names_colours(self, codes: Iterable[int]) -> bool:
        """Whether `mapping` speaks of each."""
        return set(codes) <= {code for code, _ in self.colours}

    def _classes(self, values: np.ndarray, table: np.ndarray, coloured: bool) -> np.ndarray:
        shifted = table[values]
        if shifted.min() == 0:
            raise ValueError(self._say_unknown(values[shifted == 0], coloured))
        return (shifted - 1).astype(np.uint8)

    def _of_greys(self, values: np.ndarray) -> np.ndarray:
        """A grey mask where mapping names colours only: the same picture in colour has three equal channels."""
        used = np.unique(values)
        if used[-1] > 255 or not self.names_colours(int(grey) * 0x010101 for grey in used):
            raise ValueError(f"holds ids ({_some(used)}), but mapping names colours only; add the ids to it")
        codes = values.astype(np.int32) * 0x010101
        return self._classes(codes, _colour_table(self.colours), coloured=True)

    def _refuse_two_values(self, values: np.ndarray) -> None:
        """With two classes 0 and 255 may mean black and white as well as background and ignored: ask, do not guess."""
        if self.names_ids([IGNORE]) or len(self.names) != 2:
            return
        if (values == IGNORE).any() and ((values == 0) | (values == IGNORE)).all():
            raise ValueError(
                f"holds only 0 and 255 for two classes; write mapping: {{255: 1}} if 255 is {self.names[1]!r}, "
                "or mapping: {255: ignore} if it is to be ignored"
            )

    def _say_unknown(self, unknown: np.ndarray, coloured: bool) -> str:
        values = np.unique(unknown)
        names = self.names
        if coloured:
            shown = [_colour_name(value) for value in values]
            return (
                f'colours {_some(shown)} are in no mapping; add the class of each, such as mapping: {{"{shown[0]}": '
                f"{names[0]}}}, or ignore where it is to be left out"
            )
        first = values[0]
        if first < len(names):
            return (
                f"id {first} is not in mapping, which gives its class {names[first]!r} to another id; "
                f"add mapping: {{{first}: {first}}} if both are meant, or mapping: {{{first}: ignore}}"
            )
        told = (
            f"ids {_some(values)} are no class (0 is {names[0]!r} to {len(names) - 1} is {names[-1]!r}, "
            f"255 is ignored); raise classes, or add lines such as mapping: {{{first}: ignore}}"
        )
        if values.tolist() == [len(names)] and not self.ids:
            told += f"; if 1 is {names[0]!r} and 0 is unlabelled, write {_without_zero(names, 0)}"
        return told


def _without_zero(names: Sequence[str], first: int) -> str:
    """The whole mapping of masks whose 0 is unlabelled and whose 1 is the class `first`."""
    by_name = any(name.isdecimal() for name in names)
    classes = [names[class_id] if by_name else class_id for class_id in range(first, len(names))]
    ids = ", ".join(f"{stored}: {class_id}" for stored, class_id in enumerate(classes, start=1))
    return f"mapping: {{0: ignore, {ids}}}"


def _class_id(key: str, value: int | str, names: Sequence[str]) -> int:
    if value == "ignore" and value in names:
        raise ValueError("a class is called ignore, which in mapping means no class; call it otherwise")
    if str(value) in names:  # before ids, for [1, 2, 3] are names too
        return names.index(str(value))
    if value in ("ignore", IGNORE):
        return IGNORE
    by_name = any(name.isdecimal() for name in names)
    if isinstance(value, int) and 0 <= value < len(names) and not by_name:
        return value
    known = f"one of {_some(names)}" if by_name else f"0 to {len(names) - 1}, a class name"
    raise ValueError(f"mapping {key}: {value!r} is no class; write {known} or ignore")


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


def _one_channel(values: np.ndarray) -> np.ndarray:
    """`(H, W)` of three equal channels. Raises ValueError that lists the colours if they differ."""
    if _is_grey(values):
        return values[..., 0]
    shown = [_colour_name(code) for code in np.unique(_colour_codes(values))]
    raise ValueError(f'holds colours ({_some(shown)}); say what they mean: mapping: {{"{shown[0]}": 0, ...}}')


# ---- all masks of a folder ----


@dataclass(frozen=True)
class Reading:
    """What the masks of a folder are read by, where a palette shows their values as something else."""

    by: Literal["value", "grey", "colour"] = "value"
    note: str = ""  # what a person should know of it
    # Where palettes of greys were asked: what is taken for ids, and the mapping that says so by colours.
    chosen: Literal["greys", "indices"] | None = None
    mapping: str = ""

    def values(self, path: Source) -> np.ndarray:
        """Ids `(H, W)` or colours `(H, W, 3)` of a mask. Raises UserError as `read_mask`, and for a cut palette."""
        palette = None if self.by == "value" else read_palette(path)
        if palette is None:
            return read_mask(path)
        shown = palette[_indices(path, palette)]
        return shown[..., 0] if self.by == "grey" else shown


@dataclass(frozen=True)
class _Painted:
    """A mask whose values a viewer shows as something else."""

    path: Source
    palette: np.ndarray  # (N, 3) uint8

    @cached_property
    def codes(self) -> dict[int, int]:
        """The colour code of each value that occurs, for which the pixels are read."""
        codes = _colour_codes(self.palette[None])[0]
        return {int(value): int(codes[value]) for value in _used(_indices(self.path, self.palette))}

    @property
    def greys(self) -> dict[int, int]:
        """The same for a palette of greys."""
        return {value: code & 0xFF for value, code in self.codes.items()}

    @property
    def looks_alike(self) -> bool:
        """Whether a value that occurs is shown as one before it is: then the picture has lost what the values tell."""
        first_of = {
            code: value for value, code in reversed([*enumerate(_colour_codes(self.palette[None])[0].tolist())])
        }
        return any(first_of[code] != value for value, code in self.codes.items())


def how_to_read(meaning: Meaning, where: str | Path, masks: Sequence[Source]) -> Reading:
    """Decide from all masks; their headers alone are read, where these leave no doubt.

    Colours that `mapping` names are looked up. Other palettes of colours are for viewers: their indices are ids, as
    long as a colour has one index in all masks. Nobody chooses greys for viewers, but programs that shrink files number
    them anew: greys are ids where all of them are classes, else the indices are.

    Raises UserError where neither can be right, where all masks hold nothing but 0 and 255, and where classes cannot be
    told apart, whatever masks hold.
    """
    _refuse_lost_classes(meaning, where)
    palettes = [(mask, palette) for mask in masks if (palette := read_palette(mask)) is not None]
    painted = [_Painted(mask, palette) for mask, palette in palettes]
    reading = _of_palettes(meaning, painted, len(masks)) if painted else Reading()
    _refuse_black_and_white(meaning, where, map(reading.values, masks))
    return reading


def check_ids(meaning: Meaning, where: str | Path, masks: Iterable[np.ndarray]) -> None:
    """The same for masks that are no files of their own, ids `(H, W)` or colours `(H, W, 3)`: raises such UserErrors.

    They are asked for as far as they are needed.
    """
    _refuse_lost_classes(meaning, where)
    _refuse_black_and_white(meaning, where, masks)


def _refuse_lost_classes(meaning: Meaning, where: str | Path) -> None:
    """Of one class nothing can be learnt; and where the first is ignored, mostly all names are shifted by one."""
    names = meaning.names
    if len(names) == 1:
        raise UserError(
            f"{show_path(where)}: one class, {names[0]!r}, leaves nothing to tell it from; write classes: "
            f"[background, {names[0]}], and mapping: {{255: 1}} where masks hold 0 and 255"
        )
    named = {class_id for _, class_id in (*meaning.ids, *meaning.colours)}
    if dict(meaning.ids).get(0) == IGNORE and 0 not in named and not named >= set(range(1, len(names))):
        raise UserError(
            f"{show_path(where)}: id 0 is ignored, which is class {names[0]!r}; in place of that write "
            f"{_without_zero(names, 0)} if 1 is {names[0]!r}, or {_without_zero(names, 1)} if 1 is {names[1]!r}"
        )


def _of_palettes(meaning: Meaning, painted: Sequence[_Painted], count: int) -> Reading:
    if meaning.colours and (not meaning.ids or all(meaning.names_colours(own.codes.values()) for own in painted)):
        return Reading("colour")  # with colours alone in mapping there is no other way; one it lacks is told when met
    if not all(_is_grey(own.palette) for own in painted):
        _refuse_other_palettes(meaning, painted)
        return Reading()
    others = [own for own in painted if not _is_identity(own.palette)]
    beside = len(others) < count  # masks whose values are shown as they are
    settled = meaning.names_ids([IGNORE])
    if not beside and not settled and all(_is_bilevel(own.palette) for own in others):
        return Reading()  # black is 0 and white is 1: 255 is stored nowhere
    pairs = {pair for own in others for pair in own.greys.items()}
    if all(value == grey for value, grey in pairs):
        return Reading()
    if any(own.looks_alike for own in others):  # a palette that tells nothing
        _refuse_other_palettes(meaning, others)
        return Reading()
    values, greys = sorted({value for value, _ in pairs}), sorted({grey for _, grey in pairs})
    if not settled and IGNORE in greys and BLACK_AND_WHITE.issuperset(greys):
        if beside or not pairs <= {(0, 0), (1, IGNORE)}:
            white = next(own for own in others if IGNORE in own.greys.values())
            index = next(value for value, grey in white.greys.items() if grey == IGNORE)
            raise UserError(
                f"{show_path(white.path)}: stores white as {index}, and nothing tells whether white is an id or "
                f"ignored; write mapping: {{1: 1, 255: 1}} if it is {meaning.names[1]!r}, or mapping: {{255: ignore}}"
            )
        return Reading()
    return _of_greys(meaning, others, values, greys)


def _of_greys(meaning: Meaning, painted: Sequence[_Painted], values: list[int], greys: list[int]) -> Reading:
    """Greys where all are classes, else indices where all are."""
    pairs = sorted({pair for own in painted for pair in own.greys.items()})
    if meaning.knows(greys):
        note = f"palettes of greys: the greys are taken for ids ({_some(greys)}), not the indices"
        return Reading("grey", note, "greys", _by_colour(meaning, {grey: grey for _, grey in pairs}))
    strange = next(grey for grey in greys if not meaning.knows([grey]))
    if not meaning.knows(values):
        path = next(own.path for own in painted if strange in own.greys.values())
        raise UserError(
            f"{show_path(path)}: has a palette of greys, and of all such masks neither the greys ({_some(greys)}) nor "
            f"the indices ({_some(values)}) are classes (0 to {len(meaning.names) - 1}, 255 is ignored); raise "
            f"classes, or add lines such as mapping: {{{strange}: ignore}}"
        )
    # How many bits a grey has makes it brighter or darker, whatever it means.
    _refuse_other_palettes(meaning, [own for own in painted if not _is_spread(own.palette)])
    note = f"palettes of greys: the indices are taken for ids ({_some(values)}), since grey {strange} is no class"
    return Reading("value", note, "indices", _by_colour(meaning, {grey: value for value, grey in pairs}))


def _by_colour(meaning: Meaning, id_of: Mapping[int, int]) -> str:
    """The mapping that gives each grey the class of its id."""
    ids = _id_table(len(meaning.names), meaning.ids)
    classes = {grey: int(ids[stored]) - 1 for grey, stored in sorted(id_of.items())}
    words = {grey: "ignore" if class_id == IGNORE else class_id for grey, class_id in classes.items()}
    return "{" + ", ".join(f"'{_colour_name(grey * 0x010101)}': {word}" for grey, word in words.items()) + "}"


def _refuse_other_palettes(meaning: Meaning, painted: Sequence[_Painted]) -> None:
    """Raise UserError where two masks differ in the colour of an index, or in the index of a colour.

    But not where the config names all indices as ids.
    """
    longest = max((own.palette for own in painted), key=len, default=None)
    if longest is None or all(np.array_equal(own.palette, longest[: len(own.palette)]) for own in painted):
        return
    indices = sorted({index for own in painted for index in own.codes})
    if meaning.names_ids(indices):
        return
    first_with: dict[str, _Painted] = {}  # by an index, or by a colour's name
    for own in painted:
        for index, code in own.codes.items():
            colour = _colour_name(code)
            same_index, same_colour = first_with.setdefault(str(index), own), first_with.setdefault(colour, own)
            differing = same_index if same_index.codes[index] != code else same_colour
            if differing.codes.get(index) == code:
                continue
            colours = sorted({_colour_name(code) for each in painted for code in each.codes.values()})
            by_colour = ", ".join(f"'{colour}': CLASS" for colour in colours)
            by_index = ", ".join(f"{index}: {index}" for index in indices)
            raise UserError(
                f"{show_path(own.path)}: its palette gives {colour} the index {index}, and that of "
                f"{show_path(differing.path)} does not, so indices are no ids; write which class each colour is, "
                f"mapping: {{{by_colour}}}; or mapping: {{{by_index}}} where indices are right whatever their colours"
            )


def _refuse_black_and_white(meaning: Meaning, where: str | Path, masks: Iterable[np.ndarray]) -> None:
    """As `Meaning` asks of each mask where there are two classes; among more, 0 and 255 may be all that one shows."""
    if meaning.names_ids([IGNORE]) or meaning.colours or len(meaning.names) == 2:
        return
    found: set[int] = set()
    for values in masks:
        if values.ndim == 3 and not _is_grey(values):
            return
        found.update(_used(values if values.ndim == 2 else values[..., 0]))
        if not found <= BLACK_AND_WHITE:
            return
    if found == BLACK_AND_WHITE:
        raise UserError(
            f"{show_path(where)}: all masks hold only 0 and 255 for {len(meaning.names)} classes; write "
            f"mapping: {{255: 1}} if 255 is {meaning.names[1]!r}, or mapping: {{255: ignore}} if it is to be ignored"
        )


def ask_for_classes(folder: Path, names: Sequence[str]) -> str:
    """What some of the masks hold, and the lines to write for it."""
    probed = names[:: max(1, len(names) // PROBED_MASKS)][:PROBED_MASKS]
    ids: set[int] = set()
    colours: set[str] = set()
    for name in probed:
        palette = read_palette(folder / name)
        by_grey = palette is not None and _is_grey(palette) and not _is_spread(palette)
        values = Reading("grey" if by_grey else "value").values(folder / name)
        if values.ndim == 3 and not _is_grey(values):
            colours.update(_colour_name(code) for code in np.unique(_colour_codes(values)))
        else:
            ids.update(_used(values if values.ndim == 2 else values[..., 0]))
    lead = f"{show_path(folder)}: classes is missing; {len(probed)} of {len(names)} masks hold"
    if colours:
        first = min(colours)
        return f'{lead} colours {_some(sorted(colours))}: write classes and mapping: {{"{first}": 0, ...}}'
    if ids == BLACK_AND_WHITE:
        return f"{lead} ids 0 and 255: write classes: 2 and mapping: {{255: 1}}"
    highest = max(ids - {IGNORE}, default=0)
    count = max(2, highest + 1)
    told = f"{lead} ids {_some(sorted(ids))}: write classes: {count}, or a list of {count} names (--classes a,b)"
    if highest > 1 and ids - {IGNORE} == set(range(1, count)):
        told += f"; or, 0 being no class, classes: {highest} and {_without_zero(['a class'] * highest, 0)}"
    return told


def _indices(path: Source, palette: np.ndarray) -> np.ndarray:
    """The values of a mask, which has this palette. Raises UserError for one that it lacks."""
    stored = read_mask(path)
    if stored.max() >= len(palette):
        raise UserError(f"{show_path(path)}: holds index {stored.max()}, which its palette lacks; save it anew")
    return stored


def _used(values: np.ndarray) -> list[int]:
    """The ids that occur in `(H, W)`, in their order."""
    return np.flatnonzero(np.bincount(values.ravel())).tolist()


def _is_identity(palette: np.ndarray) -> bool:
    """Whether every value of a palette of greys is shown as itself."""
    return bool((palette[:, 0] == np.arange(len(palette))).all())


def _is_bilevel(palette: np.ndarray) -> bool:
    """Whether there is black, and white after it, and nothing else."""
    return palette[:, 0].tolist() in ([0], [0, 255])


def _is_spread(palette: np.ndarray) -> bool:
    """Whether a palette of greys is that of greys of 1, 2 or 4 bits."""
    return len(palette) in (2, 4, 16) and np.array_equal(palette[:, 0], np.linspace(0, 255, len(palette)).astype(int))


# ---- colours ----


def _is_grey(values: np.ndarray) -> bool:
    return bool((values == values[..., :1]).all())


def _colour_codes(values: np.ndarray) -> np.ndarray:
    """`(H, W)` int32: 0xRRGGBB."""
    red, green, blue = np.moveaxis(values.astype(np.int32), -1, 0)
    return (red << 16) | (green << 8) | blue


def _colour_name(code: int) -> str:
    return f"#{code:06x}"


def _some(items: Iterable[Any], limit: int = 12) -> str:
    """The first of some items, and how many more there are."""
    words = [str(item) for item in items]
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more
