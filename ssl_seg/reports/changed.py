"""Pictures of the images whose score changed most against the baseline."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_seg import files, images
from ssl_seg.config import UserError
from ssl_seg.evidence.comparison import Comparison, main_score_of
from ssl_seg.evidence.pairs import Changed
from ssl_seg.evidence.results import Study
from ssl_seg.runs.folder import RunFolder

CHANGED = "changed"  # the folder of a study's pictures
NUM_CHANGED = 6  # images to look at, of each comparison
NUM_CHANGED_OF_STUDY = 3  # images drawn of each arm


def draw_changed(found: Comparison, out: str | Path, most: int = NUM_CHANGED) -> list[Path]:
    """A picture of each of the `most` images in which an arm differs most from its baseline, by their most usual pair.

    Written to `out` as `<group>_<rank>.png`, with `changed.json`: the images' names, how much their mIoU changed as a
    mean, and the two runs that are shown.
    Raises UserError where no two runs are a pair whose images were kept, and for an `out` that exists.
    """
    folder = Path(out)
    if folder.exists():
        raise UserError(f"--pictures {folder}: exists already; name a new folder")
    told: dict[str, list[dict[str, Any]]] = {}
    drawn: dict[Path, Any] = {}
    from ssl_seg import images  # and with it OpenCV, which no table needs

    for number, arm in enumerate(found.arms, start=1):
        score = main_score_of([arm])
        if score is None:
            continue
        changed = found.changed(arm, score, most=most)
        pictures = pictures_of(changed, score.partition("/")[0]) if changed else []
        for rank, (image, picture) in enumerate(zip(changed, pictures, strict=True), start=1):
            path = folder / f"group{number}_{rank}.png"
            drawn[path] = picture
            entry = {"picture": path.name, "image": image.name, "difference": image.difference}
            entry["runs"] = [outcome.name for outcome in image.pair]
            told.setdefault(arm.label, []).append(entry)
    if not drawn:
        raise UserError("--pictures: no run has a baseline with the same seeds whose images were kept; name both")
    for path, picture in drawn.items():  # not before all are there: a folder with some would be in the way of the next
        images.write_image(path, picture)
    files.write_atomic(folder / "changed.json", files.json_bytes(told))
    return list(drawn)


def pictures_of(changed: Sequence[Changed], part: str) -> list[np.ndarray]:
    """Each image with its truth, both predictions and what changed, as `panels.changed_pictures` draws them.

    Raises UserError where a model or an image is not there any more.
    """
    from ssl_seg.stages.panels import changed_pictures  # torch and the networks, which no table needs

    by_pair: dict[tuple[Path, Path], list[Changed]] = {}
    for one in changed:
        baseline, other = one.pair
        by_pair.setdefault((baseline.folder, other.folder), []).append(one)
    drawn: dict[int, np.ndarray] = {}
    for (baseline, other), ones in by_pair.items():
        names = [one.name for one in ones]
        found = changed_pictures(RunFolder.open(baseline), RunFolder.open(other), part, names)
        drawn |= {one.index: picture for one, picture in zip(ones, found, strict=True)}
    return [drawn[one.index] for one in changed]


def draw_changed_of_study(study: Study) -> None:
    """Pictures of the images that changed most under the last condition, for each arm, by their most usual pair."""
    folder = study.folder / CHANGED
    shutil.rmtree(folder, ignore_errors=True)
    score = study.main_score
    if score is None:
        return
    for number, arm in enumerate(study.arms[1:], start=1):
        changed = study.changed(arm, score, study.conditions[-1], NUM_CHANGED_OF_STUDY)
        for rank, picture in enumerate(pictures_of(changed, study.part), start=1):
            images.write_image(folder / f"{number}_{files.slug(arm.label)}_{rank}.png", picture)
