"""A small but whole set-up: textured scenes, a narrow FPN on mobilenet, two tasks; a step takes some 50 ms.

Also a plug-in module, so that commands can be tested on the same scenes: `--plugin tests/small.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg import losses, rng
from ssl_seg.config import use_plugin
from ssl_seg.datasets import Dataset, Example
from ssl_seg.tasks import Batch, Predict, Stream, TaskPlugin, View, partners


class Textured(Dataset):
    """Waves with a brighter disc of other waves on them. Textured, since norm layers divide by the spread of images."""

    count: int = 12
    size: tuple[int, int] = (80, 80)
    seed: int = 0

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("ground", "disc")

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Example:
        random = np.random.default_rng([self.seed, index])
        rows, columns = np.mgrid[: self.size[0], : self.size[1]] / min(self.size)
        label = (np.hypot(rows - random.uniform(0.3, 0.7), columns - random.uniform(0.3, 0.7)) < 0.3).astype(np.uint8)
        frequency = random.uniform(3, 40, (2, 2, 3))
        waves = [np.sin(rows[..., None] * f + columns[..., None] * g) for f, g in frequency]
        image = np.where(label[..., None] == 1, *waves) * 60 + random.normal(100, 8, (*self.size, 3))
        image[label == 1] += 60
        return Example(image.clip(0, 255).astype(np.uint8), label, self.name(index))

    def name(self, index: int) -> str:
        return f"textured_{self.seed}_{index}"


class Consistent(TaskPlugin):
    """A semi-supervised toy: what the teacher sees in two images, `segment`'s head is to see in a mixture of them.

    The pool's images darkened, with a half of the partner in each, as in CutMix.
    """

    streams: ClassVar[tuple[Stream, ...]] = ("pool",)
    borrowed_head: ClassVar[str | None] = "segment"
    asks_teacher: ClassVar[bool] = True
    mixes: ClassVar[bool] = True

    def view(self, batches: Mapping[Stream, Batch], teacher: Predict | None = None) -> View:
        image, key = batches["pool"].image, batches["pool"].key
        edge = rng.randint(key, (1, 1, 1), 0, image.shape[-1])
        own = torch.arange(image.shape[-1], device=image.device) < edge  # (B, 1, 1, W)
        seen = teacher(image).softmax(dim=1)  # (B, K, H, W)
        dark = image * rng.uniform(rng.fold_in(key, "light"), (1, 1, 1), 0.3, 1.0)
        return View(torch.where(own, dark, partners(dark)), torch.where(own, seen, partners(seen)))

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        return losses.regression("mse", prediction.softmax(dim=1), view.target)


POOL = {"type": "textured"}
# Group norm: its results do not depend on how a batch is cut. Dropout and drop path: what resuming must get right.
MODEL = {
    "encoder": {"type": "timm", "name": "mobilenetv2_035", "drop_path": 0.2},
    "decoder": {"type": "fpn", "pyramid_channels": 32, "channels": 64, "dropout": 0.2},
    "norm": "group",
}
UNTRACKED = {"type": "none"}  # a process of its own a run, which only the tests of tracking want
# All checkpoints stay: tests cut finished runs back to earlier ones.
TRAIN = {
    "keep_state": "all",
    "steps": 6,
    "batch_size": 4,
    "warmup": 2,
    "workers": 0,
    "log_every": 1,
    "save_every": 100,
    "device": "cpu",
}


def pretraining(**train: Any) -> dict[str, Any]:
    """The values of a PretrainConfig, with these keys of `train` changed."""
    return {
        "data": {"pool": POOL, "val": {**POOL, "count": 3, "seed": 9}},
        "model": MODEL,
        "augment": {"crop": [64, 64]},
        "tasks": {"denoise": {}, "rotate": {"weight": 0.5}},
        "train": {**TRAIN, **train},
        "tracking": UNTRACKED,
    }


def finetuning(**train: Any) -> dict[str, Any]:
    """The values of a FinetuneConfig, with these keys of `train` changed."""
    return {
        "data": {
            "labelled": {**POOL, "count": 4, "seed": 5},
            "val": {**POOL, "count": 3, "seed": 6},
            "test": {**POOL, "count": 3, "seed": 7},
        },
        "model": MODEL,
        "augment": {"crop": [64, 64]},
        "train": {**TRAIN, **train},
        "tracking": UNTRACKED,
    }


def joining(**train: Any) -> dict[str, Any]:
    """The values of a FinetuneConfig with two more tasks on a pool: a pretext task, and one that asks a teacher."""
    values = finetuning(**{"ema": 0.9, **train})
    values["data"]["pool"] = POOL
    return {**values, "tasks": {"denoise": {}, "consistent": {}}}


def sharing(**train: Any) -> dict[str, Any]:
    """The values of a FinetuneConfig without a pool, whose noisy images are both cleaned and segmented."""
    return {**finetuning(**train), "segment": {"sees": "denoise"}, "tasks": {"denoise": {"stream": "labelled"}}}


def semisupervised(**train: Any) -> dict[str, Any]:
    """The values of a FinetuneConfig with both shipped tasks on pseudo-labels, of all pixels; one rises over a ramp."""
    values = finetuning(**{"ema": 0.9, "batch_size": {"labelled": 2, "pool": 4}, **train})
    values["data"]["pool"] = POOL
    return {**values, "tasks": {"mean_teacher": {"confidence": 0.0, "ramp": 3}, "unimatch": {"confidence": 0.0}}}


def words(values: dict[str, Any], folder: Path) -> list[str]:
    """The values as a YAML file in a folder, for a command."""
    path = folder / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    return [str(path), "--plugin", __file__]


if "tests" in __name__:  # imported by a test; the commands name the file themselves
    use_plugin(__name__)


def learnt_by_heart(
    network: nn.Module, optimizer: torch.optim.Optimizer, steps: int, size: tuple[int, int] = (64, 64)
) -> tuple[float, float]:
    """The share of an image's pixels that a network of three classes or more names after `steps` on that image alone.

    First with the image's own statistics, then with those that batch norms have kept. The image is a disc and a bar, on
    noise of the ground's colour.
    """
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    label = ((rows - 40) ** 2 + (columns - 20) ** 2 < 150).long()
    label[8:16, 10:60] = 2
    colours = torch.tensor([[0.2, 0.3, 0.2], [0.8, 0.3, 0.2], [0.3, 0.3, 0.9]])
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    image = colours[label].permute(2, 0, 1)[None] + 0.05 * noise
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(image), label[None]).backward()
        optimizer.step()
    shares = []
    with torch.no_grad():
        for training in (True, False):
            answer = network.train(training)(image).argmax(dim=1)
            shares.append((answer == label).float().mean().item())
    return shares[0], shares[1]
