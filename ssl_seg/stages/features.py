"""What an encoder sees in images, as a few numbers an image and a region: by these images are compared.

Ours is what is pooled; scikit-learn reduces it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_seg.config import UserError
from ssl_seg.data.loading import Whole, loader
from ssl_seg.data.splits import Examples, Subset, evenly
from ssl_seg.data.workers import Workers
from ssl_seg.models import EncoderNet, Features, ModelConfig, evaluating
from ssl_seg.weights.export import exported_config, load_encoder, read_encoder_info

if TYPE_CHECKING:  # `probe` reads this file too, and with it each pretraining
    from sklearn.pipeline import Pipeline

SIDE = 224  # pixels: what published encoders were trained on; at 224 ten thousand images take minutes on two cores
# Where regions are looked at: a lattice of points of the maps, brought to one stride. By means over larger cells worse
# images were chosen: a defect or a wound is small.
GRID, STRIDE = 8, 8
COARSEST = 16  # stride of the maps that regions are described by: a coarser one sees most of the image
COMPONENTS = 32
NUM_FITTED = 256  # images by which the components are found
BATCH = 16


class Described(NamedTuple):
    """Of N images."""

    images: np.ndarray  # (N, D) float32, D at most `COMPONENTS`
    regions: np.ndarray  # (N, GRID * GRID, D) float32


def open_encoder(init: str | Path | None, model: ModelConfig) -> EncoderNet:
    """The encoder of the run or file `init`, built as its run says, else as `model` does; without it, that of `model`.

    Raises UserError where there is none, or its weights do not fit.
    """
    encoder = model_of(init, model).build_encoder()
    if init is not None:
        load_encoder(encoder, init)
    return encoder


def model_of(init: str | Path | None, model: ModelConfig) -> ModelConfig:
    """The network whose weights `init` holds, as its run says; `model` for a file of weights, and without `init`."""
    if init is None:
        return model
    info = read_encoder_info(init)
    return (exported_config(init, info) if info else model).without_pretrained()


def describe(encoder: EncoderNet, examples: Examples, workers: Workers, device: torch.device) -> Described:
    """Mean and spread of every map over the image, and maps at points of it; standardized, as principal components.

    Images are squeezed to a square. The components are those of the examples themselves, so features of two calls
    cannot be compared: give all images at once. Raises UserError for an image that cannot be read, or whose
    features are not finite.
    """
    count = len(examples)
    chosen = evenly(count, NUM_FITTED)
    sample = _stacked(_raw(encoder, Subset(examples, tuple(chosen)), workers, device))
    reductions = [_fitted(part) for part in sample]
    if len(chosen) == count:
        return Described(*(_reduced(*pair) for pair in zip(reductions, sample, strict=True)))
    batches = (
        [_reduced(*pair) for pair in zip(reductions, raw, strict=True)]
        for raw in _raw(encoder, examples, workers, device)
    )
    return Described(*_stacked(batches))


def embed(encoder: EncoderNet, examples: Examples, workers: Workers, device: torch.device) -> np.ndarray:
    """The mean of the coarsest map over each image, at length 1, `(N, C)` float32: what it shows, on any set's terms.

    Images are squeezed to a square. Nothing is fitted to them, so features of two calls can be compared. Finer maps
    were left out: by them a blur of half a per cent of the side counted for more than another kind of scene. Raises
    UserError for an image that cannot be read.
    """
    batches = _maps(encoder, examples, workers, device)
    return np.concatenate([F.normalize(maps[-1].float().mean(dim=(2, 3))).cpu().numpy() for maps in batches])


def _raw(
    encoder: EncoderNet, examples: Examples, workers: Workers, device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each batch `(B, D)` of the images and `(B, R, D')` of their regions."""
    for maps in _maps(encoder, examples, workers, device):
        yield _of_images(maps).cpu().numpy(), _of_regions(maps).cpu().numpy()


def _maps(encoder: EncoderNet, examples: Examples, workers: Workers, device: torch.device) -> Iterator[Features]:
    """Of each batch."""
    encoder = encoder.to(device).to(memory_format=torch.channels_last)  # a quarter less time on a CPU, with a resnet18
    batches = [list(range(first, min(first + BATCH, len(examples)))) for first in range(0, len(examples), BATCH)]
    whole = Whole(examples, resize=(SIDE, SIDE), with_labels=False)
    with evaluating(encoder):
        for packed in loader(whole, batches, workers):
            features = encoder(packed.to(device, channels_last=True).image)
            if not all(level.isfinite().all() for level in features):
                raise UserError(f"{packed.names[0]}: what the encoder sees in it is not finite; name another run")
            yield features


def _of_images(features: Features) -> Tensor:
    """`(B, 2 * sum of C)`: a mean tells what there is, a spread how it lies about."""
    maps = [level.flatten(2).float() for level in features if level.shape[1]]  # (B, C, h, w) -> (B, C, h * w)
    return torch.cat([torch.cat([level.mean(dim=2), level.std(dim=2, correction=0)], dim=1) for level in maps], dim=1)


def _of_regions(features: Features) -> Tensor:
    """`(B, R, sum of C)` at the points of the lattice, of the maps that are fine enough, or of the finest."""
    pairs = zip(features, features.strides, strict=True)
    maps = [level for level, stride in pairs if level.shape[1] and stride <= COARSEST] or [features[0]]
    height, width = (side // STRIDE for side in features.size)
    one_size = torch.cat([F.adaptive_avg_pool2d(level.float(), (height, width)) for level in maps], dim=1)
    rows, columns = (((torch.arange(GRID) + 0.5) * side / GRID).long() for side in (height, width))
    return one_size[:, :, rows][..., columns].flatten(2).transpose(1, 2)  # (B, C, GRID, GRID) -> (B, R, C)


def _fitted(raw: np.ndarray) -> Pipeline:
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    flat = raw.reshape(-1, raw.shape[-1])
    with np.errstate(invalid="ignore"):  # equal images have no variance that components could share
        return make_pipeline(StandardScaler(), PCA(min(COMPONENTS, *flat.shape), random_state=0)).fit(flat)


def _reduced(reduction: Pipeline, raw: np.ndarray) -> np.ndarray:
    flat = reduction.transform(raw.reshape(-1, raw.shape[-1]))
    return flat.reshape(*raw.shape[:-1], -1).astype(np.float32)


def _stacked(batches: Iterator[Sequence[np.ndarray]]) -> list[np.ndarray]:
    return [np.concatenate(part) for part in zip(*batches, strict=True)]
