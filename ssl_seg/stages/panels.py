"""Pictures of what a network predicts, for run folders and reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ssl_seg import calibration, contours, files, images
from ssl_seg.config import UserError, load
from ssl_seg.data.augment import Augment
from ssl_seg.data.loading import CenterCrops, Whole, loader, pack
from ssl_seg.data.splits import Examples, evenly, hold_out, subset_of
from ssl_seg.datasets import Dataset
from ssl_seg.evidence.passport import looks_of, passport_of
from ssl_seg.evidence.results import FOLDS
from ssl_seg.figures import panels
from ssl_seg.images import Size
from ssl_seg.leaks.record import Place
from ssl_seg.models import evaluating
from ssl_seg.runs.folder import RunFolder
from ssl_seg.scores import IMAGES_FILE, Average, ImageConfusions, image_confusion_bytes
from ssl_seg.stages.scoring import PLAINLY, Looks, Measured, device_of, masks_of, predict_ids, pretext_tasks
from ssl_seg.training.multitask import MultiTask, make_views
from ssl_seg.training.processes import DeviceName, choose_device
from ssl_seg.weights.export import load_model

NUM_PICTURES = 4
EXTREMES = ("worst", "best")
NUM_EXTREMES = 4  # of each: a screenful


def task_pictures(
    module: MultiTask, examples: Examples, augment: Augment, resize: Size | None = None, count: int = NUM_PICTURES
) -> dict[str, np.ndarray]:
    """A sheet per task that can be drawn, uint8 `(H, W, 3)`: a row per image of input | prediction | target."""
    tasks = pretext_tasks(module)
    chosen = evenly(len(examples), count)  # neighbours of a clip look alike
    sheets = {}
    with evaluating(module):
        packed = next(loader(CenterCrops(examples, augment, resize, module.encoder.image_channels), [chosen]))
        views = make_views(tasks, {"pool": packed.to(device_of(module))})
        predictions = module.predict(views)
        for name, view in views.items():
            drawn = tasks[name].render(predictions[name].float(), view)
            target = tasks[name].render_target(view)
            columns = [panels.to_uint8(panel) for panel in (view.input, drawn, target) if panel is not None]
            if drawn is not None:
                sheets[name] = panels.grid([[_fitted(column[row]) for column in columns] for row in range(len(chosen))])
    return sheets


def prediction_panel(
    model: nn.Module, examples: Examples, resize: Size | None = None, count: int = NUM_PICTURES
) -> np.ndarray:
    """A row per image of image | prediction | truth, with the classes' colours below, uint8 `(H, W, 3)`."""
    colours = panels.palette(len(examples.class_names))
    chosen = evenly(len(examples), count)  # neighbours of a clip look alike
    rows = []
    with evaluating(model):
        for packed in loader(Whole(examples, resize), [[index] for index in chosen]):
            image = packed.image[0].permute(1, 2, 0).numpy()  # (1, 3, H, W) -> (H, W, 3)
            ids = predict_ids(model, packed.to(device_of(model)).image, image.shape[:2])[0].byte().cpu().numpy()
            size = panels.at_most(image.shape[:2])
            predicted, truth = (images.resize_mask(mask, size) for mask in (ids, masks_of(packed)[0].numpy()))
            rows.append([images.resize_image(images.composite(image), size), colours[predicted], colours[truth]])
    sheet = panels.grid(rows)
    return np.vstack([sheet, panels.legend(examples.class_names, colours, sheet.shape[1])])


def write_images(
    folder: Path,
    model: nn.Module,
    parts: Mapping[str, tuple[Examples, ImageConfusions]],
    resize: Size | None = None,
) -> None:
    """Write pictures of the worst and best predictions.

    `parts` holds examples and what was found in them, by the part's name: val, test. Former files of
    these names are replaced. `extremes.json` lists a part's pictures: worst first, then from the best on.
    """
    with files.naming(folder):
        (folder / "extremes.json").unlink(missing_ok=True)  # so that it never speaks of other pictures than are there
        for kind in EXTREMES:
            for former in (folder / "pictures").glob(f"[!0-9]*_{kind}_*.png"):  # a number leads those of training
                former.unlink()
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


def write_scores(
    place: Place,
    model: nn.Module,
    found: Mapping[str, tuple[Examples, Measured]],
    resize: Size | None = None,
    about: Mapping[str, Any] | None = None,
    looks: Looks = PLAINLY,
    averages: Sequence[Average] = (),
    temperature: float | None = None,
) -> None:
    """Write what is known of a scored model: `write_images`, and `write_counted` of what was counted."""
    parts = {part: (examples, own.confusions) for part, (examples, own) in found.items()}
    write_images(place.folder, looks.of(model), parts, resize)
    write_counted(place, {part: own for part, (_, own) in found.items()}, resize, about, looks, averages, temperature)


def write_counted(
    place: Place,
    found: Mapping[str, Measured],
    resize: Size | None = None,
    about: Mapping[str, Any] | None = None,
    looks: Looks = PLAINLY,
    averages: Sequence[Average] = (),
    temperature: float | None = None,
) -> None:
    """Write every confusion matrix, what else was counted, and result.json with a passport of each part.

    `about` is what else the result says, beside figures and `averages` of them; `looks` how the model was asked, and
    `temperature` that of the tempered figures. result.json comes last: a folder that has one has all of it.
    """
    confusions = {part: own.confusions for part, own in found.items()}
    files.write_atomic(place.folder / IMAGES_FILE, image_confusion_bytes(confusions))
    matrices = {part: own.total().tolist() for part, own in confusions.items()}
    class_names = next(iter(confusions.values())).class_names
    place.write_json("confusion.json", {"classes": class_names, **matrices})
    place.write_json(calibration.FILE, _calibrations(found, temperature))
    outlines = {part: own.contours for part, own in found.items() if own.contours is not None}
    with files.naming(place.folder):
        (place.folder / contours.FILE).unlink(missing_ok=True)  # of a former end of the run
    if outlines:
        files.write_atomic(place.folder / contours.FILE, contours.table_bytes(outlines))
    named = {part: own.named(averages) for part, own in found.items()}
    how = looks.dump()
    passports = {part: passport_of(own, resize, **how).dump() for part, own in confusions.items()}
    place.write_json("result.json", {**(about or {}), **named, "passport": passports})


def _calibrations(found: Mapping[str, Measured], temperature: float | None) -> dict[str, Any]:
    """calibration.json: pixels by confidence, of each part; and the temperature of those that are tempered."""
    parts = {}
    for part, own in found.items():
        parts[part] = {"plain": own.confidences.dump()}
        parts[part] |= {} if own.tempered is None else {calibration.TEMPERED: own.tempered.dump()}
    return {"bins": calibration.BINS, "temperature": temperature, "parts": parts}


def error_picture(model: nn.Module, examples: Examples, index: int, resize: Size | None = None) -> np.ndarray:
    """One example as image | prediction | truth | errors, with the colours of its classes below, uint8 `(H, W, 3)`."""
    ids, truth = _predicted(model, examples, index, resize)
    photograph = examples.image(index).image  # as it is on disk: what the network has seen may be too coarse to look at
    return panels.error_row(photograph, truth, ids, examples.class_names)


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
    place = choose_device(device)
    models: dict[Path, tuple[nn.Module, Size | None]] = {}
    for name in names:
        index = index_of[name]
        scorers = [_scorer_of(run, name) for run in (baseline, other)]
        for run in scorers:
            if run.folder not in models:
                model, resize = _scored_model(run)
                models[run.folder] = model.to(place), resize
        asked = [models[run.folder] for run in scorers]
        (before, truth), (after, _) = (_predicted(model, examples, index, resize) for model, resize in asked)
        photograph = examples.image(index).image
        yield panels.change_row(photograph, truth, before, after, examples.class_names)


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


def _predicted(model: nn.Module, examples: Examples, index: int, resize: Size | None) -> tuple[np.ndarray, np.ndarray]:
    """What a model takes one example for, and its mask: class ids `(H, W)` uint8 each, at the mask's resolution."""
    packed = pack([Whole(examples, resize)[index]])
    truth = masks_of(packed)[0]
    with evaluating(model):
        ids = predict_ids(model, packed.to(device_of(model)).image, truth.shape)
    return ids[0].byte().cpu().numpy(), truth.numpy()


def _scorer_of(run: RunFolder, name: str) -> RunFolder:
    """The run whose model was scored on an image: of several that were pooled the one that held it out, else itself."""
    folds = run.folder.parent.parent / FOLDS
    pooled = [RunFolder.open(folds / own["run"]) for own in run.record.get("pooled", ())]
    return next((own for own in pooled if name in (own.read("split.json") or {}).get("val", ())), run)


def _scored_model(run: RunFolder) -> tuple[nn.Module, Size | None]:
    """The exported model that was scored, as it was: a run's own, or that which an evaluation names."""
    named = run.config.get("model")
    model, resize = load_model(named if isinstance(named, str) else run.folder)
    return Looks.read(looks_of(run.config)).of(model), resize


def _fitted(image: np.ndarray) -> np.ndarray:
    return images.resize_image(images.composite(image), panels.at_most(image.shape[:2]))
