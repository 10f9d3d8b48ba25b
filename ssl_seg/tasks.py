"""The contract of a task: what it shows the network, which head answers, and what a wrong answer costs.

Pretraining, fine-tuning and joint training are one loop over tasks; a stage only chooses the tasks, the image streams
and the starting weights. Pretext tasks live one a file in `pretext/`; `segment.Segment` is the supervised one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from pydantic import NonNegativeFloat
from torch import Tensor, nn

from ssl_seg.config import Config, Plugin
from ssl_seg.models import EncoderSpec

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
    loss_mask: Tensor | None = None  # (B, 1, H, W) float32: where the loss counts


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
