"""Rotate: by how many quarter turns was the image turned? The smallest example of a task.

Gidaris, Singh and Komodakis, "Unsupervised representation learning by predicting image rotations", ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssl_seg import losses, rng
from ssl_seg.models import ANY_CHANNELS, EncoderSpec, Features
from ssl_seg.tasks import PretextTask, View


class Rotate(PretextTask):
    """The middle square is turned and the rest of an oblong image greyed: its shape would tell the turn otherwise."""

    channel_counts: ClassVar[Collection[int]] = ANY_CHANNELS

    def corrupt(self, image: Tensor, key: Tensor) -> View:
        turns = rng.randint(key, (), 0, 4)
        return View(_turn(_grey_around(image), turns), turns)

    def head(self, encoder: EncoderSpec) -> nn.Module:
        return PooledClassifier(encoder.channels[-1], 4)

    def guess(self, view: View) -> Tensor:
        """All four alike."""
        return view.input.new_zeros(len(view.target), 4)

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        return losses.cross_entropy(prediction, view.target)

    def metrics(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        return {"accuracy": (prediction.argmax(dim=1) == view.target).float()}

    def render(self, prediction: Tensor, view: View) -> Tensor:
        return _turn(view.input, 4 - prediction.argmax(dim=1))

    def render_target(self, view: View) -> Tensor:
        return _turn(view.input, 4 - view.target)


class PooledClassifier(nn.Module):
    """A linear layer on the mean of the encoder's last map."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        return self.linear(features[-1].mean(dim=(2, 3)))


def _turn(image: Tensor, turns: Tensor) -> Tensor:
    """The middle square of each image turned by `turns` `(B,)` quarters: pixels move, none is interpolated."""
    rows, columns = _middle(image)
    square = image[..., rows, columns]
    turned = torch.stack([square.rot90(quarters, (2, 3)) for quarters in range(4)])  # (4, B, C, S, S)
    result = image.clone()
    result[..., rows, columns] = turned[turns % 4, torch.arange(len(image), device=image.device)]
    return result


def _grey_around(image: Tensor) -> Tensor:
    rows, columns = _middle(image)
    result = torch.full_like(image, 0.5)
    result[..., rows, columns] = image[..., rows, columns]
    return result


def _middle(image: Tensor) -> tuple[slice, slice]:
    """The rows and columns of the largest middle square."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return slice(top, top + side), slice(left, left + side)
