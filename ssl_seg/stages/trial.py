"""What is tried before the first step: whether it and the evaluations can work; and that step alone (`--dry-run`).

What runs out of memory, or meets an image too small for a norm layer, is then told at once and not after the training.
On a GPU a trial that is too large raises an error; on a CPU it is a kill, so there memory is counted on a small one.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ssl_seg import rng
from ssl_seg.config import UserError
from ssl_seg.data.loading import Packed, Samples
from ssl_seg.data.splits import NUM_DIGESTED, Examples
from ssl_seg.images import Size, show_path
from ssl_seg.models import evaluating, image_channels_of, telling_small_maps
from ssl_seg.norm.convert import is_always_synchronised, unsynchronised
from ssl_seg.rng import seeded
from ssl_seg.stages.fit import open_streams
from ssl_seg.stages.scoring import TAKEN, check_memory, device_of, predict_ids
from ssl_seg.tasks import Stream, View
from ssl_seg.terminal import clock, say
from ssl_seg.training.config import frozen_at
from ssl_seg.training.learner import MOMENTS, Learner
from ssl_seg.training.loop import SMALLER_STEPS, backward, finish_gradients, passes_of
from ssl_seg.training.memory import GIB, available, bytes_of, enough_memory, in_words
from ssl_seg.training.multitask import dealing
from ssl_seg.training.processes import is_out_of_memory, peak_memory

# Bytes of a pixel in training, for each task, that no network is known to exceed: a resnet18 U-Net takes 1.4 kB,
# swin_base with UPerNet 8. A step that fits even so is not counted.
MOST_OF_A_PIXEL = 2**16
ROOM = (
    2.0  # times the bytes counted, for a trial that is not to be killed: it took 1.45 times those of a resnet18 U-Net
)
PROBED_CROP = 512  # pixels of the longer side of a crop, above which memory is counted on a smaller one
GREY = 128
LESS = "give a smaller augment.crop or model, train.encode=in_turn or train.precision=bf16"


@dataclass(frozen=True)
class DryRun:
    """What one batch through every head showed; nothing was written."""

    parameters: dict[str, int]
    shapes: dict[str, str]
    seconds_per_step: float
    steps: int
    peak_memory_mib: float

    def lines(self) -> list[str]:
        counted = [f"{name}: {count / 1e6:.2f} M parameters" for name, count in self.parameters.items()]
        shown = [f"{name}: {shape}" for name, shape in self.shapes.items()]
        whole = clock(self.steps * self.seconds_per_step)
        return [
            *counted,
            *shown,
            f"{self.seconds_per_step:.3g} s per step, peak {self.peak_memory_mib:.0f} MiB",
            f"{self.steps} steps (train.steps): {whole}, without reading and evaluating",
        ]


def dry_run(learner: Learner, sources: Mapping[Stream, Samples], judged: Judged | None = None) -> DryRun:
    """One batch forward and backward through every head, twice: the second is timed, the first warms up.

    Then the largest of the images that are to be scored whole, for the memory that this takes.
    """
    fit_in_memory(learner)
    if judged is not None:
        judged.check()
    module, config = learner.module, learner.config
    streams = open_streams(sources, config.model_copy(update={"workers": 0}), learner.processes, module.tasks, 0)
    packed: dict[Stream, Packed] = {stream: next(batches) for stream, batches in streams.items()}
    shapes: dict[str, str] = {}
    hooks = [
        head.register_forward_hook(lambda _, inputs, output, name=name: shapes.update({name: _shapes(inputs, output)}))
        for name, head in module.heads.items()
    ]
    for _ in range(2):
        started = time.perf_counter()
        learner.forget_gradients()
        with enough_memory(learner.crops_at_once, SMALLER_STEPS, learner.processes.device):
            backward(learner, packed, last=True)
        finish_gradients(learner)
        learner.optimizer.step()  # its moments are a good part of the memory
        if learner.processes.device.type == "cuda":
            torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) * config.micro_batches
    for hook in hooks:
        hook.remove()
    if judged is not None:
        judged.predict_largest()
    parameters = {
        "encoder": _numbers_in(module.encoder),
        **{name: _numbers_in(head) for name, head in module.heads.items()},
    }
    return DryRun(parameters, shapes, seconds, config.steps, peak_memory(learner.processes.device))


def _shapes(inputs: Sequence[Any], output: Any) -> str:
    features = ", ".join("x".join(str(side) for side in level.shape) for level in inputs[0])
    return f"{features} -> {'x'.join(str(side) for side in output.shape)}"


def _numbers_in(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- memory of a step ----


def fit_in_memory(learner: Learner, quiet: bool = True) -> None:
    """Settle `train.accumulate: auto`, the same on every process, and refuse on a CPU a step that would be killed.

    Weights, moments and statistics stay as they are. Raises UserError where no step fits.
    """
    cuts = _cuts(learner)
    if learner.auto and learner.config.accumulate in cuts:
        return  # found by a former start
    counted = Counted.of(learner) if learner.processes.device.type == "cpu" else None
    if not learner.auto:
        if counted is not None:
            counted.refuse_beyond_memory(learner, quiet)
        return
    if learner.processes.world > 1 and is_always_synchronised(learner.module):
        raise UserError(
            "train.accumulate: auto: a process that runs out of memory would keep the others waiting in the network's "
            "own synchronised norms; give a number, or norm=sync"
        )
    for accumulate in cuts:
        learner.cut(accumulate)
        if fits(learner, counted):
            say(f"train.accumulate: auto is {accumulate}, {learner.crops_at_once}", quiet)
            return
    place = in_words(learner.processes.device)
    raise UserError(f"train.accumulate: auto: {learner.crops_at_once} is too much for {place}; {LESS}")


def fits(learner: Learner, counted: Counted | None) -> bool:
    """Whether a step cut as it is now fits into the memory of every process: by the count, if any, and tried."""
    may = counted is None or ROOM * counted.bytes_of_step(learner) <= counted.free
    return not learner.processes.any(not (may and rehearse(learner)))


def rehearse(learner: Learner) -> bool:
    """Learn from a grey micro-batch without a step; False where memory runs out.

    Not through DDP: a process that fails would keep the others waiting.
    """
    module = learner.module
    wrapped, learner.wrapped = learner.wrapped, module
    uses_ddp, learner.uses_ddp = learner.uses_ddp, False
    held: list[torch.Tensor] = []
    try:
        with _rehearsing(learner):
            held += [torch.empty_like(weight) for weight in _learning(module) for _ in _moments(learner)]
            for _ in range(min(2, learner.config.micro_batches)):  # the second meets the gradients of the first
                backward(learner, _grey(learner, learner.crops, learner.size), last=True)
        fitted = True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fitted = False
    learner.wrapped, learner.uses_ddp = wrapped, uses_ddp
    learner.forget_gradients()
    held.clear()
    gc.collect()
    if learner.processes.device.type == "cuda":
        torch.cuda.empty_cache()
    return fitted


@dataclass(frozen=True)
class Counted:
    """What the tensors of a step take at least, counted on a few images: a process would be killed for more.

    Of crops that take minutes a smaller part is counted: memory grows with the pixels, or faster.
    """

    of_weights: int  # bytes of their gradients, and of the moments that are still to be made
    of_least: float  # bytes that the smallest micro-batch leaves for the backward pass
    cuts: int  # into how many of these a step can be cut
    free: float  # bytes that this process may take

    @classmethod
    def of(cls, learner: Learner) -> Counted | None:
        """None where a step surely fits. The same on all processes: they share what the first one finds free."""
        processes, (height, width) = learner.processes, learner.size
        free = processes.from_first(available()) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        shown = sum(learner.crops[stream] for task in learner.module.tasks.values() for stream in task.streams)
        if shown * height * width * MOST_OF_A_PIXEL < free:
            return None
        module, cuts, size = learner.module, max(_cuts(learner), default=1), _probed(learner.size)
        few = learner.crops_if(cuts)

        def learn(views: Mapping[str, View]) -> None:
            with learner.processes.autocast():
                if learner.uses_ddp:
                    _ = module(views)
                    return
                for name, features in module.encoded(views):
                    _ = module.losses(name, features, views[name])  # freed before the next head, as in a step

        with _rehearsing(learner):
            views = passes_of(learner, _grey(learner, few, size), learner.encodes_together)
            most = max(bytes_of(partial(learn, own)) for own in views)
            most *= math.prod(learner.size) / math.prod(size)
            weights = sum(weight.nbytes for weight in _learning(module)) * (1 + len(_moments(learner)))
        return cls(weights, most, cuts, free)

    def bytes_of_step(self, learner: Learner, accumulate: int | None = None) -> float:
        return self.of_weights + self.of_least * self.cuts / (accumulate or learner.config.micro_batches)

    def refuse_beyond_memory(self, learner: Learner, quiet: bool) -> None:
        """Raise UserError where a step surely takes more than is free; tell it where it may."""
        needed = self.bytes_of_step(learner)
        if needed <= self.free:
            told = (
                f"train.batch_size: a step of {learner.crops_at_once} takes {needed / GIB:.1f} GiB or more, and a "
                f"process has {self.free / GIB:.1f} GiB: it may take more than is free, and be killed; "
                "train.accumulate=auto leaves room"
            )
            say(told, quiet or TAKEN * needed <= self.free)
            return
        finer = [count for count in _cuts(learner) if self.bytes_of_step(learner, count) <= self.free]
        remedy = f"give train.accumulate={finer[0]} or auto, or a smaller augment.crop" if finer else LESS
        room = f"{needed / GIB:.1f} GiB, and a process has {self.free / GIB:.1f} GiB of memory"
        raise UserError(f"train.batch_size: a step of {learner.crops_at_once} takes more than {room}; {remedy}")


def _cuts(learner: Learner) -> list[int]:
    """Into how many micro-batches the batch may be cut, the fewest first."""
    tasks, config, world = learner.module.tasks, learner.config, learner.processes.world
    # Of each stream, how many of the fewest images that can be shared out are in a batch.
    units = [world * math.prod(dealing(tasks, stream, config.views == "split")) for stream in learner.crops]
    batches = [config.batch_of(stream) for stream in learner.crops]
    if any(batch % unit for batch, unit in zip(batches, units, strict=True)):
        return []
    most = math.gcd(*(batch // unit for batch, unit in zip(batches, units, strict=True)))
    return [count for count in range(1, most + 1) if most % count == 0]


def _probed(size: Size) -> Size:
    """A crop of the same shape that is quickly tried."""
    times = -(-max(size) // PROBED_CROP)
    return max(1, size[0] // times), max(1, size[1] // times)


def _grey(learner: Learner, counts: Mapping[Stream, int], size: Size) -> dict[Stream, Packed]:
    channels = learner.module.encoder.image_channels
    packed = {}
    for stream, count in counts.items():
        image = torch.full((count, channels, *size), GREY, dtype=torch.uint8)
        label = torch.zeros((count, *size), dtype=torch.uint8) if stream == "labelled" else None
        packed[stream] = Packed(image, torch.arange(count), label, ["grey"] * count)
    return packed


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in module.parameters() if weight.requires_grad]


def _moments(learner: Learner) -> list[str]:
    """Those that the optimizer will make of each weight, and has not yet."""
    made = bool(learner.optimizer.state)
    return [] if made else [kind for kind in MOMENTS[learner.config.optimizer] if kind != "step"]


@contextmanager
def _rehearsing(learner: Learner) -> Iterator[None]:
    """With the encoder as it is at the last step, since one that begins frozen takes more memory later.

    A norm layer takes this process's own images alone: one that runs out of memory would keep the others waiting there.
    Statistics of norms and torch's generator are as before afterwards.
    """
    module, config, former = learner.module, learner.config, learner.module.frozen
    before = [buffer.clone() for buffer in learner.buffers]
    module.train()
    module.freeze(frozen_at(config, config.steps - 1))
    try:
        with seeded(rng.as_key("rehearsal")), unsynchronised(module):
            yield
    finally:
        module.freeze(former)
        for buffer, old in zip(learner.buffers, before, strict=True):
            buffer.copy_(old)


# ---- evaluations to come ----


def check_crops(learner: Learner) -> None:
    """Raise UserError where a network that learns from several crops at a time cannot be asked about a single one.

    That happens to small ones: of a large one a part is tried.
    """
    module, device, size = learner.evaluated, learner.processes.device, _probed(learner.size)
    with evaluating(module), telling_small_maps(size):
        features = module.encoder(torch.full((1, module.encoder.image_channels, *size), 0.5, device=device))
        for head in module.heads.values():
            head(features, size)


@dataclass(frozen=True)
class Judged:
    """A model and the images that it is to predict whole, by their part's name."""

    model: nn.Module
    parts: Mapping[str, Examples]
    resize: Size | None = None

    def check(self) -> None:
        """Raise UserError for an image that is too small for the network's norm layers, or too large for the memory.

        The smallest is known exactly; the largest is that of up to 32 images of each part, evenly apart.
        """
        for part, (name, size) in self._largest.items():
            check_memory(self.model, size, f"data.{part}: {show_path(name)}")
        # What is fed one pixel, padded to the network's smallest input, is fed anything.
        if self._fails_at(self.resize or (1, 1)) is None:
            return
        tried: dict[Size, str | None] = {}
        for part, examples in self.parts.items():
            for index in range(len(examples)):
                size = self._size(examples, index)
                if size not in tried:
                    tried[size] = self._fails_at(size)
                if tried[size] is not None:
                    raise UserError(f"data.{part}: {show_path(examples.name(index))}: {tried[size]}")

    def predict_largest(self) -> None:
        """Predict an image of the size of the largest."""
        self._predict(max((size for _, size in self._largest.values()), key=math.prod))

    @cached_property
    def _largest(self) -> dict[str, tuple[str, Size]]:
        """Of each part the largest image that was looked at, its name and size."""
        found = {}
        for part, examples in self.parts.items():
            last = len(examples) - 1
            chosen = np.linspace(0, last, min(NUM_DIGESTED, len(examples))).round().astype(int).tolist()
            sizes = [(examples.name(index), self._size(examples, index)) for index in chosen]
            found[part] = max(sizes, key=lambda named: math.prod(named[1]))
        return found

    def _size(self, examples: Examples, index: int) -> Size:
        if self.resize is not None:
            return self.resize
        height, width = examples.image(index).image.shape[:2]
        return height, width

    def _fails_at(self, size: Size) -> str | None:
        """Why an image of this size cannot be predicted; None where it can."""
        try:
            self._predict(size)
        except (UserError, RuntimeError, ValueError) as error:
            return " ".join(str(error).split())
        return None

    def _predict(self, size: Size) -> None:
        with evaluating(self.model):
            image = torch.full((1, image_channels_of(self.model), *size), 0.5, device=device_of(self.model))
            predict_ids(self.model, image, size)
