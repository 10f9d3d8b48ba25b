"""Which images of a pool to label next, as a folder ready for it.

Where kinds of image are mixed, ten images drawn by chance may hold none of one kind, and no pretraining mends that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, SerializeAsAny

from ssl_seg import files, images
from ssl_seg.config import Config, PathTexts, UserError, user_path
from ssl_seg.data import selection
from ssl_seg.data.splits import Labels, Several, pixel_counts
from ssl_seg.data.workers import TIMEOUT
from ssl_seg.datasets import Dataset
from ssl_seg.figures import charts, panels, svg
from ssl_seg.leaks import guard
from ssl_seg.leaks.guard import Leaks
from ssl_seg.models import RGB, ModelConfig
from ssl_seg.stages.features import Described, describe, model_of, open_encoder
from ssl_seg.stages.predict import mask_names
from ssl_seg.stages.setup import ReadingConfig, check_images, read_as, say_other_ranges, tell_notes
from ssl_seg.stages.uncertainty import Foreseen, Model, foresee, load_models
from ssl_seg.terminal import say
from ssl_seg.training.processes import DeviceName, choose_device
from ssl_seg.weights.export import holds_model, range_of, read_encoder_info

OTHERS_SHOWN = 5  # beside each chosen image on the sheet: from the most alike to the least of those it stands for
BANDS = "bands"  # the folder of images of which a PNG shows a part alone
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
    count: PositiveInt = 20  # how many images
    # A run whose encoder compares the images; none: `model.encoder`, with ImageNet's weights. Of a fine-tuned one is
    # also told how unsure it is of each image, and of several, its seeds, how far they differ.
    init: PathTexts = ()
    # the encoder where no run is named
    model: ModelConfig = ModelConfig.model_validate({"encoder": {"name": "resnet18", "pretrained": True}})
    leaks: Leaks = Leaks()
    workers: int = Field(default=2, ge=0)  # processes that read images
    worker_timeout: PositiveFloat = TIMEOUT  # seconds that one may take over an image
    device: DeviceName = "auto"  # auto: a GPU if there is one


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
    uncertain: tuple[float, ...] = ()  # in [0, 1], how unsure a fine-tuned run is of each; () without one
    unlabelled: tuple[str, ...] = ()  # classes that no labelled mask shows

    @property
    def folder(self) -> Path:
        """Of the images as a network is to read them."""
        bands = self.out / BANDS
        return bands if bands.is_dir() else self.out / "images"


def select(config: SelectConfig, out: str | Path, quiet: bool = False) -> Selected:
    """Choose `count` images of the pool and write them into the new folder `out`.

    There are `images/` (as PNG, turned upright, so that masks drawn on them fit), `selected.json`, `labels.yaml` for a
    data set whose masks are all there, `sheet.png` and `map.png`. Of bands the PNG is what a person draws on, and
    `bands/` holds them all, for the network. Raises UserError for a folder that exists, an image that cannot be read,
    and a pool without images that are left to label.
    """
    out = user_path(out)
    if out.exists():
        raise UserError(f"--out {out}: exists already; name a new folder")
    models = _models(config)
    config = read_as(config, model_of(config.init[0] if config.init else None, config.model).channels)
    pool = config.data.pool
    for part, dataset in config.data:
        if dataset is not None:
            check_images(f"data.{part}", dataset)
    tell_notes(dict(config.data), quiet=quiet)
    names = mask_names(pool)
    trained = range_of(read_encoder_info(config.init[0])) if config.init else None
    say_other_ranges(dict(config.data), trained, quiet=quiet)
    if models and config.data.labelled is None:
        say("data.labelled: not given, so images that are labelled already may be chosen again", quiet)
    both = Several((pool,) if config.data.labelled is None else (pool, config.data.labelled))
    encoder = open_encoder(config.init[0] if config.init else None, config.model)
    left_out = _scored_too(config)
    device = choose_device(config.device)
    seen = describe(encoder, both, config.reading, device)
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
    foreseen = foresee(models, pool, config.reading, device) if models else None
    return _write(config, out, names, seen, choice, left_out, foreseen)


def _models(config: SelectConfig) -> list[Model]:
    """Those of `init`; none of one that is a pretraining or a file of weights."""
    others = [path for path in config.init if not holds_model(path)]
    if len(config.init) > 1 and others:
        raise UserError(f"init: {others[0]} is no fine-tuned run; name one run, or several seeds of one fine-tuning")
    return [] if others else load_models(config.init)


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
    foreseen: Foreseen | None,
) -> Selected:
    pool = config.data.pool
    chosen = list(choice.indices)
    count = len(pool)
    labelled = list(range(count, len(seen.images)))
    like = selection.nearest(seen.images[:count], seen.images[chosen + labelled])
    entries: list[dict[str, Any]] = []
    sheet: list[np.ndarray] = []
    with files.naming(out):
        out.mkdir(parents=True)
    for place, (index, gain) in enumerate(zip(chosen, choice.gains, strict=True)):
        alike = np.flatnonzero(like == place)
        entry = {"name": pool.name(index), "file": f"images/{names[index]}", "share_of_pool": len(alike) / count}
        entries.append({**entry, "gain": gain, **_foreseen_of(index, foreseen)})
        picture = pool.image(index).image
        images.write_image(out / "images" / names[index], images.composite(picture))
        if picture.shape[-1] not in (1, RGB):
            whole = (out / BANDS / names[index]).with_suffix(".npy")
            with files.naming(whole):
                whole.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(whole, images.array_bytes(picture))
        if place < ROWS_SHOWN:
            shown = [picture, *(pool.image(own).image for own in _others(seen.images, index, alike))]
            sheet += _strip(entries[-1], shown)
    images.write_image(out / "sheet.png", np.vstack(sheet))
    plane = seen.images[:, :2]
    groups = {"chosen": chosen, "labelled": labelled, "pool": [*range(count)]}
    figure = charts.draw_map({name: plane[own] for name, own in groups.items() if own})
    files.write_atomic(out / "map.png", svg.to_png(figure))
    listed = tuple(entry["name"] for entry in entries)
    covered = choice.covered + sum(choice.gains)
    classes = _classes(config.data.labelled, foreseen)
    record = {
        "images": entries,
        "covered_before": choice.covered,
        "covered": covered,
        "left_out_as_scored": sorted(pool.name(index) for index in left_out),
        **({"classes": classes} if classes else {}),
        "config": config.dump(),
    }
    files.write_atomic(out / "labels.yaml", Named(labels=Labels(names=listed)).to_yaml().encode())
    files.write_atomic(out / "selected.json", files.json_bytes(record))
    return Selected(
        listed,
        tuple(entry["share_of_pool"] for entry in entries),
        choice.covered,
        covered,
        out,
        tuple(entry["uncertain"] for entry in entries if "uncertain" in entry),
        tuple(name for name, own in classes.items() if own.get("labelled_pixels") == 0),
    )


def _foreseen_of(index: int, foreseen: Foreseen | None) -> dict[str, Any]:
    """What is said of an image of the pool that a fine-tuned run has looked at."""
    if foreseen is None:
        return {}
    predicted = dict(zip(foreseen.class_names, foreseen.shares[index].tolist(), strict=True))
    differ = {} if foreseen.differ is None else {"seeds_differ": float(foreseen.differ[index])}
    return {"uncertain": float(foreseen.uncertain[index]), **differ, "predicted": predicted}


def _classes(labelled: Dataset | None, foreseen: Foreseen | None) -> dict[str, dict[str, float]]:
    """Of each class the pixels of the labelled masks, where there are any, and its share of what is predicted."""
    classes: dict[str, dict[str, float]] = {}
    if labelled is not None and labelled.class_names and labelled.label(0) is not None:
        counts = pixel_counts(labelled)[0].tolist()
        classes = {name: {"labelled_pixels": n} for name, n in zip(labelled.class_names, counts, strict=True)}
    if foreseen is not None:
        for name, share in zip(foreseen.class_names, foreseen.shares.mean(axis=0).tolist(), strict=True):
            classes.setdefault(name, {})["predicted_share_of_pool"] = share
    return classes


def _others(features: np.ndarray, index: int, alike: np.ndarray) -> list[int]:
    """Some of those that an image stands for, from the most to the least alike."""
    apart = ((features[alike] - features[index]) ** 2).sum(axis=1)
    others = [own for own in alike[np.argsort(apart, kind="stable")].tolist() if own != index]
    return others[:: max(1, len(others) // OTHERS_SHOWN)][:OTHERS_SHOWN]


def _strip(entry: Mapping[str, Any], pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A row of the sheet, below its caption: a chosen image, then others that it stands for."""
    white = np.full((PANEL, PANEL, 3), 255, dtype=np.uint8)
    shown = [panels.boxed(picture, PANEL) for picture in pictures]
    row = panels.grid([shown + [white] * (1 + OTHERS_SHOWN - len(shown))])
    text = f"{entry['name']}: stands for {entry['share_of_pool'] * 100:.0f} % of the pool"
    text += f"; uncertain: {entry['uncertain']:.2f}" if "uncertain" in entry else ""
    return [panels.caption(text, row.shape[1]), row]
