"""Which images of a pool to label next, as a folder ready for it.

Where kinds of image are mixed, ten images drawn by chance may hold none of one kind, and no pretraining mends that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, SerializeAsAny

from ssl_seg import files, images
from ssl_seg.config import Config, PathText, UserError, load, user_path
from ssl_seg.data import selection
from ssl_seg.data.splits import Examples, Labels
from ssl_seg.data.workers import TIMEOUT
from ssl_seg.datasets import Dataset, Example
from ssl_seg.figures import charts, panels, svg
from ssl_seg.leaks import guard
from ssl_seg.leaks.guard import Leaks
from ssl_seg.models import EncoderNet, ModelConfig
from ssl_seg.stages.features import Described, describe
from ssl_seg.stages.predict import mask_names
from ssl_seg.stages.setup import ReadingConfig, check_images, tell_notes
from ssl_seg.terminal import say
from ssl_seg.training.processes import DeviceName, choose_device
from ssl_seg.weights.export import load_encoder, read_encoder_info

OTHERS_SHOWN = 5  # beside each chosen image on the sheet: from the most alike to the least of those it stands for
ROWS_SHOWN = 40
PANEL = 160  # pixels of a picture's longer side there
SAME = 1e-6  # squared distance of features, of the mean one, from which two images are one


class SelectData(Config):
    """Where the images come from."""

    pool: SerializeAsAny[Dataset]  # what can be labelled; masks, if it has any, are not looked at
    labelled: SerializeAsAny[Dataset] | None = None  # what is labelled already
    # What will score the model: images of the pool that show the same are not chosen, for a run would refuse them.
    scored: SerializeAsAny[Dataset] | None = None


class SelectConfig(ReadingConfig):
    """`ssl-seg select photos --count 20 --with runs/pretrained --out to_label`"""

    data: SelectData
    count: PositiveInt = 20
    init: PathText | None = (
        None  # a run whose encoder compares the images; None: `model.encoder`, with ImageNet's weights
    )
    model: ModelConfig = ModelConfig.model_validate({"encoder": {"name": "resnet18", "pretrained": True}})
    leaks: Leaks = Leaks()
    workers: int = Field(default=2, ge=0)
    worker_timeout: PositiveFloat = TIMEOUT
    device: DeviceName = "auto"


class Named(Config):
    """labels.yaml: laid on a fine-tuning's config it takes just these images."""

    labels: Labels


@dataclass(frozen=True)
class Selected:
    """What `select` gives back and writes."""

    names: tuple[str, ...]  # in the order in which they should be labelled
    shares: tuple[float, ...]  # of the pool: what resembles each of them more than any other chosen or labelled image
    covered_before: float  # the share of what the pool shows that the labelled images cover
    covered: float  # and with the chosen ones
    out: Path


@dataclass(frozen=True)
class _Both:
    """The pool's images, then the labelled ones: as what a loader's workers look at, without masks."""

    pool: Examples
    labelled: Examples | None
    class_names = ()

    def __len__(self) -> int:
        return len(self.pool) + (0 if self.labelled is None else len(self.labelled))

    def read(self, index: int) -> Example:
        return self.image(index)

    def image(self, index: int) -> Example:
        examples, own = self._at(index)
        return examples.image(own)

    def label(self, index: int) -> None:
        return None

    def name(self, index: int) -> str:
        examples, own = self._at(index)
        return examples.name(own)

    def doubt(self, index: int) -> str:
        return ""

    def sequence(self, index: int) -> str:
        return ""

    def _at(self, index: int) -> tuple[Examples, int]:
        count = len(self.pool)
        return (self.pool, index) if self.labelled is None or index < count else (self.labelled, index - count)


def select(config: SelectConfig, out: str | Path, quiet: bool = False) -> Selected:
    """Choose `count` images of the pool and write them into the new folder `out`.

    There are `images/` (as PNG, turned upright, so that masks drawn on them fit), `selected.json`, `labels.yaml` for a
    data set whose masks are all there, `sheet.png` and `map.png`. Raises UserError for a folder that exists, an image
    that cannot be read, and a pool without images that are left to label.
    """
    out, pool = user_path(out), config.data.pool
    if out.exists():
        raise UserError(f"--out {out}: exists already; name a new folder")
    for part, dataset in config.data:
        if dataset is not None:
            check_images(f"data.{part}", dataset)
    tell_notes(dict(config.data), quiet=quiet)
    names = mask_names(pool)
    both = _Both(pool, config.data.labelled)
    encoder = _encoder(config)
    left_out = _scored_too(config)
    seen = describe(encoder, both, config.reading, choose_device(config.device))
    labelled = range(len(pool), len(both))
    twins = _twins(seen.images, len(pool))
    parts = [selection.of_images(seen.images), selection.of_regions(seen.regions)]
    choice = selection.choose(parts, config.count, labelled, left_out | twins)
    if not choice.indices:
        raise UserError(
            f"data.pool: of {len(pool)} images {len(twins)} are labelled and {len(left_out)} are scored; "
            "name a pool with others"
        )
    if len(choice.indices) < config.count:
        say(f"only {len(choice.indices)} images are left to choose from", quiet)
    return _write(config, out, names, seen, choice, left_out)


def _encoder(config: SelectConfig) -> EncoderNet:
    if config.init is None:
        return config.model.build_encoder()
    info = read_encoder_info(config.init)
    model = load(ModelConfig, info["config"]) if info else config.model
    encoder = model.without_pretrained().build_encoder()
    load_encoder(encoder, config.init)
    return encoder


def _scored_too(config: SelectConfig) -> set[int]:
    """Images of the pool that show what will be scored."""
    pool, scored = config.data.pool, config.data.scored
    leaking = set() if scored is None else guard.leaking(pool, scored, config.leaks, config.reading)
    return {index for index in range(len(pool)) if pool.name(index) in leaking}


def _twins(features: np.ndarray, count: int) -> set[int]:
    """Of the first `count` images those that are among the rest too."""
    rest = features[count:]
    if not len(rest):
        return set()
    nearest = selection.nearest(features[:count], rest)
    apart = ((features[:count] - rest[nearest]) ** 2).sum(axis=1)
    return set(np.flatnonzero(apart <= SAME * (features**2).sum(axis=1).mean()).tolist())


def _write(
    config: SelectConfig,
    out: Path,
    names: tuple[str, ...],
    seen: Described,
    choice: selection.Choice,
    left_out: set[int],
) -> Selected:
    pool = config.data.pool
    chosen = list(choice.indices)
    count = len(pool)
    labelled = list(range(count, len(seen.images)))
    like = selection.nearest(seen.images[:count], seen.images[chosen + labelled])
    shares = [float((like == place).mean()) for place in range(len(chosen))]
    stands_for = [np.flatnonzero(like == place).tolist() for place in range(len(chosen))]
    out.mkdir(parents=True)
    for index in chosen:
        images.write_image(out / "images" / names[index], pool.image(index).image)
    listed = [pool.name(index) for index in chosen]
    entries = [
        {"name": name, "file": f"images/{names[index]}", "share_of_pool": share, "gain": gain}
        for name, index, share, gain in zip(listed, chosen, shares, choice.gains, strict=True)
    ]
    covered = choice.covered + sum(choice.gains)
    record = {
        "images": entries,
        "covered_before": choice.covered,
        "covered": covered,
        "left_out_as_scored": sorted(pool.name(index) for index in left_out),
        "config": config.dump(),
    }
    files.write_atomic(out / "selected.json", files.json_bytes(record))
    files.write_atomic(out / "labels.yaml", Named(labels=Labels(names=tuple(listed))).to_yaml().encode())
    _draw(out, pool, seen, chosen, labelled, shares, stands_for)
    return Selected(tuple(listed), tuple(shares), choice.covered, covered, out)


def _draw(
    out: Path,
    pool: Examples,
    seen: Described,
    chosen: list[int],
    labelled: list[int],
    shares: list[float],
    stands_for: list[list[int]],
) -> None:
    """sheet.png: a row for each chosen image, with others that it stands for; map.png: the pool in a plane."""
    white = np.full((PANEL, PANEL, 3), 255, dtype=np.uint8)
    strips = []
    for index, share, alike in list(zip(chosen, shares, stands_for, strict=True))[:ROWS_SHOWN]:
        apart = ((seen.images[alike] - seen.images[index]) ** 2).sum(axis=1)
        others = [alike[place] for place in np.argsort(apart, kind="stable") if alike[place] != index]
        shown = [index, *others[:: max(1, len(others) // OTHERS_SHOWN)][:OTHERS_SHOWN]]
        row = [panels.boxed(pool.image(own).image, PANEL) for own in shown]
        row = panels.grid([row + [white] * (1 + OTHERS_SHOWN - len(row))])
        strips += [panels.caption(f"{pool.name(index)}: stands for {share * 100:.0f} % of the pool", row.shape[1]), row]
    images.write_image(out / "sheet.png", np.vstack(strips))
    plane = seen.images[:, :2]
    groups = {"chosen": chosen, "labelled": labelled, "pool": [*range(len(pool))]}
    figure = charts.draw_map({name: plane[own] for name, own in groups.items() if own})
    files.write_atomic(out / "map.png", svg.to_png(figure))
