"""Masks for images: class ids as PNG files, and the same in colour over the image for a person.

Beside them, where they are asked for, grey pictures: the share of each class, and how unsure the network is of a pixel;
and a table of objects.
An image that is too large to be looked at whole is predicted in tiles.

A folder of masks is made in one go or in several: an image that cannot be read, or not be predicted, is left out and
named at the end, and the same command makes what is missing.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import (
    Field,
    PositiveFloat,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ssl_seg import files, images
from ssl_seg.config import Config, PathTexts, UserError, known_to_0_1, user_path
from ssl_seg.data.loading import Whole, pack
from ssl_seg.data.splits import digest_of, names_of
from ssl_seg.data.workers import TIMEOUT, collected
from ssl_seg.datasets import Dataset, Example
from ssl_seg.figures import panels
from ssl_seg.runs.folder import Records
from ssl_seg.runs.lock import hold
from ssl_seg.stages.looking import ONE_VIEW, Looker, Views, check_known
from ssl_seg.stages.objects import ObjectsField, write_objects
from ssl_seg.stages.scoring import Statistics, TemperatureField, temperature_at
from ssl_seg.stages.setup import ReadingConfig, as_trained, check_images, tell_notes
from ssl_seg.stages.tiles import Block, Tiles
from ssl_seg.stages.uncertainty import DropoutSampling, entropy, load_models
from ssl_seg.terminal import say, watch_signals
from ssl_seg.training.processes import DeviceName, choose_device
from ssl_seg.weights.export import channels_of, range_of, read_model_info

RECORD = "classes.json"  # of a folder of masks: the classes, the model, and whether all is there
MADE = "made.jsonl"  # a line for each mask: the image's name, and a digest of its pixels
ASKED = (
    "uncertainty",
    "statistics",
    "tiles",
    "views",
    "threshold",
    "temperature",
)  # keys that change masks or shares; noted where they are not as usual
MASKS, OVERLAYS, UNCERTAINTY, ENTROPY = "masks", "overlays", "uncertainty", "entropy"  # folders
LONGEST_CLASS = 80  # letters of a class in a folder's name: four bytes each at most
LONGEST_NAME = 255  # bytes of a file's name on the usual disks
SHOWN = 20  # lines about images that cannot be read: a screenful

SINCE_0_1 = (
    "probabilities",
    "uncertainty",
    "entropy",
    "threshold",
    "temperature",
    "statistics",
    "views",
    "objects",
    "tiles",
)


class PredictData(Config):
    images: SerializeAsAny[Dataset]  # masks, if it has any, are not looked at


class PredictConfig(ReadingConfig):
    """`ssl-seg predict model=runs/a data.images.type=folder data.images.images=photos --out masks`"""

    # A run folder or its model/. Of several, such as seeds of one fine-tuning, the mean of their shares decides.
    model: PathTexts = Field(min_length=1)
    data: PredictData
    overlays: bool = True  # also write overlays/, colours laid over each image
    probabilities: bool = False  # also write probabilities/ID_CLASS/, each class's share: black is 0, white 1
    # Sample the network with its dropout on: the class is the mean's, and uncertainty/ has how far the samples differ,
    # 0 (black) to 1 (white). None: one prediction without dropout. As many times the time as there are samples.
    uncertainty: DropoutSampling | None = None
    entropy: bool = False  # also write entropy/, that of the shares: black where it is sure, white where all are alike
    # A class by its name and the share from 0 to 1 from which on it is taken, where masks are to find all of a rare one
    # (below a half), or only what is sure (above). `thresholded` has the rule.
    threshold: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default={})
    # Divide the logits by this before shares are made of them: above 1 it makes them less sure. val takes the number
    # that the run's validation images gave. Probabilities, entropy and thresholds go by it, and no mask without a
    # threshold. None: the shares as the network has them, for what val gave may not hold for images of another kind.
    temperature: TemperatureField = None
    statistics: Statistics = "running"  # of batch norm, as for `evaluate`
    views: Views = Views()  # mirrored and scaled images are looked at too, for as many times the time
    # List every object of each class in objects.csv, and how many there are in objects.json; true takes the defaults.
    objects: ObjectsField = None
    # Look at an image larger than a tile tile by tile. None: whole, and in tiles where the memory of a CPU may not do.
    tiles: Tiles | None = None
    workers: int = Field(default=2, ge=0)  # processes that read images
    worker_timeout: PositiveFloat = TIMEOUT  # seconds; a worker that has not handed over its image by then ends it
    device: DeviceName = "auto"  # auto: a GPU if there is one

    @model_validator(mode="after")
    def _temperature_is_used(self) -> Self:
        if self.temperature is not None and not self.wants_shares:
            raise ValueError(
                "temperature: changes no mask; give probabilities=true, entropy=true or a threshold, which go by it"
            )
        return self

    @property
    def wants_shares(self) -> bool:
        """Whether more is written than the class of the largest."""
        return self.probabilities or self.entropy or bool(self.threshold)

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped = known_to_0_1(self, dump(self), since=SINCE_0_1)
        return {**dumped, "model": _one_or_all(self.model)}


@dataclass(frozen=True)
class Predicted:
    """Where the masks are: `out/masks/<name>.png`, one for each image; of stacks also `out/masks/<stack>.tif`."""

    out: Path
    names: tuple[str, ...]
    class_names: tuple[str, ...]
    made: int  # images that this call has looked at; others had their masks
    seconds: float  # for these, from first to last, with reading and writing
    looking: float  # seconds of it that the network took
    objects: dict[str, int] | None = None  # how many there are of each class, where they were asked for


def predict(config: PredictConfig, out: str | Path) -> Predicted:
    """Predict every image into a folder, at the image's own size.

    The folder is new, or a former call with this model has left it without some masks: then those of unchanged images
    are kept. Raises UserError for any other folder before any work is done, and at the end, when all others have their
    masks, for images that cannot be read, or not be predicted; `config.Interrupted` after a signal.
    """
    check_images("data.images", config.data.images)
    ranges = [range_of(read_model_info(path)) for path in config.model]
    if any(own != ranges[0] for own in ranges):
        raise UserError("model: these were trained on images of different ranges; predict with one at a time")
    counts = {channels_of(path, read_model_info(path)) for path in config.model}
    if len(counts) > 1:
        raise UserError("model: these take images of different numbers of channels; predict with one at a time")
    dataset = as_trained("images", config.data.images, ranges[0], counts.pop())
    tell_notes({"images": dataset})
    names = mask_names(dataset)
    with watch_signals(), _opened(config, user_path(out)) as place:
        models = load_models(config.model, "model")
        class_names = models[0][0].class_names
        check_known("threshold", config.threshold, class_names)
        check_known("objects.classes", config.objects.classes if config.objects else (), class_names)
        is_plain = len(models) == 1 and config.views == ONE_VIEW and config.uncertainty is None
        is_plain = is_plain and config.statistics == "running"
        temperature = temperature_at(config.temperature, config.model[0], is_plain)
        device = choose_device(config.device)
        looker = Looker.of(models, device, config.statistics, config.tiles, config.views, config.uncertainty)
        colours = panels.palette(len(class_names))
        made = _made_before(place.folder / MADE)
        unread: dict[str, str] = {}
        count, looking, started = 0, 0.0, time.perf_counter()
        whole = Whole(dataset, with_labels=False)
        one_by_one = [[index] for index in range(len(dataset))]  # images may differ in size
        for (index,), packed in zip(one_by_one, collected(whole, one_by_one, config.reading, pack), strict=True):
            if isinstance(packed, UserError):
                unread[dataset.name(index)] = str(packed)
                continue
            original = packed.image[0].permute(1, 2, 0).numpy()  # (1, C, H, W) -> (H, W, C)
            digest = digest_of(Example(original, None, ""))
            written = _files(config, class_names, place.folder, names[index])
            others = [path for kind, path in written.items() if kind != MASKS]
            if made.get(names[index]) == digest and _is_whole(written[MASKS]) and all(map(Path.is_file, others)):
                continue
            begun = time.perf_counter()
            try:
                blocks = looker.blocks(original, dataset.name(index), shares=config.wants_shares)
                pictures = _joined(config, blocks, class_names, original.shape[:2], temperature)
            except UserError as error:  # too large for the memory, too small for the network: others may fit
                name = dataset.name(index)
                unread[name] = f"{images.show_path(name)}: {error}"
                continue
            looking += time.perf_counter() - begun
            count += 1
            ids = pictures.pop(MASKS)
            images.write_mask(written[MASKS], ids, colours)
            if config.overlays:
                pictures[OVERLAYS] = panels.overlay(original, ids, colours)
            for kind, path in written.items():
                if kind != MASKS:
                    images.write_image(path, pictures[kind])
            _note(place.folder / MADE, names[index], digest)
        seconds = time.perf_counter() - started
        if not unread:
            dataset.join_masks([place.folder / MASKS / name for name in names], place.folder / MASKS)
            if config.overlays:
                dataset.join_overlays([place.folder / OVERLAYS / name for name in names], place.folder / OVERLAYS)
        objects = None
        if config.objects is not None:
            named = zip(map(dataset.name, range(len(dataset))), names, strict=True)
            masks = {name: place.folder / MASKS / mask for name, mask in named if name not in unread}
            objects = write_objects(place, masks, class_names, config.objects)
        place.write_json(RECORD, {**_record(config), "finished": not unread, "unread": unread})
        if unread:
            raise UserError(_say_unread(unread, len(dataset), place.folder))
    return Predicted(place.folder, names, class_names, count, seconds, looking, objects)


def thresholded(shares: torch.Tensor, threshold: Mapping[int, float]) -> torch.Tensor:
    """Class ids `(H, W)` of shares `(K, H, W)`, by the least share of some classes.

    A class is taken where its share reaches its threshold. Where several do, the one whose share is the largest
    multiple of its threshold; of equal ones the first. Where none does, the largest share of the other classes decides,
    and of all if each has a threshold.
    """
    named = sorted(threshold)
    others = [number for number in range(len(shares)) if number not in threshold] or list(range(len(shares)))
    least = torch.tensor([threshold[number] for number in named], device=shares.device)
    multiple, taken = (shares[named] / least[:, None, None]).max(dim=0)
    rest = torch.tensor(others, device=shares.device)[shares[others].argmax(dim=0)]
    return torch.where(multiple >= 1, torch.tensor(named, device=shares.device)[taken], rest)


def tempered(shares: torch.Tensor, temperature: float | None) -> torch.Tensor:
    """Shares `(K, H, W)` as they are when the logits that they come from are divided by a temperature.

    They are the softmax of log(share) / temperature, so this holds for a mean of shares too, and no two of a pixel
    change places.
    """
    return shares if temperature is None else (shares.log() / temperature).softmax(dim=0)


def _drawn(
    config: PredictConfig, class_names: Sequence[str], figures: torch.Tensor, temperature: float | None
) -> dict[str, np.ndarray]:
    """The pictures of figures as `Looker.blocks` has them, by the words of `_files`."""
    plain = figures if config.uncertainty is None else figures[:-1]
    shares = tempered(plain, temperature)
    grey = {} if config.uncertainty is None else {UNCERTAINTY: figures[-1]}
    grey |= {ENTROPY: entropy(shares[None])[0]} if config.entropy else {}
    grey |= {str(number): share for number, share in enumerate(shares)} if config.probabilities else {}
    pictures = {kind: (255 * values).round().byte().cpu().numpy() for kind, values in grey.items()}
    threshold = {class_names.index(name): least for name, least in config.threshold.items()}
    ids = thresholded(shares, threshold) if threshold else plain.argmax(dim=0)
    return {MASKS: ids.byte().cpu().numpy(), **pictures}


def _joined(
    config: PredictConfig,
    blocks: Iterable[Block],
    class_names: Sequence[str],
    size: Sequence[int],
    temperature: float | None,
) -> dict[str, np.ndarray]:
    """The pictures of an image of `size` (H, W), of the blocks that it was looked at in."""
    pictures: dict[str, np.ndarray] = {}
    for block in blocks:
        for kind, part in _drawn(config, class_names, block.values, temperature).items():
            whole = pictures.setdefault(kind, np.empty(tuple(size), dtype=np.uint8))
            whole[block.rows, block.columns] = part
    return pictures


def _files(config: PredictConfig, class_names: Sequence[str], folder: Path, name: str) -> dict[str, Path]:
    """Where the pictures of one image are written, by the words of `_drawn`."""
    kinds = {MASKS: MASKS}
    if config.overlays:
        kinds[OVERLAYS] = OVERLAYS
    if config.probabilities:  # a class may be called as no folder can be
        plain = [re.sub(r"[^\w-]", "_", own)[:LONGEST_CLASS] for own in class_names]
        kinds |= {str(number): f"probabilities/{number}_{own}" for number, own in enumerate(plain)}
    if config.uncertainty is not None:
        kinds[UNCERTAINTY] = UNCERTAINTY
    if config.entropy:
        kinds[ENTROPY] = ENTROPY
    return {kind: folder / place / name for kind, place in kinds.items()}


@contextmanager
def _opened(config: PredictConfig, out: Path) -> Iterator[Records]:
    """The folder to write, held by this process alone."""
    place = Records(out)
    record = _record(config)
    with files.naming(out):
        if out.exists() and not place.is_new():
            _check_continues(place, record)
    with hold(out):
        place.write_json(RECORD, {**record, "finished": False})
        yield place


def _record(config: PredictConfig) -> dict[str, Any]:
    """What the masks come from."""
    infos = [read_model_info(path) for path in config.model]
    return {
        "classes": infos[0]["class_names"],
        "model": _one_or_all(config.model),
        "sha256": _one_or_all([info.get("sha256") for info in infos]),
        "resize": _one_or_all([info.get("resize") for info in infos]),
        **{key: value for key, value in config.dump().items() if key in ASKED},
    }


def _one_or_all(values: Sequence[Any]) -> Any:
    """What the record has of models: of a single one no list."""
    return values[0] if len(values) == 1 else list(values)


def _check_continues(place: Records, record: Mapping[str, Any]) -> None:
    """Raise UserError unless the folder lacks masks that this model would have made."""
    former = place.read_json(RECORD) if place.folder.is_dir() else None
    if former is None or former.get("finished") is not False:
        raise UserError(f"--out {place.folder}: exists already; name a new folder")
    if any(former.get(key) != record[key] for key in ("sha256", "resize", "classes")):
        raise UserError(
            f"--out {place.folder}: holds masks of another model ({former.get('model')}, or of other weights in it); "
            "name a new folder"
        )
    for key in ASKED:
        if former.get(key) != record.get(key):
            raise UserError(
                f"--out {place.folder}: holds masks that were made with another {key}; give that, or name a new folder"
            )


def _made_before(path: Path) -> dict[str, str]:
    """The digest of the image that each mask was made of. A kill may have cut a line, whose mask is then made again."""
    made = {}
    with files.naming(path, "cannot be read"):
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            noted = json.loads(line)
            made[noted["mask"]] = noted["image"]
    return made


def _note(path: Path, mask: str, digest: str) -> None:
    with files.naming(path), path.open("a") as noted:
        noted.write(json.dumps({"mask": mask, "image": digest}) + "\n")


def _is_whole(mask: Path) -> bool:
    """A power cut may leave an empty file under its name."""
    try:
        images.read_mask(mask)
    except UserError:
        return False
    return True


def _say_unread(unread: Mapping[str, str], count: int, folder: Path) -> str:
    """The line at the end, after one for each image."""
    for line in list(unread.values())[:SHOWN]:
        say(line)
    if len(unread) > SHOWN:
        say(f"and {len(unread) - SHOWN} more: {folder / RECORD} has all of them")
    first = images.show_path(next(iter(unread)))
    return (
        f"data.images: {len(unread)} of {count} images cannot be predicted and have no mask ({first} first); the "
        f"others have theirs in {folder / 'masks'}: mend or remove them, and the same command does the rest"
    )


def mask_names(dataset: Dataset) -> tuple[str, ...]:
    """The masks' relative paths: the images' with .png.

    Raises UserError where two images would share one, and for names that no file in the folder can have.
    """
    names = [PurePosixPath(name) for name in names_of(dataset)]
    stems = [name.with_suffix("") if name.suffix.lower() in images.IMAGE_SUFFIXES else name for name in names]
    masks = [f"{stem}.png" for stem in stems]
    folders = {str(folder) for mask in masks for folder in PurePosixPath(mask).parents}
    counts = Counter(masks)
    for name, mask in zip(names, masks, strict=True):
        problem = None
        if counts[mask] > 1:
            others = (other for other, same in zip(names, masks, strict=True) if same == mask and other != name)
            problem = f"would be given the same mask as {images.show_path(str(next(others, name)))}"
        elif mask in folders:
            problem = "would be given a mask with the name of a folder of masks"
        elif name.is_absolute() or ".." in name.parts:
            problem = "would be given a mask outside of --out: a data set's names are relative paths without .."
        elif max(len(os.fsencode(part)) for part in PurePosixPath(mask).parts) > LONGEST_NAME:
            problem = f"would be given a mask whose name has more than {LONGEST_NAME} bytes"
        if problem:
            raise UserError(f"data.images: {images.show_path(str(name))} {problem}; rename it")
    return tuple(masks)
