"""The one module that DDP sees: a shared encoder with a head for each task, and the views that a batch gives them.

Ours, because DDP wants one forward for the whole of a step, and a head must start from the same weights whichever other
tasks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Self

import torch
from torch import Tensor, nn

from ssl_seg import rng
from ssl_seg.models import EncoderNet, EncoderSpec, Features, telling_small_maps
from ssl_seg.rng import seeded
from ssl_seg.tasks import PAIR, Batch, Stream, Task, View, readers, weighty

Teach = Callable[[str, Tensor], Tensor]  # a head's name and images to the teacher's prediction


class MultiTask(nn.Module):
    """One encoder, a head per task that borrows none; `forward` is the whole of a step up to the losses.

    So DDP sees a single call. A task of weight 0 has its head, which stays as it is, and is none of `tasks`.
    """

    def __init__(self, encoder: EncoderNet, spec: EncoderSpec, tasks: Mapping[str, Task], seed: int = 0) -> None:
        super().__init__()
        self.tasks = weighty(tasks)
        self.encoder = encoder
        self.watched: dict[str, Tensor] = {}  # what tasks tell of the last batch, each a number: `<task>/<figure>`
        self.frozen = False  # whether the encoder stays as it is
        self._held: list[nn.Parameter] = []  # what of it will learn again
        self.heads = nn.ModuleDict()
        for name, task in tasks.items():
            if task.borrowed_head is not None:
                continue
            # By name, so that a head starts from the same weights whichever other tasks there are.
            with seeded(rng.fold_in(rng.fold_in(rng.as_key(seed), "head"), name)):
                self.heads[name] = task.head(spec)
        for name in self.heads.keys() - self.learning:
            self.heads[name].requires_grad_(False)

    @property
    def learning(self) -> set[str]:
        """The names of the heads that some task trains."""
        return {head_of(self.tasks, name) for name in self.tasks}

    def freeze(self, frozen: bool) -> None:
        """Let the encoder stay as it is, or learn (again).

        A frozen one is in evaluation mode whatever the module's mode is: its norms take their running statistics and
        leave them alone, dropout and drop path are off; no gradient is computed for it.
        """
        if frozen and not self.frozen:
            self._held = [weight for weight in self.encoder.parameters() if weight.requires_grad]
        for weight in self._held:
            weight.requires_grad_(not frozen)
        self.frozen = frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, views: Mapping[str, View]) -> dict[str, Tensor]:
        """Per task its losses, `(B,)` float32."""
        by_task = {name: self.losses(name, own, views[name]) for name, own in self.encoded(views)}
        return {name: by_task[name] for name in views}

    def predict(self, views: Mapping[str, View]) -> dict[str, Tensor]:
        """Per task its head's output."""
        return {name: self._predicted(name, own, views[name]) for name, own in self.encoded(views)}

    def encoded(self, views: Mapping[str, View]) -> Iterator[tuple[str, Features]]:
        """Each task's name and the encoder's answer to its view, pass by pass: see `passes`."""
        for given in self.passes(views):
            yield from given.items()

    def passes(self, views: Mapping[str, View]) -> Iterator[dict[str, Features]]:
        """By task what the encoder answers, for each pass of it. Views of the pool and of one size share a pass.

        Each task that reads labelled images is encoded apart: the supervised one then gives the same bits with and
        without others beside it. One that is shown another's input shares that one's pass.
        """
        groups: dict[tuple, list[str]] = {}
        for name, view in views.items():
            task = self.tasks[name]
            apart = (task.borrowed_input or name) if "labelled" in task.streams else ""
            groups.setdefault((apart, *view.input.shape[-2:]), []).append(name)
        for (apart, *_), names in groups.items():
            shown = names[:1] if apart else names  # apart stands one input, of one task or of two
            # Not by a name of this function's, which would hold one pass's maps while the next is made.
            yield self._answers(names, [views[name].input for name in shown])

    def losses(self, name: str, features: Features, view: View) -> Tensor:
        """A task's losses, `(B,)` float32, for what the encoder answers to its view."""
        prediction = self._predicted(name, features, view).float()
        values = self.tasks[name].loss(prediction, view)
        count = len(view.target)
        if values.shape != (count,):
            raise ValueError(
                f"task {name}: its loss has the shape {tuple(values.shape)}, not one number a sample, ({count},)"
            )
        told = self.tasks[name].watch(prediction.detach(), view)
        self.watched |= {f"{name}/{figure}": of_samples.mean() for figure, of_samples in told.items()}
        return values

    def _predicted(self, name: str, features: Features, view: View) -> Tensor:
        size = view.input.shape[-2:]
        with telling_small_maps(size):
            return self.heads[head_of(self.tasks, name)](self.tasks[name].perturb(features, view), size)

    def _answers(self, names: Sequence[str], inputs: Sequence[Tensor]) -> dict[str, Features]:
        """The encoder's answers to inputs of one size, by one pass over all; to a single one the same for all names."""
        with telling_small_maps(inputs[0].shape[-2:]):
            if len(inputs) == 1:
                answer: Features = self.encoder(inputs[0])
                return dict.fromkeys(names, answer)
            features = self.encoder(torch.cat(list(inputs)))
            return dict(zip(names, features.split([len(image) for image in inputs]), strict=True))


def head_of(tasks: Mapping[str, Task], name: str) -> str:
    """The name of the head that a task uses."""
    return tasks[name].borrowed_head or name


def make_views(
    tasks: Mapping[str, Task], batches: Mapping[Stream, Batch], split: bool = False, teach: Teach | None = None
) -> dict[str, View]:
    """Each task's view of its streams' batches; with `split` the pool's images are dealt out to the tasks in turn.

    A sample's key is folded with the task's name, so two tasks corrupt one image independently. A task that borrows
    another's input has its own target, and that very tensor.
    """
    views = {}
    deal, at_once = dealing(tasks, "pool", split)
    for name, task in tasks.items():
        own: dict[Stream, Batch] = {stream: batches[stream] for stream in task.streams}
        if deal > 1 and "pool" in own:
            own["pool"] = share_of(own["pool"], readers(tasks, "pool").index(name), deal, at_once)
        own = {stream: replace(batch, key=rng.fold_in(batch.key, name)) for stream, batch in own.items()}
        teacher = partial(teach, head_of(tasks, name)) if teach is not None and task.asks_teacher else None
        views[name] = task.view(own, teacher)
    borrowed = {name: task.borrowed_input for name, task in tasks.items() if task.borrowed_input is not None}
    return views | {name: replace(views[name], input=views[shower].input) for name, shower in borrowed.items()}


def dealing(tasks: Mapping[str, Task], stream: Stream, split: bool) -> tuple[int, int]:
    """To how many tasks a stream's images are dealt out, and how many neighbours at a time: 2 where a task mixes."""
    reading = readers(tasks, stream)
    at_once = PAIR if any(tasks[name].mixes for name in reading) else 1
    return (len(reading) if split and stream == "pool" else 1), at_once


def share_of(batch: Batch, turn: int, count: int, at_once: int) -> Batch:
    """The images of one of `count` in turn, each of whom gets `at_once` neighbours at a time."""
    if at_once == 1:
        return batch[turn::count]
    return batch[[place for place in range(len(batch.image)) if place // at_once % count == turn]]


def weighted_total(
    tasks: Mapping[str, Task],
    sample_losses: Mapping[str, Tensor],
    factors: Mapping[str, float] | None = None,
    step: int | None = None,
) -> Tensor:
    """The number that is minimized in a step: each task's mean over its samples, by its weight and factor, summed."""
    factors = factors or dict.fromkeys(sample_losses, 1.0)
    means = ((tasks[name].weight_at(step) * factors[name], values.mean()) for name, values in sample_losses.items())
    return reduce(torch.add, (weight * mean for weight, mean in means))
