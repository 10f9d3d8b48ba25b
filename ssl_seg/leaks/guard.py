"""The leak guard: is an image that is trained on among those that are scored, unchanged, altered or a frame beside it?

Every image is read once. `likeness` says which pictures are the same, `sequences` which are neighbours in a video; here
is what follows from it: the record, the line that stops a run, and what is let pass by name. Imports no torch, so that
a report can read what was found.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError

from ssl_seg import files
from ssl_seg.config import Config, UserError
from ssl_seg.images import resize_image, show_path, write_image
from ssl_seg.leaks.near_duplicates import SIDE, Fingerprints, altered, equal, fingerprint
from ssl_seg.leaks.neighbours import NONE_SHARED, TOO_FEW, frames_apart, how_judged, neighbours
from ssl_seg.terminal import say

if TYPE_CHECKING:
    from ssl_seg.data.loading import Examples
    from ssl_seg.training.loop import Processes

Kind = Literal["exact", "sequence", "altered"]

SHOWN = 3  # pairs in the line on the terminal
ROWS = 8  # pairs on the sheet
PANEL = 320  # pixels of the longer side of a picture on the sheet
MOST_STORED = 20_000  # fingerprints of a run, 80 MB, for runs that start from it
FILES = ("leaks.json", "leaks.png", "images.json", "fingerprints.safetensors")
TRAINED = ("pool", "labelled", "images")  # what parts that are trained on end in, the last where nothing is known
MANY = 1_000  # images whose reading takes so long that it is announced
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
class Leak:
    """One image that is trained on, and the one that is scored."""

    kind: Kind
    # pool or labelled; init.pool of the pretraining that the weights come from, init.init.pool of the one before that
    part: str
    name: str
    scored_part: str
    scored: str
    alike: float | None  # 1 for equal pixels, the fine structure in common, None where names tell
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
    # The runs whose weights are started from: their images are compared by what those runs stored. By name: `init`, or
    # `init.` and anything where there are several.
    inits: Mapping[str, str | None] = field(default_factory=dict)
    # Parts (trained, scored) that the run itself has cut from one data set: frames beside the cut are written down and
    # let pass, for the user has not chosen it and one clip cannot be cut without.
    own_cuts: frozenset[tuple[str, str]] = frozenset()

    @property
    def given(self) -> dict[str, Examples]:
        return {part: own for part, own in {**self.trained, **self.scored}.items() if own is not None}

    @property
    def basis(self) -> dict[str, Any]:
        """What an answer holds for, as long as it stays the same."""
        from ssl_seg.data.loading import manifest, sample_digest  # torch stays out of the report

        images = {part: manifest(examples) for part, examples in self.given.items()}
        if self.config.check:
            for part, examples in self.given.items():
                images[part]["sha256_of_some"] = sample_digest(examples, with_labels=False)
        inits = {name: {"path": init, "images": _digest_of_init(init)} for name, init in self.inits.items() if init}
        return {"images": images, "settings": self.config.dump(), "inits": inits}


def _digest_of_init(init: str) -> str | None:
    folder = _run_of(init)
    if folder is None:
        return None
    with files.naming(folder / "images.json", "cannot be read"):
        return files.sha256((folder / "images.json").read_bytes())


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
        seconds = time.monotonic() - started
        say(f"{sentence(record)} ({seconds:.1f} s)", quiet)
        yield _Outcome(record)
    except UserError as error:
        yield _Outcome({}, str(error))


@dataclass
class Compared:
    """What a check has read and found so far."""

    prints: dict[str, Fingerprints] = field(default_factory=dict)  # of every part whose images are known
    unknown: list[str] = field(default_factory=list)  # parts of other runs whose images nobody has stored
    leaks: list[Leak] = field(default_factory=list)


def _compared(question: Question, workers: int, result: Compared) -> Iterator[None]:
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
            if part not in question.scored:
                result.leaks += yield from compare(part, prints, against, result.prints[against], question.config)


def make_record(
    basis: Mapping[str, Any],
    result: Compared,
    scored: set[str],
    config: Leaks,
    own_cuts: Collection[tuple[str, str]] = (),
) -> dict[str, Any]:
    """leaks.json: what was compared and how, and every leak with whether it is allowed, the worst first."""
    trained = {part: prints for part, prints in result.prints.items() if part not in scored}
    against = {part: prints for part, prints in result.prints.items() if part in scored}
    pairs = [
        {"part": part, "scored_part": other, **_how(prints, theirs, config)}
        for part, prints in [*trained.items(), *((part, None) for part in result.unknown)]
        for other, theirs in against.items()
    ]
    return {
        "basis": dict(basis),
        "checked": config.check,
        "trained": {part: len(prints) for part, prints in trained.items()},
        "scored": {part: len(prints) for part, prints in against.items()},
        "pairs": pairs,
        "leaks": [_recorded(leak, config, own_cuts) for leak in _worst_first(result.leaks)],
    }


def _recorded(leak: Leak, config: Leaks, own_cuts: Collection[tuple[str, str]]) -> dict[str, Any]:
    at_own_cut = leak.kind == "sequence" and (leak.part, leak.scored_part) in own_cuts
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


def sentence(record: Mapping[str, Any] | None) -> str:
    """What leaks.json says, in one sentence; None is a run from before there was one."""
    if record is None:
        return "Whether training images are among the scored ones was not checked."
    if not record["checked"]:
        return "Whether training images are among the scored ones was not checked (leaks.check=false)."
    gaps = _gaps(record)
    if not record["trained"] or not record["scored"]:
        return f"No leak check: {'; '.join(gaps) or 'there is nothing to compare with'}."
    both = f"{_counted(record['trained'])} compared with {_counted(record['scored'])}"
    if not record["leaks"]:
        return f"No leak: {'; '.join([both, *gaps])}."
    allowed = sum(leak["allowed"] for leak in record["leaks"])
    verdict = "all allowed by leaks.allow" if allowed == len(record["leaks"]) else f"{allowed} of them allowed"
    cut = sum(leak.get("at_own_cut", False) for leak in record["leaks"])
    if cut:
        verdict = f"{allowed} of them allowed, {cut} as frames beside the cut that the run made itself"
    return f"LEAK: {_kinds(record['leaks'])} among {'; '.join([both, verdict, *gaps])}."


def _gaps(record: Mapping[str, Any]) -> list[str]:
    """What could not be compared, or not as well as the rest."""
    pairs = record.get("pairs", ())
    parts = {
        how: list(dict.fromkeys(pair["part"] for pair in pairs if how in (pair["pictures"], pair["names"])))
        for how in ("unknown", "exact only", TOO_FEW, NONE_SHARED)
    }
    words = []
    if parts["unknown"]:
        runs = [part.removesuffix(".images") for part in parts["unknown"]]
        words.append(f"the images that {' and '.join(runs)} was trained on are unknown")
    if parts["exact only"]:
        words.append(f"of {' and '.join(parts['exact only'])} only exact copies were looked for")
    if parts[TOO_FEW]:
        words.append(f"too few images of {' and '.join(parts[TOO_FEW])} to judge neighbours by name")
    if parts[NONE_SHARED]:
        named = " and ".join(parts[NONE_SHARED])
        words.append(f"names of {named} share no numbering with the scored ones, so no neighbours were looked for")
    return words


def _kinds(found: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(leak["kind"] for leak in found).items())


def say_leaks(record: Mapping[str, Any], folder: Path) -> str | None:
    """The line that stops a run; None where nothing is found that is not allowed."""
    stopping = [leak for leak in record["leaks"] if not leak["allowed"]]
    if not stopping:
        return None
    inits = record["basis"].get("inits", {})
    between: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for leak in stopping:
        between[leak["part"], leak["scored_part"]].append(leak)
    told = []
    for (part, scored), found in between.items():
        examples = "" if told else f": {_examples(found)}"
        told.append(f"{_place(part, inits)}: leak into {_place(scored, inits)}: {_kinds(found)}{examples}")
    kinds = ",".join(dict.fromkeys(leak["kind"] for leak in stopping))
    return (
        f"{'; '.join(told)}; see {folder / 'leaks.json'} and leaks.png; take the images out, keep whole sequences on "
        f"one side, or allow them by name: leaks.allow=[{kinds}]"
    )


def _examples(found: Sequence[Mapping[str, Any]]) -> str:
    pairs = [f"{show_path(leak['name'])} ~ {show_path(leak['scored'])} ({leak['detail']})" for leak in found[:SHOWN]]
    return "; ".join(pairs) + (", ..." if len(found) > SHOWN else "")


def _place(part: str, inits: Mapping[str, Mapping[str, Any]]) -> str:
    """Where in the config the images of a part come from."""
    name = next((name for name in inits if part.startswith(f"{name}.")), None)
    *before, own = part.removeprefix(f"{name}.").split(".")
    own = own.partition("#")[0]  # a study numbers parts of other data
    if name is not None:
        key = "init" if len(inits) == 1 else f"init={inits[name]['path']}"
        return f"{key}: the {own} {'that its own init' if before else 'it'} was trained on"
    return f"pretrain.{'.'.join(before)}.data.{own}" if before else f"data.{own}"


def _counted(parts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} images of {part}" for part, count in parts.items())


class _Part(BaseModel):
    """An entry of images.json: the images of a part in order."""

    model_config = ConfigDict(extra="forbid")
    names: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()  # of each image's pixels
    sha256_of_fingerprints: str | None = None  # None where there are none: of what is scored, or too many
    unknown: bool = False


def write_fingerprints(run: Place, result: Compared) -> None:
    """images.json, the manifest of what the run saw, and the fingerprints for runs that start from this one.

    With those of the runs before, so that a chain of pretrainings is seen to its beginning.
    """
    from safetensors.numpy import save

    stored: dict[str, np.ndarray] = {}
    left = MOST_STORED
    for part in sorted(result.prints, key=lambda part: part.count(".")):  # its own first
        thumbs = result.prints[part].thumbs
        if _is_trained(part) and thumbs is not None and len(thumbs) <= left:
            stored[part] = np.ascontiguousarray(thumbs)
            left -= len(thumbs)
    manifest = {part: _Part(unknown=True) for part in result.unknown}
    for part, prints in result.prints.items():
        digest = _digest(stored[part]) if part in stored else None
        manifest[part] = _Part(names=prints.names, sha256=prints.digests, sha256_of_fingerprints=digest)
    if stored:
        files.write_atomic(run.folder / "fingerprints.safetensors", save(stored))
    run.write_json("images.json", {part: about.model_dump(exclude_defaults=True) for part, about in manifest.items()})


def read_fingerprints(init: str | None) -> tuple[dict[str, Fingerprints], list[str]]:
    """What the run that `init` names was trained on, as it has stored it, and the parts of which nobody knows anything.

    Weights of another origin have one unknown part, `images`. Raises UserError for a record that is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if init is None:
        return {}, []
    folder = _run_of(init)
    if folder is None:
        return {}, ["images"]
    path, store = folder / "images.json", folder / "fingerprints.safetensors"
    try:
        manifest = TypeAdapter(dict[str, _Part]).validate_python(files.read_json(path))
    except ValidationError as error:
        raise UserError(f"{path}: not a run's list of images; {_REPAIR}") from error
    try:
        thumbs = load_file(store) if store.is_file() else None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{store}: damaged; {_REPAIR}") from error
    known: dict[str, Fingerprints] = {}
    for part, about in manifest.items():
        if not _is_trained(part) or about.unknown:
            continue
        if len(about.names) != len(about.sha256):
            raise UserError(f"{path}: {part} has not one sha256 for each name; {_REPAIR}")
        own = None
        if thumbs is not None and about.sha256_of_fingerprints is not None:
            own = thumbs.get(part)
            if own is None or len(own) != len(about.names) or _digest(own) != about.sha256_of_fingerprints:
                raise UserError(f"{store}: the fingerprints of {part} are not those that were written; {_REPAIR}")
        known[part] = Fingerprints(about.names, about.sha256, own)
    return known, [part for part, about in manifest.items() if about.unknown]


_REPAIR = "restore it, make the run again, or remove images.json: its images are then said to be unknown"


def _run_of(init: str) -> Path | None:
    """The run whose folder, encoder/ or weights `init` names; None where no run has left its images."""
    start = Path(init).parent if Path(init).is_file() else Path(init)
    return next((folder for folder in (start, start.parent) if (folder / "images.json").is_file()), None)


def _is_trained(part: str) -> bool:
    return part.rpartition(".")[2] in TRAINED


def _digest(thumbs: np.ndarray) -> str:
    """sha256 of the kind, shape and values of an array."""
    about = f"{thumbs.dtype}{thumbs.shape}".encode()
    return hashlib.sha256(about + thumbs.tobytes()).hexdigest()


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
    for match in altered(trained.thumbs, open_, scored.thumbs, config.alike, config.turns):
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


# ---- the picture of the worst ----


def sheet(found: Sequence[Leak], given: Mapping[str, Examples], seen: Mapping[str, Fingerprints]) -> np.ndarray:
    """Rows of what is trained on | what is scored, the pairs in the order given, RGB uint8 `(H, W, 3)`."""
    from ssl_seg.figures.panels import grid

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
