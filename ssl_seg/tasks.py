"""The contract of a task: what it shows the network, which head answers, and what a wrong answer costs.

Pretraining, fine-tuning and joint training are one loop over tasks; a stage only chooses the tasks, the image streams
and the starting weights. Pretext tasks live one a file in `pretext/`; `segment.Segment` is the supervised one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from ssl_seg.config import Config, Plugin, UserError, known_to_0_1
from ssl_seg.models import RGB, DecoderKind, EncoderSpec, Features, ReconstructionHead

Stream = Literal["pool", "labelled"]
Predict = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [0, 1] to a head's prediction, float32, no gradient
SPREAD = 0.21  # of a photograph's pixels about its mean colour: the root mean square over 200 images of BSDS500
LEAST_CONTRAST = 0.1
PAIR = 2  # images: what stays together where a task mixes


@dataclass
class Batch:
    """Images on the device, as a task's `view` gets them."""

    image: Tensor  # (B, 3, H, W) float32 RGB in [0, 1]; of another `model.channels` that many in place of 3
    key: Tensor  # (B,) int64
    label: Tensor | None = None  # (B, H, W) int64, 255 is ignored
    names: list[str] = field(default_factory=list)

    def __getitem__(self, part: slice | list[int]) -> Batch:
        label = None if self.label is None else self.label[part]
        names = self.names[part] if isinstance(part, slice) else [self.names[place] for place in part]
        return Batch(self.image[part], self.key[part], label, names)


@dataclass
class View:
    """What a task shows the network, and the answer it wants."""

    input: Tensor  # (k*B, 3, H, W) float32 RGB in [0, 1]; k = 1 for the built-in tasks
    target: Tensor  # dense (B, C, H, W) float32; classes (B,), (B, N) or (B, h, w) int64
    loss_mask: Tensor | None = None  # (B, 1, H, W) float32: where the loss counts
    key: Tensor | None = None  # (B,) int64: for what is drawn once the encoder has answered (`Task.perturb`)


class Task(Config, ABC):
    """Something the network learns from streams of images: a view, a head and a loss per sample. Frozen, stateless."""

    streams: ClassVar[tuple[Stream, ...]]  # those it reads
    borrowed_head: ClassVar[str | None] = None  # the task whose head it uses too; None: it has a head of its own
    # The task whose input it is shown too, in one pass of the encoder; None: it is shown that of its own view.
    borrowed_input: ClassVar[str | None] = None
    # Whether the view shows each image once and leaves its pixels where they are, so that the image's mask fits it.
    in_place: ClassVar[bool] = False
    # Numbers of image channels that it makes sense for; one that says nothing knows RGB alone.
    channel_counts: ClassVar[Collection[int]] = (RGB,)
    asks_teacher: ClassVar[bool] = False  # whether `view` needs the teacher, which `train.ema` gives
    # Whether the view of an image depends on its partner too (`partners`), as in CutMix. Partners then stay together in
    # whatever a batch is dealt out to: processes, micro-batches, tasks.
    mixes: ClassVar[bool] = False
    since_0_1: ClassVar[tuple[str, ...]] = ("ramp",)  # keys that version 0.1 did not know; a subclass adds its own
    # Of its loss in the sum. A task of weight 0 is left out of the run: it has no head, and no image is read for it.
    weight: NonNegativeFloat = 1.0
    # Steps at the beginning in which the weight rises: as long as predictions mean little, agreeing with them is not to
    # count. 0: the whole weight from the first step on.
    ramp: NonNegativeInt = 0

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return known_to_0_1(self, dump(self), since=self.since_0_1)

    def weight_at(self, step: int | None) -> float:
        """The weight in the update that makes step `step` (counted from 0); None: after the ramp.

        The ramp is the sigmoid one of Laine and Aila 2017, which begins at a 148th.
        """
        if step is None or step >= self.ramp:
            return self.weight
        return self.weight * math.exp(-5 * (1 - step / self.ramp) ** 2)

    @abstractmethod
    def view(self, batches: Mapping[Stream, Batch], teacher: Predict | None = None) -> View:
        """The network's input and target for a batch of each of `streams`, on their device.

        Sample i depends on the i-th image and key of each alone; of a task that `mixes`, on those of its partner too.
        `teacher` predicts by the averaged weights, in evaluation mode, through the head that this task uses; None for a
        task that does not ask for it.
        """

    def head(self, encoder: EncoderSpec) -> nn.Module:
        """A fresh head; its `forward(features, size)` gives the prediction for an input of `size` (H, W).

        Every task without a `borrowed_head` has one.
        """
        raise NotImplementedError(f"{type(self).__name__}: give it a head, or name a borrowed_head")

    def perturb(self, features: Features, view: View) -> Features:
        """What the head is given of the encoder's answer to the view's input; as it is, unless a task says otherwise.

        It may give more samples than it got: the head then predicts for all of them.
        """
        return features

    @abstractmethod
    def loss(self, prediction: Tensor, view: View) -> Tensor:
        """`(B,)`: one loss per sample, its mean over the counted pixels, 0 for a sample with none."""

    def metrics(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        """Figures a person reads beside the loss, each `(B,)`."""
        return {}

    def watch(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        """Figures of a training batch, each `(B,)`, that a person follows while the run goes on.

        For what only training shows, as how much of an image a task that learns from predictions is sure of.
        """
        return {}

    def render(self, prediction: Tensor, view: View) -> Tensor | None:
        """The prediction in [0, 1], RGB `(B, 3, H, W)` or as the images are: the picture a person looks at."""
        return None

    def render_target(self, view: View) -> Tensor | None:
        """The wanted answer in [0, 1], beside which `render`'s picture is shown."""
        return view.target if view.target.shape == view.input.shape else None


T = TypeVar("T", bound=Task)


class TaskPlugin(Task, Plugin, ABC):
    """A task that a config names by its `type`, under `tasks`."""

    package: ClassVar[str] = "pretext"
    packages_beside: ClassVar[tuple[str, ...]] = ("ssl_seg.semisupervised",)
    group: ClassVar[str] = "ssl_seg.pretext"

    @property
    def origin(self) -> str | None:
        """The run or the file of weights that a task brings along, which have seen images; None where there is none."""
        return None

    def prepare(self, images: Tensor) -> Self:
        """Measure a fixed sample of its stream once, before step 0; the copy is recorded, a resumed run reads it back.

        Of a task that reads two streams it is one of the first. So is that of `doubt`.
        """
        return self

    def doubt(self, images: Tensor) -> str:
        """What a person should know before the task learns from images such as these, in a few words; '' for nothing.

        They are a fixed sample of its stream, `(N, 3, H, W)` in [0, 1], and are asked about once, before step 0.
        """
        return ""


class PretextTask(TaskPlugin, ABC):
    """A task that makes its own answer from images without their masks: corrupt them, and ask for what was there.

    Three methods are required: `corrupt`, `head` and `loss`. `ssl_seg.testing.check_pretext_task(MyTask())` tests one.
    """

    since_0_1: ClassVar[tuple[str, ...]] = (*Task.since_0_1, "stream")
    # Which images it learns from: those of the pool, or those of fine-tuning that have masks, which it does not read.
    stream: Stream = "pool"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return (self.stream,)

    @abstractmethod
    def corrupt(self, image: Tensor, key: Tensor) -> View:
        """The view of images `(B, 3, H, W)` in [0, 1] under keys `(B,)`; sample i depends on the i-th of each alone.

        Of a task that `mixes` it depends on those of its partner too. It must not synchronise the device (no `.item()`,
        no boolean indexing).
        """

    def view(self, batches: Mapping[Stream, Batch], teacher: Predict | None = None) -> View:
        batch = batches[self.stream]
        return self.corrupt(batch.image, batch.key)

    @abstractmethod
    def head(self, encoder: EncoderSpec) -> nn.Module:
        """A fresh head; its `forward(features, size)` gives the prediction for an input of `size` (H, W)."""

    def guess(self, view: View) -> Tensor | None:
        """The best prediction that takes no learning: chance, a mean, the input itself. None where none is known.

        Held-out images then also tell `learnt`: 0 for a loss like the guess's, 1 for none at all.
        """
        return None


class DenseTask(PretextTask, ABC):
    """A pretext task whose answer is a map: it says which decoder draws that."""

    since_0_1: ClassVar[tuple[str, ...]] = (*PretextTask.since_0_1, "decoder")
    # full: that of the segmentation model, so that fine-tuning can start from it. By its skips fine detail passes the
    # deep layers by: a denoised picture needs little of them. deep cuts the skips, and what is drawn has come through
    # the coarsest map; light is a narrow decoder without skips, for which most of the work is left to the encoder.
    # reconstruction: none, for an encoder that draws the picture itself (encoder stacked).
    decoder: Literal[DecoderKind, "reconstruction"] = "full"

    def dense(self, encoder: EncoderSpec, out_channels: int, stride: int = 1) -> nn.Module:
        """The head that draws `out_channels` at `stride`, by the decoder that was asked for."""
        if self.decoder == "reconstruction":
            return ReconstructionHead(encoder, out_channels, stride)
        return encoder.dense(out_channels, stride, self.decoder)


class PictureTask(DenseTask, ABC):
    """A pretext task whose answer is the image itself, as it was before the task spoilt it."""

    since_0_1: ClassVar[tuple[str, ...]] = (*DenseTask.since_0_1, "relative", "residual")
    # Whether errors, and noise that is added, are in units of each image's own contrast. Else in a pool of mixed kinds
    # those of high contrast make nearly all of the loss, and noise buries what is faint, as in fluorescence.
    relative: bool = False
    # Whether the network draws what is missing in the guess that takes no learning, in place of the whole picture: most
    # of a picture is copied, and a network of strided maps spends its first thousands of steps on learning to copy.
    # As in Zhang et al., "Beyond a Gaussian denoiser: residual learning of deep CNN for image denoising", TIP 2017.
    residual: bool = False

    @model_validator(mode="after")
    def _check_residual(self) -> Self:
        if self.residual and self.decoder == "reconstruction":
            raise ValueError("residual: the encoder draws the whole picture (decoder: reconstruction); leave one out")
        return self

    @abstractmethod
    def plain(self, view: View) -> Tensor:
        """The best answer that takes no learning, in the units of `view.target`."""

    def answer(self, prediction: Tensor, view: View) -> Tensor:
        """What the network says, in the units of `view.target`."""
        return self.plain(view) + prediction if self.residual else prediction

    def guess(self, view: View) -> Tensor:
        return torch.zeros_like(view.target) if self.residual else self.plain(view)

    def head(self, encoder: EncoderSpec) -> nn.Module:
        return self.dense(encoder, encoder.image_channels)

    def contrast(self, image: Tensor) -> Tensor | float:
        """`(B, 1, 1, 1)`: how far clean images `(B, 3, H, W)` spread about their mean colour, over photographs' spread.

        A tenth at least: what is flat has no contrast to be measured in. 1 unless the task is `relative`.
        """
        if not self.relative:
            return 1.0
        spread = image.var(dim=(2, 3), keepdim=True, correction=0).mean(dim=1, keepdim=True).sqrt()
        return (spread / SPREAD).clamp(min=LEAST_CONTRAST)


def partners(rows: Tensor) -> Tensor:
    """Each row's partner: of `(B, ...)` rows 2i and 2i + 1 change places; the last of an odd number is its own.

    In training the partner of a draw is draw XOR 1: a batch of a task that `mixes` holds whole pairs, the same ones on
    any number of processes.
    """
    places = torch.arange(len(rows), device=rows.device) ^ 1
    return rows[places.clamp(max=len(rows) - 1)]


def readers(tasks: Mapping[str, Task], stream: Stream) -> list[str]:
    """The names of the tasks that read a stream."""
    return [name for name, task in tasks.items() if stream in task.streams]


def weighty(tasks: Mapping[str, T]) -> dict[str, T]:
    """The tasks that have a weight: those of a run."""
    return {name: task for name, task in tasks.items() if task.weight > 0}


def streams_of(tasks: Mapping[str, Task]) -> list[Stream]:
    """The streams that tasks read, in the order of the tasks."""
    return list(dict.fromkeys(stream for task in tasks.values() for stream in task.streams))


def check_channels(tasks: Mapping[str, Task], count: int) -> None:
    """Raise UserError for a task that makes no sense for images of so many channels."""
    for name, task in tasks.items():
        if count not in task.channel_counts:
            takes = ", ".join(map(str, task.channel_counts))
            raise UserError(
                f"tasks.{name}: is for images of {takes} channels, and model.channels is {count}; leave it out: "
                f"tasks.{name}=null"
            )


def check_tasks(tasks: Mapping[str, Task], streams: Collection[Stream], has_teacher: bool) -> None:
    """Raise UserError for a task that cannot work beside the others.

    No such stream, no head to borrow, none whose input it could be shown, no teacher.
    """
    for name, task in tasks.items():
        missing = [stream for stream in task.streams if stream not in streams]
        if missing:
            raise UserError(f"tasks.{name}: reads {missing[0]} images, and this stage has none; use it in fine-tuning")
        lender = task.borrowed_head
        if lender is not None and (lender not in tasks or tasks[lender].borrowed_head is not None):
            owners = ", ".join(other for other, own in tasks.items() if own.borrowed_head is None) or "none"
            raise UserError(f"tasks.{name}: uses the head of '{lender}', and the tasks with a head are: {owners}")
        shower = task.borrowed_input
        if shower is not None:
            others = {other: own for other, own in tasks.items() if other != name}
            if shower not in others:
                known = ", ".join(others) or "none"
                raise UserError(f"{name}.sees: '{shower}' is no other task that has a weight; those are: {known}")
            if others[shower].streams != ("labelled",):
                raise UserError(
                    f"{name}.sees: {shower} shows the pool, which has no masks; give tasks.{shower}.stream=labelled"
                )
            if not others[shower].in_place:
                fitting = ", ".join(other for other, own in others.items() if own.in_place) or "none"
                raise UserError(
                    f"{name}.sees: {shower} does not leave each pixel at its place, so masks would not fit; those that "
                    f"do: {fitting}"
                )
        if task.asks_teacher and not has_teacher:
            raise UserError(f"tasks.{name}: asks a teacher, and there is none; give train.ema=0.999")
