"""How well a frozen encoder tells the classes of a few labelled images apart: one linear layer on its maps, in seconds.

An encoder that is no better at it than one with random weights has learnt little that segmentation can use: its tasks
are at fault. Where one is better and fine-tunes no better, what is at fault is how it is fine-tuned. Each image is
scored by a layer that was fitted to others. Only labelled images that train are read, never those that judge.

Ours is which points are looked at and what is left out; scikit-learn fits the layer.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from pydantic import Field, PositiveFloat, SerializeAsAny
from torch.nn import functional as F

from ssl_seg import files, images, rng
from ssl_seg.config import Config, PathTexts, UserError, load, user_path
from ssl_seg.data.loading import Whole, loader
from ssl_seg.data.splits import IGNORE, Examples, Labels, Subset, has_labelled_pixels, names_of
from ssl_seg.data.workers import ALONE, TIMEOUT, Workers
from ssl_seg.datasets import Dataset, Example
from ssl_seg.evidence.statistics import image_blocks
from ssl_seg.figures import panels
from ssl_seg.models import EncoderNet, ModelConfig, evaluating
from ssl_seg.scores import SegmentationScores, named_scores
from ssl_seg.stages.features import model_of, open_encoder
from ssl_seg.stages.setup import ReadingConfig, check_images, in_channels, say_other_ranges, tell_notes
from ssl_seg.training.processes import DeviceName, Processes, choose_device
from ssl_seg.weights.export import range_of, read_encoder_info

if TYPE_CHECKING:  # a pretraining reads this file for its keys, and scikit-learn is as long to import as torch
    from sklearn.pipeline import Pipeline

SIDE = 256  # pixels of an image's longer side at most, and
STRIDE = 4  # of the points that are looked at: 10 images of 480 x 360 take a second, and no map is finer by much
FITTED = 20_000  # points that a layer is fitted to at most
FOLDS = 5
# Of the ridge, for each point, the features having variance 1. Of 0.003 to 0.3 the best, or near it, on street frames,
# nuclei, wounds and aerial roads at 10 and 30 labels, by ImageNet's weights and by random ones.
ALPHA = 0.3
# Points count by this power of how rare their class is: without it no wound, 1 in 100 pixels, is found by any encoder.
RARITY = 0.5
NETWORK = re.compile(r"[a-z0-9_.]+")  # how timm writes names, and a tag of weights
FIGURE = "probe/miou"  # in the metrics of a pretraining
SHOWN = 6  # images of the sheet
PANEL = 160  # pixels of a picture's longer side there


class ProbeData(Config):
    """The images that the layer is fitted to, and scored on in turn."""

    labelled: SerializeAsAny[Dataset]  # a few images with masks


class ProbeConfig(ReadingConfig):
    """`ssl-seg probe runs/pretrained data.labelled.images=photos ... labels.count=10`"""

    data: ProbeData
    labels: Labels = Labels()  # as those of the fine-tuning to come
    holds_out: bool = True  # whether it has no data.val of its own: what it then holds out is not looked at here either
    # Runs, their encoder/ folders, files of weights, or names of networks that timm publishes weights for.
    init: PathTexts = ()
    # Of a file of weights, and where `init` names nothing.
    model: ModelConfig = ModelConfig.model_validate({"encoder": {"name": "resnet18", "pretrained": True}})
    seed: int = 0  # of the random weights that each is compared with
    workers: int = Field(default=0, ge=0)  # a few images
    worker_timeout: PositiveFloat = TIMEOUT  # seconds that one may take over an image
    device: DeviceName = "auto"  # auto: a GPU if there is one


class ProbeRule(Config):
    """The probe of a pretraining while it trains."""

    labelled: SerializeAsAny[Dataset]  # a few images with masks
    labels: Labels = Labels(count=10)  # those that the fine-tuning will have: more are seen by nobody before it
    holds_out: bool = True  # whether it has no data.val of its own: what it then holds out is not looked at here either
    every: int | None = Field(default=None, ge=1)  # steps; None: as `train.eval_every`


@dataclass(frozen=True)
class Probed:
    """What one encoder's features came to."""

    name: str
    scores: SegmentationScores  # of all points of all images, each by a layer that was fitted to other images
    random: SegmentationScores  # the same network with random weights
    seconds: float


@dataclass(frozen=True)
class Probes:
    """What `probe` gives back."""

    encoders: tuple[Probed, ...]  # in the order given
    chance: SegmentationScores  # every point taken for the class that most points have
    labelled: tuple[str, ...]  # names of the images
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Points:
    """The labelled points of one image."""

    features: np.ndarray  # (P, C) float32, of all maps
    ids: np.ndarray  # (P,) uint8
    where: np.ndarray  # (h, w) bool: which points of the lattice these are


@dataclass(frozen=True)
class _Small(Subset):
    """The images with their masks, none larger than `SIDE`, and of sides that `unit` divides; masks one in `STRIDE`."""

    unit: int

    def read(self, index: int) -> Example:
        example = super().read(index)
        if example.label is None:
            raise UserError(f"{example.name}: has no mask, and the probe is of labelled images")
        factor = min(1.0, SIDE / max(example.image.shape[:2]))
        height, width = (max(1, round(side * factor / self.unit)) * self.unit for side in example.image.shape[:2])
        label = images.resize_mask(example.label, (height // STRIDE, width // STRIDE))
        return replace(example, image=images.resize_image(example.image, (height, width)), label=label)


def probe(config: ProbeConfig, out: str | Path | None = None, quiet: bool = False) -> Probes:
    """Probe encoders, each beside one of random weights; with `out`, write `probe.json` and `sheet.png` into it.

    Raises UserError for a folder that exists, fewer than two images, and images or weights that cannot be read.
    """
    out = None if out is None else user_path(out)
    if out is not None and out.exists():
        raise UserError(f"--out {out}: exists already; name a new folder")
    encoders = _encoders(config)
    counts = {one.model.channels for one in encoders}
    if len(counts) > 1:
        raise UserError("init: these take images of different numbers of channels; probe one at a time")
    dataset = in_channels("data.labelled", config.data.labelled, counts.pop())
    check_images("data.labelled", dataset)
    tell_notes({"labelled": dataset}, ("labelled",), quiet)
    labelled = choose_labelled(dataset, config.labels, config.holds_out, "data.labelled")
    for one in encoders:
        trained = None if one.init is None else range_of(read_encoder_info(one.init))
        say_other_ranges({"labelled": dataset}, trained, quiet=quiet)
    device = choose_device(config.device)
    probed, shown = [], []
    points: list[Points] = []
    for one in encoders:
        began = time.monotonic()
        with _seeded(config.seed):
            points = read_points(open_encoder(one.init, one.model), labelled, config.reading, device)
            shown.append(left_out(points, labelled))
            seconds = time.monotonic() - began
            random = scores_of(one.random(), labelled, config.reading, device)
        probed.append(Probed(one.name, scored(points, shown[-1], labelled), random, seconds))
    found = Probes(tuple(probed), _chance(points, labelled), names_of(labelled), dataset.class_names)
    if out is not None:
        _write(config, out, found, labelled, points, shown)
    return found


@dataclass
class Watch:
    """The probe of an encoder while it is pretrained: one more evaluator of the run."""

    encoder: Callable[[], EncoderNet]  # as it would be exported
    model: ModelConfig
    labelled: Subset
    seed: int
    processes: Processes
    random: float | None = None  # mIoU of the same network with random weights, once it is known

    def measure(self, _: int) -> dict[str, float]:
        """`probe/miou`, and beside it `probe/random`; made by the first process, the same on all."""
        made = self.processes.together(self._made)
        return self.processes.from_first(made)

    def _made(self) -> dict[str, float]:
        if not self.processes.is_main:
            return {}
        if self.random is None:
            with _seeded(self.seed):
                bare = self.model.without_pretrained().build_encoder()
            self.random = scores_of(bare, self.labelled, device=self.processes.device).miou
        # No loader workers: to start them takes longer than a few images.
        found = scores_of(self.encoder(), self.labelled)
        return {FIGURE: found.miou, "probe/random": self.random}


def choose_labelled(dataset: Dataset, labels: Labels, holds_out: bool, key: str) -> Subset:
    """The images whose masks are looked at: those that fine-tuning chooses by the same `labels`.

    Raises UserError for one alone, and where nothing is labelled.
    """
    if len(dataset.class_names) < 2:
        raise UserError(f"{key}: the probe tells classes apart; give it masks and two class names or more")
    if labels.folds is not None and not holds_out:
        raise UserError(f"{key}: nothing of it is held out, so it has no folds; drop labels.folds")
    labelled = labels.choose(labels.divide(dataset)[0] if holds_out else dataset)
    if len(labelled) < 2:
        raise UserError(f"{key}: one image is left out in turn, so two or more are needed; give labels.count=2 or more")
    if not has_labelled_pixels(labelled):
        raise UserError(f"{key}: every pixel of all {len(labelled)} masks is ignored; look at ignore and mapping")
    return labelled


def scores_of(
    encoder: EncoderNet, labelled: Subset, workers: Workers = ALONE, device: torch.device | None = None
) -> SegmentationScores:
    """How well the frozen maps of `encoder` tell the classes of two or more labelled images apart.

    The encoder is left as it was: in its mode, its weights and its statistics.
    """
    points = read_points(encoder, labelled, workers, device)
    return scored(points, left_out(points, labelled), labelled)


# ---- what is looked at, and by what ----


def read_points(
    encoder: EncoderNet, labelled: Subset, workers: Workers = ALONE, device: torch.device | None = None
) -> list[Points]:
    """Those of each image, by all maps of the encoder brought to one lattice."""
    device = device or next(encoder.parameters()).device
    encoder = encoder.to(device)
    small = _Small(labelled, tuple(range(len(labelled))), math.lcm(encoder.multiple, STRIDE))
    found = []
    with evaluating(encoder):
        for packed in loader(Whole(small), [[index] for index in range(len(small))], workers):
            assert packed.label is not None, "an image without a mask has been refused"
            label = packed.label[0].numpy()
            where = label != IGNORE
            maps = [level.float() for level in encoder(packed.to(device).image) if level.shape[1]]
            on_lattice = [F.interpolate(level, label.shape, mode="bilinear", antialias=True) for level in maps]
            features = torch.cat(on_lattice, dim=1)[0]  # (C, h, w)
            if not features.isfinite().all():
                raise UserError(f"{packed.names[0]}: what the encoder sees in it is not finite; name another run")
            found.append(Points(features.permute(1, 2, 0).cpu().numpy()[where], label[where], where))
    return found


def blocks_of(labelled: Subset) -> np.ndarray:
    """Ids `(N,)` of neighbours among all that could be chosen, as frames of a video: none may tell of another."""
    every = image_blocks(names_of(labelled.dataset))
    blocks = every[list(labelled.indices)]
    # Where all are neighbours there is nothing else to fit a layer to.
    return blocks if len(set(blocks.tolist())) > 1 else np.arange(len(labelled))


def left_out(points: Sequence[Points], labelled: Subset) -> list[np.ndarray]:
    """Class ids `(P,)` of the points of each image, by a layer that was fitted to others."""
    from sklearn.model_selection import GroupKFold

    blocks = blocks_of(labelled)
    folds = GroupKFold(min(FOLDS, len(set(blocks.tolist()))))
    ids: list[np.ndarray] = [np.empty(0)] * len(points)
    for fitted, held in folds.split(blocks, groups=blocks):
        layer = _fitted([points[index] for index in fitted], len(labelled.class_names))
        for index in held:
            features = points[index].features
            ids[index] = layer.predict(features).argmax(axis=1) if len(features) else np.empty(0, dtype=np.int64)
    return ids


def _fitted(points: Sequence[Points], num_classes: int) -> Pipeline:
    """Ridge regression of the classes, one-hot, on standardized features."""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not any(len(own.ids) for own in points):
        raise UserError("probe: the masks of the images that are left hold no labelled pixel; give more, or others")
    each = -(-FITTED // len(points))
    places = [_some(len(own.ids), each, number) for number, own in enumerate(points)]
    features = np.concatenate([own.features[some] for own, some in zip(points, places, strict=True)])
    ids = np.concatenate([own.ids[some] for own, some in zip(points, places, strict=True)])
    weights = np.bincount(ids, minlength=num_classes).clip(min=1.0)[ids] ** -RARITY
    layer = make_pipeline(StandardScaler(), Ridge(ALPHA * len(ids)))
    return layer.fit(features, np.eye(num_classes)[ids], ridge__sample_weight=weights / weights.mean())


def _some(count: int, most: int, number: int) -> np.ndarray:
    """Up to `most` of `count` points of an image, anywhere."""
    if count <= most:
        return np.arange(count)
    return rng.permutation(rng.fold_in(rng.as_key("probe"), number), count)[:most].numpy()


def scored(points: Sequence[Points], ids: Sequence[np.ndarray], labelled: Examples) -> SegmentationScores:
    """Of the matrix summed over all points."""
    count = len(labelled.class_names)
    matrix = np.zeros((count, count), dtype=np.int64)
    for own, predicted in zip(points, ids, strict=True):
        np.add.at(matrix, (own.ids, predicted.astype(np.int64)), 1)
    return SegmentationScores.from_confusion(matrix)


def _chance(points: Sequence[Points], labelled: Examples) -> SegmentationScores:
    most = np.bincount(np.concatenate([own.ids for own in points])).argmax()
    return scored(points, [np.full(len(own.ids), most) for own in points], labelled)


# ---- encoders, and what a person looks at ----


class _Encoder(NamedTuple):
    name: str
    init: str | None
    model: ModelConfig  # of `init`, if there is one

    def random(self) -> EncoderNet:
        """The same network, knowing nothing."""
        return self.model.without_pretrained().build_encoder()


def _encoders(config: ProbeConfig) -> list[_Encoder]:
    """Those that `init` names, else that of `model`. Raises UserError for a word that is neither run nor network."""
    if not config.init:
        options = config.model.encoder.dump()
        return [_Encoder(str(options.get("name", options["type"])), None, config.model)]
    found = []
    for word in config.init:
        if user_path(word).exists() or not NETWORK.fullmatch(word):
            found.append(_Encoder(word, word, model_of(word, config.model)))
            continue
        try:
            model = load(ModelConfig, {"encoder": {"name": word, "pretrained": True}})
        except UserError as error:
            raise UserError(f"{word}: there is no such run or file, and {error}") from error
        found.append(_Encoder(word, None, model))
    return found


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights by `seed`; the caller's random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _write(
    config: ProbeConfig,
    out: Path,
    found: Probes,
    labelled: Subset,
    points: Sequence[Points],
    shown: Sequence[Sequence[np.ndarray]],
) -> None:
    """`points` are those of any encoder: where they lie is the same for all with one `unit`."""
    record = {
        "encoders": [
            {
                "name": one.name,
                **named_scores(one.scores, found.class_names),
                "random": named_scores(one.random, found.class_names),
                "seconds": one.seconds,
            }
            for one in found.encoders
        ],
        "chance": named_scores(found.chance, found.class_names),
        "labelled": list(found.labelled),
        "config": config.dump(),
    }
    colours = panels.palette(len(found.class_names))
    rows = []
    for index in range(min(len(labelled), SHOWN)):
        image = labelled.image(index).image
        ids = [points[index].ids, *(one[index] for one in shown)]
        masks = [_mask_of(points[index].where, own, colours, image.shape[:2]) for own in ids]
        rows.append([panels.boxed(own, PANEL) for own in (image, *masks)])
    sheet = panels.grid(rows)
    legend = panels.legend(found.class_names, colours, sheet.shape[1])
    text = "image, truth, " + ", ".join(one.name for one in found.encoders)
    with files.naming(out):
        out.mkdir(parents=True)
    images.write_image(out / "sheet.png", np.vstack([panels.caption(text, sheet.shape[1]), sheet, legend]))
    files.write_atomic(out / "probe.json", files.json_bytes(record))


def _mask_of(where: np.ndarray, ids: np.ndarray, colours: np.ndarray, size: images.Size) -> np.ndarray:
    """In colour, as large as the panel shows an image of `size` (H, W)."""
    whole = np.full(where.shape, IGNORE, dtype=np.uint8)
    whole[where] = ids
    factor = PANEL / max(size)
    return colours[images.resize_mask(whole, (round(size[0] * factor) or 1, round(size[1] * factor) or 1))]
