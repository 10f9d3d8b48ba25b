"""The teacher: an exponential moving average of the module (Tarvainen and Valpola, "Mean teachers", NeurIPS 2017).

Ours, because torch's `AveragedModel` counts its updates in a buffer and averages integers too.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ssl_seg.training.multitask import MultiTask


class Teacher:
    """The average of a module's weights over its steps, itself a module in evaluation mode that no gradient reaches.

    Running statistics and all other buffers of floats are averaged as the weights are, so that they are those of
    weights which lie between; integers (how many batches a norm has seen) are copied. timm's `ModelEmaV3` does the
    same. In the paper's own code the teacher gathers statistics by itself, for there it predicts in training mode.
    """

    def __init__(self, module: MultiTask, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    def update(self, module: MultiTask, number: int) -> None:
        """Take in the weights that update `number` (counted from 1) has made."""
        own, theirs = self.module.state_dict(), module.state_dict()
        floats = [name for name, value in own.items() if value.is_floating_point()]
        average = get_ema_multi_avg_fn(decay_at(self.decay, number))
        average([own[name] for name in floats], [theirs[name] for name in floats], number)
        for name in own.keys() - set(floats):
            own[name].copy_(theirs[name])

    def predict(self, head: str, image: Tensor) -> Tensor:
        """What the head named so makes of images `(B, 3, H, W)` in [0, 1]; float32."""
        with torch.no_grad():
            features = self.module.encoder(image)
            return self.module.heads[head](features, image.shape[-2:]).float()


def decay_at(decay: float, number: int) -> float:
    """What is kept of the average at update `number`: of a short run's first ones less, so that it forgets its start.

    A plain mean of the weights until `decay` is reached, as in the paper's code.
    """
    return min(1 - 1 / (number + 1), decay)
