"""Scores: segmentation from the confusion matrix of every image, pretext tasks from fixed views of held-out images.

Each process takes the images `rank::world`, without padding, so no image counts twice; what they have counted is shared
once at the end.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg import files, images
from ssl_seg.config import Config, UserError, load
from ssl_seg.data.loading import Augment, Examples, Packed, Views, Whole, hold_out, loader, manifest, pack, subset_of
from ssl_seg.datasets import Dataset
from ssl_seg.evidence.passport import passport_of
from ssl_seg.figures import panels
from ssl_seg.leaks.guard import LeakError, Leaks, Question, check
from ssl_seg.metrics import ConfusionMatrix, near_boundaries
from ssl_seg.models import ModelConfig, SegmentationModel
from ssl_seg.runs.folder import LOCK, RunFolder, origin
from ssl_seg.runs.writer import hold
from ssl_seg.scores import IMAGES_FILE, ImageConfusions, Row, SegmentationScores, image_confusion_bytes
from ssl_seg.tasks import MultiTask, Task, evaluating, make_views
from ssl_seg.training.loop import Processes
from ssl_seg.weights.export import load_model_weights, read_model_info

NUM_PICTURES = 4
EXTREMES = ("worst", "best")
NUM_EXTREMES = 4  # of each: a screenful
OF_LABELLED = ("labelled", "sha256_of_labelled")  # what split.json says of the labelled images
Size = tuple[int, int]
DeviceName = Literal["auto", "cpu"]


def image_confusions(
    model: nn.Module,
    examples: Examples,
    resize: Size | None = None,
    workers: int = 0,
    processes: Processes | None = None,
) -> ImageConfusions:
    """What `model` (RGB in [0, 1] to logits) takes each labelled example for, at the label's own resolution.

    Images are brought to `resize` (H, W) first, where given, and logits brought back bilinearly. One image at a time:
    a data set may hold images of many sizes. Every process gets all images, in the data set's order.
    """
    num_classes = len(examples.class_names)
    rank, world, device = _place(model, processes)
    mine = [[index] for index in range(rank, len(examples), world)]
    rows: list[Row] = []
    with evaluating(model):
        for (index,), packed in zip(mine, loader(Whole(examples, resize), mine, workers), strict=True):
            name = packed.names[0]
            if packed.label is None:
                raise UserError(f"{name}: has no mask, so it cannot be scored; name a labelled data set")
            ids = predict_ids(model, packed.to(device).image, packed.label.shape[-2:])
            rows.append(count_image(index, packed, ids.cpu(), num_classes))
    if processes is not None:
        rows = processes.gather(rows)
    return ImageConfusions.from_rows(examples.class_names, rows)


def count_image(index: int, packed: Packed, ids: Tensor, num_classes: int) -> Row:
    """The confusion matrix of one example's class ids `(1, H, W)`, with how much of it lies near class boundaries."""
    whole, near = ConfusionMatrix(num_classes), ConfusionMatrix(num_classes)
    whole.update(packed.label, ids)
    where = torch.from_numpy(near_boundaries(packed.label[0].numpy()))
    near.update(packed.label[0, where], ids[0, where])
    pixels = whole.counts.flatten().numpy()
    cells = pixels.nonzero()[0]
    return Row(index, packed.names[0], cells, pixels[cells], near.counts.flatten().numpy()[cells], packed.digests[0])


def predict_ids(model: nn.Module, image: Tensor, size: Size) -> Tensor:
    """Class ids `(B, *size)` int64 for images `(B, 3, H, W)` in [0, 1]."""
    logits = model(image)
    if tuple(logits.shape[-2:]) != tuple(size):
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return logits.argmax(dim=1)


def score_tasks(
    module: MultiTask,
    examples: Examples,
    augment: Augment,
    resize: Size | None = None,
    batch_size: int = 16,
    workers: int = 0,
    processes: Processes | None = None,
) -> dict[str, float]:
    """Each pretext task's loss and metrics on held-out images, `<task>/<figure>`: centre crops and fixed noise."""
    tasks = _pretext(module)
    rank, world, device = _place(module, processes)
    indices = list(range(rank, len(examples), world))
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    sums: dict[str, Tensor] = {}
    with evaluating(module):
        for packed in loader(Views(examples, augment, resize), batches, workers):
            views = make_views(tasks, {"pool": packed.to(device)})
            predictions = module.predict(views)
            for name, view in views.items():
                prediction = predictions[name].float()
                figures = {"loss": tasks[name].loss(prediction, view), **tasks[name].metrics(prediction, view)}
                for figure, values in figures.items():
                    key = f"{name}/{figure}"
                    sums[key] = sums.get(key, torch.zeros(2, device=device)) + _sum_and_count(values, figure != "loss")
    if processes is not None:
        # A process without an image knows no figures; the names come from rank 0, which has the first image.
        keys = processes.from_first(list(sums))
        mine = torch.stack([sums.get(key, torch.zeros(2, device=device)) for key in keys])
        sums = dict(zip(keys, processes.sum(mine), strict=True))
    return {key: (total / count).item() for key, (total, count) in sums.items()}


def task_pictures(
    module: MultiTask, examples: Examples, augment: Augment, resize: Size | None = None, count: int = NUM_PICTURES
) -> dict[str, np.ndarray]:
    """A sheet per task that can be drawn, uint8 `(H, W, 3)`: a row per image of input | prediction | target."""
    tasks = _pretext(module)
    chosen = _spread(examples, count)
    sheets = {}
    with evaluating(module):
        packed = next(loader(Views(examples, augment, resize), [chosen], 0))
        views = make_views(tasks, {"pool": packed.to(_device(module))})
        predictions = module.predict(views)
        for name, view in views.items():
            drawn = tasks[name].render(predictions[name].float(), view)
            target = tasks[name].render_target(view)
            columns = [panels.to_uint8(panel) for panel in (view.input, drawn, target) if panel is not None]
            if drawn is not None:
                sheets[name] = panels.grid([[column[row] for column in columns] for row in range(len(chosen))])
    return sheets


def prediction_panel(
    model: nn.Module, examples: Examples, resize: Size | None = None, count: int = NUM_PICTURES
) -> np.ndarray:
    """A row per image of image | prediction | truth, with the classes' colours below, uint8 `(H, W, 3)`."""
    colours = panels.palette(len(examples.class_names))
    chosen = _spread(examples, count)
    rows = []
    with evaluating(model):
        for packed in loader(Whole(examples, resize), [[index] for index in chosen], 0):
            image = panels.to_uint8(packed.image.float() / 255)[0]
            ids = predict_ids(model, packed.to(_device(model)).image, image.shape[:2])[0]
            truth = images.resize_mask(packed.label[0].numpy(), image.shape[:2])
            rows.append([image, colours[ids.cpu().numpy()], colours[truth]])
    sheet = panels.grid(rows)
    return np.vstack([sheet, panels.legend(examples.class_names, colours, sheet.shape[1])])


def write_images(
    folder: Path,
    model: nn.Module,
    parts: Mapping[str, tuple[Examples, ImageConfusions]],
    resize: Size | None = None,
) -> None:
    """Write what is kept of single images: every confusion matrix, and pictures of the worst and best predictions.

    `parts` holds examples and what `image_confusions` found in them, by the part's name: val, test. Former files of
    these names are replaced. `extremes.json` lists a part's pictures: worst first, then from the best on.
    """
    with files.naming(folder):
        (folder / "extremes.json").unlink(missing_ok=True)  # so that it never speaks of other pictures than are there
        for kind in EXTREMES:
            for former in (folder / "pictures").glob(f"[!0-9]*_{kind}_*.png"):  # a number leads those of training
                former.unlink()
    files.write_atomic(folder / IMAGES_FILE, image_confusion_bytes({part: found for part, (_, found) in parts.items()}))
    extremes: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    for part, (examples, found) in parts.items():
        miou = found.per_image_miou()
        for kind, indices in zip(EXTREMES, found.extremes(NUM_EXTREMES), strict=True):
            for number, index in enumerate(indices, start=1):
                picture = f"pictures/{part}_{kind}_{number}.png"
                images.write_image(folder / picture, error_picture(model, examples, index, resize))
                described = {"kind": kind, "name": found.names[index], "miou": float(miou[index]), "picture": picture}
                extremes[part].append(described)
    files.write_atomic(folder / "extremes.json", files.json_bytes(extremes))


def error_picture(model: nn.Module, examples: Examples, index: int, resize: Size | None = None) -> np.ndarray:
    """One example as image | prediction | truth | errors, with the colours of its classes below, uint8 `(H, W, 3)`."""
    packed = pack([Whole(examples, resize)[index]])
    with evaluating(model):
        ids = predict_ids(model, packed.to(_device(model)).image, packed.label.shape[-2:])
    photograph = examples.image(index).image  # as it is on disk: what the network has seen may be too coarse to look at
    return panels.error_row(photograph, packed.label[0].numpy(), ids[0].byte().cpu().numpy(), examples.class_names)


def changed_pictures(
    baseline: RunFolder, other: RunFolder, part: str, names: Sequence[str], device: DeviceName = "auto"
) -> Iterator[np.ndarray]:
    """Of each named image of `part` (val, test): image | truth | `baseline`'s prediction | `other`'s | what changed.

    The data set is that of `other`'s config, so its images have to be where they were, and a plug-in's module imported.
    Raises UserError where a model or an image is not there.
    """
    examples = examples_of(other, part)
    index_of = {examples.name(index): index for index in range(len(examples))}
    gone = [name for name in names if name not in index_of]
    if gone:
        raise UserError(f"{other.folder}: its data.{part} has no image {gone[0]} any more; put the images back")
    models = [load_model(_model_of(run)) for run in (baseline, other)]
    place = choose_device(device)
    for name in names:
        index = index_of[name]
        ids = []
        for model, resize in models:
            packed = pack([Whole(examples, resize)[index]])
            with evaluating(model.to(place)):
                ids.append(predict_ids(model, packed.to(place).image, packed.label.shape[-2:])[0].byte().cpu().numpy())
        photograph = examples.image(index).image
        yield panels.change_row(photograph, packed.label[0].numpy(), *ids, examples.class_names)


def examples_of(run: RunFolder, part: str) -> Examples:
    """The images that the scores of a part of a run are about. Raises UserError where the config cannot be read."""
    data = run.config.get("data", {})
    if data.get(part) is not None:
        return load(Dataset, data[part])
    if part != "val" or data.get("labelled") is None:
        raise UserError(f"{run.folder}: its config has no data.{part}; name runs that were scored on one")
    labelled = load(Dataset, data["labelled"])
    recorded = (run.read("split.json") or {}).get("val")
    return hold_out(labelled)[1] if recorded is None else subset_of(labelled, recorded)


def _model_of(run: RunFolder) -> str | Path:
    """The exported model that was scored: a run's own, or that which an evaluation names."""
    named = run.config.get("model")
    return named if isinstance(named, str) else run.folder


def build_model(config: ModelConfig, class_names: tuple[str, ...]) -> SegmentationModel:
    """A segmentation model with fresh weights."""
    encoder = config.build_encoder()
    head = config.spec(encoder).dense(len(class_names))
    return SegmentationModel(encoder, head, class_names)


def load_model(path: str | Path) -> tuple[SegmentationModel, Size | None]:
    """A fine-tuned model from a run folder or its `model/`, in evaluation mode, and the size (H, W) it wants images in.

    The model eats RGB in [0, 1], `(B, 3, H, W)` at any size. Raises UserError unless every weight is found.
    """
    info = read_model_info(path)
    config = load(ModelConfig, info["config"])
    model = build_model(config.without_pretrained(), tuple(info["class_names"]))
    load_model_weights(model, path)
    resize = tuple(info["resize"]) if info.get("resize") else None
    return model.eval(), resize


class EvaluateData(Config):
    test: SerializeAsAny[Dataset]


class EvaluateConfig(Config):
    """`ssl-seg evaluate model=runs/a data.test.type=camvid ...`"""

    model: str  # a run folder or its model/
    data: EvaluateData
    workers: int = Field(default=2, ge=0)
    device: DeviceName = "auto"
    leaks: Leaks = Leaks()


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` gives back and writes to its folder."""

    scores: SegmentationScores
    class_names: tuple[str, ...]
    out: Path | None


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
    if len(data) == 0:
        raise UserError("data.test: holds no image; name a folder with some")
    with _opened(config, out) as place:
        _guard(config, place)
        found = image_confusions(model, data, resize, config.workers)
        if out is not None:
            _write(place, config, model, found, resize)
    return Evaluated(found.scores(), model.class_names, None if out is None else place.folder)


@dataclass(frozen=True)
class _Place:
    """The folder that an evaluation writes."""

    folder: Path

    def read_json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return files.read_json(path) if path.is_file() else None

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        files.write_atomic(self.folder / name, files.json_bytes(values))


@contextmanager
def _opened(config: EvaluateConfig, out: str | Path | None) -> Iterator[_Place]:
    """The folder to write, held; where none is named a temporary one, which stays only if a leak is to be looked at."""
    if out is None:
        folder, stays = Path(tempfile.mkdtemp(prefix="ssl_seg-evaluate-")), False
        try:
            yield _Place(folder)
        except LeakError:
            stays = True
            raise
        finally:
            if not stays:
                shutil.rmtree(folder, ignore_errors=True)
        return
    place = _Place(Path(out))
    with files.naming(place.folder):
        if not _is_free(place):
            raise UserError(f"--out {out}: exists already; name a new folder")
    with hold(place.folder):
        place.write_json("run.json", _record(config, "running"))
        yield place


def _is_free(place: _Place) -> bool:
    """Whether nothing is there, or only what an evaluation of ours that did not end has left."""
    if not place.folder.is_dir():
        return not place.folder.exists()
    record = place.read_json("run.json")
    if record is not None:
        return record.get("stage") == "evaluate" and record.get("status") == "running"
    return all(entry.name == LOCK or files.is_unfinished(entry) for entry in place.folder.iterdir())


def _record(config: EvaluateConfig, status: str) -> dict[str, Any]:
    """run.json; where the model comes from stays known when its run is gone."""
    return {"stage": "evaluate", "status": status, "config": config.dump(), "origin": origin(config.model)}


def _guard(config: EvaluateConfig, place: _Place) -> None:
    """Compare what is scored with all that the model's run was trained on, as that has stored it."""
    question = Question({}, {"test": config.data.test}, config.leaks, {"model": config.model})
    check(place, question, config.workers)


def _write(
    place: _Place, config: EvaluateConfig, model: SegmentationModel, found: ImageConfusions, resize: Size | None
) -> None:
    data = config.data.test
    write_images(place.folder, model, {"test": (data, found)}, resize)
    images.write_image(place.folder / "predictions.png", prediction_panel(model, data, resize))
    place.write_json("data.json", {"test": manifest(data)})
    split = _split_of(config.model)
    if split is not None:
        place.write_json("split.json", {name: split[name] for name in OF_LABELLED if name in split})
    place.write_json("confusion.json", {"classes": model.class_names, "test": found.total().tolist()})
    place.write_json("result.json", {"test": found.named(), "passport": {"test": passport_of(found, resize).dump()}})
    place.write_json("run.json", _record(config, "finished"))  # last: until then the folder may be taken again


def _split_of(model: str) -> dict[str, Any] | None:
    """The split.json of the run that `model` names by its folder or model/: what tells which runs are a pair."""
    found = (_Place(place).read_json("split.json") for place in (Path(model), Path(model).parent))
    return next((split for split in found if split is not None), None)


def choose_device(name: DeviceName) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def _spread(examples: Examples, count: int) -> list[int]:
    """Indices from the first to the last, evenly apart: neighbours of a clip look alike."""
    return np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(int).tolist()


def _pretext(module: MultiTask) -> Mapping[str, Task]:
    return {name: task for name, task in module.tasks.items() if task.stream == "pool"}


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _place(module: nn.Module, processes: Processes | None) -> tuple[int, int, torch.device]:
    if processes is None:
        return 0, 1, _device(module)
    return processes.rank, processes.world, processes.device


def _sum_and_count(values: Tensor, leave_out: bool) -> Tensor:
    """A figure may be nan where nothing counts, as the PSNR of an empty hole; a loss that is nan has to be seen."""
    counted = values.isfinite() if leave_out else torch.ones_like(values, dtype=torch.bool)
    return torch.stack([torch.where(counted, values, 0.0).sum(), counted.sum().float()])
