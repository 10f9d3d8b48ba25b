"""The contract of a task, and the one module that DDP sees: a shared encoder with a head per task.

Pretraining, fine-tuning and joint training are the same loop over this module; a stage only chooses the tasks, the
image streams and the starting weights. Pretext tasks live one a file in `pretext/`; `Segment` is the supervised one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from ssl_seg import losses, rng
from ssl_seg.config import Config, Plugin
from ssl_seg.models import EncoderNet, EncoderSpec, Features

Stream = Literal["pool", "labelled"]


@dataclass
class Batch:
    """Images on the device, as a task's `view` gets them."""

    image: Tensor  # (B, 3, H, W) float32 RGB in [0, 1]
    key: Tensor  # (B,) int64
    label: Tensor | None = None  # (B, H, W) int64, 255 is ignored
    names: list[str] = field(default_factory=list)

    def __getitem__(self, part: slice) -> Batch:
        label = None if self.label is None else self.label[part]
        return Batch(self.image[part], self.key[part], label, self.names[part])


@dataclass
class View:
    """What a task shows the network, and the answer it wants."""

    input: Tensor  # (k*B, 3, H, W) float32 RGB in [0, 1]; k = 1 for the built-in tasks
    target: Tensor  # dense (B, C, H, W) float32; classes (B,), (B, N) or (B, h, w) int64
    where: Tensor | None = None  # (B, 1, H, W) float32: where the loss counts


class Task(Config, ABC):
    """Something the network learns from a stream of images: a view, a head and a loss per sample. Frozen, stateless."""

    stream: ClassVar[Stream]
    weight: NonNegativeFloat = 1.0

    @abstractmethod
    def view(self, batch: Batch) -> View:
        """The network's input and target for a batch; pure per sample, on the batch's device."""

    @abstractmethod
    def head(self, encoder: EncoderSpec) -> nn.Module:
        """A fresh head; its `forward(features, size)` gives the prediction for an input of `size` (H, W)."""

    @abstractmethod
    def loss(self, prediction: Tensor, view: View) -> Tensor:
        """`(B,)`: one loss per sample, its mean over the counted pixels, 0 for a sample with none."""

    def metrics(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        """Figures a person reads beside the loss, each `(B,)`."""
        return {}

    def render(self, prediction: Tensor, view: View) -> Tensor | None:
        """The prediction as RGB in [0, 1], `(B, 3, H, W)`: the picture a person looks at."""
        return None

    def render_target(self, view: View) -> Tensor | None:
        """The wanted answer as RGB in [0, 1], beside which `render`'s picture is shown."""
        return view.target if view.target.shape == view.input.shape else None


class PretextTask(Task, Plugin, ABC):
    """A task that makes its own answer from unlabelled images: corrupt them, and ask for what was there.

    Three methods are required: `corrupt`, `head` and `loss`. `ssl_seg.testing.check_pretext_task(MyTask())` tests one.
    """

    package: ClassVar[str] = "pretext"
    group: ClassVar[str] = "ssl_seg.pretext"
    stream: ClassVar[Stream] = "pool"

    def prepare(self, images: Tensor) -> Self:
        """Measure a fixed sample of the pool once, before step 0; the copy is recorded, a resumed run reads it back."""
        return self

    @abstractmethod
    def corrupt(self, image: Tensor, key: Tensor) -> View:
        """The view of images `(B, 3, H, W)` in [0, 1] under keys `(B,)`; sample i depends on the i-th of each alone.

        It must not synchronise the device (no `.item()`, no boolean indexing).
        """

    def view(self, batch: Batch) -> View:
        return self.corrupt(batch.image, batch.key)


class Segment(Task):
    """Supervised segmentation: cross-entropy and Dice against class ids, 255 ignored."""

    stream: ClassVar[Stream] = "labelled"
    num_classes: int = Field(default=0, ge=0, le=255)  # 0: as many as the labelled data set has names
    cross_entropy: NonNegativeFloat = 1.0
    dice: NonNegativeFloat = 0.0
    # Weights per class, or "median" for median frequency balancing (Eigen and Fergus, ICCV 2015, section 6.3.2).
    class_weights: tuple[PositiveFloat, ...] | Literal["median"] | None = None

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not self.cross_entropy and not self.dice:
            raise ValueError("cross_entropy and dice are both 0, so nothing is learnt; give one of them a weight")
        given = self.class_weights
        if isinstance(given, tuple) and self.num_classes and len(given) != self.num_classes:
            raise ValueError(f"class_weights: {len(given)} numbers for {self.num_classes} classes; give one a class")
        return self

    def prepare(self, pixels: Tensor, pixels_beside: Tensor) -> Self:
        """A copy whose "median" class weights are numbers; classes that no image shows weigh 1.

        `pixels` `(K,)` counts each class's pixels, `pixels_beside` `(K,)` all those of the images that show it.
        """
        if self.class_weights != "median":
            return self
        present = pixels > 0
        if not present.any():
            return self.model_copy(update={"class_weights": None})
        frequency = pixels.double()[present] / pixels_beside[present]
        weights = torch.ones(len(pixels), dtype=torch.float64)
        weights[present] = frequency.quantile(0.5) / frequency
        return self.model_copy(update={"class_weights": tuple(weights.tolist())})

    def view(self, batch: Batch) -> View:
        if batch.label is None:
            raise ValueError("Segment needs labels; give it batches of a labelled data set")
        return View(batch.image, batch.label)

    def head(self, encoder: EncoderSpec) -> nn.Module:
        return encoder.dense(self.num_classes)

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        weights = None
        if self.class_weights is not None:
            weights = torch.tensor(self.class_weights, dtype=torch.float32, device=prediction.device)
        total = prediction.new_zeros(len(prediction), dtype=torch.float32)
        if self.cross_entropy:
            total = total + self.cross_entropy * losses.cross_entropy(prediction, view.target, weights=weights)
        if self.dice:
            total = total + self.dice * losses.dice(prediction, view.target)
        return total


class MultiTask(nn.Module):
    """One encoder, a head per task; `forward` is the whole of a step up to the losses, so DDP sees a single call."""

    def __init__(self, encoder: EncoderNet, spec: EncoderSpec, tasks: Mapping[str, Task], seed: int = 0) -> None:
        super().__init__()
        self.tasks = dict(tasks)
        self.encoder = encoder
        self.heads = nn.ModuleDict()
        for name, task in tasks.items():
            # By name, so that a head starts from the same weights whichever other tasks there are.
            with seeded(rng.fold_in(rng.fold_in(rng.as_key(seed), "head"), name)):
                self.heads[name] = task.head(spec)

    def forward(self, views: Mapping[str, View]) -> dict[str, Tensor]:
        """Per task its losses, `(B,)` float32."""
        predictions = self.predict(views)
        by_task = {name: self.tasks[name].loss(predictions[name].float(), view) for name, view in views.items()}
        for name, values in by_task.items():
            count = len(views[name].target)
            if values.shape != (count,):
                raise ValueError(
                    f"task {name}: its loss has the shape {tuple(values.shape)}, not one number a sample, ({count},)"
                )
        return by_task

    def predict(self, views: Mapping[str, View]) -> dict[str, Tensor]:
        """Per task its head's output. Views of one stream and one size share an encoder pass.

        Streams are encoded apart, one after the other: labelled images then give the same bits with and without
        unlabelled ones beside them.
        """
        groups: dict[tuple, list[str]] = {}
        for name, view in views.items():
            groups.setdefault((self.tasks[name].stream, *view.input.shape[-2:]), []).append(name)
        predictions: dict[str, Tensor] = {}
        for (_, height, width), names in groups.items():
            features = self._encode([views[name].input for name in names])
            for name, own in zip(names, features, strict=True):
                predictions[name] = self.heads[name](own, (height, width))
        return predictions

    def _encode(self, inputs: list[Tensor]) -> list[Features]:
        """The features of several inputs of one size, by one pass over all of them."""
        if len(inputs) == 1:
            return [self.encoder(inputs[0])]
        counts = [len(image) for image in inputs]
        levels = [
            level.split(counts) for level in self.encoder(torch.cat(inputs))
        ]  # (T*B, C, h, w) -> T of (B, C, h, w)
        return [list(own) for own in zip(*levels, strict=True)]


def make_views(tasks: Mapping[str, Task], batches: Mapping[Stream, Batch], split: bool = False) -> dict[str, View]:
    """Each task's view of its stream's batch; with `split` the pool's images are dealt out, one task after the other.

    A sample's key is folded with the task's name, so two tasks corrupt one image independently.
    """
    views = {}
    dealt = [name for name, task in tasks.items() if task.stream == "pool"]
    for name, task in tasks.items():
        batch = batches[task.stream]
        if split and task.stream == "pool":
            batch = batch[dealt.index(name) :: len(dealt)]
        views[name] = task.view(replace(batch, key=rng.fold_in(batch.key, name)))
    return views


def weighted_total(tasks: Mapping[str, Task], sample_losses: Mapping[str, Tensor]) -> Tensor:
    """The number that is minimized: the weighted sum of each task's mean over its samples."""
    return sum(tasks[name].weight * values.mean() for name, values in sample_losses.items())


@contextmanager
def seeded(key: Tensor) -> Iterator[None]:
    """What torch draws inside (first weights) depends on the key alone; its generator goes on as before after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(key) & (2**63 - 1))
        yield


@contextmanager
def in_evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; after it each part has its own former mode, frozen parts too."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients."""
    with in_evaluation_mode(module), torch.no_grad():
        yield
