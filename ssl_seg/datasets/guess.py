"""What the values in masks are likely to mean where nobody has said it: classes, a mapping, ids to ignore.

Ours: what `masks` refuses until a person has decided is proposed here, from what all masks of a folder hold, with a
line for what was taken for what. Only `ssl-seg check` asks; a run never guesses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ssl_seg.datasets.masks import BLACK_AND_WHITE, IGNORE

MOST_VALUES = 64  # in the masks of a folder; more are objects numbered one by one, or smoothed edges
MOST_SMOOTHED = 8  # values where nearly all pixels are black or white: more are smoothed edges
STRAY = 0.02  # of the masks: an id beyond a gap that no more show is a slip of the pen
SYSTEMATIC = 0.5  # of the masks: one id too many that more show means something
THIN = 0.8  # of a value's pixels near its edge: lines
RARE_ZERO = 0.05  # of the pixels: an id 0 that covers less is perhaps no background, but unlabelled


@dataclass(frozen=True)
class Held:
    """What the masks of a folder hold, as it is stored: ids, or colour codes where any of them has colours."""

    masks: int
    coloured: bool
    pixels: Mapping[int, int]  # of each value
    shown: Mapping[int, int]  # in how many masks each is
    thin: float = 0.0  # share of the pixels of 255 near its edge

    def share(self, value: int) -> float:
        """Of all pixels."""
        return self.pixels.get(value, 0) / max(1, sum(self.pixels.values()))


@dataclass(frozen=True)
class Guess:
    """What is proposed, in the words of a `folder`."""

    classes: tuple[str, ...]
    mapping: dict[int | str, int | str] = field(default_factory=dict)
    ignore: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    fault: str = ""  # why nothing can be proposed


def guess(held: Held, names: Sequence[str] = ()) -> Guess:
    """What the values mean, if the classes are called `names`, or are to get names such as class_0."""
    values = sorted(held.pixels)
    most = sorted(values, key=lambda value: -held.pixels[value])[:2]
    if len(values) > MOST_VALUES or (len(values) > MOST_SMOOTHED and BLACK_AND_WHITE.issuperset(most)):
        what = "colours" if held.coloured else "ids"
        return Guess(
            _named(2, names),
            fault=f"masks hold {len(values)} {what}, and two of them ({', '.join(_shown(held, most))}) cover "
            f"{sum(map(held.share, most)) * 100:.0f} % of the pixels: objects numbered one by one, or edges that were "
            "smoothed; export masks with one value a class, without antialiasing",
        )
    if held.coloured:
        return _of_colours(held, values, names)
    if BLACK_AND_WHITE.issuperset(values) and IGNORE in values:
        note = (
            "masks hold 0 and 255: 255 is taken for a class, mapping: {255: 1}; if it is to be ignored, {255: ignore}"
        )
        return Guess(_named(2, names), {IGNORE: 1}, notes=(note,))
    own = _of_ids(held, [value for value in values if value != IGNORE], names)
    return Guess(own.classes, own.mapping, own.ignore, (*own.notes, *_of_void(held)))


def _of_colours(held: Held, codes: Sequence[int], names: Sequence[str]) -> Guess:
    left_out = [min(codes, key=lambda code: held.pixels[code])] if names and len(codes) == len(names) + 1 else []
    kept = [code for code in codes if code not in left_out]
    if names and len(kept) != len(names):
        return Guess(
            tuple(names),
            fault=f"masks hold {len(codes)} colours ({', '.join(_shown(held, codes))}) for {len(names)} classes; write "
            "all of them, mapping: {" + ", ".join(f"'{shown}': CLASS" for shown in _shown(held, codes)) + "}",
        )
    mapping: dict[int | str, int | str] = dict(zip(_shown(held, kept), range(len(kept)), strict=True))
    mapping |= dict.fromkeys(_shown(held, left_out), "ignore")
    note = (
        f"masks hold colours, taken for classes from black to white, mapping: {_written(mapping)}; see whether they fit"
    )
    return Guess(_named(len(kept), names), mapping, notes=(note,))


def _of_ids(held: Held, ids: Sequence[int], names: Sequence[str]) -> Guess:
    if names and set(ids) <= set(range(len(names))):
        return Guess(tuple(names))
    if names and list(ids) == list(range(len(names) + 1)):
        return _one_too_many(held, names)
    run = [value for place, value in enumerate(ids) if value == ids[0] + place]
    beyond = list(ids[len(run) :])
    kept, ignored = list(ids), list[int]()
    if len(run) > 1 and beyond and all(held.shown[value] <= max(1, STRAY * held.masks) for value in beyond):
        kept = run  # the others are told mask by mask
    elif len(run) > 1 and len(beyond) == 1 and len(ids) != len(names):
        kept, ignored = run, beyond
    if names and len(kept) != len(names):
        return Guess(tuple(names))  # what does not fit is told mask by mask
    mapping: dict[int | str, int | str] = {value: place for place, value in enumerate(kept) if value != place}
    notes = [f"id {value} follows a gap: taken for what does not count, ignore: [{value}]" for value in ignored]
    if mapping:
        notes.append(f"masks hold ids {_some(kept)}, taken for the classes in this order, mapping: {_written(mapping)}")
    elif not names and len(kept) > 2 and held.share(0) < RARE_ZERO:
        shifted: dict[int | str, int | str] = {0: "ignore", **{value: value - 1 for value in kept[1:]}}
        notes.append(
            f"id 0 covers {held.share(0) * 100:.2g} % of the pixels; if it means unlabelled, write one class less, and "
            f"mapping: {_written(shifted)}"
        )
    return Guess(_named(len(kept), names), mapping, tuple(ignored), tuple(notes))


def _one_too_many(held: Held, names: Sequence[str]) -> Guess:
    """Ids 0 to the number of names: 0 or the last is no class; the one that covers less, where most masks show both."""
    count = len(names)
    if held.shown[count] <= SYSTEMATIC * held.masks and held.shown[0] > SYSTEMATIC * held.masks:
        return Guess(tuple(names))
    shifted: dict[int | str, int | str] = {0: "ignore", **{value: value - 1 for value in range(1, count + 1)}}
    written = _written(shifted)
    if held.pixels[count] <= held.pixels[0]:
        note = f"one id too many: {count} is taken for what does not count; if 0 is that, mapping: {written}"
        return Guess(tuple(names), ignore=(count,), notes=(note,))
    note = f"one id too many: 0 is taken for unlabelled, mapping: {written}; if {count} is that, ignore: [{count}]"
    return Guess(tuple(names), shifted, notes=(note,))


def _of_void(held: Held) -> tuple[str, ...]:
    if IGNORE not in held.pixels:
        return ()
    where = ", in thin lines as of borders" if held.thin > THIN else ""
    return (f"255 never counts: {held.share(IGNORE) * 100:.2g} % of the pixels{where}",)


def _named(count: int, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(names) or tuple(f"class_{index}" for index in range(count))


def _shown(held: Held, values: Sequence[int]) -> list[str]:
    return [f"#{value:06x}" if held.coloured else str(value) for value in values]


def _some(values: Sequence[int]) -> str:
    return f"{', '.join(map(str, values[:12]))}{' ...' if len(values) > 12 else ''}"


def _written(mapping: Mapping[int | str, int | str]) -> str:
    keys = (f"'{key}'" if isinstance(key, str) else str(key) for key in mapping)
    return "{" + ", ".join(f"{key}: {value}" for key, value in zip(keys, mapping.values(), strict=True)) + "}"
