"""What a score means: by which definition, on which images. Scores of different passports are never ranked together.

A passport stands in a result.json for each part that has a mIoU. No library says with a figure how it treats an absent
class, though two libraries differ there by tens of points. Needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ssl_seg import calibration
from ssl_seg.calibration import Confidences
from ssl_seg.config import UserError
from ssl_seg.runs.folder import RunFolder, find_runs
from ssl_seg.scores import (
    BAND_WIDTH,
    ImageConfusions,
    SegmentationScores,
    averages_in,
    named_scores,
    read_image_confusion,
)

DEFINITION = 1  # to be raised with any change of what a figure means; figures of two definitions are not ranked
EXACT = 1e-9  # how far a figure may be from what its matrices say: rounding in another order, and no pixel more
IGNORED = 255
# Fields that scores are ranked across: how large the network wants its images is a property of the model, for whatever
# it sees, its answer is scored at the label's size; and the version of the software is told apart by the definition.
FACTS = ("resize", "software")
LOOKS = ("flips", "statistics", "tiles")  # fields that say how a model was asked, and are written where that is unusual
Passports = Mapping[str, Mapping[str, Any] | None]  # by part; None: of a version that wrote no passports


@dataclass(frozen=True)
class Passport:
    """The definition of the scores of one part (`val`, `test`) of a run."""

    classes: tuple[str, ...]  # that are averaged, in the order of their ids
    images: int
    split: str  # sha256 of names, decoded images and labels, in the data set's order
    resize: tuple[int, ...] | None  # (H, W) that the network is given; None: as the images are
    definition: int = DEFINITION
    averaging: str = "mean over classes of the IoU of the matrix summed over all images"
    absent: str = "in neither truth nor prediction: left out; predicted only: 0"
    ignore: int = IGNORED  # pixels of the label that count nowhere
    resolution: str = "the label's own"  # logits are brought there bilinearly
    band: float = BAND_WIDTH  # of the label's diagonal, on each side of a class boundary
    software: str = metadata.version("ssl_seg")
    flips: bool = False  # whether an answer is the mean of those to the image and to its mirror image
    statistics: str = "running"  # of batch norm; image: each image is normalized by its own
    tiles: Mapping[str, int] | None = None  # size and overlap of those in which larger images are looked at

    def dump(self) -> dict[str, Any]:
        """Plain JSON types. How a model is asked stands there only where it is unusual: others are as ever."""
        usual = {key: getattr(Passport, key) for key in LOOKS}
        plain = {key: value for key, value in asdict(self).items() if key not in usual or value != usual[key]}
        return {**plain, "classes": list(self.classes), "resize": None if self.resize is None else list(self.resize)}


def passport_of(
    found: ImageConfusions,
    resize: Sequence[int] | None = None,
    flips: bool = False,
    statistics: str = "running",
    tiles: Mapping[str, int] | None = None,
) -> Passport:
    """That of the scores of `found`, by a network that saw images of `resize` (H, W) and was asked in these ways."""
    size = None if resize is None else tuple(resize)
    return Passport(
        classes=found.class_names,
        images=len(found),
        split=found.digest,
        resize=size,
        flips=flips,
        statistics=statistics,
        tiles=tiles,
    )


def looks_of(written: Mapping[str, Any]) -> dict[str, Any]:
    """How the model was asked, by what a passport, or the config of an evaluation, says of it."""
    statistics = "image" if written.get("statistics") == "image" else "running"
    tiles = written.get("tiles") if isinstance(written.get("tiles"), Mapping) else None
    return {"flips": written.get("flips") is True, "statistics": statistics, "tiles": tiles}


def passports_in(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any] | None]:
    """Of each part of a result.json that has a mIoU; None where it was written without one."""
    written = result.get("passport", {})
    scored = [part for part, named in result.items() if isinstance(named, Mapping) and "miou" in named]
    return {part: written.get(part) for part in scored}


def definition_of(passports: Passports) -> tuple[str, ...]:
    """What is equal for scores that may be ranked together, as text."""
    told = []
    for part, written in sorted(passports.items()):
        kept = None if written is None else {key: value for key, value in written.items() if key not in FACTS}
        told.append(f"passport.{part}={json.dumps(kept, sort_keys=True)}")
    return tuple(told)


def differing(one: Passports, other: Passports) -> list[str]:
    """What keeps the scores of two runs from being ranked, as `val: images, split`; empty where nothing does.

    Only parts that both have are looked at: scores of the others never stand side by side.
    """
    told = []
    for part in one.keys() & other.keys():
        fields = _differing_fields(one[part], other[part])
        told += [f"{part}: {', '.join(fields)}"] if fields else []
    return sorted(told)


def _differing_fields(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> list[str]:
    if one is None or other is None:
        return [] if one is other else ["passport (runs of earlier versions have none)"]
    keys = dict.fromkeys([*one, *other])
    return [key for key in keys if key not in FACTS and one.get(key) != other.get(key)]


# ---- whether a score follows from its matrices ----


@dataclass(frozen=True)
class Verified:
    """What `verify` has found to follow from the stored matrices."""

    figures: int
    largest: float  # difference between a figure that is written down and one recomputed, at most EXACT
    without_passport: tuple[str, ...] = ()  # parts whose definition and images nothing tells


def verify(folder: str | Path) -> Verified:
    """Recompute every score of a run: from its confusion matrices, image by image and summed, and what else it counted.

    Raises UserError that names the figure where one differs by more than EXACT, where the two files of matrices
    disagree, where a passport speaks of other images or classes, and where there are no scores or no matrices.
    """
    run = RunFolder.open(folder)
    result = run.result or {}
    parts = passports_in(result)
    if not parts:
        raise UserError(f"{folder}: has no segmentation scores to verify; name finished fine-tunings or evaluations")
    from ssl_seg.contours import Contours, read_contours  # OpenCV, which those who only compare can do without

    of_images = read_image_confusion(folder)
    summed = run.read("confusion.json") or {}
    confidences = (run.read(calibration.FILE) or {}).get("parts", {})
    outlines = read_contours(folder, summed.get("classes", ()))
    figures, differences = 0, []
    for part, written in parts.items():
        if part not in of_images or part not in summed:
            raise UserError(f"{folder}: has no matrices of {part}, so its scores cannot be verified; {_AGAIN}")
        found = of_images[part]
        if summed[part] != found.total().tolist() or tuple(summed.get("classes", ())) != found.class_names:
            raise UserError(f"{folder}: confusion.json is not the sum of the images' matrices in {part}; {_AGAIN}")
        _check_passport(folder, part, written, found)
        averages = averages_in(result[part])
        from_images = found.named(averages)
        from_sum = named_scores(SegmentationScores.from_confusion(summed[part]), found.class_names, averages)
        # A part whose pixels are all ignored has no row in the table.
        has_outlines = part in outlines or any(name.startswith("hd95/") for name in result[part])
        others = outlines.get(part, Contours(found.class_names, ())).named() if has_outlines else {}
        if part in confidences:
            others |= _of_confidences(folder, part, confidences[part], found)
        for recomputed in (from_images, from_sum, others):
            differences += _differences(folder, part, result[part], recomputed)
        _refuse_more(folder, part, result[part], {**from_images, **others})
        figures += len(from_images) + len(others)
    return Verified(figures, max(differences), tuple(part for part, written in parts.items() if written is None))


def verify_all(folders: Iterable[str | Path]) -> Iterator[tuple[Path, Verified]]:
    """Every finished run with segmentation scores in `folders`, as `compare` finds them; those that hold come first.

    Then raises UserError for the first that does not, or where there is none at all.
    """
    found = [run for run in find_runs(folders) if run.is_done and passports_in(run.result or {})]
    if not found:
        raise UserError("--verify: no finished run with segmentation scores among them; name fine-tunings")
    refused: list[UserError] = []
    for run in found:
        try:
            yield run.folder, verify(run.folder)
        except UserError as error:
            refused.append(error)
    if refused:
        more = f" (and {len(refused) - 1} more runs)" if len(refused) > 1 else ""
        raise UserError(f"{refused[0]}{more}")


_AGAIN = "score its model anew by ssl-seg evaluate --out"


def _check_passport(folder: str | Path, part: str, written: Mapping[str, Any] | None, found: ImageConfusions) -> None:
    if written is None:
        return
    if written.get("definition") != DEFINITION:
        raise UserError(
            f"{folder}: {part} is scored by definition {written.get('definition')}, and this version knows "
            f"{DEFINITION}; verify it with the version that made it"
        )
    wanted = passport_of(found, written.get("resize"), **looks_of(written)).dump()
    wrong = _differing_fields(wanted, written)
    if wrong:
        raise UserError(f"{folder}: the passport of {part} says another {wrong[0]} than its matrices; {_AGAIN}")


def _of_confidences(
    folder: str | Path, part: str, written: Mapping[str, Any], found: ImageConfusions
) -> dict[str, float | None]:
    """The figures of calibration.json, whose pixels are those of the matrices, as many of them right."""
    matrix, named = found.total(), {}
    for kind, dumped in written.items():
        own = Confidences.load(dumped)
        for of_pixels, of_right in ((own.pixels, own.right), (own.doubted, own.doubted_right)):
            if (of_pixels.sum(), of_right.sum()) != (matrix.sum(), matrix.trace()):
                raise UserError(
                    f"{folder}: {calibration.FILE} counts other pixels of {part} than its matrices; {_AGAIN}"
                )
        named |= own.named("" if kind == "plain" else f"{kind}/")
    return named


def _differences(
    folder: str | Path, part: str, written: Mapping[str, Any], recomputed: Mapping[str, float | None]
) -> list[float]:
    found = []
    for name, value in recomputed.items():
        said = written.get(name)
        difference = _distance(said, value)
        if not difference <= EXACT:
            raise UserError(
                f"{folder}: result.json says {part}/{name} = {_shown(said)}, its {_source_of(name)} say "
                f"{_shown(value)}; {_AGAIN}"
            )
        found.append(difference)
    return found


def _distance(said: float | None, value: float | None) -> float:
    """Infinite where one of them says nothing."""
    if said is None or value is None:
        return 0.0 if said is value else math.inf
    return abs(said - value)


def _refuse_more(
    folder: str | Path, part: str, written: Mapping[str, Any], recomputed: Mapping[str, float | None]
) -> None:
    more = [name for name in written if name not in recomputed]
    if more:
        raise UserError(f"{folder}: {part}/{more[0]} follows from no confusion matrix of the run; {_AGAIN}")


def _source_of(name: str) -> str:
    """What a figure is recomputed from."""
    if name.removeprefix(f"{calibration.TEMPERED}/") in Confidences.none().named():
        return f"counts in {calibration.FILE}"
    return "outlines in contours.csv" if name.startswith(("boundary/", "hd95")) else "confusion matrices"


def _shown(value: float | None) -> str:
    return "nothing" if value is None else repr(value)
