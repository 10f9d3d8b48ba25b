"""`--dry-run`: what a step would cost, before it costs anything."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ssl_seg.data.loading import Samples
from ssl_seg.stages.setup import open_streams, pool_tasks
from ssl_seg.tasks import Stream
from ssl_seg.training.loop import Learner, backward, finish_gradients, peak_memory


@dataclass(frozen=True)
class DryRun:
    """What one batch through every head showed; nothing was written."""

    parameters: dict[str, int]
    shapes: dict[str, str]
    seconds_per_step: float
    peak_memory_mib: float

    def lines(self) -> list[str]:
        counted = [f"{name}: {count / 1e6:.2f} M parameters" for name, count in self.parameters.items()]
        shown = [f"{name}: {shape}" for name, shape in self.shapes.items()]
        return [*counted, *shown, f"{self.seconds_per_step:.3g} s per step, peak {self.peak_memory_mib:.0f} MiB"]


def dry_run(learner: Learner, sources: Mapping[Stream, Samples]) -> DryRun:
    """One batch forward and backward through every head, twice: the second is timed, the first warms up."""
    module, config = learner.module, learner.config
    streams = open_streams(
        sources, config.model_copy(update={"workers": 0}), learner.processes, pool_tasks(module.tasks), 0
    )
    packed = {stream: next(batches) for stream, batches in streams.items()}
    shapes: dict[str, str] = {}
    hooks = [
        head.register_forward_hook(lambda _, inputs, output, name=name: shapes.update({name: _shapes(inputs, output)}))
        for name, head in module.heads.items()
    ]
    for _ in range(2):
        started = time.perf_counter()
        learner.optimizer.zero_grad()
        backward(learner, packed, last=True)
        finish_gradients(learner)
        learner.optimizer.step()  # its moments are a good part of the memory
        if learner.processes.device.type == "cuda":
            torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) * config.accumulate
    for hook in hooks:
        hook.remove()
    parameters = {"encoder": _count(module.encoder), **{name: _count(head) for name, head in module.heads.items()}}
    return DryRun(parameters, shapes, seconds, peak_memory(learner.processes.device))


def _shapes(inputs: Sequence[Any], output: Any) -> str:
    features = ", ".join("x".join(str(side) for side in level.shape) for level in inputs[0])
    return f"{features} -> {'x'.join(str(side) for side in output.shape)}"


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
