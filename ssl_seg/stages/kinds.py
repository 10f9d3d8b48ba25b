"""Kinds of image that are scored and that no labelled image shows, and the map of both.

A kind is a cluster of what an untrained resnet18 of fixed weights sees in images: texture and tone, the same for every
run, and in a trial it parted stained from fluorescent cell nuclei better than the encoders that had been fine-tuned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ssl_seg.data.splits import Examples, Several, Subset, spread
from ssl_seg.data.workers import Workers
from ssl_seg.evidence.cautions import kinds_in_words
from ssl_seg.models import EncoderNet, ModelConfig
from ssl_seg.runs.writer import Run
from ssl_seg.scores import ImageConfusions
from ssl_seg.terminal import say

LEAST_SCORED = 20  # images, below which no kind can be told from a few odd ones
LEAST, LEAST_SHARE = 3, 0.03  # images of a kind, and of those that are scored
CLUSTERS = range(2, 9)
# By how much its mIoU is below that of the others. A linear classifier on frozen features, ten labels of mixed cell
# nuclei: without stained tissue among them it was 0.41 to 0.50 in 5 of 6 draws (in one no cluster was free of labels),
# with some there was no such cluster in 6 draws, nor in a fine-tuning on street frames, roads, wounds and tiles each.
WORSE = 0.2
MOST = 500  # images of a part that are looked at: some 20 s on one core
SEED = 0  # of the weights and of k-means


@dataclass(frozen=True)
class Uncovered:
    """A kind of image that no labelled image shows."""

    indices: tuple[int, ...]  # of the scored images
    miou: float  # of these together, over the classes that both they and the others show
    miou_of_others: float


Found = Mapping[str, tuple[Examples, ImageConfusions]]  # what is scored, by part


def tell(run: Run, labelled: Examples, found: Found, workers: Workers, device: torch.device, quiet: bool) -> None:
    """Write kinds.json and say which kinds are not covered. Of a handful of images there is none: these have no map."""
    large = {part: own for part, own in found.items() if len(own[0]) >= LEAST_SCORED}
    if not large:
        return
    record = look(labelled, large, workers, device)
    run.write_json("kinds.json", record)
    for sentence in kinds_in_words(record):
        say(f"CAUTION: {sentence}", quiet)


def look(labelled: Examples, found: Found, workers: Workers, device: torch.device) -> dict[str, Any]:
    """kinds.json: where the images lie in a plane, the mIoU of each that is scored, and kinds that are not covered.

    Of more than `MOST` images some are looked at, evenly apart.
    """
    from ssl_seg.stages.features import describe  # scikit-learn takes a second

    parts: dict[str, Examples] = {"labelled": labelled, **{part: examples for part, (examples, _) in found.items()}}
    taken = {part: spread(len(examples), MOST) for part, examples in parts.items()}
    every = Several(tuple(Subset(parts[part], tuple(own)) for part, own in taken.items()))
    seen = describe(_untrained(), every, workers, device).images
    ends = np.cumsum([len(own) for own in taken.values()])
    features = dict(zip(parts, np.split(seen, ends[:-1]), strict=True))
    places = {part: _placed(parts[part], taken[part], own) for part, own in features.items()}
    kinds = {}
    for part, (_, confusions) in found.items():
        miou = confusions.per_image_miou()[taken[part]].tolist()
        places[part]["miou"] = miou
        if len(labelled) > MOST:
            continue
        worst = uncovered(features["labelled"], features[part], confusions, taken[part])
        if worst is not None:
            names = [confusions.names[index] for index in worst.indices]
            of = {"labelled": len(labelled), "scored": len(taken[part])}
            kinds[part] = {**of, "names": names, "miou": worst.miou, "miou_of_others": worst.miou_of_others}
    return {"uncovered": kinds, "places": places}


def _untrained() -> EncoderNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return ModelConfig.model_validate({"encoder": {"name": "resnet18"}}).build_encoder()


def uncovered(
    labelled: np.ndarray, scored: np.ndarray, confusions: ImageConfusions, taken: Sequence[int]
) -> Uncovered | None:
    """Of the clusters `WORSE` than the rest in which no labelled image lies, the one that is so by most.

    By the features `(N, D)` of labelled images and those of the images `taken` of the scored ones.
    """
    found = []
    for members in _clusters(np.concatenate([labelled, scored])):
        own = members[len(labelled) :]
        if members[: len(labelled)].any() or own.all() or own.sum() < max(LEAST, LEAST_SHARE * len(own)):
            continue
        indices = np.array(taken)
        kind, others = (confusions.scores(indices[chosen]) for chosen in (own, ~own))
        both = (kind.confusion.sum(axis=1) > 0) & (others.confusion.sum(axis=1) > 0)  # an absent class counts 0 or not
        if both.any():
            figures = float(kind.iou[both].mean()), float(others.iou[both].mean())
            found.append(Uncovered(tuple(indices[own].tolist()), *figures))
    worst = max(found, key=lambda kind: kind.miou_of_others - kind.miou, default=None)
    return None if worst is None or worst.miou_of_others - worst.miou < WORSE else worst


def _clusters(features: np.ndarray) -> Iterator[np.ndarray]:
    """`(N,)` bool: of each cluster its members, of that number of clusters with the largest silhouette.

    Of more clusters some are parts of a kind, with its labelled images in another part.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    distinct = len(np.unique(features.round(3), axis=0))  # equal images differ by rounding
    tried = [
        KMeans(count, n_init="auto", random_state=SEED).fit_predict(features) for count in CLUSTERS if count < distinct
    ]
    if tried:
        best = max(tried, key=lambda clusters: silhouette_score(features, clusters))
        yield from (best == cluster for cluster in range(best.max() + 1))


def _placed(examples: Examples, taken: Sequence[int], features: np.ndarray) -> dict[str, list[Any]]:
    """The images by name, and where each lies on the map: the first two components of the features."""
    plane = np.zeros((len(features), 2))
    plane[:, : features.shape[1]] = features[:, :2]
    return {"names": [examples.name(index) for index in taken], "x": plane[:, 0].tolist(), "y": plane[:, 1].tolist()}
