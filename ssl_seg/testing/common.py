"""What the checks of all kinds of plug-ins share."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg import rng
from ssl_seg.config import Plugin

HALVING = (2, 4, 8, 16, 32)  # the strides of most encoders


def check_config(config: Plugin, root: type[Plugin]) -> None:
    """Frozen, and the same again after a run folder has kept it; `root` is the family's abstract class."""
    assert config.model_config.get("frozen"), f"the config is not frozen; leave model_config as {root.__name__} has it"
    dumped = json.loads(json.dumps(config.dump()))
    families = [type(config)]
    if dumped["type"] in root.names():  # a class in a test file is found by no `type`
        families.append(root)
    for family in families:
        loaded = family.model_validate(dumped)
        assert type(loaded) is type(config), f"type '{dumped['type']}' loads {type(loaded).__name__}, not this class"
        assert loaded == config, f"dump and load give another config: {loaded!r}, not {config!r}"


def check_gradients(part: str, module: nn.Module, every: bool) -> None:
    """They are finite, and some arrive; with `every` at all weights that are trained."""
    gradients = {name: weight.grad for name, weight in module.named_parameters() if weight.requires_grad}
    without = [name for name, gradient in gradients.items() if gradient is None]
    assert not (every and without), f"{part} weights get no gradient: {', '.join(without)}; DDP would stop at step 2"
    arrived = [gradient for gradient in gradients.values() if gradient is not None]
    assert all(gradient.isfinite().all() for gradient in arrived), f"gradients of the {part} are not finite"
    assert not gradients or any(gradient.any() for gradient in arrived), f"no gradient reaches the {part}"


def pictures(count: int, height: int, width: int, channels: int = 3) -> Tensor:
    """Smooth colours with a bright disc on them, `(B, C, H, W)`; every picture is another."""
    keys = rng.fold_in(rng.as_key("pictures"), torch.arange(count))
    coarse = rng.uniform(keys, (channels, 4, 4), 0.1, 0.9)
    image = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    row = torch.linspace(0.0, 1.0, height).view(-1, 1)
    column = torch.linspace(0.0, 1.0, width).view(1, -1)
    y, x = rng.uniform(rng.fold_in(keys, "disc"), (2, 1, 1, 1), 0.2, 0.8).unbind(1)
    disc = (row - y) ** 2 + (column - x) ** 2 < 0.02
    colour = rng.uniform(rng.fold_in(keys, "colour"), (channels, 1, 1))
    return torch.where(disc, colour, image)
