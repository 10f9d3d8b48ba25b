"""Cross-validation: the held-out folds of a cell's runs, pooled into one score of all labelled images.

A mIoU is no mean over folds: the matrices are summed, so that the cell is scored as one network would be on all images.
What is written is read as any scored run is, and each image was predicted by the one network that has not seen it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_seg import calibration, files
from ssl_seg.calibration import Confidences
from ssl_seg.config import UserError
from ssl_seg.contours import Contours, read_contours
from ssl_seg.data.splits import Examples, digest_of, names_of
from ssl_seg.runs.cost import cost_of
from ssl_seg.runs.folder import Records, RunFolder
from ssl_seg.runs.writer import timestamp
from ssl_seg.scores import IMAGES_FILE, ImageConfusions, read_image_confusion, split_digest
from ssl_seg.stages.finetune import FinetuneConfig
from ssl_seg.stages.panels import EXTREMES, NUM_EXTREMES, write_counted
from ssl_seg.stages.scoring import Measured

PART = "val"  # of a run, the fold that it holds out
MADE_BY = ("versions", "environment", "device", "precision")  # of each run
SAME = ("stage", "command", "git_commit", *MADE_BY, "seed", "origin")


def digests_in(examples: Examples) -> dict[str, str]:
    """The digest of each image with its mask, by name; every one is read."""
    return {examples.name(index): digest_of(examples.read(index)) for index in range(len(examples))}


def is_pooled(folder: Path, runs: Sequence[Path]) -> bool:
    """Whether a cell's folder holds the score of these very runs, as far as they are still there."""
    try:
        cell = RunFolder.open(folder)
        receipt = {own["run"]: own["sha256"] for own in cell.record.get("pooled", ())}
        is_whole = cell.is_done and receipt.keys() == {run.name for run in runs}
        return is_whole and all(_digest(run) in (None, receipt[run.name]) for run in runs)
    except UserError:
        return False


def _digest(run: Path) -> str | None:
    """sha256 of what a run has counted; None for one that is gone."""
    path = run / IMAGES_FILE
    return files.sha256(files.read_bytes(path)) if path.is_file() else None


def pool(folder: Path, runs: Sequence[Path], config: FinetuneConfig, digests: Mapping[str, str]) -> tuple[str, ...]:
    """Write the score of all labelled images into a cell's `folder`, from its finished `runs`, one for each fold.

    `digests` are `digests_in` the labelled images. Gives the names of images without a pixel that counts: they are
    scored by nobody. Raises UserError where a run was scored on other images or masks than there are now, and for one
    that is damaged.
    """
    found = [RunFolder.open(run) for run in runs]
    parts = [_confusions_of(run, digests) for run in found]
    names = names_of(config.data.labelled)
    try:
        joined = ImageConfusions.joined(parts, names, split_digest(digests.items()))
    except ValueError as error:
        raise UserError(
            f"{folder}: {error}, so its folds are no cut of data.labelled; delete {runs[0].parent} and {folder}, and "
            "give the same command again"
        ) from error
    place = Records(folder)
    with files.naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)  # of other runs; what MLflow calls the cell stays
    record = _record(found)
    place.write_json("run.json", {**record, "status": "running"})
    place.write_json("split.json", _split(found, names, config))
    _copy_if_there(found[0], place, "data.json")
    _write_leaks(found, place)
    _copy_extremes(joined, found, place)
    measured = Measured(joined, _confidences(found), None, None, _contours(found, joined))
    about = {"steps": max((run.result or {}).get("steps", 0) for run in found)}
    write_counted(place, {PART: measured}, config.data.resize, about, averages=config.averages)
    place.write_json("run.json", record)  # last: until then the cell is made again
    miou = joined.per_image_miou()
    return tuple(name for name, value in zip(names, miou.tolist(), strict=True) if value != value)


def _confusions_of(run: RunFolder, digests: Mapping[str, str]) -> ImageConfusions:
    own = read_image_confusion(run.folder)[PART]
    if own.digest != split_digest((name, digests.get(name, "")) for name in own.names):
        raise UserError(
            f"{run.folder}: was scored on other images or masks than data.labelled has now; put them back, or delete "
            "that folder, and the same command makes it anew"
        )
    return own


def _record(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """run.json: as that of the first, with what the others were made by, what all took, and the receipt."""
    first, *others = (run.record for run in runs)
    costs = [cost_of(run) for run in runs]
    sums = {name: [getattr(cost, name) for cost in costs] for name in ("seconds", "images", "peak_memory_mib")}
    known = {name: own for name, own in sums.items() if None not in own}
    cost = {name: max(own) if name == "peak_memory_mib" else sum(own) for name, own in known.items()}
    again = [{key: other[key] for key in MADE_BY if key in other} for other in others]
    labels = {key: value for key, value in first["config"]["labels"].items() if key != "fold"}
    pooled = [
        {"run": run.name, "images": len((run.read("split.json") or {}).get(PART, ())), "sha256": _digest(run.folder)}
        for run in runs
    ]
    return {
        **{key: first[key] for key in SAME if key in first},
        "status": "finished",
        "started": min(run.record["started"] for run in runs),
        "ended": timestamp(),
        "resumed": again,
        "cost": cost,
        "config": {**first["config"], "labels": labels},
        "pooled": pooled,
    }


def _split(runs: Sequence[RunFolder], names: Sequence[str], config: FinetuneConfig) -> dict[str, Any]:
    """split.json: every image is held out once; learnt from are those that some run has learnt from."""
    own = [run.read("split.json") or {} for run in runs]
    learnt = {name for split in own for name in split["labelled"]}
    digests = "".join(split["sha256_of_labelled"] for split in own)
    return {
        "labels": config.labels.dump(),
        "labelled": [name for name in names if name in learnt],
        PART: list(names),
        "folds": [split[PART] for split in own],
        "sha256_of_labelled": files.sha256(digests.encode()),
    }


def _copy_if_there(run: RunFolder, place: Records, name: str) -> None:
    found = run.read(name)
    if found is not None:
        place.write_json(name, found)


def _write_leaks(runs: Sequence[RunFolder], place: Records) -> None:
    """leaks.json: what the guard of each run has said, as of one."""
    own = [found for run in runs if (found := run.read("leaks.json")) is not None]
    if not own:
        return
    first = own[0]
    scored = {part: sum(found["scored"].get(part, 0) for found in own) for part in first["scored"]}
    leaks = [leak for found in own for leak in found["leaks"]]
    checked = all(found["checked"] for found in own)
    doubts = {part: words for found in own for part, words in found["doubts"].items()}
    place.write_json("leaks.json", {**first, "checked": checked, "scored": scored, "doubts": doubts, "leaks": leaks})


def _copy_extremes(joined: ImageConfusions, runs: Sequence[RunFolder], place: Records) -> None:
    """The worst and best of all images: each is among those of its own fold, which is drawn already."""
    drawn = {
        entry["name"]: run.folder / entry["picture"]
        for run in runs
        for entry in (run.read("extremes.json") or {}).get(PART, ())
    }
    miou, listed = joined.per_image_miou(), []
    pictures = place.folder / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir()
    for kind, indices in zip(EXTREMES, joined.extremes(NUM_EXTREMES), strict=True):
        for number, index in enumerate(indices, start=1):
            name, picture = joined.names[index], f"pictures/{PART}_{kind}_{number}.png"
            if name in drawn and drawn[name].is_file():
                shutil.copyfile(drawn[name], place.folder / picture)
                listed.append({"kind": kind, "name": name, "miou": float(miou[index]), "picture": picture})
    place.write_json("extremes.json", {PART: listed})


def _confidences(runs: Sequence[RunFolder]) -> Confidences:
    written = [(run.read(calibration.FILE) or {})["parts"][PART]["plain"] for run in runs]
    return sum(map(Confidences.load, written), Confidences.none())


def _contours(runs: Sequence[RunFolder], joined: ImageConfusions) -> Contours | None:
    """Outlines in the data set's order; None where the runs have none."""
    own = [found for run in runs if (found := read_contours(run.folder, joined.class_names).get(PART)) is not None]
    if not own:
        return None
    place = {name: index for index, name in enumerate(joined.names)}
    rows = sorted((row for found in own for row in found.rows), key=lambda row: place[row.image])
    return Contours(joined.class_names, tuple(rows))
