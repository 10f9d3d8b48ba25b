"""How far pools of images lie from those that a model is for: which of them is worth pretraining or training on.

Of two halves of one set the answer is 0. It says how alike images are in what an encoder sees; what a pool is worth to
a model only that model can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cv2
import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, SerializeAsAny
from sklearn.decomposition import PCA

from ssl_seg import files, images
from ssl_seg.config import Config, PathText, UserError, user_path
from ssl_seg.data.splits import Examples, Several, Subset, evenly, names_of
from ssl_seg.data.workers import TIMEOUT
from ssl_seg.datasets import Dataset, Example
from ssl_seg.evidence import distance
from ssl_seg.evidence.distance import Distance, Images
from ssl_seg.evidence.statistics import LEVEL, MIN_BLOCKS, NEIGHBOURS, Interval, image_blocks
from ssl_seg.figures import charts, panels, svg
from ssl_seg.models import RGB, ModelConfig
from ssl_seg.stages.features import embed, model_of, open_encoder
from ssl_seg.stages.setup import ReadingConfig, check_images, say_other_ranges, tell_notes
from ssl_seg.terminal import say
from ssl_seg.training.processes import DeviceName, choose_device
from ssl_seg.weights.export import range_of, read_encoder_info

MOST = 2_000  # images of a set that are looked at: with as many the target's number alone says how sure a gap is
ALTERED = 200  # of the target's that are altered
BLUR = 0.01  # of the shorter side: a photograph that is plainly out of focus
SAME = 1e-3  # distance of features, of length 1, up to which two images are one
SHOWN = 7  # images in a row of the sheet
PANEL = 160  # pixels of a picture's longer side there


class GapData(Config):
    """The images that a model is for, and those that it could learn from."""

    target: SerializeAsAny[Dataset]  # what the model is for
    pools: Annotated[dict[str, SerializeAsAny[Dataset]], Field(min_length=1)]  # by a name for each


class GapConfig(ReadingConfig):
    """`ssl-seg gap photos drawn others --with runs/pretrained --out gap`"""

    data: GapData
    init: PathText | None = None  # a run whose encoder compares the images; None: `model.encoder`, published weights
    # the encoder where no run is named
    model: ModelConfig = ModelConfig.model_validate({"encoder": {"name": "resnet18", "pretrained": True}})
    # Images in a block of neighbours by their numbers, which count as nearly one; 1 where they are no frames of videos.
    neighbours: PositiveInt = NEIGHBOURS
    workers: int = Field(default=2, ge=0)  # processes that read images
    worker_timeout: PositiveFloat = TIMEOUT  # seconds that one may take over an image
    device: DeviceName = "auto"  # auto: a GPU if there is one

    @property
    def encoder_name(self) -> str:
        """Whose features these are, in words."""
        if self.init is not None:
            return f"the encoder of {self.init}"
        options = self.model.encoder.dump()
        weights = options.get("pretrained", False)
        kind = {True: "published weights", False: "random weights"}.get(weights, f"weights {weights}")
        return f"{options.get('name', options['type'])} with {kind}"


@dataclass(frozen=True)
class PoolGap:
    """What is known of one pool."""

    name: str
    count: int
    gap: float  # 0: as the target's own images, 1: nothing in common
    interval: Interval | None  # over other images of the same kinds; None below 5 blocks of neighbours
    reached: float  # share of the target's images that it has one like
    inside: float  # share of its images that are like one of the target
    shared: int  # of its images that are the target's too
    behind: Interval | None = None  # how much farther than the nearest pool; None for that one


@dataclass(frozen=True)
class Gaps:
    """What `gap` gives back."""

    pools: tuple[PoolGap, ...]  # the nearest first
    count: int  # images of the target
    blocks: int
    encoder: str
    halves: float | None  # 95 % of the target's random halves lie no farther apart; None where it has too few images
    grey: float  # how far the target's own images lie away without colour
    blurred: float  # and out of focus


class _Set(NamedTuple):
    """Images that were looked at, and where they lie."""

    examples: Examples
    seen: Images


@dataclass(frozen=True)
class _Altered(Several):
    """Images without their colour, or out of focus."""

    blurs: bool

    def image(self, index: int) -> Example:
        example = super().image(index)
        if self.blurs:
            altered = cv2.GaussianBlur(example.image, (0, 0), BLUR * min(example.image.shape[:2]))
        else:
            altered = cv2.cvtColor(cv2.cvtColor(example.image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        return replace(example, image=altered)


def gap(config: GapConfig, out: str | Path | None = None, quiet: bool = False) -> Gaps:
    """Measure how far each pool lies from the target; with `out`, write into that new folder what a person looks at.

    There are then `gap.json` with every image by its nearness, `sheet.png` with the nearest and the farthest, and
    `map.png`. Raises UserError for a folder that exists, an image that cannot be read, and a set whose images are all
    neighbours of each other.
    """
    out = None if out is None else user_path(out)
    if out is not None and out.exists():
        raise UserError(f"--out {out}: exists already; name a new folder")
    channels = model_of(config.init, config.model).channels
    if channels != RGB:
        raise UserError(
            f"gap: measures with images of RGB, and the network takes {channels} channels (model.channels); name "
            "another encoder"
        )
    keys = {"target": config.data.target, **{f"pools.{name}": pool for name, pool in config.data.pools.items()}}
    for key, dataset in keys.items():
        check_images(f"data.{key}", dataset)
    tell_notes(keys, quiet=quiet)
    trained = None if config.init is None else range_of(read_encoder_info(config.init))
    say_other_ranges(keys, trained, quiet=quiet)
    chosen = {key: _looked_at(key, dataset, config.neighbours, quiet) for key, dataset in keys.items()}
    encoder, device = open_encoder(config.init, config.model), choose_device(config.device)

    def seen(examples: Examples, blocks: np.ndarray) -> Images:
        return Images(embed(encoder, examples, config.reading, device), blocks)

    target, *pools = (_Set(examples, seen(examples, blocks)) for examples, blocks in chosen.values())
    measured = distance.measure(target.seen, [pool.seen for pool in pools])
    order = sorted(range(len(pools)), key=lambda place: measured[place].value)
    found = _ranked(list(config.data.pools), target.seen, pools, measured, order)
    own = distance.between_halves(target.seen)
    few = evenly(len(target.seen), ALTERED)
    plain = Images(target.seen.features[few], _renumbered(target.seen.blocks[few]))
    grey, blurred = (
        distance.of_altered(plain, seen(_Altered((Subset(target.examples, tuple(few)),), blurs), plain.blocks))
        for blurs in (False, True)
    )
    halves = float(np.quantile(own, LEVEL)) if len(own) else None
    gaps = Gaps(found, len(target.seen), target.seen.num_blocks, config.encoder_name, halves, grey, blurred)
    if out is not None:
        _write(config, out, gaps, target, [pools[place] for place in order])
    return gaps


def _looked_at(key: str, dataset: Dataset, neighbours: int, quiet: bool) -> tuple[Examples, np.ndarray]:
    """Up to MOST images, evenly apart, and their blocks."""
    count = len(dataset)
    few = evenly(count, MOST)
    if len(few) < count:
        say(f"data.{key}: {len(few)} of {count} images are looked at, evenly apart", quiet)
    blocks = image_blocks(names_of(dataset), neighbours)
    blocks = _renumbered(blocks[few])
    num_blocks = int(blocks.max()) + 1
    if num_blocks < 2:
        raise UserError(
            f"data.{key}: {count} images that may all be neighbours in one video, by their names; give neighbours=1 if "
            "they are not, or more images"
        )
    if num_blocks < MIN_BLOCKS:
        why = f"{count} images in {num_blocks} blocks of neighbours, and {MIN_BLOCKS} are needed"
        say(f"data.{key}: no interval, for it has {why}; give neighbours=1 if they are no frames of videos", quiet)
    return Subset(dataset, tuple(few)), blocks


def _renumbered(blocks: np.ndarray) -> np.ndarray:
    """The same blocks, those without an image left out."""
    return np.unique(blocks, return_inverse=True)[1]


def _ranked(
    names: Sequence[str], target: Images, pools: Sequence[_Set], measured: Sequence[Distance], order: Sequence[int]
) -> tuple[PoolGap, ...]:
    radius = distance.reach(target)
    nearest = measured[order[0]]
    ranked = []
    for place in order:
        pool, own = pools[place].seen, measured[place]
        apart = distance.distances(target, pool)  # (N, M)
        behind = None
        if own is not nearest and own.interval and nearest.interval:
            behind = distance.interval_of(own.draws - nearest.draws, target, pool, pools[order[0]].seen)
        ranked.append(
            PoolGap(
                name=names[place],
                count=len(pool),
                gap=own.value,
                interval=own.interval,
                reached=float((apart.min(axis=1) <= radius).mean()),
                inside=float((apart <= radius[:, None]).any(axis=0).mean()),
                shared=int((apart.min(axis=0) <= SAME).sum()),
                behind=behind,
            )
        )
    return tuple(ranked)


# ---- what a person looks at ----


def _write(config: GapConfig, out: Path, gaps: Gaps, target: _Set, pools: Sequence[_Set]) -> None:
    """`pools` in the order of `gaps.pools`."""
    entries, strips = [], []
    for found, pool in zip(gaps.pools, pools, strict=True):
        apart = distance.distances(target.seen, pool.seen)  # (N, M)
        entries.append(
            {
                **_plain(found),
                "images": _listed(pool, target, apart.T),
                "target": _listed(target, pool, apart),
            }
        )
        near, far = f"{found.name}: nearest to the target", f"{found.name}: farthest from the target"
        strips += _rows(near, pool, target, apart.T, farthest=False)
        strips += _rows(far, pool, target, apart.T, farthest=True)
        strips += _rows(f"target: farthest from {found.name}", target, pool, apart, farthest=True)
    record = {**_plain(gaps), "pools": entries, "level": LEVEL, "config": config.dump()}
    with files.naming(out):
        out.mkdir(parents=True)
    files.write_atomic(out / "gap.json", files.json_bytes(record))
    images.write_image(out / "sheet.png", np.vstack(strips))
    files.write_atomic(out / "map.png", svg.to_png(charts.draw_map(_plane(gaps, target, pools), len(pools))))


def _plain(found: PoolGap | Gaps) -> dict[str, Any]:
    """For JSON; an interval as its two ends."""
    ends = {key: [value.low, value.high] for key, value in vars(found).items() if isinstance(value, Interval)}
    return {**vars(found), **ends}


def _listed(own: _Set, other: _Set, apart: np.ndarray) -> list[dict[str, Any]]:
    """Each image with the one of the other set that it is most like, the nearest first; `apart` is (own, other)."""
    nearest = apart.argmin(axis=1)
    return [
        {
            "name": own.examples.name(index),
            "distance": float(apart[index, nearest[index]]),
            "like": other.examples.name(int(nearest[index])),
        }
        for index in np.argsort(apart.min(axis=1), kind="stable").tolist()
    ]


def _rows(text: str, own: _Set, other: _Set, apart: np.ndarray, farthest: bool) -> list[np.ndarray]:
    """A caption, a row of images, and below each that image of the other set that it is most like.

    First one of each block: the nearest of a video are a row of the same.
    """
    nearness = apart.min(axis=1)
    order = np.argsort(-nearness if farthest else nearness, kind="stable")
    _, first = np.unique(own.seen.blocks[order], return_index=True)
    shown = np.concatenate([order[np.sort(first)], np.delete(order, first)])[:SHOWN].tolist()
    beside = [int(apart[index].argmin()) for index in shown]
    white = [np.full((PANEL, PANEL, 3), 255, dtype=np.uint8)] * (SHOWN - len(shown))
    rows = [
        [*(panels.boxed(source.examples.image(index).image, PANEL) for index in indices), *white]
        for source, indices in ((own, shown), (other, beside))
    ]
    drawn = panels.grid(rows)
    return [panels.caption(f"{text}; below each what it is most like", drawn.shape[1]), drawn]


def _plane(gaps: Gaps, target: _Set, pools: Sequence[_Set]) -> dict[str, np.ndarray]:
    """All images in the plane in which they differ most, each set counting alike."""
    names = ["target", *(found.name for found in gaps.pools)]
    sets = [target.seen.features, *(pool.seen.features for pool in pools)]
    fewest = min(len(own) for own in sets)
    plane = PCA(2, random_state=0).fit(np.concatenate([own[evenly(len(own), fewest)] for own in sets]))
    return {name: plane.transform(own) for name, own in zip(names, sets, strict=True)}
