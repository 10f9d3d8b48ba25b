"""From data sets to batches: which image a draw is, and how it reaches the device.

A *draw* is a global sample counter. Batch t of a run is draws `[t*B, (t+1)*B)`, whatever the number of processes and
workers, so the batch of a step is a pure function of the config and the step: resume means "start at t". Ours for that
reason; torch's samplers and accelerate's `skip_first_batches` keep a hidden position. Workers decode, crop and flip and
hand over `uint8` pixels with an `int64` key; corruption runs on the device. `workers` starts and watches them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ssl_seg import images, rng
from ssl_seg.config import UserError
from ssl_seg.data.augment import Augment
from ssl_seg.data.splits import Examples, digest_of
from ssl_seg.data.workers import ALONE, Batches, Drawable, Handed, Workers, collected
from ssl_seg.datasets import Example
from ssl_seg.tasks import Batch

# Bytes up to which each loader worker keeps a set of decoded images: 64 photographs of 1024 x 1024 with their masks, or
# a pool of 4,600 frames of 160 x 120. The few labelled images of most users fit.
KEPT = 256 * 2**20


@dataclass(frozen=True)
class Draws:
    """The draws of one process, a list per micro-batch, from step `start` on: an iterable without a position.

    A step's batch is cut into `accumulate` micro-batches; within one, draws are dealt to the tasks in turn (`deal` of
    them), `at_once` neighbours at a time, and each task's draws to the processes likewise. So neither the world's size
    nor accumulation changes which task sees which image, nor beside which partner.
    """

    batch_size: int
    start: int
    steps: int
    rank: int = 0
    world: int = 1
    deal: int = 1
    accumulate: int = 1
    at_once: int = 1

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, self.world, self.deal, self.accumulate, self.at_once)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.batch_size // self.accumulate
        turn = self.at_once * self.deal
        mine = [place for place in range(micro) if place // turn % self.world == self.rank]
        for number in range(self.start * self.accumulate, self.steps * self.accumulate):
            yield [number * micro + place for place in mine]


def check_batch_size(
    batch_size: int, world: int, deal: int, accumulate: int, at_once: int = 1, key: str = "train.batch_size"
) -> None:
    """Raise UserError with the nearest sizes unless every process gets the same number of images of every task.

    And, of images that stay together `at_once`, no part of them. `key` is where the size was given.
    """
    unit = world * deal * accumulate * at_once
    if batch_size % unit == 0:
        return
    below = batch_size // unit * unit
    nearest = f"{below} or {below + unit}" if below else f"{unit}"
    parts = [f"{world} process{'es' if world > 1 else ''}"]
    parts += [f"{deal} tasks (views: split)"] if deal > 1 else []
    parts += [f"{accumulate} micro-batches"] if accumulate > 1 else []
    parts += [f"{at_once} images that are mixed"] if at_once > 1 else []
    raise UserError(f"{key}: {batch_size} cannot be divided by {' x '.join(parts)}; use {nearest}")


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
class Sample:
    image: np.ndarray  # (H, W, C) uint8
    label: np.ndarray | None  # (H, W) uint8
    key: int
    name: str
    digest: str = ""


@dataclass(frozen=True)
class Samples:
    """A map from draws to cropped `uint8` samples, as a loader's workers run it."""

    examples: Examples
    augment: Augment
    seed: int
    resize: tuple[int, int] | None = None
    with_labels: bool = False  # else the masks are not even read
    channels: int = 3  # of the images
    beside: Examples | None = None  # images of another origin, which `share` of the draws are of
    share: float = 0.0
    kept: Kept = field(default_factory=Kept, compare=False)
    kept_beside: Kept = field(default_factory=Kept, compare=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.augment.crop) * (self.channels + self.with_labels)

    def name(self, draw: int) -> str:
        examples, _, index = self._found(draw)
        return examples.name(index)

    def __getitem__(self, draw: int) -> Sample:
        examples, kept, index = self._found(draw)
        stream = "labelled" if self.with_labels else "pool"
        key = rng.fold_in(rng.fold_in(rng.as_key(self.seed), stream), draw)
        example = kept.get(index, len(examples), partial(self._read, examples))
        image, label = self.augment.apply(example.image, example.label, key)
        return Sample(image, label, int(key), example.name)

    def is_beside(self, draw: int) -> bool:
        """Whether a draw is of the set beside."""
        return self.beside is not None and math.floor((draw + 1) * self.share) > math.floor(draw * self.share)

    def _found(self, draw: int) -> tuple[Examples, Kept, int]:
        """The set that a draw is of, and the index in it: each set is visited epoch after epoch in an order of its own.

        Those of the set beside are spread as evenly as they can be; of a share of a half they are every other one.
        """
        if self.beside is None:
            return self.examples, self.kept, self._index(draw, len(self.examples))
        before = math.floor(draw * self.share)  # draws that were of the set beside
        if self.is_beside(draw):
            return self.beside, self.kept_beside, self._index(before, len(self.beside))
        return self.examples, self.kept, self._index(draw - before, len(self.examples))

    def _index(self, turn: int, count: int) -> int:
        epoch, position = divmod(turn, count)
        return int(rng.epoch_order(self.seed, epoch, count)[position])

    def _read(self, examples: Examples, index: int) -> Example:
        read = examples.read if self.with_labels else examples.image
        return resized(read(index), self.resize)


@dataclass(frozen=True)
class CenterCrops:
    """A map from indices to centre crops with a key of their own: every validation sees the same crops and noise."""

    examples: Examples
    augment: Augment
    resize: tuple[int, int] | None = None
    channels: int = 3  # of the images

    @property
    def nbytes(self) -> int:
        return math.prod(self.augment.crop) * self.channels

    def name(self, index: int) -> str:
        return self.examples.name(index)

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

    @property
    def nbytes(self) -> int:
        return 0  # images differ in size

    def name(self, index: int) -> str:
        return self.examples.name(index)

    def __getitem__(self, index: int) -> Sample:
        example = self.examples.read(index) if self.with_labels else self.examples.image(index)
        image = example.image if self.resize is None else images.resize_image(example.image, self.resize)
        return Sample(image, example.label, index, example.name, digest_of(example) if self.with_labels else "")


@dataclass
class Packed(Handed):
    """A batch on its way from a worker: uint8, so that a quarter of the bytes of floats cross the process border."""

    image: Tensor  # (B, C, H, W) uint8
    key: Tensor  # (B,) int64
    label: Tensor | None
    names: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)  # of those that were read whole

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + (0 if self.label is None else self.label.nbytes)

    def share(self) -> None:
        for tensor in (self.image, self.key, self.label):
            if tensor is not None:
                tensor.share_memory_()

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


def loader(samples: Drawable, batches: Batches, workers: Workers = ALONE, pin: bool = False) -> Iterator[Packed]:
    """Batches in the order asked for. A file that cannot be read ends them with its UserError, in this process.

    Raises WorkersError as `collected` does.
    """
    for packed in collected(samples, batches, workers, pack, pin):
        if isinstance(packed, UserError):
            packed.of_one_process = True
            raise packed
        yield packed


def pack(samples: Sequence[Sample]) -> Packed:
    """Samples of one size as one batch."""
    image = torch.stack([_channels_first(sample.image) for sample in samples])  # B of (H, W, C) -> (B, C, H, W)
    label = None
    if samples[0].label is not None:
        label = torch.stack([torch.from_numpy(np.ascontiguousarray(sample.label)) for sample in samples])
    key = torch.tensor([sample.key for sample in samples], dtype=torch.int64)
    names = [sample.name for sample in samples]
    return Packed(image, key, label, names, [sample.digest for sample in samples])


def resized(example: Example, size: tuple[int, int] | None) -> Example:
    """An example with image and mask brought to `size` (H, W), where one is given."""
    if size is None:
        return example
    label = None if example.label is None else images.resize_mask(example.label, size)
    return Example(images.resize_image(example.image, size), label, example.name)


def _channels_first(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
