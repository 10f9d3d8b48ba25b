"""What lies in the folders, looked at before anything is trained: every image and mask is read once.

A run stops at the first file that is wrong. Here all of them are named, each with what to do, and what would be learnt
wrong is told beside them: classes that hardly occur, pictures that are there twice, frames of one video.
"""

from __future__ import annotations

import shlex
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ssl_seg import files, images
from ssl_seg.config import UserError, user_path
from ssl_seg.data.splits import hold_out, names_of
from ssl_seg.datasets import Dataset
from ssl_seg.images import show_path
from ssl_seg.leaks import guard
from ssl_seg.leaks.near_duplicates import Fingerprints
from ssl_seg.leaks.record import Compared, Leak
from ssl_seg.stages import finetune
from ssl_seg.stages.findings import Finding, Look, Part, Told
from ssl_seg.stages.finetune import LABELLED, FinetuneConfig
from ssl_seg.stages.pretrain import PretrainConfig
from ssl_seg.stages.setup import check_images, check_palettes, read_as
from ssl_seg.stages.start import find_start

TRAINED, SCORED = ("labelled", "beside", "pool"), ("val", "test")


@dataclass(frozen=True)
class Checked:
    """What `check` gives back; check.json and `--json` hold the same."""

    parts: tuple[Part, ...]
    faults: tuple[Finding, ...]  # what a run would stop at, or learn wrong
    notes: tuple[Finding, ...]
    command: str | None  # what trains on these images; None where faults are to be mended first
    out: Path | None = None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return files.finite({**asdict(self), "out": None if self.out is None else str(self.out)})


# ---- the verb ----


def check(
    config: FinetuneConfig | PretrainConfig,
    out: str | Path | None = None,
    quiet: bool = False,
    words: Sequence[str] = (),
    propose: bool = False,
) -> Checked:
    """Look at every part of a config's `data`; with `out`, write check.json and sheet.png into that new folder.

    `words` are what was typed for the config, for the command at the end. `propose` says that these are folders alone:
    what their masks mean is then proposed, not asked for. Raises UserError for a folder that exists or holds nothing.
    """
    out = None if out is None else user_path(out)
    if out is not None and out.exists():
        raise UserError(f"--out {out}: exists already; name a new folder")
    config = read_as(config, find_start(config).model.channels)
    given = {key: own for key, own in config.data if isinstance(own, Dataset)}
    looks: dict[str, Look] = {}
    for key, dataset in given.items():
        with_masks = isinstance(config, FinetuneConfig) and key in LABELLED
        looks[key] = Look.at(key, dataset, config.train.reading, with_masks, propose, quiet)
    told = [finding for look in looks.values() for finding in look.findings(config)]
    told += _leaks(config, looks)
    if not any(is_fault for is_fault, _ in told):
        told += _as_a_run_asks(config, looks)
    faults, notes = (tuple(own for is_fault, own in told if is_fault == wanted) for wanted in (True, False))
    command = None if faults else _command(config, looks, words, propose)
    checked = Checked(tuple(look.part() for look in looks.values()), faults, notes, command, out)
    if out is not None:
        with files.naming(out):
            out.mkdir(parents=True)
        images.write_image(out / "sheet.png", np.vstack([look.sheet(told) for look in looks.values()]))
        files.write_atomic(out / "check.json", files.json_bytes(checked.plain()))
    return checked


# ---- between images ----


def _leaks(config: FinetuneConfig | PretrainConfig, looks: Mapping[str, Look]) -> Told:
    """What a run's guard would stop at; then what one part holds twice, and its neighbours in a video."""
    if not config.leaks.check:
        return []
    whole = {key: look.prints() for key, look in looks.items()}
    whole = {key: own for key, own in whole.items() if len(own)}
    prints = {**whole, **_held_out(looks, whole)}
    result = Compared(dict(prints))
    for part, other in ((part, other) for part in TRAINED for other in SCORED if {part, other} <= prints.keys()):
        result.leaks += _all(guard.compare(part, prints[part], other, prints[other], config.leaks))
    own_cuts = {("labelled", "val")} if "val" not in looks else set[tuple[str, str]]()
    told: Told = []
    known = set[frozenset[str]]()
    for leak in guard.make_record({}, result, set(SCORED), config.leaks, own_cuts)["leaks"]:
        if not leak["allowed"]:
            known.add(frozenset((leak["name"], leak["scored"])))
            theirs = "which is held out to validate on" if leak["scored_part"] not in looks else leak["scored_part"]
            text = (
                f"{show_path(leak['name'])} and {show_path(leak['scored'])} ({theirs}) leak, {leak['kind']}: "
                f"{leak['detail']}; take one of them out, or let it pass by leaks.allow"
            )
            told.append((True, Finding(leak["part"], "leak", text, (leak["name"], leak["scored"]))))
    for part, own in whole.items():
        found = _all(guard.within(part, own, config.leaks))
        told += _twice([leak for leak in found if frozenset((leak.name, leak.scored)) not in known], len(own))
    return told


def _held_out(looks: Mapping[str, Look], prints: Mapping[str, Fingerprints]) -> dict[str, Fingerprints]:
    """What a run without data.val makes of the labelled images."""
    if "labelled" not in prints or "val" in looks:
        return {}
    dataset = looks["labelled"].dataset
    try:
        held = set(names_of(hold_out(dataset)[1]))
    except UserError:  # which is told already
        return {}
    own = prints["labelled"]
    places = [[i for i, name in enumerate(own.names) if (name in held) == is_held] for is_held in (False, True)]
    return {part: own.some(some) for part, some in zip(("labelled", "val"), places, strict=True) if some}


def _twice(found: Sequence[Leak], count: int) -> Told:
    told: Told = []
    for leak in found:
        if leak.kind != "sequence":
            text = f"{show_path(leak.name)} and {show_path(leak.scored)} are the same picture ({leak.detail}); keep one"
            told.append((False, Finding(leak.part, "twice", text, (leak.name, leak.scored))))
    frames = [leak for leak in found if leak.kind == "sequence"]
    if frames:
        names = tuple(sorted({name for leak in frames for name in (leak.name, leak.scored)}))
        text = (
            f"{len(names)} of {count} images are frames beside others of a video ({show_path(frames[0].name)}, "
            f"{show_path(frames[0].scored)}), so a split by chance would leak; for data.val take a whole clip, in a "
            "folder of its own, or none: a run then holds out whole subfolders, or the end of each numbering"
        )
        told.append((False, Finding(frames[0].part, "neighbours", text, names)))
    return told


def _all(working: Generator[None, None, list[Leak]]) -> list[Leak]:
    """What comes of a search that pauses now and then."""
    while True:
        try:
            next(working)
        except StopIteration as done:
            return done.value


# ---- what a run would say, and how to start it ----


def _as_a_run_asks(config: FinetuneConfig | PretrainConfig, looks: Mapping[str, Look]) -> Told:
    """What is wrong with the parts together: other classes, too few images to hold some out, no pixel that counts."""
    data = config.data.model_copy(update={key: look.dataset for key, look in looks.items()})
    asked = config.model_copy(update={"data": data})
    try:
        if isinstance(asked, FinetuneConfig):
            finetune.check_data(asked)
            check_palettes({key: looks[key].dataset for key in LABELLED if key in looks})
            finetune.choose_images(asked)
        for key, look in looks.items():
            check_images(f"data.{key}", look.dataset)
    except UserError as error:
        return [(True, Finding("data", "run", str(error)))]
    return []


def _command(
    config: FinetuneConfig | PretrainConfig, looks: Mapping[str, Look], words: Sequence[str], propose: bool
) -> str:
    """What trains on these images: the words that were typed, or the folders with what is proposed."""
    stage = "finetune" if isinstance(config, FinetuneConfig) else "pretrain"
    given = [shlex.quote(word) for word in words]
    if propose:
        key, look = next(iter(looks.items()))
        said = _short_words(key, {name: value for name, value in look.dataset.dump().items() if value})
        own = (f"data.{key}=", f"data.{key}.")  # which these say already
        given = [*said, *(shlex.quote(word) for word in words if not word.startswith(own))]
    places = ["runs/first", *(f"runs/first_{number}" for number in range(2, 1000))]
    out = next(place for place in places if not user_path(place).exists())
    return " ".join(["ssl-seg", stage, *given, "--out", out])


def _short_words(part: str, values: Mapping[str, Any]) -> Iterator[str]:
    """What names a folder's images and masks on a command line: options, and keys for what no option has."""
    classes = values.get("classes")
    names = [str(name) for name in classes] if isinstance(classes, list | tuple) else []
    mapping = {int(key) if key.isdecimal() else key: value for key, value in values.get("mapping", {}).items()}
    yield f"--images {shlex.quote(values['images'])}"
    if "masks" in values:
        yield f"--masks {shlex.quote(values['masks'])}"
    rest = {**values, "mapping": mapping} if mapping else dict(values)
    # A comma or a blank at an end would not survive; what looks like a number would be one.
    if names and all(name == name.strip() and "," not in name for name in names):
        yield f"--classes {shlex.quote(','.join(names))}"
        del rest["classes"]
    for key, value in rest.items():
        if key not in ("type", "images", "masks"):
            yield _quoted(f"data.{part}.{key}", value)


def _quoted(key: str, value: Any) -> str:
    """A key and its value as YAML on one line, as a shell takes it."""
    flow = {"default_flow_style": True, "sort_keys": False, "width": 10**9, "allow_unicode": True}
    said = yaml.safe_dump(value, **flow).strip().removesuffix("...").strip()  # which ends a lone number
    text = f"{key}={said}"
    return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)
