"""`ssl-seg evaluate`: the scores of a fine-tuned model on a labelled data set, with all that is behind them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, SerializeAsAny, SerializerFunctionWrapHandler, model_serializer
from torch import nn

from ssl_seg import files, images
from ssl_seg.config import Config, PathText, UserError, known_to_0_1, user_path
from ssl_seg.data.splits import manifest
from ssl_seg.data.workers import TIMEOUT
from ssl_seg.datasets import Dataset
from ssl_seg.images import Size
from ssl_seg.leaks.guard import LeakError, Leaks, Question, check
from ssl_seg.models import image_channels_of
from ssl_seg.runs.folder import Records, beside, origin
from ssl_seg.runs.lock import hold
from ssl_seg.runs.schema import read_checked
from ssl_seg.scores import Average, SegmentationScores
from ssl_seg.stages.panels import prediction_panel, write_scores
from ssl_seg.stages.scoring import (
    Also,
    Looks,
    Measured,
    Scored,
    Statistics,
    TemperatureField,
    looks_at,
    measure,
    temperature_at,
)
from ssl_seg.stages.setup import ReadingConfig, as_trained, check_images, tell_notes
from ssl_seg.stages.tiles import Tiles
from ssl_seg.training.processes import DeviceName, choose_device
from ssl_seg.weights.export import load_model, range_of, read_model_info, temperature_of

SINCE_0_1 = ("flips", "statistics", "averages", "contours", "tiles", "temperature")
OF_LABELLED = ("labelled", "sha256_of_labelled")  # what split.json says of the labelled images


class EvaluateData(Config):
    test: SerializeAsAny[Dataset]  # images with masks


class EvaluateConfig(ReadingConfig):
    """`ssl-seg evaluate model=runs/a data.test.type=camvid ...`"""

    model: PathText  # a run folder or its model/
    data: EvaluateData
    # Whether each image is looked at mirrored too, and the mean of both answers is scored: twice the time, and a score
    # that is never ranked with one without. Off: then a score here is as that of the run itself.
    flips: bool = False
    # Of batch norm, and of the batch's share in a switch norm. running: the averages of training. image: those of the
    # image at hand, as a network that was trained on single images has always had them; never ranked with the others.
    statistics: Statistics = "running"
    # Recall, specificity, precision and others as averages over the classes, for a comparison with published tables.
    averages: tuple[Average, ...] = ()
    # Boundary IoU and the 95th percentile of the Hausdorff distance of each class, and a table with a row for each
    # image and class. Off, since a photograph of 480 x 360 with eleven classes takes some 45 ms more.
    contours: bool = False
    # Look at an image larger than a tile tile by tile, as `predict` does; never ranked with scores of whole images.
    # None: whole.
    tiles: Tiles | None = None
    # Also tell how good the shares are when the logits are divided by this: val takes the number that the run's
    # validation images gave. No class changes by it. None: the shares as they are, which is what `predict` gives too.
    temperature: TemperatureField = None
    workers: int = Field(default=2, ge=0)  # processes that read images
    worker_timeout: PositiveFloat = TIMEOUT  # seconds that one may take over an image
    device: DeviceName = "auto"  # auto: a GPU if there is one
    leaks: Leaks = Leaks()

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return known_to_0_1(self, dump(self), since=SINCE_0_1)


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` gives back and writes to its folder."""

    scores: SegmentationScores
    class_names: tuple[str, ...]
    out: Path | None
    measured: Measured
    temperature: float | None = None  # of the figures that are tempered
    is_in_sample: bool = False  # whether it was fitted on these very images


def evaluate(config: EvaluateConfig, out: str | Path | None = None) -> Evaluated:
    """Score a fine-tuned model on a labelled data set; `out` receives a result that `compare` reads.

    An `out` that a kill has left half done is taken again. Raises UserError for one that holds anything else, before
    any work is done, and LeakError where images of the data set are among those that the model's run was trained on.
    """
    model, resize = load_model(config.model)
    model = model.to(choose_device(config.device))
    data = config.data.test
    if data.class_names != model.class_names:
        raise UserError(
            f"data.test: has the classes {', '.join(data.class_names) or '(none)'}, "
            f"the model of {config.model} has {', '.join(model.class_names)}; name the model's classes in that order"
        )
    check_images("data.test", data)
    data = as_trained("test", data, range_of(read_model_info(config.model)), image_channels_of(model))
    config = config.model_copy(update={"data": EvaluateData(test=data)})  # as it is recorded, and read again by
    tell_notes({"test": data}, labelled=("test",))
    is_plain = not config.flips and config.statistics == "running"
    temperature = temperature_at(config.temperature, config.model, is_plain)
    if config.tiles is not None:
        config.tiles.refuse_one_size(resize)
    with _opened(config, out) as place:
        _guard(config, place)
        if config.tiles is not None:
            config.tiles.tell_norms(model)
        looks = looks_at(model, config.statistics, config.flips, config.tiles)
        also = Also(temperature=temperature, contours=config.contours)
        found = measure(looks.of(model), data, resize, config.reading, also=also)
        if out is not None:
            _write(place, config, model, looks, found, resize, temperature)
    fitted = temperature_of(read_model_info(config.model)) if config.temperature == "val" else None
    return Evaluated(
        scores=found.confusions.scores(),
        class_names=model.class_names,
        out=None if out is None else place.folder,
        measured=found,
        temperature=temperature,
        is_in_sample=fitted is not None and fitted.split == found.confusions.digest,
    )


@contextmanager
def _opened(config: EvaluateConfig, out: str | Path | None) -> Iterator[Records]:
    """The folder to write, held; where none is named a temporary one, which stays only if a leak is to be looked at."""
    if out is None:
        folder, stays = Path(tempfile.mkdtemp(prefix="ssl_seg-evaluate-")), False
        try:
            yield Records(folder)
        except LeakError:
            stays = True
            raise
        finally:
            if not stays:
                shutil.rmtree(folder, ignore_errors=True)
        return
    place = Records(user_path(out))
    with files.naming(place.folder):
        if not _is_free(place):
            raise UserError(f"--out {out}: exists already; name a new folder")
    with hold(place.folder):
        place.write_json("run.json", _record(config, "running"))
        yield place


def _is_free(place: Records) -> bool:
    """Whether nothing is there, or only what an evaluation of ours that did not end has left."""
    if not place.folder.is_dir():
        return not place.folder.exists()
    record = place.read_json("run.json")
    if record is not None:
        return record.get("stage") == "evaluate" and record.get("status") == "running"
    return place.is_new()


def _record(config: EvaluateConfig, status: str) -> dict[str, Any]:
    """run.json; where the model comes from stays known when its run is gone."""
    return {"stage": "evaluate", "status": status, "config": config.dump(), "origin": origin(config.model)}


def _guard(config: EvaluateConfig, place: Records) -> None:
    """Compare what is scored with all that the model's run was trained on, as that has stored it."""
    question = Question({}, {"test": Scored.all_of(config.data.test)}, config.leaks, {"model": config.model})
    check(place, question, config.reading)


def _write(
    place: Records,
    config: EvaluateConfig,
    model: nn.Module,
    looks: Looks,
    found: Measured,
    resize: Size | None,
    temperature: float | None,
) -> None:
    data = config.data.test
    images.write_image(place.folder / "predictions.png", prediction_panel(looks.of(model), data, resize))
    place.write_json("data.json", {"test": manifest(data)})
    path = beside(config.model, "split.json")
    if path is not None:  # what tells which runs are a pair
        split = read_checked(path)
        place.write_json("split.json", {name: split[name] for name in OF_LABELLED if name in split})
    scored = {"test": (data, found)}
    write_scores(place, model, scored, resize, None, looks, config.averages, temperature)
    place.write_json("run.json", _record(config, "finished"))  # last: until then the folder may be taken again
