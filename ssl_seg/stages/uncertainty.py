"""How sure fine-tuned models are of images that have no masks, and which classes they see in them.

Of whole images: entropy of the prediction, and where there are several models, seeds of one fine-tuning, also how far
they differ: the mutual information of prediction and model (Houlsby et al. 2011), as of an ensemble (Lakshminarayanan
et al. 2017). Of each pixel: how far samples of one model with dropout differ, as in Bayesian SegNet (Kendall,
Badrinarayanan and Cipolla, BMVC 2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg import rng
from ssl_seg.config import Config, PathText, UserError
from ssl_seg.data.loading import Whole, loader
from ssl_seg.data.splits import Examples
from ssl_seg.data.workers import Workers
from ssl_seg.images import Size
from ssl_seg.models import SegmentationModel, evaluating
from ssl_seg.stages.scoring import PREDICTION, SMALLER_IMAGES, logits_at
from ssl_seg.training.memory import enough_memory
from ssl_seg.weights.export import load_model

# torch's kinds. Drop path, which skips whole blocks, is none of them.
Dropout = nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout | nn.FeatureAlphaDropout
Model = tuple[SegmentationModel, Size | None]  # and the size (H, W) that it wants images in


class Foreseen(NamedTuple):
    """What models make of N images, K classes."""

    class_names: tuple[str, ...]
    # (N,) in [0, 1]: mean over pixels of the entropy of the models' mean prediction, 1 where all classes are alike.
    uncertain: np.ndarray
    differ: np.ndarray | None  # (N,) in [0, 1]: the part of it by which the models differ; None for a single one
    shares: np.ndarray  # (N, K): of an image's pixels, by what is predicted


# ---- of whole images, by several models ----


def load_models(paths: Sequence[PathText], key: str = "init") -> list[Model]:
    """Those of fine-tuned runs, named by `key`. Raises UserError where they do not tell the same classes apart."""
    models = [load_model(path) for path in paths]
    for path, (model, _) in zip(paths, models, strict=True):
        if model.class_names != models[0][0].class_names:
            raise UserError(
                f"{key}: {path} tells {', '.join(model.class_names)} apart, and {paths[0]} "
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
        each = torch.cat([_of_whole(model, image, resize) for model, resize in models])  # (M, K, H, W)
        mean = each.mean(dim=0, keepdim=True)
        own = entropy(mean).mean().item()
        shares = torch.bincount(mean.argmax(dim=1).flatten(), minlength=len(class_names)) / mean[0, 0].numel()
        rows.append((own, own - entropy(each).mean().item(), shares.cpu().numpy()))
    uncertain, differ, shares = (np.array(column) for column in zip(*rows, strict=True))
    return Foreseen(class_names, uncertain, differ.clip(0) if len(models) > 1 else None, shares)


def _of_whole(model: SegmentationModel, image: Tensor, resize: Size | None) -> Tensor:
    """`(1, K, H, W)` at the size of the image `(1, 3, H, W)`."""
    seen = image if resize is None else F.interpolate(image, size=resize, mode="bilinear", antialias=True)
    with evaluating(model):
        return probabilities(model, seen, image.shape[-2:])


def entropy(shares: Tensor) -> Tensor:
    """`(M, K, H, W)` to `(M, H, W)`, as a share of the largest that there can be."""
    return torch.special.entr(shares).sum(dim=1) / math.log(shares.shape[1])


# ---- of each pixel, by samples of one model ----


class DropoutSampling(Config):
    """Predictions with dropout on, as many as there are `samples`; norms stay as in any prediction."""

    # By Bayesian SegNet six are better than the network without dropout, and from forty on nothing is gained.
    samples: int = Field(default=40, ge=2)
    seed: int = 0  # of what is dropped


class Sampled(NamedTuple):
    """What samples make of a batch."""

    mean: Tensor  # (B, K, H, W): mean of the softmax shares, of which the class is the largest
    # (B, H, W) in [0, 1]: how far the samples differ. The mean over classes of the variance of their shares, which is
    # Bayesian SegNet's measure, as a part of the largest that it can be; its root, in units of a share. It is of what
    # the network has not learnt, and leaves out what it has learnt to be unsure of, which the mean's entropy has too.
    deviation: Tensor


def check_dropout(model: nn.Module) -> None:
    """Raise UserError where there is no dropout, so that all samples would be one."""
    if not _dropout_layers(model):
        raise UserError(
            "uncertainty: the model has no dropout, so all samples would be alike; fine-tune one with some "
            "(model.encoder.dropout=0.5 and model.decoder.dropout=0.5 of segnet), or drop the key"
        )


def sample(
    model: nn.Module, image: Tensor, size: Sequence[int], sampling: DropoutSampling, names: Sequence[str]
) -> Sampled:
    """Shares at `size` (H, W) for images `(B, 3, H, W)` in [0, 1], by a model in evaluation mode but for its dropout.

    What is dropped depends on the seed, the image's name and the sample's number alone: not on the images around it.
    """
    answers = [_sample_one(model, one, size, sampling, name) for one, name in zip(image.split(1), names, strict=True)]
    return Sampled(*(torch.cat(parts) for parts in zip(*answers, strict=True)))


def _sample_one(
    model: nn.Module, image: Tensor, size: Sequence[int], sampling: DropoutSampling, name: str
) -> tuple[Tensor, Tensor]:
    key = rng.fold_in(rng.fold_in(rng.as_key(sampling.seed), "dropout"), name)
    image = image.contiguous()  # torch deals random numbers out in the order in which values lie in memory
    mean = squares = torch.zeros(())
    for number in range(sampling.samples):
        with _dropping(model), rng.seeded(rng.fold_in(key, number), image.device):
            shares = probabilities(model, image, size)
        # Welford's way: two maps in memory, however many samples there are.
        before = shares - mean
        mean = mean + before / (number + 1)
        squares = squares + before * (shares - mean)
    largest = sampling.samples * (1 - 1 / mean.shape[1])  # where each sample is sure, and they are of all classes
    deviation = (squares.sum(dim=1) / largest).clamp(0, 1).sqrt()
    return mean, deviation


def probabilities(model: nn.Module, image: Tensor, size: Sequence[int]) -> Tensor:
    """Softmax shares `(B, K, *size)` float32 at `size` (H, W), for images `(B, 3, H, W)` in [0, 1]."""
    height, width = image.shape[-2:]
    with torch.no_grad(), enough_memory(PREDICTION.format(height, width), SMALLER_IMAGES, image.device):
        return logits_at(model, image, size).float().softmax(dim=1)


@contextmanager
def _dropping(model: nn.Module) -> Iterator[None]:
    """Dropout as in training, and nothing else."""
    layers = _dropout_layers(model)
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, training in zip(layers, modes, strict=True):
            layer.training = training


def _dropout_layers(model: nn.Module) -> list[Dropout]:
    """Those that drop anything."""
    return [layer for layer in model.modules() if isinstance(layer, Dropout) and layer.p > 0]
