"""The training loop: a generator of steps that knows no logger, no files and no metrics but its own.

Ours, because exact resume asks that everything which can be a function of the step is one (batch, keys, learning
rate, dropout), and because the multi-task step must be the same on 1 and N processes in both ways of encoding. What is
left over is the state (`learner`): weights, their average, optimizer moments, loss scaler, count of bad steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ssl_seg import rng
from ssl_seg.config import UserError
from ssl_seg.data.loading import Packed
from ssl_seg.models import Features
from ssl_seg.tasks import Batch, Stream, View
from ssl_seg.training.config import frozen_at, lr_at, measures_affinity
from ssl_seg.training.learner import Learner
from ssl_seg.training.memory import enough_memory
from ssl_seg.training.multitask import make_views, weighted_total
from ssl_seg.training.processes import Processes

PATIENCE_FOR_NAN = 10  # bad steps in a row before the run stops; a scaler of fp16 settles in fewer

SMALLER_STEPS = "give train.accumulate=auto, a smaller augment.crop, train.encode=in_turn or train.precision=bf16"


@dataclass(frozen=True)
class Step:
    """What a step tells: its number (updates so far), its figures, and whether some process asked to stop."""

    number: int
    metrics: dict[str, float]
    stop: bool = False


class NonFiniteError(UserError):
    """Too many steps in a row gave no finite loss or gradient; `names` are the images of the last one."""

    def __init__(self, step: int, names: list[str]) -> None:
        super().__init__(
            f"step {step}: loss or gradient not finite {PATIENCE_FOR_NAN} times in a row; "
            f"lower train.lr, set train.precision=fp32, or look at the images named in nonfinite.json"
        )
        self.names = names


def train(
    learner: Learner,
    streams: Mapping[Stream, Iterator[Packed]],
    start: int,
    seed: int,
    wants_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Make the steps from `start` to the end, yielding each one's figures.

    `streams` give this process's micro-batches in order. Each step, all processes learn whether any of them
    `wants_stop`. A step whose loss or gradient is not finite changes nothing, on any process; ten in a row raise
    NonFiniteError.
    """
    config = learner.config
    key, own = rng.fold_in(rng.as_key(seed), "dropout"), rng.fold_in(rng.as_key(seed), "step")
    for step in range(start, config.steps):
        learner.freeze(frozen_at(config, step))
        learner.module.train()
        rate = lr_at(config, step)
        for group in learner.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        learner.optimizer.zero_grad()
        learner.balancer.start(rng.fold_in(own, step))
        before = [buffer.clone() for buffer in learner.buffers]
        totals: dict[str, Tensor] = {}
        watched: dict[str, Tensor] = {}
        names: list[str] = []
        affinities: dict[str, float] = {}
        for micro in range(config.micro_batches):
            packed: dict[Stream, Packed] = {stream: next(batches) for stream, batches in streams.items()}
            names += [name for batch in packed.values() for name in batch.names]
            dropout = rng.fold_in(rng.fold_in(rng.fold_in(key, step), micro), learner.processes.rank)
            seed_torch(dropout)
            with enough_memory(f"step {step + 1}: {learner.crops_at_once}", SMALLER_STEPS, learner.processes.device):
                if micro == 0 and measures_affinity(config, step) and not learner.balancer.reads_gradients:
                    affinities = learner.balancer.affinities(gram_of(learner, packed))
                    put_back(learner.buffers, before)
                    seed_torch(dropout)
                means = backward(learner, packed, micro == config.micro_batches - 1, step)
            for sums, found in ((totals, means), (watched, learner.module.watched)):
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value / config.micro_batches
        told, stop = agree(learner.processes, {**totals, **watched}, wants_stop())
        losses = {name: told[name] for name in totals}
        norm = finish_gradients(learner)
        finite = math.isfinite(norm) and all(math.isfinite(loss) for loss in losses.values())
        if finite:
            learner.balancer.learn(losses)
            with enough_memory(f"step {step + 1}: the optimizer's moments", SMALLER_STEPS, learner.processes.device):
                learner.optimizer.step()
            learner.bad_in_a_row = 0
            learner.processes.average(learner.statistics)
            if learner.teacher is not None:
                learner.teacher.update(learner.module, step + 1)
        else:
            learner.bad_in_a_row += 1
            put_back(learner.buffers, before)  # the statistics of a norm layer have seen the bad batch too
            if learner.accelerator.scaler:
                learner.accelerator.scaler.update()  # without a step: it shrinks after an infinite gradient
        if learner.bad_in_a_row == PATIENCE_FOR_NAN:
            raise NonFiniteError(step + 1, learner.processes.gather(names))
        figures = {f"train/{name}/loss": loss for name, loss in losses.items()}
        tasks = learner.module.tasks
        figures["train/loss"] = sum(tasks[name].weight_at(step) * loss for name, loss in losses.items())
        figures |= {f"train/{name}": told[name] for name in watched}
        figures |= {f"train/{name}/weight": task.weight_at(step) for name, task in tasks.items() if task.ramp}
        if measures_affinity(config, step) and learner.balancer.gram is not None:
            affinities = learner.balancer.affinities(learner.balancer.gram)
        figures |= {"lr": rate, "grad_norm": norm, **learner.balancer.figures(), **affinities}
        yield Step(step + 1, figures, stop)


def backward(
    learner: Learner, packed: Mapping[Stream, Packed], last: bool, step: int | None = None
) -> dict[str, Tensor]:
    """Add one micro-batch's gradients; gives each task's mean loss over this process's samples, detached.

    The tasks weigh what they do in the update that makes `step` (counted from 0); None: what they do after their ramps.
    """
    config = learner.config
    waits = learner.uses_ddp and not last  # DDP averages at the last micro-batch only
    means: dict[str, Tensor] = {}

    def add(sample_losses: Mapping[str, Tensor]) -> None:
        total = weighted_total(learner.module.tasks, sample_losses, learner.balancer.factors, step)
        if total.requires_grad:  # not of a head without weights, while the encoder is frozen
            learner.accelerator.backward(total / config.micro_batches)
        means.update({name: values.detach().mean() for name, values in sample_losses.items()})

    for chosen in passes_of(learner, packed, learner.encodes_together):
        with learner.balancer.keeping(list(chosen)):
            if learner.uses_ddp:  # which asks for one call and one backward pass
                with learner.accelerator.no_sync(learner.wrapped) if waits else nullcontext():
                    with learner.processes.autocast():
                        sample_losses = learner.wrapped(chosen)
                    add(sample_losses)
            else:
                head_by_head(learner, chosen, add)
    return means


def head_by_head(learner: Learner, views: Mapping[str, View], add: Callable[[Mapping[str, Tensor]], None]) -> None:
    """Give each task's losses to `add`, which goes back through its head alone; then go back through the encoder.

    To the bit the gradients of one backward pass over all. But the activations of one head are kept at a time: it takes
    less memory, and less time since they stay near the processor.
    """

    def back_to(features: Features, name: str) -> list[tuple[Tensor, Tensor]]:
        """What the encoder gave, and the gradients that have come back to it."""
        own = features.cut_off()
        with learner.processes.autocast():
            sample_losses = learner.module.losses(name, own, views[name])
        add({name: sample_losses})
        pairs = zip(features.tensors, own.tensors, strict=True)
        return [(given, cut.grad) for given, cut in pairs if cut.grad is not None]

    passes = learner.module.passes(views)
    while True:
        with learner.processes.autocast():
            answers = next(passes, None)
        if answers is None:
            return
        reached = [pair for name, features in answers.items() for pair in back_to(features, name)]
        del answers
        if reached:  # not by a frozen encoder
            given, gradients = zip(*reached, strict=True)
            torch.autograd.backward(given, gradients)
            del given, gradients
        del reached  # the next pass is to find this one's maps gone


def gram_of(learner: Learner, packed: Mapping[Stream, Packed]) -> np.ndarray:
    """Inner products of the tasks' gradients of the encoder, by stage, over one micro-batch of all processes.

    Beside the step: no weight's own gradient is touched.
    """
    shared = [parameter for parameter in learner.balancer.shared if parameter.requires_grad]
    scaler, gradients = learner.accelerator.scaler, {}
    for chosen in passes_of(learner, packed, together=False):
        with learner.processes.autocast():
            sample_losses = learner.module(chosen)
        for name, values in sample_losses.items():
            loss = values.mean() * (scaler.get_scale() if scaler else 1.0)  # a cosine does not ask for the scale
            found = iter(torch.autograd.grad(loss, shared, allow_unused=True) if shared else ())
            own = [next(found) if parameter.requires_grad else None for parameter in learner.balancer.shared]
            gradients[name] = own
    learner.processes.average([one for own in gradients.values() for one in own if one is not None])
    return learner.balancer.gram_of(gradients)


def put_back(buffers: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Give the buffers the values that they had before."""
    for buffer, old in zip(buffers, before, strict=True):
        buffer.copy_(old)


def passes_of(learner: Learner, packed: Mapping[Stream, Packed], together: bool) -> list[dict[str, View]]:
    """The views of a micro-batch, in one pass or in one for each task."""
    config, device = learner.config, learner.processes.device
    batches: dict[Stream, Batch] = {stream: batch.to(device, config.channels_last) for stream, batch in packed.items()}
    views = make_views(learner.module.tasks, batches, config.views == "split", learner.teach)
    return [views] if together else [{name: view} for name, view in views.items()]


def finish_gradients(learner: Learner) -> float:
    """Average over the processes where DDP has not, combine what is kept apart by task, clip.

    Gives the norm before clipping, equal on all processes.
    """
    gradients = [parameter.grad for parameter in learner.module.parameters() if parameter.grad is not None]
    if not learner.uses_ddp:
        learner.processes.average([*learner.balancer.kept(), *gradients])
    if learner.balancer.reads_gradients:  # of all processes: what their own shares agree on is another thing
        learner.balancer.combine(learner.processes.from_first)
        gradients = [parameter.grad for parameter in learner.module.parameters() if parameter.grad is not None]
    learner.accelerator.unscale_gradients(learner.optimizer)
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).tolist()
    # fsum is exact, so the norm does not depend on how many gradients of zero stand beside the others: a joint run
    # whose unlabelled losses weigh nothing then clips as the supervised run does, to the bit.
    norm = math.sqrt(math.fsum(value * value for value in norms))
    if learner.config.clip is not None:
        total = torch.tensor(norm, device=learner.processes.device)
        nn.utils.clip_grads_with_norm_(learner.module.parameters(), learner.config.clip, total)
    return norm


def agree(processes: Processes, figures: Mapping[str, Tensor], stop: bool) -> tuple[dict[str, float], bool]:
    """The mean of each figure over the processes, and whether any of them wants to stop: one reduction, one sync."""
    mine = torch.stack([*figures.values(), torch.tensor(float(stop), device=processes.device)])
    shared = (processes.sum(mine) / processes.world).tolist()
    return dict(zip(figures, shared, strict=False)), shared[-1] > 0


def seed_torch(key: Tensor) -> None:
    """Dropout and drop path draw from torch's own generators: start them from the step's key."""
    torch.manual_seed(int(key) & (2**63 - 1))
