"""Which images carry labels, which judge, and how a run records its choice.

Subsets of labels are nested, cover the classes and depend on a seed alone. Images to validate on are held out by whole
sequences, since the frames of one video are nearly copies. Ours, because both choices are part of the evidence.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from torch import Tensor

from ssl_seg import images, rng
from ssl_seg.config import Config, UserError, known_to_0_1
from ssl_seg.datasets import Dataset, Example, numbering
from ssl_seg.datasets.masks import IGNORE
from ssl_seg.runs.folder import manifest_of

HELD_OUT = 0.2  # the usual fifth, where the user names no validation set
NUM_DIGESTED = 32  # images that a start reads once more to know them again: a second of large photographs
LEAST_HELD_OUT = 0.1  # one stray image in a folder of its own is a sequence too, and would judge the run alone
LARGEST_HELD_OUT = 0.4  # of the images: rather a whole sequence of that size than neighbours on both sides
HOLD_OUT_KEY = rng.as_key("hold out")
LEAST_FOLDS = 2


class Examples(Protocol):
    """What a `Dataset` and a `Subset` of one have in common."""

    @property
    def class_names(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> Example: ...
    def image(self, index: int) -> Example: ...
    def label(self, index: int) -> np.ndarray | None: ...
    def name(self, index: int) -> str: ...
    def doubt(self, index: int) -> str: ...
    def sequence(self, index: int) -> str: ...
    def files(self, index: int) -> tuple[Path, ...]: ...


@dataclass(frozen=True)
class Subset:
    """Some examples of a data set, in the given order."""

    dataset: Examples
    indices: tuple[int, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Example:
        return self.dataset.read(self.indices[index])

    def image(self, index: int) -> Example:
        return self.dataset.image(self.indices[index])

    def label(self, index: int) -> np.ndarray | None:
        return self.dataset.label(self.indices[index])

    def name(self, index: int) -> str:
        return self.dataset.name(self.indices[index])

    def doubt(self, index: int) -> str:
        return self.dataset.doubt(self.indices[index])

    def sequence(self, index: int) -> str:
        return self.dataset.sequence(self.indices[index])

    def files(self, index: int) -> tuple[Path, ...]:
        return self.dataset.files(self.indices[index])


@dataclass(frozen=True)
class Several:
    """The images of one data set after those of another, to be looked at together: masks and classes are left out."""

    parts: tuple[Examples, ...]
    class_names = ()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, index: int) -> Example:
        return self.image(index)

    def image(self, index: int) -> Example:
        part, own = self._at(index)
        return part.image(own)

    def label(self, index: int) -> None:
        return None

    def name(self, index: int) -> str:
        part, own = self._at(index)
        return part.name(own)

    def doubt(self, index: int) -> str:
        return ""

    def sequence(self, index: int) -> str:
        return ""

    def files(self, index: int) -> tuple[Path, ...]:
        return ()

    def _at(self, index: int) -> tuple[Examples, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)


def _say_gone(name: str) -> str:
    return (
        f"data.labelled: {name} is not there any more, and the run began with it; "
        "put it back, or start anew with --overwrite"
    )


def names_of(examples: Examples) -> tuple[str, ...]:
    """The images' names, in their order."""
    return tuple(examples.name(index) for index in range(len(examples)))


def subset_of(dataset: Examples, names: Sequence[str], say_gone: Callable[[str], str] = _say_gone) -> Subset:
    """The images of these names, in their order; as a run has recorded them, where `say_gone` is left out.

    Raises UserError with what `say_gone` says of one that is not there.
    """
    index_of = {dataset.name(index): index for index in range(len(dataset))}
    gone = [name for name in names if name not in index_of]
    if gone:
        raise UserError(say_gone(images.show_path(gone[0])))
    return Subset(dataset, tuple(index_of[name] for name in names))


class Labels(Config):
    """How many of the labelled images are used, and which: the sets of one seed are nested and cover the classes."""

    count: PositiveInt | None = None  # None and no fraction: all of them, or of the names
    fraction: PositiveFloat | None = Field(default=None, le=1.0)  # of the labelled images, in place of `count`
    # The first `count` of these, as the data set names them: what `ssl-seg select` has chosen.
    names: tuple[str, ...] | None = None
    # True: drawn by chance alone, as by one who has no masks yet; else masks are read, to cover the classes.
    blind: bool = False
    # Into how many folds the labelled images are cut, groups whole and classes evenly, where there is no data.val: each
    # run learns from all but one and is scored on that one. `ssl-seg study` makes all of them and pools their scores.
    folds: int | None = None
    fold: NonNegativeInt | None = None  # which of `folds` is held out, from 0; a study leaves it out
    seed: int = 0  # of the draw, and of the cut into folds

    @model_validator(mode="after")
    def _folds_fit(self) -> Labels:
        if self.folds is None:
            if self.fold is not None:
                raise ValueError(f"fold: {self.fold} of how many? Give folds too, or drop it")
            return self
        if self.folds < LEAST_FOLDS:
            raise ValueError(f"folds: {self.folds} would leave nothing to learn from; give {LEAST_FOLDS} or more")
        if self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold: {self.fold} is none of the {self.folds} folds; write 0 to {self.folds - 1}")
        if self.names is not None:
            raise ValueError("names and folds are both given; keep one of them, or list the named images as a data set")
        return self

    @model_validator(mode="after")
    def _one_way(self) -> Labels:
        for one, other in (("count", "fraction"), ("fraction", "names"), ("names", "blind")):
            if getattr(self, one) not in (None, False) and getattr(self, other) not in (None, False):
                raise ValueError(f"{one} and {other} are both given; keep one of them")
        if self.names is not None and len(set(self.names)) < max(1, len(self.names)):
            raise ValueError("names: is empty, or holds a name twice; name each image once")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return known_to_0_1(self, dump(self), since=("names", "blind", "folds", "fold"))

    def number(self, available: int, held_out: int = 0) -> int:
        """How many of the available images are used, beside which some are held out. Raises UserError for too many."""
        if self.names is not None:
            wanted = self.count or len(self.names)
            if wanted > len(self.names):
                raise UserError(f"labels.count: {wanted} is more than the {len(self.names)} labels.names; name more")
            return wanted
        wanted = self.count or available
        if self.fraction is not None:
            wanted = max(1, round(self.fraction * available))
        if wanted > available:
            if not held_out:
                raise UserError(f"labels.count: {wanted} is more than the {available} labelled images; ask for fewer")
            otherwise = "give data.val of its own" if self.folds is None else "cut more labels.folds"
            raise UserError(
                f"labels.count: {wanted} is more than the {available} labelled images to train on: of "
                f"{available + held_out} {held_out} {'is' if held_out == 1 else 'are'} held out to validate on; write "
                f"{available} or less, or {otherwise}"
            )
        return wanted

    def divide(self, dataset: Dataset) -> tuple[Subset, Subset]:
        """The images whose masks may be used, and those held out to validate on: a fold, where `folds` are asked for.

        Raises UserError as `cut_into_folds`, and where nothing says which fold it is.
        """
        if self.folds is None:
            return hold_out(dataset)
        if self.fold is None:
            raise UserError(
                f"labels.folds: {self.folds}, and labels.fold does not say which of them is held out; write 0 to "
                f"{self.folds - 1}, or let ssl-seg study make all of them"
            )
        held = self.cut(dataset)[self.fold]
        kept = sorted(set(range(len(dataset))) - set(held))
        return Subset(dataset, tuple(kept)), Subset(dataset, held)

    def cut(self, dataset: Dataset) -> tuple[tuple[int, ...], ...]:
        """The images of each of the `folds`; () without any."""
        return () if self.folds is None else cut_into_folds(dataset, self.folds, self.seed, not self.blind)

    def choose(self, dataset: Examples) -> Subset:
        """The first images of `names`, else of a seeded order whose prefixes cover the classes as early as they can."""
        available = len(dataset)
        wanted = self.number(available)
        if self.names is not None:
            return subset_of(
                dataset,
                self.names[:wanted],
                lambda name: (
                    f"labels.names: {name} is none of the {available} labelled images that are not held out, such as "
                    f"{images.show_path(dataset.name(0))}; name those, and give data.val if the images that judge are "
                    "others"
                ),
            )
        if wanted == available:
            return Subset(dataset, tuple(range(available)))
        if self.blind:
            return Subset(dataset, tuple(covering_order([set()] * available, self.seed)[:wanted]))
        classes = [_classes(dataset, index) for index in range(available)]
        return Subset(dataset, tuple(covering_order(classes, self.seed)[:wanted]))


def sample_digest(examples: Examples, count: int = NUM_DIGESTED, with_labels: bool = True) -> str:
    """sha256 of up to `count` examples, evenly apart: enough to notice other files under the same names."""
    read = examples.read if with_labels else examples.image
    digests = [digest_of(read(index)) for index in evenly(len(examples), count)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def evenly(number: int, count: int) -> list[int]:
    """Up to `count` of `number` indices, evenly apart."""
    return np.linspace(0, number - 1, min(count, number)).round().astype(int).tolist()


def digest_of(example: Example) -> str:
    """sha256 of the sizes and pixels of image and label: the same files under any path, decoded alike, have one."""
    hashed = hashlib.sha256()
    for pixels in (example.image, example.label):
        if pixels is not None:
            hashed.update(f"{pixels.dtype}{pixels.shape}".encode())
            hashed.update(np.ascontiguousarray(pixels).data)
    return hashed.hexdigest()


def pixel_counts(examples: Examples) -> tuple[Tensor, Tensor]:
    """How many pixels each class has over all masks, and how many the images that show it have; each `(K,)` int64.

    Ignored pixels count nowhere.
    """
    num_classes = len(examples.class_names)
    pixels = torch.zeros(num_classes, dtype=torch.int64)
    beside = torch.zeros(num_classes, dtype=torch.int64)
    for index in range(len(examples)):
        counts = np.bincount(_mask(examples, index).ravel(), minlength=256)[:num_classes]
        pixels += torch.from_numpy(counts)
        beside += torch.from_numpy((counts > 0) * counts.sum())
    return pixels, beside


def has_labelled_pixels(examples: Examples) -> bool:
    """Whether any pixel of any mask counts; masks are read until one does, which is mostly the first."""
    return any((_mask(examples, index) != IGNORE).any() for index in range(len(examples)))


def untrained_classes(trained: Examples, scored: Examples, count: int = NUM_DIGESTED) -> tuple[str, ...]:
    """The names of classes that up to `count` masks of `scored`, evenly apart, show and no mask of `trained` does."""
    shown = set().union(*(_classes(scored, index) for index in evenly(len(scored), count)))
    left = shown & set(range(len(scored.class_names)))  # another id is told where all of them are read
    for index in range(len(trained)):
        if not left:
            break
        left -= _classes(trained, index)
    return tuple(scored.class_names[class_id] for class_id in sorted(left))


def _classes(examples: Examples, index: int) -> set[int]:
    return set(np.flatnonzero(np.bincount(_mask(examples, index).ravel())).tolist()) - {IGNORE}


def _mask(examples: Examples, index: int) -> np.ndarray:
    label = examples.label(index)
    if label is None:
        raise UserError(f"{examples.name(index)}: has no mask; name a data set whose images all have one")
    return label


def covering_order(classes: Sequence[set[int]], seed: int) -> list[int]:
    """Every index once, in a seeded order in which an image with classes not seen yet comes before the others.

    At each place stands, among the remaining images, the one that shows the most unseen classes (the first in a seeded
    shuffle among equals), so each prefix covers many classes and the prefixes are nested.
    """
    order = rng.permutation(rng.fold_in(rng.as_key(seed), "labels"), len(classes)).tolist()
    unseen = set().union(*classes)
    chosen: list[int] = []
    while unseen:
        best = max(order, key=lambda index: len(classes[index] & unseen))
        order.remove(best)
        chosen.append(best)
        unseen -= classes[best]
    return chosen + order


def hold_out(dataset: Dataset) -> tuple[Subset, Subset]:
    """A training and a validation part of about a fifth: whole sequences where some are small enough, else images.

    Images whose names are a numbering are taken from its end, for they may be frames of a video. The shuffle has a seed
    of its own, so that runs with other labels or weights are validated on the same images.
    """
    count = len(dataset)
    by_sequence = _by_sequence(dataset)
    names = sorted(by_sequence)
    held: set[int] = set()
    for place in rng.permutation(HOLD_OUT_KEY, len(names)).tolist():
        if len(held) + len(by_sequence[names[place]]) <= HELD_OUT * count:
            held |= by_sequence[names[place]]
    if len(held) < LEAST_HELD_OUT * count:
        larger = [held | own for own in by_sequence.values() if not own <= held]
        fitting = [own for own in larger if LEAST_HELD_OUT * count <= len(own) <= LARGEST_HELD_OUT * count]
        held = min(fitting, key=len, default=_single_images(dataset))
    kept = tuple(index for index in range(count) if index not in held)
    return Subset(dataset, kept), Subset(dataset, tuple(sorted(held)))


def _single_images(dataset: Dataset) -> set[int]:
    """A fifth of the images, whatever sequence they belong to: the end of each numbering, of the others any."""
    count = len(dataset)
    order = rng.permutation(HOLD_OUT_KEY, count).tolist()
    numbered, others = _by_numbering(dataset, order)
    groups = [*(own[::-1] for own in numbered), others]
    share = {index: (place + 0.5) / len(own) for own in groups for place, index in enumerate(own)}
    return set(sorted(order, key=share.__getitem__)[: round(HELD_OUT * count)])


def _by_sequence(dataset: Dataset) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for index in range(len(dataset)):
        found.setdefault(dataset.sequence(index), set()).add(index)
    return found


def _by_numbering(dataset: Dataset, order: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Of the images in `order` those of each numbering, by their number, and those of none, in that order.

    A number that no other image shares a numbering with is as good as none.
    """
    numberings: dict[str, list[tuple[int, int]]] = {}
    others: list[int] = []
    for index in order:
        numbered = numbering(dataset.name(index))
        if numbered is None:
            others.append(index)
        else:
            numberings.setdefault(numbered[0], []).append((numbered[1], index))
    found = [[index for _, index in sorted(own)] for own in numberings.values() if len(own) > 1]
    return found, [*others, *(own[0][1] for own in numberings.values() if len(own) == 1)]


def cut_into_folds(dataset: Dataset, count: int, seed: int, by_classes: bool = True) -> tuple[tuple[int, ...], ...]:
    """The indices of each of `count` folds, by names, groups and seed alone; masks are read where `by_classes`.

    Whole sequences, as in `hold_out`. Where there are none, images, of which those with a numbering stay together in
    as many stretches as there are folds, for they may be frames of a video.
    Raises UserError for more folds than groups.
    """
    groups = _groups(dataset, count)
    if count > len(groups):
        are_images = all(len(own) == 1 for own in groups)
        what = "labelled images" if are_images else "groups of labelled images, each of which stays whole"
        fewer = f"write {len(groups)} or less" if len(groups) >= LEAST_FOLDS else "give more of them"
        raise UserError(f"labels.folds: {count} is more than the {len(groups)} {what}; {fewer}")
    shown = [_classes(dataset, index) if by_classes else set() for index in range(len(dataset))]
    return spread_groups(groups, shown, count, seed)


def _groups(dataset: Dataset, count: int) -> list[list[int]]:
    """The images that have to stay in one fold, in the order of their first names."""
    sequences = _by_sequence(dataset)
    alone = sequences.pop("", set()) if len(sequences) > 1 else set(range(len(dataset)))
    whole = [sorted(own) for own in sequences.values()] if len(alone) < len(dataset) else []
    numbered, others = _by_numbering(dataset, sorted(alone))
    stretches = [part.tolist() for own in numbered for part in np.array_split(own, count) if len(part)]
    groups = [*whole, *stretches, *([index] for index in others)]
    return sorted(groups, key=lambda own: min(map(dataset.name, own)))


def spread_groups(
    groups: Sequence[Sequence[int]], shown: Sequence[set[int]], count: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Deal groups of images to `count` folds of about one size, with the classes that images show spread evenly.

    The largest groups come first, among equals those with the rarest class, in a seeded order. Each goes where its
    rarest class lacks most, then the next rarest (after Sechidis et al., "On the stratification of multi-label data",
    ECML 2011), then to the smallest fold, as long as it has room. scikit-learn knows one class an image only.
    """
    number = sum(map(len, groups))
    totals = Counter(class_id for own in shown for class_id in own)
    rarest_first = sorted(totals, key=lambda class_id: (totals[class_id], class_id))
    order = rng.permutation(rng.fold_in(rng.as_key(seed), "folds"), len(groups)).tolist()
    counts = [Counter(class_id for index in own for class_id in shown[index]) for own in groups]
    order.sort(key=lambda place: (-len(groups[place]), min((totals[one] for one in counts[place]), default=number)))
    rooms = [number // count + (fold < number % count) for fold in range(count)]
    given: list[Counter[int]] = [Counter() for _ in range(count)]
    dealt: list[list[int]] = [[] for _ in range(count)]
    for place in order:
        own = groups[place]
        most = max(room - len(held) for room, held in zip(rooms, dealt, strict=True))
        fitting = [fold for fold in range(count) if rooms[fold] - len(dealt[fold]) >= min(most, len(own))]
        classes = [class_id for class_id in rarest_first if class_id in counts[place]]
        fold = min(fitting, key=lambda fold: ([given[fold][one] for one in classes], len(dealt[fold])))
        dealt[fold] += own
        given[fold] += counts[place]
    return tuple(tuple(sorted(own)) for own in dealt)


def manifest(examples: Examples) -> dict[str, Any]:
    """What a resumed run checks: the same images in the same order. Names only; their pixels are not read."""
    return manifest_of(names_of(examples))
