"""The leak guard: is an image that is trained on among those that are scored, unchanged, altered or a frame beside it?

Every image is read once. `likeness` says which pictures are the same, `sequences` which are neighbours in a video; here
is what follows from it: the record, the line that stops a run, and what is let pass by name. Imports no torch, so that
a report can read what was found.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import Field, NonNegativeInt

from ssl_seg import files
from ssl_seg.config import Config, UserError
from ssl_seg.images import resize_image, show_path, write_image
from ssl_seg.likeness import SIDE, Fingerprints, altered, equal, fingerprint
from ssl_seg.sequences import neighbours
from ssl_seg.terminal import say

if TYPE_CHECKING:
    from ssl_seg.data import Examples
    from ssl_seg.train import Processes

Kind = Literal["exact", "sequence", "altered"]

SHOWN = 3  # pairs in the line on the terminal
ROWS = 8  # pairs on the sheet
PANEL = 320  # pixels of the longer side of a picture on the sheet
MOST_STORED = 20_000  # fingerprints of a run, 80 MB, for runs that start from it
HEARTBEAT = 2.0  # seconds after which waiting processes hear that the first is at work


class LeakError(UserError):
    """Images that are scored are among those that are trained on. The CLI exits with 3."""

    exit_code = 3


class Leaks(Config):
    """What the leak guard looks for, and what it lets pass."""

    check: bool = True  # reading every image once is most of the cost; False is written into the run and its report
    # Globs of kinds (exact, sequence, altered) or of image names whose leaks do not stop the run; all are recorded.
    allow: tuple[str, ...] = ()
    # Fine structure in common from which a pair is a leak: altered copies had 0.78 to 1, no clean pair more than 0.35.
    alike: float = Field(default=0.6, gt=0.0, le=1.0)
    # Frames of one video this close are neighbours; 0: names are not looked at. CamVid's at 30 a second are more alike
    # than 95 % of distant ones up to 60 numbers apart, and no more at 90; its official splits are 31 and 39 apart.
    frames: NonNegativeInt = 60
    turns: bool = False  # also quarter turns and upside down, for aerial or microscope images; four times the search


@dataclass(frozen=True)
class Leak:
    """One image that is trained on, and the one that is scored."""

    kind: Kind
    part: str  # pool or labelled, or init.pool: of the pretraining that the weights come from
    name: str
    scored_part: str
    scored: str
    alike: float | None  # 1 for equal pixels, the fine structure in common, None for neighbours by name
    detail: str  # such as "mirrored, 72 % of the area" or "31 frames apart"


# ---- in a run ----


class Place(Protocol):
    """A folder that keeps records: a run's or a study's."""

    @property
    def folder(self) -> Path: ...
    def read_json(self, name: str) -> dict[str, Any] | None: ...
    def write_json(self, name: str, values: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Question:
    """What is to be compared with what: parts by name, None for one that is not there."""

    trained: Mapping[str, Examples | None]
    scored: Mapping[str, Examples | None]
    config: Leaks
    # By a name of theirs, the runs whose weights are started from: their pools are compared by what those runs stored.
    inits: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Examples]:
        return {part: own for part, own in {**self.trained, **self.scored}.items() if own is not None}

    @property
    def basis(self) -> dict[str, Any]:
        """What an answer holds for, as long as it stays the same."""
        from ssl_seg.data import manifest  # torch stays out of the report

        images = {part: manifest(examples) for part, examples in self.given.items()}
        return {"images": images, "settings": self.config.dump(), "inits": dict(self.inits)}


def guard(
    run: Place, question: Question, processes: Processes, workers: int = 0, quiet: bool = False
) -> dict[str, Any]:
    """`check` for a run of several processes: the first reads and compares, and all end alike."""
    outcome: _Outcome | None = None
    if processes.is_main:
        for outcome in _work(run, question, workers, quiet):
            processes.from_first(outcome)  # now and then, since those who wait give up after minutes of silence
    else:
        while outcome is None:
            outcome = processes.from_first(None)
    return outcome.record_or_refusal(run.folder)


def check(place: Place, question: Question, workers: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Compare what is trained on with what is scored, unless it was done already; gives leaks.json.

    Raises LeakError, with leaks.json and leaks.png written, for a leak that is not allowed.
    """
    *_, outcome = _work(place, question, workers, quiet)
    return outcome.record_or_refusal(place.folder)


@dataclass(frozen=True)
class _Outcome:
    record: dict[str, Any]
    refusal: str | None = None

    def record_or_refusal(self, folder: Path) -> dict[str, Any]:
        if self.refusal:
            raise UserError(self.refusal)
        line = say_leaks(self.record, folder)
        if line:
            raise LeakError(line)
        return self.record


def _work(place: Place, question: Question, workers: int, quiet: bool) -> Iterator[_Outcome | None]:
    """The check as one process makes it: None while it works, then what came out, a user's error as words."""
    basis = question.basis
    former = place.read_json("leaks.json")
    if former is not None and former["basis"] == basis:
        yield _Outcome(former)
        return
    try:
        found: list[Leak] = []
        seen: dict[str, Fingerprints] = {}
        started = beaten = time.monotonic()
        for _ in _compared(question, workers, seen, found):
            if time.monotonic() - beaten > HEARTBEAT:
                beaten = time.monotonic()
                yield None
        record = make_record(basis, seen, set(question.scored), question.config, found)
        place.write_json("leaks.json", record)
        if seen:
            write_fingerprints(place, seen)
        if found:
            yield None
            worst = sheet(found, question.given, seen)
            write_image(place.folder / "leaks.png", worst)
        seconds = time.monotonic() - started
        say(f"{sentence(record)} ({seconds:.1f} s)", quiet)
        yield _Outcome(record)
    except UserError as error:
        yield _Outcome({}, str(error))


def _compared(question: Question, workers: int, seen: dict[str, Fingerprints], found: list[Leak]) -> Iterator[None]:
    """Fill `seen` with every part's fingerprints and `found` with the leaks, pausing now and then.

    Without a scored part there is nothing to compare, but a run that starts from this one may have some.
    """
    if not question.config.check:
        return
    given = question.given
    for part, examples in given.items():
        seen[part] = yield from fingerprint(examples, workers)
    for name, init in question.inits.items():
        seen |= {f"{name}.{part}": prints for part, prints in read_fingerprints(init).items()}
    for part, prints in list(seen.items()):
        for against in sorted(question.scored.keys() & given.keys()):
            if part not in question.scored:
                found += yield from compare(part, prints, against, seen[against], question.config)


def make_record(
    basis: Mapping[str, Any],
    seen: Mapping[str, Fingerprints],
    scored: set[str],
    config: Leaks,
    found: Sequence[Leak],
) -> dict[str, Any]:
    """leaks.json: what was compared, and every leak with whether it is allowed, the worst first."""
    order = {"exact": 0, "altered": 1, "sequence": 2}
    ordered = sorted(found, key=lambda leak: (order[leak.kind], -(leak.alike or 0.0)))
    coarse = [part for part, prints in seen.items() if prints.thumbs is None]
    return {
        "basis": dict(basis),
        "checked": config.check,
        "trained": {part: len(prints) for part, prints in seen.items() if part not in scored},
        "scored": {part: len(prints) for part, prints in seen.items() if part in scored},
        "without_fingerprints": coarse,
        "leaks": [{**asdict(leak), "allowed": is_allowed(leak, config.allow)} for leak in ordered],
    }


def is_allowed(leak: Leak, allow: Sequence[str]) -> bool:
    """Whether a glob names the leak's kind or one of its images."""
    return any(fnmatchcase(word, glob) for glob in allow for word in (leak.kind, leak.name, leak.scored))


def sentence(record: Mapping[str, Any] | None) -> str:
    """What leaks.json says, in one sentence; None is a run from before there was one."""
    if record is None:
        return "Whether training images are among the scored ones was not checked."
    if not record["checked"]:
        return "Whether training images are among the scored ones was not checked (leaks.check=false)."
    if not record["trained"] or not record["scored"]:
        return "No leak check: there is nothing to compare with."
    both = f"{_counted(record['trained'])} compared with {_counted(record['scored'])}"
    if not record["leaks"]:
        return f"No leak: {both}."
    kinds = Counter(leak["kind"] for leak in record["leaks"])
    what = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    allowed = sum(leak["allowed"] for leak in record["leaks"])
    verdict = "all allowed by leaks.allow" if allowed == len(record["leaks"]) else f"{allowed} of them allowed"
    return f"LEAK: {what} among {both}; {verdict}."


def say_leaks(record: Mapping[str, Any], folder: Path) -> str | None:
    """The line that stops a run; None where nothing is found that is not allowed."""
    stopping = [leak for leak in record["leaks"] if not leak["allowed"]]
    if not stopping:
        return None
    kinds = Counter(leak["kind"] for leak in stopping)
    pairs = [f"{show_path(leak['name'])} ~ {show_path(leak['scored'])} ({leak['detail']})" for leak in stopping[:SHOWN]]
    more = ", ..." if len(stopping) > SHOWN else ""
    first = stopping[0]
    what = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return (
        f"{_place(first['part'])}: leak into data.{first['scored_part']}: {what}: {'; '.join(pairs)}{more}; see "
        f"{folder / 'leaks.json'} and leaks.png; take the images out, keep whole sequences on one side, "
        f"or allow them by name: leaks.allow=[{','.join(kinds)}]"
    )


def _place(part: str) -> str:
    """Where in the config the images of a part come from."""
    return f"init: the {part.removeprefix('init.')} it was trained on" if part.startswith("init.") else f"data.{part}"


def _counted(parts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} images of {part}" for part, count in parts.items())


def write_fingerprints(run: Place, seen: Mapping[str, Fingerprints]) -> None:
    """images.json, the manifest of what the run saw, and the fingerprints for runs that start from this one."""
    from safetensors.numpy import save

    own = {part: prints for part, prints in seen.items() if not part.startswith("init.")}
    run.write_json("images.json", {part: {"names": p.names, "sha256": p.digests} for part, p in own.items()})
    stored = {part: prints.thumbs for part, prints in own.items() if part in ("pool", "labelled")}
    if sum(len(thumbs) for thumbs in stored.values()) <= MOST_STORED:
        files.write_atomic(run.folder / "fingerprints.safetensors", save(stored))


def read_fingerprints(init: str | None) -> dict[str, Fingerprints]:
    """What the run that `init` names was trained on, as it has stored it; empty for weights of another origin."""
    from safetensors.numpy import load_file

    places = [] if init is None else [Path(init), Path(init).parent]
    folder = next((place for place in places if (place / "images.json").is_file()), None)
    if folder is None:
        return {}
    stored = folder / "fingerprints.safetensors"
    thumbs = load_file(stored) if stored.is_file() else {}
    manifests = files.read_json(folder / "images.json")
    return {
        part: Fingerprints(tuple(known["names"]), tuple(known["sha256"]), thumbs.get(part))
        for part, known in manifests.items()
        if part in ("pool", "labelled")
    }


# ---- comparing ----


def compare(
    part: str, trained: Fingerprints, scored_part: str, scored: Fingerprints, config: Leaks
) -> Generator[None, None, list[Leak]]:
    """The leaks of one part into another, at most one an image, pausing now and then; returns a list of `Leak`."""
    found: dict[int, Leak] = {}

    def note(index: int, kind: Kind, other: int, alike: float | None, detail: str) -> None:
        found[index] = Leak(kind, part, trained.names[index], scored_part, scored.names[other], alike, detail)

    for index, other in equal(trained, scored):
        note(index, "exact", other, 1.0, "the same pixels")
    yield
    if trained.thumbs is not None:
        pairs = neighbours(trained, scored, config.frames) if config.frames else []
        for index, other, apart in pairs:
            if index not in found:
                note(index, "sequence", other, None, f"{apart} frames apart")
        open_ = [index for index in range(len(trained)) if index not in found]
        for match in altered(trained.thumbs, open_, scored.thumbs, config.alike, config.turns):
            if match is not None:
                note(open_[match.index], "altered", match.other, round(match.alike, 3), match.detail)
            yield
    return list(found.values())


# ---- the picture of the worst ----


def sheet(found: Sequence[Leak], given: Mapping[str, Examples], seen: Mapping[str, Fingerprints]) -> np.ndarray:
    """Rows of what is trained on | what is scored, the pairs in the order given, RGB uint8 `(H, W, 3)`."""
    from ssl_seg.pictures import grid

    rows = []
    for leak in found[:ROWS]:
        ours = _picture(leak.part, leak.name, given, seen)
        theirs = _picture(leak.scored_part, leak.scored, given, seen)
        rows.append([_boxed(ours), _boxed(theirs)])
    return grid(rows)


def _picture(part: str, name: str, given: Mapping[str, Examples], seen: Mapping[str, Fingerprints]) -> np.ndarray:
    """The image itself, or its fingerprint where another run was trained on it."""
    index = seen[part].names.index(name)
    if part in given:
        return given[part].image(index).image
    thumbs = seen[part].thumbs
    grey = np.zeros((SIDE, SIDE), dtype=np.uint8) if thumbs is None else thumbs[index]
    return np.repeat(grey[..., None], 3, axis=-1)  # (H, W) -> (H, W, 3)


def _boxed(image: np.ndarray) -> np.ndarray:
    """An image of any size in the middle of a grey square of `PANEL`."""
    scale = PANEL / max(image.shape[:2])
    size = (max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale)))
    panel = np.full((PANEL, PANEL, 3), 128, dtype=np.uint8)
    top, left = (PANEL - size[0]) // 2, (PANEL - size[1]) // 2
    panel[top : top + size[0], left : left + size[1]] = resize_image(image, size)
    return panel
