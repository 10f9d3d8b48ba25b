"""The leak guard: is an image that is trained on among those that are scored, unchanged, altered or a frame beside it?

Every image is read once. `near_duplicates` says which pictures are the same, `neighbours` which are frames of one video
close to each other, `record` how it is stored and told. This file asks them, stops the run, and lets pass what is
allowed by name.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, NonNegativeInt

from ssl_seg import files
from ssl_seg.config import Config, UserError
from ssl_seg.datasets import numbering
from ssl_seg.images import write_image
from ssl_seg.leaks.near_duplicates import SIDE, Fingerprints, altered, equal, fingerprint
from ssl_seg.leaks.neighbours import LEAST_PAIRS, TOO_FEW, frames_apart, how_judged, neighbours
from ssl_seg.leaks.record import (
    Compared,
    Kind,
    Leak,
    Place,
    read_fingerprints,
    say_doubts,
    say_leaks,
    sentence,
    write_fingerprints,
)
from ssl_seg.runs.folder import beside
from ssl_seg.terminal import say

if TYPE_CHECKING:
    from ssl_seg.data.splits import Examples
    from ssl_seg.data.workers import Workers
    from ssl_seg.training.processes import Processes

ROWS = 8  # pairs on the sheet
PANEL = 320  # pixels of the longer side of a picture on the sheet
FILES = ("leaks.json", "leaks.png", "images.json", "fingerprints.safetensors")
FEW = 256  # images of a part that `within` halves no further
MANY = 1_000  # images whose reading takes so long that it is announced
Pair = tuple[str, str]  # of parts: trained on, scored
HEARTBEAT = 2.0  # seconds after which waiting processes hear that the first is at work


class LeakError(UserError):
    """Images that are scored are among those that are trained on. The CLI exits with 3."""

    exit_code = 3


class Leaks(Config):
    """What the leak guard looks for, and what it lets pass."""

    check: bool = True  # reading every image once is most of the cost; False is written into the run and its report
    # Globs of kinds (exact, sequence, altered) or of image names whose leaks do not stop the run; all are recorded.
    allow: tuple[str, ...] = ()
    # Fine structure in common from which a pair is a leak: photographs' copies had 0.78 and more, clean pairs to 0.42.
    alike: float = Field(default=0.6, gt=0.0, le=1.0)
    # Frames of one video this close are neighbours; 0: names are not looked at. CamVid's at 30 a second are more alike
    # than 95 % of distant ones up to 60 numbers apart, and no more at 90; its official splits are 31 and 39 apart.
    frames: NonNegativeInt = 60
    turns: bool = False  # also quarter turns and upside down, for aerial or microscope images; four times the search


@dataclass(frozen=True)
class Question:
    """What is to be compared with what: parts by name, None for one that is not there."""

    trained: Mapping[str, Examples | None]
    scored: Mapping[str, Examples | None]
    config: Leaks
    # The runs whose weights are started from, or teach: their images are compared by what those runs stored. By the key
    # that names each: `init`, or `init.` and anything where there are several.
    inits: Mapping[str, str | None] = field(default_factory=dict)
    # Parts (trained, scored) that the run itself has cut from one data set: frames beside the cut are written down and
    # let pass, for the user has not chosen it and one clip cannot be cut without.
    own_cuts: frozenset[Pair] = frozenset()
    # Of a pair of parts that are one set of images, cut into folds once or several times: the fold of each image by its
    # name, for each cut. Only images in different folds of a cut are trained on for one another.
    folds: Mapping[Pair, Sequence[Mapping[str, int]]] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Examples]:
        return {part: own for part, own in {**self.trained, **self.scored}.items() if own is not None}

    @property
    def basis(self) -> dict[str, Any]:
        """What an answer holds for, as long as it stays the same."""
        from ssl_seg.data.splits import manifest, sample_digest  # torch stays out of the report

        images = {part: manifest(examples) for part, examples in self.given.items()}
        if self.config.check:
            for part, examples in self.given.items():
                images[part]["sha256_of_some"] = sample_digest(examples, with_labels=False)
        inits = {name: {"path": init, "images": _digest_of_init(init)} for name, init in self.inits.items() if init}
        return {"images": images, "settings": self.config.dump(), "inits": inits}


def _digest_of_init(init: str) -> str | None:
    path = beside(init, "images.json")
    if path is None:
        return None
    with files.naming(path, "cannot be read"):
        return files.sha256(path.read_bytes())


def guard(
    run: Place, question: Question, processes: Processes, workers: Workers | None = None, quiet: bool = False
) -> dict[str, Any]:
    """`check` for a run of several processes: the first reads and compares, and all end alike."""
    outcome: _Outcome | None = None
    if processes.is_main:
        for outcome in _work(run, question, workers, quiet):
            processes.from_first(outcome)  # now and then, since those who wait give up after minutes of silence
    else:
        while outcome is None:
            outcome = processes.from_first(None)
    assert outcome is not None  # as `_work` ends
    return outcome.record_or_refusal(run.folder)


def check(place: Place, question: Question, workers: Workers | None = None, quiet: bool = False) -> dict[str, Any]:
    """Compare what is trained on with what is scored, unless it was done already; gives leaks.json.

    Raises LeakError, with leaks.json and leaks.png written, for a leak that is not allowed.
    """
    *_, outcome = _work(place, question, workers, quiet)
    assert outcome is not None  # as `_work` ends
    return outcome.record_or_refusal(place.folder)


def leaking(examples: Examples, scored: Examples, config: Leaks, workers: Workers | None = None) -> set[str]:
    """The names of those examples that show what is scored, but for what `allow` names; none where `check` is off."""
    result = Compared()
    for _ in _compared(Question({"pool": examples}, {"scored": scored}, config), workers, result):
        pass
    return {leak.name for leak in result.leaks if not is_allowed(leak, config.allow)}


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


def _work(place: Place, question: Question, workers: Workers | None, quiet: bool) -> Iterator[_Outcome | None]:
    """The check as one process makes it: None while it works, then what came out, a user's error as words."""
    try:
        basis = question.basis
        former = place.read_json("leaks.json")
        if former is not None and former.get("basis") == basis:
            yield _Outcome(former)
            return
        for name in FILES:
            with files.naming(place.folder / name, "cannot be removed"):
                (place.folder / name).unlink(missing_ok=True)
        result = Compared()
        started = beaten = time.monotonic()
        number = sum(map(len, question.given.values()))
        say(f"looking for leaks: {number:,} images are read once", quiet or number < MANY or not question.config.check)
        for _ in _compared(question, workers, result):
            if time.monotonic() - beaten > HEARTBEAT:
                beaten = time.monotonic()
                yield None
        record = make_record(basis, result, set(question.scored), question.config, question.own_cuts)
        if question.config.check:
            write_fingerprints(place, result)
        if result.leaks:
            yield None
            write_image(place.folder / "leaks.png", sheet(_worst_first(result.leaks), question.given, result.prints))
        place.write_json("leaks.json", record)  # last: with it the answer is whole
        for line in say_doubts(record["doubts"]):
            say(line, quiet)
        seconds = time.monotonic() - started
        say(f"{sentence(record)} ({seconds:.1f} s)", quiet)
        yield _Outcome(record)
    except UserError as error:
        yield _Outcome({}, str(error))


def _compared(question: Question, workers: Workers | None, result: Compared) -> Iterator[None]:
    """Fill `result` with every part's fingerprints and with the leaks, pausing now and then.

    Without a scored part there is nothing to compare, but a run that starts from this one may have some.
    """
    if not question.config.check:
        return
    given = question.given
    for name, init in question.inits.items():  # first, since it is quick and may be damaged
        known, unknown = read_fingerprints(init)
        result.prints |= {f"{name}.{part}": prints for part, prints in known.items()}
        result.unknown += [f"{name}.{part}" for part in unknown]
    for part, examples in given.items():
        result.prints[part] = yield from fingerprint(examples, workers)
    for part, prints in list(result.prints.items()):
        for against in sorted(question.scored.keys() & given.keys()):
            if (part, against) in question.folds:
                result.leaks += yield from _between_folds((part, against), prints, question)
            elif part not in question.scored:
                result.leaks += yield from compare(part, prints, against, result.prints[against], question.config)


def _between_folds(pair: Pair, prints: Fingerprints, question: Question) -> Generator[None, None, list[Leak]]:
    """The leaks of images into others that are held out, in some cut, where they themselves are not."""
    alike = yield from within(pair[0], prints, question.config)
    cuts = question.folds[pair]
    apart = [leak for leak in alike if any(cut[leak.name] != cut[leak.scored] for cut in cuts)]
    return [replace(leak, scored_part=pair[1]) for leak in apart]


def make_record(
    basis: Mapping[str, Any],
    result: Compared,
    scored: set[str],
    config: Leaks,
    own_cuts: Collection[Pair] = (),
) -> dict[str, Any]:
    """leaks.json: what was compared and how, every leak with whether it is allowed, and images to look at.

    The worst leak comes first.
    """
    trained = {part: prints for part, prints in result.prints.items() if part not in scored}
    against = {part: prints for part, prints in result.prints.items() if part in scored}
    pairs = [
        {"part": part, "scored_part": other, **_how(prints, theirs, config)}
        for part, prints in [*trained.items(), *((part, None) for part in result.unknown)]
        for other, theirs in against.items()
    ]
    unjudged = {(pair["part"], pair["scored_part"]) for pair in pairs if pair["names"] == TOO_FEW}
    at_own_cut = {leak for leak in result.leaks if _is_at_own_cut(leak, own_cuts, unjudged, config.frames)}
    return {
        "basis": dict(basis),
        "checked": config.check,
        "trained": {part: len(prints) for part, prints in trained.items()},
        "scored": {part: len(prints) for part, prints in against.items()},
        "pairs": pairs,
        "doubts": {part: own for part, prints in result.prints.items() if (own := _doubts(prints))},
        "leaks": [_recorded(leak, config, leak in at_own_cut) for leak in _worst_first(result.leaks)],
    }


def _doubts(prints: Fingerprints) -> dict[str, str]:
    """What is to be looked at, by the image's name."""
    return {name: words for name, words in zip(prints.names, prints.doubts, strict=False) if words}


def _is_at_own_cut(leak: Leak, own_cuts: Collection[Pair], unjudged: Collection[Pair], frames: int) -> bool:
    """Whether the run's own cut has parted neighbours.

    Where pictures are too few to say that numbers are time, two that are much alike and close in number are taken for
    neighbours too: a run of sixteen frames is cut between two.
    """
    pair = (leak.part, leak.scored_part)
    if pair not in own_cuts:
        return False
    apart = frames_apart(leak.name, leak.scored) or 0
    return leak.kind == "sequence" or (leak.kind == "altered" and pair in unjudged and 0 < apart <= frames)


def _recorded(leak: Leak, config: Leaks, at_own_cut: bool) -> dict[str, Any]:
    return {**asdict(leak), "allowed": at_own_cut or is_allowed(leak, config.allow), "at_own_cut": at_own_cut}


def _how(trained: Fingerprints | None, scored: Fingerprints, config: Leaks) -> dict[str, str]:
    """By what the images of two parts were compared: pictures and names."""
    if trained is None:
        return {"pictures": "unknown", "names": "unknown"}
    if trained.thumbs is None:
        return {"pictures": "exact only", "names": "not looked at"}
    return {"pictures": "compared", "names": how_judged(trained, scored) if config.frames else "not looked at"}


def _worst_first(found: Sequence[Leak]) -> list[Leak]:
    order = {"exact": 0, "altered": 1, "sequence": 2}
    return sorted(found, key=lambda leak: (order[leak.kind], -(leak.alike or 0.0)))


def is_allowed(leak: Leak, allow: Sequence[str]) -> bool:
    """Whether a glob names the leak's kind or one of its images; a name with brackets names itself."""
    words = (leak.kind, leak.name, leak.scored)
    return any(word == glob or fnmatchcase(word, glob) for glob in allow for word in words)


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
    if trained.thumbs is None:
        return list(found.values())
    near = {pair.index: pair for pair in (neighbours(trained, scored, config.frames) if config.frames else ())}
    open_ = [index for index in range(len(trained)) if index not in found]
    for match in altered(trained.thumbs, open_, scored.pictures, config.alike, config.turns):
        if match is not None:
            index = open_[match.index]
            beside = near.get(index)
            # The next frames are nearly the same picture: they stay neighbours. Where one of the same number is scored,
            # or the best match is of another numbering, it is a copy.
            apart = frames_apart(trained.names[index], scored.names[match.other])
            if beside is None or beside.apart == 0 or not apart:
                note(index, "altered", match.other, round(match.alike, 3), match.detail)
        yield
    for index, other, apart in near.values():
        if index not in found and apart > 0:
            note(index, "sequence", other, None, f"{apart} frames apart")
        elif index not in found:
            note(index, "altered", other, None, "the same number, and much alike")
    return list(found.values())


def within(part: str, prints: Fingerprints, config: Leaks) -> Generator[None, None, list[Leak]]:
    """What one part holds twice, and neighbours in it: what a split by chance would make leaks of.

    Every other image is compared with the rest, then what is left of either half in itself; of a few, those whose
    place has a bit with those whose place has not, bit by bit, since two places differ in one at least. Halving down to
    pairs took minutes for 1,000 pictures, and pairs do not tell what a set shares. An image that is told is left out
    from then on, for the one that it is like stands for it: three copies are two pairs. Pauses now and then.
    """
    found: list[Leak] = []
    told: set[int] = set()
    asked, by_pictures = config, config.model_copy(update={"frames": 0})  # the first look has all numbers before it
    index_of = {name: index for index, name in enumerate(prints.names)}
    waiting = [list(range(len(prints)))]
    while waiting:
        chosen = waiting.pop()
        is_few = len(chosen) <= FEW
        for bit in range((len(chosen) - 1).bit_length() if is_few else 1):
            sides: tuple[list[int], list[int]] = ([], [])
            for place, index in enumerate(chosen):
                if index not in told:
                    sides[place >> bit & 1].append(index)
            if all(sides):
                one, other = (prints.some(side) for side in sides)
                own = yield from compare(part, one, part, other, asked)
                found += own
                asked = by_pictures
                told |= {index_of[leak.name] for leak in own}
        if not is_few:
            waiting += [[index for index in half if index not in told] for half in (chosen[::2], chosen[1::2])]
    # Few pictures, or those of a camera that moves fast, do not say that numbers are time; others of the same numbering
    # may have said it, and so do several that are alike and close.
    close = Counter(_numbering_of(leak) for leak in found if _is_close(leak, config.frames))
    said = {_numbering_of(leak) for leak in found if leak.kind == "sequence"}
    videos = said | {numbered for numbered, count in close.items() if count >= LEAST_PAIRS}
    return [
        replace(leak, kind="sequence", alike=None, detail=f"{frames_apart(leak.name, leak.scored)} frames apart")
        if leak.kind == "altered" and _is_close(leak, config.frames) and _numbering_of(leak) in videos
        else leak
        for leak in found
    ]


def _is_close(leak: Leak, frames: int) -> bool:
    """Whether its images are close in one numbering."""
    return 0 < (frames_apart(leak.name, leak.scored) or 0) <= frames


def _numbering_of(leak: Leak) -> str:
    numbered = numbering(leak.name)
    return "" if numbered is None else numbered[0]


# ---- the picture of the worst ----


def sheet(found: Sequence[Leak], given: Mapping[str, Examples], seen: Mapping[str, Fingerprints]) -> np.ndarray:
    """Rows of what is trained on | what is scored, the pairs in the order given, RGB uint8 `(H, W, 3)`."""
    from ssl_seg.figures.panels import boxed, grid

    rows = []
    for leak in found[:ROWS]:
        ours = _picture(leak.part, leak.name, given, seen)
        theirs = _picture(leak.scored_part, leak.scored, given, seen)
        rows.append([boxed(ours, PANEL), boxed(theirs, PANEL)])
    return grid(rows)


def _picture(part: str, name: str, given: Mapping[str, Examples], seen: Mapping[str, Fingerprints]) -> np.ndarray:
    """The image itself, or its fingerprint where another run was trained on it."""
    index = seen[part].names.index(name)
    if part in given:
        return given[part].image(index).image
    thumbs = seen[part].thumbs
    grey = np.zeros((SIDE, SIDE), dtype=np.uint8) if thumbs is None else thumbs[index]
    return np.repeat(grey[..., None], 3, axis=-1)  # (H, W) -> (H, W, 3)
