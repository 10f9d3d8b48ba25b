"""How sure fine-tuned models are of images that have no masks, and which classes they see in them.

Entropy of the prediction, and where there are several models, seeds of one fine-tuning, also how far they differ: the
mutual information of prediction and model (Houlsby et al. 2011), as of an ensemble (Lakshminarayanan et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_seg.config import PathText, UserError
from ssl_seg.data.loading import Whole, loader
from ssl_seg.data.splits import Examples
from ssl_seg.data.workers import Workers
from ssl_seg.images import Size
from ssl_seg.models import SegmentationModel, evaluating
from ssl_seg.stages.scoring import SMALLER_IMAGES, logits_at
from ssl_seg.training.memory import enough_memory
from ssl_seg.weights.export import load_model

Model = tuple[SegmentationModel, Size | None]  # and the size (H, W) that it wants images in


class Foreseen(NamedTuple):
    """What models make of N images, K classes."""

    class_names: tuple[str, ...]
    # (N,) in [0, 1]: mean over pixels of the entropy of the models' mean prediction, 1 where all classes are alike.
    uncertain: np.ndarray
    differ: np.ndarray | None  # (N,) in [0, 1]: the part of it by which the models differ; None for a single one
    shares: np.ndarray  # (N, K): of an image's pixels, by what is predicted


def load_models(paths: Sequence[PathText]) -> list[Model]:
    """Those of fine-tuned runs. Raises UserError where they do not tell the same classes apart."""
    models = [load_model(path) for path in paths]
    for path, (model, _) in zip(paths, models, strict=True):
        if model.class_names != models[0][0].class_names:
            raise UserError(
                f"init: {path} tells {', '.join(model.class_names)} apart, and {paths[0]} "
                f"{', '.join(models[0][0].class_names)}; name seeds of one fine-tuning"
            )
    return models


def foresee(models: Sequence[Model], examples: Examples, workers: Workers, device: torch.device) -> Foreseen:
    """Look at every image at its own size, one at a time. Raises UserError for one that cannot be read."""
    class_names = models[0][0].class_names
    rows: list[tuple[float, float, np.ndarray]] = []
    one_by_one = [[index] for index in range(len(examples))]
    for model, _ in models:
        model.to(device)
    for packed in loader(Whole(examples, with_labels=False), one_by_one, workers):
        image = packed.to(device).image
        each = torch.cat([_probabilities(model, image, resize) for model, resize in models])  # (M, K, H, W)
        mean = each.mean(dim=0, keepdim=True)
        entropy = _entropy(mean).mean().item()
        shares = torch.bincount(mean.argmax(dim=1).flatten(), minlength=len(class_names)) / mean[0, 0].numel()
        rows.append((entropy, entropy - _entropy(each).mean().item(), shares.cpu().numpy()))
    uncertain, differ, shares = (np.array(column) for column in zip(*rows, strict=True))
    return Foreseen(class_names, uncertain, differ.clip(0) if len(models) > 1 else None, shares)


def _probabilities(model: SegmentationModel, image: Tensor, resize: Size | None) -> Tensor:
    """`(1, K, H, W)` at the size of the image `(1, 3, H, W)`."""
    height, width = image.shape[-2:]
    seen = image if resize is None else F.interpolate(image, size=resize, mode="bilinear", antialias=True)
    what = f"a prediction of {height} x {width} pixels at once"
    with evaluating(model), enough_memory(what, SMALLER_IMAGES, image.device):
        return logits_at(model, seen, (height, width)).float().softmax(dim=1)


def _entropy(probabilities: Tensor) -> Tensor:
    """`(M, K, H, W)` to `(M, H, W)`, as a share of the largest that there can be."""
    return torch.special.entr(probabilities).sum(dim=1) / math.log(probabilities.shape[1])
