"""The one module that DDP sees: a shared encoder with a head for each task, and the views that a batch gives them.

Ours, because DDP wants one forward for the whole of a step, and a head must start from the same weights whichever other
tasks there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ssl_seg import rng
from ssl_seg.models import EncoderNet, EncoderSpec, Features
from ssl_seg.rng import seeded
from ssl_seg.tasks import Batch, Stream, Task, View


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
        return self.encoder(torch.cat(inputs)).split([len(image) for image in inputs])


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
