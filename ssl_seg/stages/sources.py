"""Whether the files that a run reads are still those that it began with, when it goes on.

A digest of every file would cost a start the reading of the whole pool. So the first start writes down the size and
the time of each file beside its digest, and a later one reads again what differs in these: a pool that was copied goes
on, another picture under an old name does not. Masks are looked at as images are; a corrected one is another one.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from ssl_seg import files
from ssl_seg.config import UserError
from ssl_seg.data.splits import Examples, Subset
from ssl_seg.data.workers import Workers
from ssl_seg.images import show_path
from ssl_seg.leaks.guard import HEARTBEAT, MANY
from ssl_seg.leaks.near_duplicates import fingerprint
from ssl_seg.runs.writer import Run
from ssl_seg.terminal import say
from ssl_seg.training.processes import Processes

RECORD = "files.json"


@dataclass
class Listed:
    """The images of a part, or its masks, with what their files are known by."""

    part: str
    are_masks: bool
    examples: Examples
    names: list[str]
    paths: list[Path]
    bytes: list[int]
    modified: list[int]  # nanoseconds since 1970
    digests: dict[str, str] = field(default_factory=dict)  # by name, of those that are known by now

    @property
    def key(self) -> str:
        """In the record."""
        return f"{self.part} masks" if self.are_masks else self.part

    def record(self) -> dict[str, Sequence[object]]:
        sha256 = [self.digests.get(name) for name in self.names]
        return {"names": self.names, "bytes": self.bytes, "modified": self.modified, "sha256": sha256}


class Sources:
    """The files of a run's parts as they are now; only the first process looks at them.

    Make it before images are read, `check` it before anything is taken from a former start, and `record` it once the
    leak guard has read all images, since the digests are its own.
    """

    def __init__(self, parts: Mapping[str, Examples], labelled: Collection[str], processes: Processes) -> None:
        self.processes = processes
        self.listed: list[Listed] = []
        if processes.is_main:
            for part, examples in parts.items():
                found = [_listed(part, examples, are_masks) for are_masks in (False, True)[: 1 + (part in labelled)]]
                self.listed += [listed for listed in found if listed.names]

    def check(self, run: Run, workers: Workers, allow_changed: Sequence[str] = (), quiet: bool = False) -> None:
        """Raise UserError that names a file which is not the one that the run began with, unless its part is allowed.

        Runs that have not written down their files, as those of version 0.1, are not asked.
        """
        refusal: str | None = None
        if self.processes.is_main:
            for refusal in self._work(run, workers, allow_changed, quiet):
                self.processes.from_first(refusal)  # now and then, since those who wait give up after minutes
        else:
            while refusal is None:
                refusal = self.processes.from_first(None)
        if refusal:
            raise UserError(refusal)

    def record(self, run: Run) -> None:
        """Write down what the files are known by: for images the digests of pixels that the leak guard has taken."""
        seen = run.read_json("images.json") or {}
        for listed in self.listed:
            if listed.are_masks:
                for name, path in zip(listed.names, listed.paths, strict=True):
                    if name not in listed.digests:
                        listed.digests[name] = _digest_of_file(path)
            else:
                own = seen.get(listed.part, {})
                known = zip(own.get("names", ()), own.get("sha256", ()), strict=False)
                listed.digests = {**dict(known), **listed.digests}
        run.write_json(RECORD, {listed.key: listed.record() for listed in self.listed})

    def _work(self, run: Run, workers: Workers, allow_changed: Sequence[str], quiet: bool) -> Iterator[str | None]:
        """None now and then while files are read again, then why the run cannot go on; empty where it can."""
        beaten = time.monotonic()
        try:
            for answer in self._asked(run, workers, allow_changed, quiet):
                if answer is not None or time.monotonic() - beaten > HEARTBEAT:
                    beaten = time.monotonic()
                    yield answer
        except UserError as error:
            yield str(error)

    def _asked(self, run: Run, workers: Workers, allow_changed: Sequence[str], quiet: bool) -> Iterator[str | None]:
        """As `_work`, pausing at each file."""
        former = run.read_json(RECORD) or {}
        for listed in self.listed:
            changed = yield from _changed(listed, former.get(listed.key, {}), workers, quiet)
            if changed and not any(fnmatchcase(f"data.{listed.part}", glob) for glob in allow_changed):
                yield _say_changed(listed, changed)
                return
            if changed:
                (run.folder / "leaks.json").unlink(missing_ok=True)  # its answer was about other pictures
        yield ""


def _listed(part: str, examples: Examples, are_masks: bool) -> Listed:
    listed = Listed(part, are_masks, examples, [], [], [], [])
    for index in range(len(examples)):
        own = examples.files(index)[int(are_masks) :][:1]
        for path in own:
            with files.naming(path, "cannot be read"):
                about = path.stat()
            listed.names.append(examples.name(index))
            listed.paths.append(path)
            listed.bytes.append(about.st_size)
            listed.modified.append(about.st_mtime_ns)
    return listed


def _changed(
    listed: Listed, former: Mapping[str, Sequence[object]], workers: Workers, quiet: bool
) -> Generator[None, None, list[str]]:
    """The names whose files are others than in the former record; notes the digests of all that are not doubtful."""
    columns = (former.get(column, ()) for column in ("names", "bytes", "modified", "sha256"))
    before = {name: (size, modified, digest) for name, size, modified, digest in zip(*columns, strict=True)}
    changed, doubtful, again = [], [], []
    now = zip(listed.names, listed.bytes, listed.modified, strict=True)
    for index, (name, size, modified) in enumerate(now):
        if name not in before:
            continue
        size_before, modified_before, digest = before[name]
        if (size, modified) == (size_before, modified_before):
            listed.digests |= {} if digest is None else {name: str(digest)}
        elif digest is not None:
            again.append(index)
        else:
            (doubtful if size == size_before else changed).append(name)
    if doubtful:
        say(
            f"data.{listed.part}: {len(doubtful)} images have another time than when the run began ({_first(doubtful)} "
            "first), and with leaks.check=false nobody knows whether their pixels are others",
            quiet,
        )
    told = f"data.{listed.part}: {len(again):,} files have another size or time, and are read again"
    say(told, quiet or len(again) < MANY)
    for index, digest in zip(again, (yield from _digests(listed, again, workers)), strict=True):
        name = listed.names[index]
        listed.digests[name] = digest
        if digest != before[name][2]:
            changed.append(name)
    return changed


def _digests(listed: Listed, chosen: Sequence[int], workers: Workers) -> Generator[None, None, Sequence[str]]:
    """Of masks a digest of the file, which is small; of images that of the leak guard, so of pixels."""
    if listed.are_masks:
        found = []
        for index in chosen:
            found.append(_digest_of_file(listed.paths[index]))
            yield
        return found
    if not chosen:
        return ()
    prints = yield from fingerprint(Subset(listed.examples, tuple(chosen)), workers)
    return prints.digests


def _digest_of_file(path: Path) -> str:
    with files.naming(path, "cannot be read"):
        about = path.stat()
        return _digest_of_same_file(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=1)  # the masks of a stack are one file, and come one after the other
def _digest_of_same_file(path: Path, *_: int) -> str:
    with os.fdopen(files.open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say_changed(listed: Listed, changed: Sequence[str]) -> str:
    what = "masks" if listed.are_masks else "images"
    return (
        f"data.{listed.part}: {len(changed)} of {len(listed.names)} {what} are not those that the run began with, "
        f"under the same names ({_first(changed)} first); put them back, start anew with --overwrite, or give "
        f"--allow-changed data.{listed.part}"
    )


def _first(names: Sequence[str]) -> str:
    return show_path(names[0])
