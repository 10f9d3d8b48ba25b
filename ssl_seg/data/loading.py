"""From data sets to batches: which image a draw is, how it is cropped, and which images carry labels.

A *draw* is a global sample counter. Batch t of a run is draws `[t*B, (t+1)*B)`, whatever the number of processes and
workers, so the batch of a step is a pure function of the config and the step: resume means "start at t". Ours for that
reason; torch's samplers and accelerate's `skip_first_batches` keep a hidden position. Workers decode, crop and flip and
hand over `uint8` pixels with an `int64` key; corruption runs on the device.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from torch.utils.data import DataLoader

from ssl_seg import images, rng
from ssl_seg.config import Config, UserError
from ssl_seg.datasets import Dataset, Example, numbering
from ssl_seg.tasks import Batch

IGNORE = 255
HELD_OUT = 0.2  # the usual fifth, where the user names no validation set
# Bytes up to which each loader worker keeps a set of decoded images: 64 photographs of 1024 x 1024 with their masks, or
# a pool of 4,600 frames of 160 x 120. The few labelled images of most users fit.
KEPT = 256 * 2**20
NUM_DIGESTED = 32  # images that a start reads once more to know them again: a second of large photographs
LEAST_HELD_OUT = 0.1  # one stray image in a folder of its own is a sequence too, and would judge the run alone
LARGEST_HELD_OUT = 0.4  # of the images: rather a whole sequence of that size than neighbours on both sides

HOLD_OUT_KEY = rng.as_key("hold out")


class Examples(Protocol):
    """What a `Dataset` and a `Subset` of one have in common."""

    @property
    def class_names(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> Example: ...
    def image(self, index: int) -> Example: ...
    def name(self, index: int) -> str: ...
    def sequence(self, index: int) -> str: ...


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

    def name(self, index: int) -> str:
        return self.dataset.name(self.indices[index])

    def sequence(self, index: int) -> str:
        return self.dataset.sequence(self.indices[index])


def subset_of(dataset: Dataset, names: Sequence[str]) -> Subset:
    """The labelled images of these names, as a run has recorded them. Raises UserError for one that is gone."""
    index_of = {dataset.name(index): index for index in range(len(dataset))}
    gone = [name for name in names if name not in index_of]
    if gone:
        raise UserError(
            f"data.labelled: {images.show_path(gone[0])} is not there any more, and the run began with it; "
            "put it back, or start anew with --overwrite"
        )
    return Subset(dataset, tuple(index_of[name] for name in names))


class Labels(Config):
    """How many of the labelled images are used, and which: the sets of one seed are nested and cover the classes."""

    count: PositiveInt | None = None  # None and no fraction: all of them
    fraction: PositiveFloat | None = Field(default=None, le=1.0)
    seed: int = 0

    @model_validator(mode="after")
    def _only_one(self) -> Labels:
        if self.count is not None and self.fraction is not None:
            raise ValueError("count and fraction are both given; keep one of them")
        return self

    def number(self, available: int) -> int:
        """How many of the available images are used. Raises UserError for more than there are."""
        wanted = available
        if self.count is not None:
            wanted = self.count
        if self.fraction is not None:
            wanted = max(1, round(self.fraction * available))
        if wanted > available:
            raise UserError(f"labels.count: {wanted} is more than the {available} labelled images; ask for fewer")
        return wanted

    def choose(self, dataset: Examples) -> Subset:
        """The first images of a seeded order whose prefixes cover the classes as early as they can."""
        available = len(dataset)
        wanted = self.number(available)
        if wanted == available:
            return Subset(dataset, tuple(range(available)))
        classes = [set(np.unique(dataset.read(index).label)) - {IGNORE} for index in range(available)]
        return Subset(dataset, tuple(covering_order(classes, self.seed)[:wanted]))


class Augment(Config):
    """Random crops of the training images; the same for image and mask."""

    crop: tuple[PositiveInt, PositiveInt] = (128, 128)  # (H, W) that the network sees
    # The range of the factor by which an image is scaled before the crop, drawn log-uniformly: 0.5 shows a region of
    # twice the crop's side. A region that does not fit is made smaller, so a small image is scaled up, never padded.
    zoom: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.0)
    flip: bool = True  # left-right; scenes keep their sky above
    jitter: float = Field(default=0.0, ge=0.0, lt=1.0)  # brightness and contrast factors in 1 -+ jitter

    @model_validator(mode="after")
    def _in_order(self) -> Augment:
        if self.zoom[0] > self.zoom[1]:
            raise ValueError(f"zoom: {list(self.zoom)} is empty; write the smaller factor first")
        return self

    def apply(self, image: np.ndarray, label: np.ndarray | None, key: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """A crop of an image `(H, W, 3)` and its mask `(H, W)`; a pure function of the key."""
        zoom, up, left, flip, bright, contrast = rng.uniform(rng.fold_in(key, "augment"), (6,)).tolist()
        low, high = self.zoom
        height, width = region(image.shape[:2], self.crop, low * (high / low) ** zoom)
        top = int(up * (image.shape[0] - height + 1))
        start = int(left * (image.shape[1] - width + 1))
        window = np.s_[top : top + height, start : start + width]
        image = images.resize_image(image[window], self.crop)
        if label is not None:
            label = images.resize_mask(label[window], self.crop)
        if self.flip and flip < 0.5:
            image = image[:, ::-1]
            label = None if label is None else label[:, ::-1]
        if self.jitter:
            image = _jitter(image, 1 + self.jitter * (2 * bright - 1), 1 + self.jitter * (2 * contrast - 1))
        return image, label

    def center(self, image: np.ndarray) -> np.ndarray:
        """The middle of an image at zoom 1, `(crop_h, crop_w, 3)`: what validation of the pretext tasks looks at."""
        height, width = region(image.shape[:2], self.crop, 1.0)
        top = (image.shape[0] - height) // 2
        left = (image.shape[1] - width) // 2
        window = np.s_[top : top + height, left : left + width]
        return images.resize_image(image[window], self.crop)


def region(size: tuple[int, int], crop: tuple[int, int], zoom: float) -> tuple[int, int]:
    """The height and width that become `crop` when scaled by `zoom`, made smaller together until they fit `size`."""
    fitting = max(zoom, crop[0] / size[0], crop[1] / size[1])
    return max(1, round(crop[0] / fitting)), max(1, round(crop[1] / fitting))


@dataclass(frozen=True)
class Draws:
    """The draws of one process, a list per micro-batch, from step `start` on: an iterable without a position.

    A step's batch is cut into `accumulate` micro-batches; within one, draws are dealt to the tasks in turn (`deal` of
    them), and each task's draws to the processes in turn. So neither the world's size nor accumulation changes which
    task sees which image.
    """

    batch_size: int
    start: int
    steps: int
    rank: int = 0
    world: int = 1
    deal: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, self.world, self.deal, self.accumulate)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.batch_size // self.accumulate
        mine = [place for place in range(micro) if place // self.deal % self.world == self.rank]
        for number in range(self.start * self.accumulate, self.steps * self.accumulate):
            yield [number * micro + place for place in mine]


def check_batch_size(batch_size: int, world: int, deal: int, accumulate: int) -> None:
    """Raise UserError with the nearest sizes unless every process gets the same number of images of every task."""
    unit = world * deal * accumulate
    if batch_size % unit == 0:
        return
    below = batch_size // unit * unit
    nearest = f"{below} or {below + unit}" if below else f"{unit}"
    parts = [f"{world} process{'es' if world > 1 else ''}"]
    parts += [f"{deal} tasks (views: split)"] if deal > 1 else []
    parts += [f"{accumulate} micro-batches"] if accumulate > 1 else []
    raise UserError(f"train.batch_size: {batch_size} cannot be divided by {' x '.join(parts)}; use {nearest}")


@dataclass
class Kept:
    """Decoded and resized examples by index: a few labelled images come at every step.

    Each loader worker fills one of its own, if `count` of the same size fit in `most` bytes: an epoch visits all images
    in turn, so a part of a large pool would take the memory and be met rarely. What is in stays.
    """

    most: int = KEPT
    size: int = 0
    examples: dict[int, Example] = field(default_factory=dict)

    def get(self, index: int, count: int, make: Callable[[int], Example]) -> Example:
        """The example of this index, of `count` that there are; made if it is not here."""
        example = self.examples.get(index)
        if example is None:
            example = make(index)
            own = example.image.nbytes + (0 if example.label is None else example.label.nbytes)
            if max(self.size + own, count * own) <= self.most:
                self.examples[index] = example
                self.size += own
        return example


@dataclass(frozen=True)
class Samples:
    """A map from draws to cropped `uint8` samples, as a loader's workers run it."""

    examples: Examples
    augment: Augment
    seed: int
    resize: tuple[int, int] | None = None
    with_labels: bool = False  # else the masks are not even read
    kept: Kept = field(default_factory=Kept, compare=False)

    def __getitem__(self, draw: int) -> Sample:
        epoch, position = divmod(draw, len(self.examples))
        index = int(rng.epoch_order(self.seed, epoch, len(self.examples))[position])
        stream = "labelled" if self.with_labels else "pool"
        key = rng.fold_in(rng.fold_in(rng.as_key(self.seed), stream), draw)
        example = self.kept.get(index, len(self.examples), self._read)
        image, label = self.augment.apply(example.image, example.label, key)
        return Sample(image, label, int(key), example.name)

    def _read(self, index: int) -> Example:
        read = self.examples.read if self.with_labels else self.examples.image
        return resized(read(index), self.resize)


@dataclass(frozen=True)
class Views:
    """A map from indices to centre crops with a key of their own: every validation sees the same crops and noise."""

    examples: Examples
    augment: Augment
    resize: tuple[int, int] | None = None

    def __getitem__(self, index: int) -> Sample:
        key = rng.fold_in(rng.as_key("validation"), index)
        example = resized(self.examples.image(index), self.resize)
        return Sample(self.augment.center(example.image), None, int(key), example.name)


@dataclass(frozen=True)
class Whole:
    """A map from indices to whole images, with the mask, where it is wanted, at its own resolution.

    With the mask comes a digest of both as they were read, before anything is resized.
    """

    examples: Examples
    resize: tuple[int, int] | None = None
    with_labels: bool = True

    def __getitem__(self, index: int) -> Sample:
        example = self.examples.read(index) if self.with_labels else self.examples.image(index)
        image = example.image if self.resize is None else images.resize_image(example.image, self.resize)
        return Sample(image, example.label, index, example.name, digest_of(example) if self.with_labels else "")


@dataclass(frozen=True)
class Caught:
    """Another map whose UserErrors come back as values: torch wraps what a worker raises in a page of traceback."""

    samples: Any

    def __getitem__(self, index: int) -> Sample | UserError:
        try:
            return self.samples[index]
        except UserError as error:
            return error


@dataclass(frozen=True)
class Sample:
    image: np.ndarray  # (H, W, 3) uint8
    label: np.ndarray | None  # (H, W) uint8
    key: int
    name: str
    digest: str = ""


@dataclass
class Packed:
    """A batch on its way from a worker: uint8, so that a quarter of the bytes of floats cross the process border."""

    image: Tensor  # (B, 3, H, W) uint8
    key: Tensor  # (B,) int64
    label: Tensor | None
    names: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)  # of those that were read whole

    def pin_memory(self) -> Packed:
        label = None if self.label is None else self.label.pin_memory()
        return Packed(self.image.pin_memory(), self.key, label, self.names, self.digests)

    def to(self, device: torch.device, channels_last: bool = False) -> Batch:
        """Floats in [0, 1] on the device."""
        image = self.image.to(device, non_blocking=True).float() / 255
        if channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        label = None if self.label is None else self.label.to(device, non_blocking=True).long()
        return Batch(image, self.key.to(device, non_blocking=True), label, self.names)


def loader(samples: Any, batches: Any, workers: int, pin: bool = False) -> Iterator[Packed]:
    """Batches in the order asked for. A file that cannot be read ends them with its UserError, in this process."""
    options = {"collate_fn": pack, "pin_memory": pin, "worker_init_fn": outlive_signals}
    loading = DataLoader(Caught(samples), batch_sampler=batches, num_workers=workers, **options)
    for packed in loading:
        if isinstance(packed, UserError):
            packed.of_one_process = True
            raise packed
        yield packed


def outlive_signals(_: int) -> None:
    """In a worker: a signal to the whole process group is the main process's to answer, which still wants batches.

    torch lets a worker die of SIGTERM, and then the run fails in place of saving its state.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def pack(samples: Sequence[Sample | UserError]) -> Packed | UserError:
    """Samples of one size as one batch, or the first error among them."""
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    if errors:
        return errors[0]
    image = torch.stack([_channels_first(sample.image) for sample in samples])  # B of (H, W, 3) -> (B, 3, H, W)
    label = None
    if samples[0].label is not None:
        label = torch.stack([torch.from_numpy(np.ascontiguousarray(sample.label)) for sample in samples])
    key = torch.tensor([sample.key for sample in samples], dtype=torch.int64)
    names = [sample.name for sample in samples]
    return Packed(image, key, label, names, [sample.digest for sample in samples])


def sample_digest(examples: Examples, count: int = NUM_DIGESTED, with_labels: bool = True) -> str:
    """sha256 of up to `count` examples, evenly apart: enough to notice other files under the same names."""
    chosen = np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(int).tolist()
    read = examples.read if with_labels else examples.image
    digests = [digest_of(read(index)) for index in chosen]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def digest_of(example: Example) -> str:
    """sha256 of the sizes and pixels of image and label: the same files under any path, decoded alike, have one."""
    hashed = hashlib.sha256()
    for pixels in (example.image, example.label):
        if pixels is not None:
            hashed.update(f"{pixels.dtype}{pixels.shape}".encode())
            hashed.update(np.ascontiguousarray(pixels))
    return hashed.hexdigest()


def resized(example: Example, size: tuple[int, int] | None) -> Example:
    """An example with image and mask brought to `size` (H, W), where one is given."""
    if size is None:
        return example
    label = None if example.label is None else images.resize_mask(example.label, size)
    return Example(images.resize_image(example.image, size), label, example.name)


def pixel_counts(examples: Examples) -> tuple[Tensor, Tensor]:
    """How many pixels each class has over all masks, and how many the images that show it have; each `(K,)` int64.

    Ignored pixels count nowhere.
    """
    num_classes = len(examples.class_names)
    pixels = torch.zeros(num_classes, dtype=torch.int64)
    beside = torch.zeros(num_classes, dtype=torch.int64)
    for index in range(len(examples)):
        counts = np.bincount(examples.read(index).label.ravel(), minlength=256)[:num_classes]
        pixels += torch.from_numpy(counts)
        beside += torch.from_numpy((counts > 0) * counts.sum())
    return pixels, beside


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
    by_sequence: dict[str, set[int]] = {}
    for index in range(count):
        by_sequence.setdefault(dataset.sequence(index), set()).add(index)
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
    numberings: dict[str, list[tuple[int, int]]] = {}
    others: list[int] = []
    order = rng.permutation(HOLD_OUT_KEY, count).tolist()
    for index in order:
        numbered = numbering(dataset.name(index))
        if numbered is None:
            others.append(index)
        else:
            numberings.setdefault(numbered[0], []).append((numbered[1], index))
    groups = [[index for _, index in sorted(own, reverse=True)] for own in numberings.values() if len(own) > 1]
    # A number that no other image shares a sequence with is as good as none.
    groups.append([*others, *(own[0][1] for own in numberings.values() if len(own) == 1)])
    share = {index: (place + 0.5) / len(own) for own in groups for place, index in enumerate(own)}
    return set(sorted(order, key=share.__getitem__)[: round(HELD_OUT * count)])


def manifest(examples: Examples) -> dict[str, Any]:
    """What a resumed run checks: the same images in the same order. Names only; their pixels are not read."""
    digest = hashlib.sha256()
    for index in range(len(examples)):
        digest.update(examples.name(index).encode("utf-8", "surrogateescape") + b"\0")
    return {"images": len(examples), "sha256_of_names": digest.hexdigest()}


def _jitter(image: np.ndarray, brightness: float, contrast: float) -> np.ndarray:
    mean = float(image.mean())
    changed = ((image.astype(np.float32) - mean) * contrast + mean) * brightness
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def _channels_first(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
