"""Shards: tar files as WebDataset writes them, on a disk or behind any URL that fsspec reads.

WebDataset itself reads shards from their beginning on and shuffles in a buffer, so the order of its images depends on
how many workers there are and cannot be entered in the middle. Ours is an index: where in which shard each member lies.
A tar is not compressed, so that a member is read alone, in any order, and what is promised of a data set holds: a step
sees the same images on any number of processes, and a run goes on at any step. fsspec reads URLs, tarfile reads the
headers, and braceexpand spells the URLs as WebDataset does.
"""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import os
import re
import stat
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec.config
import fsspec.core
import numpy as np
from braceexpand import braceexpand
from pydantic import TypeAdapter, field_validator

from ssl_seg import files
from ssl_seg.config import PathTexts, UserError, first_line, user_path
from ssl_seg.datasets import Dataset
from ssl_seg.datasets.pairs import Pictures, some_names
from ssl_seg.images import IMAGE_SUFFIXES, MASK_SUFFIXES, Packed, show_path
from ssl_seg.terminal import say

MOST_SHARDS = 100_000  # that braces may stand for: {0..9999999999} would fill the memory
LARGEST = 2**30  # bytes of a member that is read: no image that is decoded has as many
# Bytes that are read of a shard at a time while its headers are looked for: with images of 10 kB one request shows 25
# headers, and of images of 5 MB a twentieth is read. On a disk to skip costs nothing.
BLOCK_OF_URL, BLOCK_OF_FILE = 2**18, 2**12
AT_A_TIME = 8  # shards behind URLs that are asked at once
PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between the five times that a URL is asked
# What stores say of an object that changes with its bytes.
STAMPS = ("ETag", "etag", "Content-MD5", "md5Hash", "generation", "mtime", "LastModified", "Last-Modified", "created")
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
CACHE = "filecache"  # fsspec's, of whole files
FORMAT = 1  # of an index that is kept
T = TypeVar("T")


class Listed(Dataset):
    """Which shards there are, and which of their members are meant."""

    # A path or URL of shards, or several: {000000..000009} counts, and in a path * and ? stand for any letters.
    urls: PathTexts
    images: str | None = None  # what images end in, behind their key: jpg, rgb.png. None: the one that is an image
    masks: str | None = None  # what masks end in: seg.png, mask.png. None: images are unlabelled


class Shards(Pictures, Listed):
    """Images in WebDataset's tar shards: `00017.jpg`, and its mask `00017.seg.png`, are of key `00017`.

    The key is the path up to the first dot of its last part, and what follows tells what a member is, as WebDataset has
    it; keys without an image are left out. Order is that of the shards, and in them that of the members. An image is
    called by its path in its shard. Its sequence is the folder in that path.

    Where members lie is found by one pass over each shard, and kept in the user's cache folder for as long as the shard
    has the same size and time, or tag of its store. A member's header is read with it and compared, so that a shard
    that was exchanged in the meantime is noticed.

    Errors (UserError, one line): a shard that is not there, cut off, damaged, compressed or of two archives; one key in
    two shards; two images for a key, or none at all; masks that are missing; a URL that does not answer, or gives no
    parts of a file; those of images and masks as of `folder`.
    """

    @field_validator("images", "masks")
    @classmethod
    def _check_ending(cls, ending: str | None) -> str | None:
        return None if ending is None else ending.lower().removeprefix(".")

    @field_validator("urls")
    @classmethod
    def _check_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        if not urls:
            raise ValueError('is empty; name shards: "pool-{000000..000009}.tar"')
        for url in urls:
            _spelled(url)
        return urls

    def _check_given(self) -> None:
        given = self._given()
        if self.masks is None and given:
            raise ValueError(f"{given[0]} is given without masks; write what masks end in: masks: seg.png")
        if self.masks is None:
            return
        if self.classes is None:
            raise ValueError("classes is missing; write their names in the order of their ids, or their number")
        if f".{self.masks.rpartition('.')[2]}" not in MASK_SUFFIXES:
            known = " ".join(sorted(MASK_SUFFIXES))
            raise ValueError(f"masks: {self.masks} keeps no ids; write what masks end in ({known}): seg.png")
        if self.masks == self.images:
            raise ValueError(f"images and masks are both {self.masks}; write what each ends in")

    def __len__(self) -> int:
        return len(self._found.images.names)

    def name(self, index: int) -> str:
        return self._found.images.names[index]

    def sequence(self, index: int) -> str:
        return self.name(index).rpartition("/")[0]

    def files(self, index: int) -> tuple[Path, ...]:
        path = _local(self._url(index))
        return () if path is None else (path, path)[: 1 + self.has_masks]

    def notes(self, with_labels: bool = True) -> tuple[str, ...]:
        return self._found.notes + super().notes(with_labels)

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    @property
    def image_place(self) -> str:
        return some_names(self.urls)

    @property
    def mask_place(self) -> str:
        return f"{self.image_place} (*.{self.masks})"

    def image_source(self, index: int) -> Packed:
        return self._packed(index, self._found.images)

    def mask_source(self, index: int) -> Packed:
        return self._packed(index, self._found.masks)

    def _packed(self, index: int, column: _Column) -> Packed:
        url = self._url(index)
        offset, size, check = column.places[index].tolist()
        return Packed(f"{show_path(url)}: {show_path(column.names[index])}", partial(_read, url, offset, size, check))

    def _url(self, index: int) -> str:
        return self._found.urls[self._found.shards[index]]

    @cached_property
    def _found(self) -> _Found:
        """Where all images lie; loader workers inherit it."""
        urls = [url for text in self.urls for url in _expanded(text)]
        (url, times), *_ = Counter(urls).most_common(1)
        if times > 1:
            raise UserError(f"{show_path(url)}: is named {times} times in urls; name each shard once")
        samples: dict[str, _Sample] = {}
        links = 0
        for number, shard in enumerate(_shards(urls)):
            links += shard.links
            for member in shard.members:
                parts = _parted(member.name)
                if parts is None:
                    continue
                key, ending = parts
                sample = samples.setdefault(key, _Sample(number, {}))
                if sample.shard != number:
                    raise UserError(
                        f"{show_path(urls[number])}: key {show_path(key)} is also in {show_path(urls[sample.shard])}; "
                        "number images through all shards, or give those of each shard a folder of their own"
                    )
                if ending in sample.members:
                    raise UserError(f"{show_path(urls[number])}: {show_path(member.name)} is in it twice; pack it anew")
                sample.members[ending] = member
        return self._chosen(urls, samples, links)

    def _chosen(self, urls: list[str], samples: dict[str, _Sample], links: int) -> _Found:
        """The images among the members, and their masks."""
        shards, images, masks = [], [], []
        missing, others = [], Counter[str]()
        for key, (number, members) in samples.items():
            endings = [ending for ending in members if self._is_image(ending)]
            if not endings:
                others[f"*.{next(iter(members))}"] += 1
                continue
            if len(endings) > 1:
                both = " and ".join(show_path(members[ending].name) for ending in endings[:2])
                raise UserError(
                    f"{show_path(urls[number])}: {both} are of one key; write what images end in: images: "
                    f"{endings[0]}, or if one of them is a mask, masks"
                )
            shards.append(number)
            images.append(_checked(members[endings[0]], urls[number]))
            mask = members.get(self.masks or "")
            if mask is not None:
                masks.append(_checked(mask, urls[number]))
            elif self.has_masks:
                missing.append(key)
        place = self.image_place
        ends = some_names([name for name, _ in others.most_common()])
        if not images:
            told = f"; members are called {ends}: write what images end in, images: ENDING" if others else ""
            raise UserError(f"{place}: no image in {len(urls)} shards{told}")
        if missing:
            raise UserError(
                f"{place}: no mask for {len(missing)} of the {len(images)} images (keys {some_names(missing)}); masks "
                f"are called KEY.{self.masks}: pack them beside their images, or write what they end in"
            )
        notes: tuple[str, ...] = ()
        if others:
            notes += (f"{place}: {others.total():,} keys have no image ({ends}) and are left out",)
        if links:
            notes += (f"{place}: {links:,} members are links, or stored with holes, and are left out (docs/data.md)",)
        return _Found(urls, np.array(shards), _Column.of(images), _Column.of(masks), notes)

    def _is_image(self, ending: str) -> bool:
        if self.images is not None:
            return ending == self.images
        return f".{ending}" in IMAGE_SUFFIXES and ending != self.masks


class _Sample(NamedTuple):
    """What is of one key."""

    shard: int
    members: dict[str, Member]  # by what they end in


class _Column(NamedTuple):
    """All images, or all masks."""

    names: list[str]
    places: np.ndarray  # (N, 3) int64: offset and size of the bytes, and checksum of the header before them

    @classmethod
    def of(cls, members: Sequence[Member]) -> _Column:
        return cls([member.name for member in members], np.array([member[1:] for member in members], dtype=np.int64))


class _Found(NamedTuple):
    urls: list[str]
    shards: np.ndarray  # (N,) the number of the shard that an image lies in
    images: _Column
    masks: _Column
    notes: tuple[str, ...]


def _checked(member: Member, url: str) -> Member:
    """Raise UserError for a member that is not to be read as an image."""
    name = f"{show_path(url)}: {show_path(member.name)}"
    if member.size > LARGEST:
        raise UserError(f"{name}: has {member.size:,} bytes, and is no image; pack the shard anew without it")
    # Its name is also that of files which are written of it.
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise UserError(f"{name}: leads out of its folder; pack it by another name")
    return member


# ---- names ----


def _parted(name: str) -> tuple[str, str] | None:
    """The key of a member and what follows it, as WebDataset parts them; None for a name that has not both."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return (f"{folder}{slash}{stem}", ending.lower()) if stem and ending else None


def _spelled(text: str) -> list[str]:
    """The names that braces stand for. Raises ValueError for braces that are not closed, and for too many names."""
    too_many = f"{text}: stands for more than {MOST_SHARDS:,} shards; write a smaller range"
    # First, since braceexpand makes all numbers at once.
    if any(abs(int(last) - int(first)) >= MOST_SHARDS for first, last in re.findall(r"(-?\d+)\.\.(-?\d+)", text)):
        raise ValueError(too_many)
    try:
        found = [*itertools.islice(braceexpand(text), MOST_SHARDS + 1)]
    except ValueError as error:
        raise ValueError(f"{text}: its braces are not closed; write {{000000..000009}}") from error
    if len(found) > MOST_SHARDS:
        raise ValueError(too_many)
    return found


def _local(url: str) -> Path | None:
    """The path of a shard on this machine; None for one behind a URL."""
    return Path(url) if url.startswith("/") else None


def _expanded(text: str) -> Iterator[str]:
    """The URLs of shards that a text stands for, those on this machine by their whole paths."""
    for url in _spelled(text):
        plain = url.removeprefix("file://")
        if "://" in plain or "::" in plain:
            if "*" in url:
                raise UserError(f"{show_path(url)}: * finds files of this machine alone; count: {{000000..000009}}")
            yield url
            continue
        path = user_path(plain)
        if has_magic(str(path)) and not files.is_there(path):
            found = sorted(glob(str(path)))
            if not found:
                raise UserError(f"{show_path(path)}: no shard is called so; check the path")
            yield from map(os.path.abspath, found)
        else:
            yield os.path.abspath(path)


# ---- bytes ----


def _read(url: str, offset: int, size: int, check: int) -> bytes:
    """A member, whose header is still the one that was listed."""
    data = _fetch(url, offset - tarfile.BLOCKSIZE, offset + size)
    if zlib.crc32(data[: tarfile.BLOCKSIZE]) != check:
        raise UserError(
            f"{show_path(url)}: is another shard than the one that was there at the start; put it back, or begin anew"
        )
    return data[tarfile.BLOCKSIZE :]


def _fetch(url: str, start: int, end: int) -> bytes:
    """A part of a shard. Raises UserError where it cannot be had.

    No file is kept open, and fsspec keeps its connections by process, so a worker may be forked.
    """
    path = _local(url)
    if path is None:
        return _asking(url, lambda: _part(url, start, end))
    try:
        handle = files.open_regular(path)
        try:
            found = os.pread(handle, end - start, start)
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"{show_path(path)}: cannot be read ({error.strerror}); check the path") from error
    if len(found) < end - start:
        raise UserError(_say_cut_off(url))
    return found


def _part(url: str, start: int, end: int) -> bytes:
    system, path = fsspec.core.url_to_fs(url)
    found = system.cat_file(path, start=start, end=end)
    if len(found) > end - start:
        raise UserError(
            f"{show_path(url)}: its server gives whole files alone; copy the shards, or keep them as they come: "
            f"filecache::{url}"
        )
    if len(found) < end - start:
        raise OSError(f"{len(found)} of {end - start} bytes came")
    return found


def _asking(url: str, ask: Callable[[], T]) -> T:
    """What a URL answers, asked again where the network fails. Raises UserError that says why there is no answer."""
    shown = show_path(url)
    for pause in (*PAUSES, None):
        try:
            return ask()
        except UserError:
            raise
        except PermissionError as error:
            raise UserError(f"{shown}: may not be read ({first_line(error)}); give your credentials") from error
        except (ImportError, ValueError) as error:  # of fsspec: a protocol that is unknown, or not installed
            raise UserError(f"{shown}: cannot be read ({first_line(error)}); mend the URL, or install that") from error
        except Exception as error:  # each store has errors of its own for a network that fails
            if _is_absent(error):
                raise UserError(f"{shown}: no such shard; check the URL and the numbers in braces") from error
            if pause is None:
                cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
                told = f"no answer, asked {len(PAUSES) + 1} times ({first_line(cause)})"
                raise UserError(f"{shown}: {told}; check the network, and the same command goes on") from error
            time.sleep(pause)
    raise AssertionError("the last time returns or raises")


def _is_absent(error: Exception) -> bool:
    """Whether there is no such file. fsspec also says so of a server that could not be asked."""
    cause = error.__cause__
    unasked = cause is not None and getattr(cause, "status", None) not in (404, 410)
    return isinstance(error, FileNotFoundError) and not unasked


class _Bytes(io.RawIOBase):
    """A shard as a file that tarfile reads and skips in."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self.place = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any, /) -> int:
        end = min(self.place + len(buffer), self.size)
        if end <= self.place:
            return 0
        found = _fetch(self.url, self.place, end)
        buffer[: len(found)] = found
        self.place = end
        return len(found)


# ---- what is in a shard ----


class Member(NamedTuple):
    """A file in a shard."""

    name: str
    offset: int  # of its bytes
    size: int
    check: int  # crc32 of the header before them


class Shard(NamedTuple):
    """What a pass over a shard has found."""

    members: list[Member]
    links: int  # and members that are stored with holes, which are no bytes in a row


INDEX = TypeAdapter(Shard)


def _shards(urls: Sequence[str]) -> Iterator[Shard]:
    """What is in each, several behind URLs at a time."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        remote = {url: pool.submit(_shard, url) for url in urls if _local(url) is None}
        new = sum(not _kept(url).exists() for url in remote)
        if new:
            say(f"{show_path(urls[0])} ...: {new} shards are gone through once, for an index of what is in them")
        try:
            for url in urls:
                yield remote[url].result() if url in remote else _shard(url)
        finally:
            pool.shutdown(cancel_futures=True)


def _shard(url: str) -> Shard:
    """What is in a shard, by its index where it is still that of the shard, else by a pass."""
    _check_cache(url)
    about = _about(url)
    kept = _kept(url)
    with _alone(kept):
        shard = None
        with suppress(OSError, ValueError, TypeError, KeyError):  # no index, or a damaged one
            found = json.loads(files.read_bytes(kept))
            if {key: found[key] for key in about} == about:
                shard = INDEX.validate_python((found["members"], found["links"]))
        if url.startswith(f"{CACHE}::"):
            _get_whole(url, anew=shard is None)
        if shard is not None:
            return shard
        shard = _pass(url, about["bytes"])
        with suppress(OSError, UserError):  # without a place for it the next start makes it again
            files.write_atomic(kept, json.dumps({**about, **shard._asdict()}).encode())
    return shard


def _about(url: str) -> dict[str, Any]:
    """What a shard is known by: its size, and its time or what its store says of its bytes."""
    path = _local(url)
    if path is None:
        plain = url.removeprefix(f"{CACHE}::")  # the cache knows less than the store
        system, inner = _asking(url, lambda: fsspec.core.url_to_fs(plain))
        info = _asking(url, lambda: system.info(inner))
        size, stamps = info.get("size"), {key: str(info[key]) for key in STAMPS if info.get(key) is not None}
    else:
        try:
            found = path.stat()
        except FileNotFoundError as error:
            raise UserError(f"{show_path(path)}: no such shard; check the path and the numbers in braces") from error
        except OSError as error:
            raise UserError(f"{show_path(path)}: cannot be read ({error.strerror}); check the path") from error
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{show_path(path)}: not a file; give the path of a shard")
        size, stamps = found.st_size, {"mtime": str(found.st_mtime_ns)}
    if size is None:
        raise UserError(f"{show_path(url)}: its server does not say how large it is; copy the shards to a disk")
    if size == 0:
        raise UserError(f"{show_path(url)}: empty (0 bytes); copy it again")
    return {"format": FORMAT, "url": url, "bytes": size, "stamps": stamps}


def _pass(url: str, size: int) -> Shard:
    """Go through the headers of a shard. Raises UserError for one that is not a whole tar."""
    shown = show_path(url)
    block = BLOCK_OF_URL if _local(url) is None else BLOCK_OF_FILE
    members, links = [], 0
    with io.BufferedReader(_Bytes(url, size), block) as file:
        start = file.read(8)
        for magic, program in COMPRESSED.items():
            if start.startswith(magic):
                raise UserError(
                    f"{shown}: is compressed, so no image can be read alone, and images are compressed already; "
                    f"write it plainly: {program} {Path(url).name}"
                )
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for entry in tar:
                    if entry.isfile() and not entry.issparse():
                        file.seek(entry.offset_data - tarfile.BLOCKSIZE)
                        check = zlib.crc32(file.read(tarfile.BLOCKSIZE))
                        members.append(Member(entry.name.removeprefix("./"), entry.offset_data, entry.size, check))
                    elif not entry.isdir():
                        links += 1
                end = tar.offset
        except tarfile.TarError as error:
            cut_off = "unexpected end" in str(error) or "truncated" in str(error)
            raise UserError(
                _say_cut_off(url) if cut_off else f"{shown}: is no tar ({first_line(error)}); pack it anew"
            ) from error
        # tarfile takes a damaged header for the end, as it does the end of a first of two archives.
        if size - end < tarfile.BLOCKSIZE:
            raise UserError(_say_cut_off(url))
        file.seek(end)
        while piece := file.read(block):
            if piece.count(0) < len(piece):
                raise UserError(
                    f"{shown}: something follows its end at byte {end}: a damaged header, or a second archive; pack it "
                    "anew"
                )
    return Shard(members, links)


def _say_cut_off(url: str) -> str:
    return f"{show_path(url)}: cut off, for its end is missing; copy it again"


# ---- what is kept ----


def _kept(url: str) -> Path:
    """The index of a shard, in the cache folder of the user (XDG)."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return folder / "ssl_seg" / "shards" / f"{files.sha256(url.encode(errors='surrogateescape'))[:32]}.json"


def _get_whole(url: str, anew: bool) -> None:
    """Have fsspec get a shard as a whole, by one process at a time: another would take a part of it for all."""
    system, inner = fsspec.core.url_to_fs(url)
    if anew:
        with suppress(OSError, KeyError, ValueError):  # where it has none
            system.pop_from_cache(inner)
    _fetch(url, 0, 1)


def _check_cache(url: str) -> None:
    """Raise UserError where each process would have copies of whole shards of its own, or old ones."""
    if url.startswith(("simplecache::", "blockcache::")):
        raise UserError(f"{show_path(url)}: such copies do not tell when a shard is another; write {CACHE}::")
    if url.startswith(f"{CACHE}::") and "cache_storage" not in fsspec.config.conf.get(CACHE, {}):
        raise UserError(
            f"{show_path(url)}: say where whole shards are kept: FSSPEC_{CACHE.upper()}_CACHE_STORAGE=/scratch/shards "
            "in the environment"
        )


@contextmanager
def _alone(kept: Path) -> Iterator[None]:
    """Only one process at a time makes an index, or has fsspec fetch a shard; the others wait, and find it made."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(kept.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # no place to keep anything
        yield
        return
    try:
        with suppress(OSError):  # a disk without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
