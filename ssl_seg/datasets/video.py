"""Videos: frames of clips, for pools and for prediction.

OpenCV decodes. Ours is what it leaves open: where it seeks to is checked against a pass from the start, since some
codecs and files lead it to another frame; an end of the file is told from the end of the clip; and frames that show
what the last one showed are left out.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import cv2
import numpy as np
from pydantic import Field, FiniteFloat, PositiveInt, model_validator

from ssl_seg import files, images
from ssl_seg.config import PathText, UserError, user_path
from ssl_seg.datasets import Dataset, Example, place_in
from ssl_seg.datasets.folder import by_stem, is_folder, scan
from ssl_seg.images import show_path
from ssl_seg.terminal import say

SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".mts", ".m2ts", ".3gp", ".ogv"}
)
# How containers begin: FFmpeg would also take a list of addresses on the network for a clip.
CONTAINERS = {
    0: (b"RIFF", b"\x1aE\xdf\xa3", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"0&\xb2u", b"OggS", b"\x47"),
    4: (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"\x47"),
}
THUMBNAIL = 32  # pixels of a side, at most; each stands for 8 x 8 at least, over which noise is averaged
# Grey levels by which thumbnails differ on average, from which on a frame shows something else. A still scene of
# 480 x 360 with sensor noise of 8 levels differs by 0.5, coded as MPEG-4 or MJPG by 0.6; a street that moves by one
# pixel of 480 by 0.9, and from one drawn frame to the next of a moving camera by 2 to 6.
DISTINCT = 1.0
LEAST_DECODED = 0.95  # of the frames that the header promises, which some containers only estimate
READ_ON = 32  # frames: to decode so many costs no more than to seek, which begins at a key frame
USUAL_RATE = 25.0  # frames a second, of a clip that does not say
SLOWEST, FASTEST = 0.1, 1000.0  # frames a second that MPEG-4 can be told
OPENED = 4  # clips that a process keeps open
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg's own lines; what is wrong is told here in one


class Clip(NamedTuple):
    """A clip and the frames that are taken, with a checksum of each as a pass from the start has decoded it."""

    stem: str
    path: str
    frames: tuple[int, ...]
    checksums: tuple[int, ...]
    length: int  # in frames
    alike: int  # frames that were left out
    rate: float  # frames a second; 0 where the clip does not say


class Video(Dataset):
    """Frames of clips, named `<clip>/<frame>`, from 0 on; every `stride`-th from `start` on, up to `end` (seconds).

    `clips` is a file or a folder of them. Times are by the clip's frame rate. `distinct` leaves out a frame whose grey
    thumbnail differs from that of the last one taken by less than `DISTINCT` levels on average. The list is made by
    one pass over each clip, and every frame is the one that this pass has decoded, in whatever order frames are read.
    The sequence of a frame is its clip. There are no masks.

    Errors (UserError, one line): a missing file, what is no video, one that is damaged or cut off or of a codec that
    OpenCV lacks, and a clip without a frame in the given time.
    """

    clips: PathText  # a file, or a folder of them
    stride: PositiveInt = 5  # every so-many-th frame is taken
    start: FiniteFloat = Field(default=0.0, ge=0)  # seconds
    end: FiniteFloat | None = None  # seconds; None: to its end
    distinct: bool = True  # leave out frames that show what the last one did

    @model_validator(mode="after")
    def _check_times(self) -> Self:
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end ({self.end:g} s) has to be later than start ({self.start:g} s)")
        return self

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        clip, place = self._at(index)
        return f"{clip.stem}/{clip.frames[place]:06d}"

    def sequence(self, index: int) -> str:
        return self._at(index)[0].stem

    def files(self, index: int) -> tuple[Path, ...]:
        return (Path(self._at(index)[0].path),)

    def read(self, index: int) -> Example:
        clip, place = self._at(index)
        frame = _opened(clip.path).frame(clip.frames[place], clip.checksums[place])
        return Example(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), None, self.name(index))

    def join_overlays(self, overlays: Sequence[Path], folder: Path) -> None:
        for number, clip in enumerate(self._clips):
            own = overlays[self._ends[number] - len(clip.frames) : self._ends[number]]
            numbers = [(frame - clip.frames[0]) // self.stride for frame in clip.frames]
            end = math.ceil((clip.length - clip.frames[0]) / self.stride)
            write_clip(folder / f"{clip.stem}.mp4", own, numbers, end, (clip.rate or USUAL_RATE) / self.stride)

    def notes(self, with_labels: bool = True) -> tuple[str, ...]:
        total, alike = sum(clip.length for clip in self._clips), sum(clip.alike for clip in self._clips)
        left_out = f"; {alike:,} that hardly differ from the one before are left out (distinct)" if alike else ""
        told = f"{len(self):,} of the {total:,} frames are taken (stride: {self.stride}{left_out})"
        return (*self._scanned[1], f"{show_path(self.clips)}: {told}")

    def _at(self, index: int) -> tuple[Clip, int]:
        number, place = place_in(self._ends, index)
        return self._clips[number], place

    @cached_property
    def _ends(self) -> list[int]:
        """How many frames there are up to the end of each clip."""
        return np.cumsum([len(clip.frames) for clip in self._clips]).tolist()

    @cached_property
    def _clips(self) -> tuple[Clip, ...]:
        """The frames that are taken; workers inherit them."""
        return tuple(self._clip(stem, path) for stem, path in self._scanned[0])

    @cached_property
    def _scanned(self) -> tuple[list[tuple[str, Path]], tuple[str, ...]]:
        """The name and the path of each clip, and what a person should know."""
        path = user_path(self.clips)
        if path.is_file():
            return [(path.stem, path)], ()
        if not is_folder(path):
            raise UserError(f"{show_path(path)}: no such file or folder; check the path")
        found = scan(path, None, SUFFIXES, frozenset())
        names = [name for name, _ in found.pairs]
        by_stem(path, names)
        return [(Path(name).with_suffix("").as_posix(), path / name) for name in names], found.notes

    def _clip(self, stem: str, path: Path) -> Clip:
        """One pass over a clip, from its first frame on."""
        shown = show_path(path)
        _check_container(path)
        frames, checksums, last = [], [], None
        number = alike = 0
        with _capturing(path) as capture:
            rate, promised = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
            if (self.start or self.end) and not 0 < rate < math.inf:
                raise UserError(f"{shown}: says no frame rate, so seconds mean nothing; leave start and end out")
            first, stop = (_frame_at(seconds, rate) for seconds in (self.start, self.end))
            while (stop is None or number < stop) and capture.grab():
                if number >= (first or 0) and (number - (first or 0)) % self.stride == 0:
                    frame = capture.retrieve()[1]
                    if frame is None:
                        break
                    thumbnail = _thumbnail(frame)
                    if not self.distinct or last is None or np.abs(thumbnail - last).mean() >= DISTINCT:
                        last = thumbnail
                        frames.append(number)
                        checksums.append(_checksum(frame))
                    else:
                        alike += 1
                number += 1
        if number == 0 or (
            (stop is None or number < stop) and number < LEAST_DECODED * min(promised, stop or promised)
        ):
            raise UserError(_say_damaged(shown, number, promised, rate))
        if not frames:
            lasts = f"the clip ends at {number / rate:.1f} s" if 0 < rate < math.inf else f"it has {number} frames"
            raise UserError(f"{shown}: no frame from {self.start:g} s on, for {lasts}; write an earlier start")
        rate = rate if 0 < rate < math.inf else 0.0
        return Clip(stem, str(path), tuple(frames), tuple(checksums), number, alike, rate)


def _frame_at(seconds: float | None, rate: float) -> int | None:
    """The first frame that is not before a time."""
    return None if seconds is None else math.ceil(seconds * rate - 1e-6) if seconds else 0


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
    height, width = (max(1, min(THUMBNAIL, side // 8)) for side in grey.shape)
    return cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)


def _checksum(frame: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(frame).data)


def _say_damaged(shown: str, decoded: int, promised: float, rate: float) -> str:
    if decoded == 0:
        return (
            f"{shown}: no frame of it can be decoded: it is damaged, cut off, or of a codec that OpenCV lacks; copy it "
            "again, or convert it (ffmpeg -i CLIP -c:v libx264 clip.mp4)"
        )
    whole = (
        f"; or write end: {math.floor(10 * decoded / rate) / 10:g} to use what is there" if 0 < rate < math.inf else ""
    )
    return (
        f"{shown}: {decoded} of about {promised:.0f} frames can be decoded: it is damaged or cut off; copy it again"
        f"{whole}"
    )


# ---- writing


def write_clip(path: Path, pictures: Sequence[Path], numbers: Sequence[int], end: int, rate: float) -> None:
    """Pictures of one size as an MP4 of `rate` frames a second, each from its number on until the next one's, or `end`.

    So where frames were left out the clip still lasts as long. OpenCV's own MPEG-4 writes it, which every player knows
    and browsers do not. Odd sides get one more row or column, as the codec wants. Where it cannot be written at all, a
    line tells it, and the pictures are what there is. Raises UserError where it could not be written whole.
    """
    height, width = images.read_image(pictures[0]).shape[:2]
    new = path.with_name(files.NEW + path.name)
    with files.naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lasts = [after - before for before, after in pairwise([*numbers, max(end, numbers[-1] + 1)])]
    rate = min(max(rate, SLOWEST), FASTEST)
    try:
        with _silence():
            writer = cv2.VideoWriter(
                str(_plain(new).absolute()),  # FFmpeg takes pipe:1 for something else
                cv2.CAP_FFMPEG,
                cv2.VideoWriter.fourcc(*"mp4v"),
                rate,
                (width + width % 2, height + height % 2),
            )
            if not writer.isOpened():
                say(f"{show_path(path)}: cannot be written by OpenCV; its frames are beside it")
                return
            for picture, count in zip(pictures, lasts, strict=True):
                frame = cv2.cvtColor(images.read_image(picture), cv2.COLOR_RGB2BGR)
                if frame.shape[:2] != (height, width):
                    raise UserError(f"{show_path(picture)}: is not of the size of its clip's other frames; remove it")
                frame = cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
                for _ in range(count):
                    writer.write(frame)
            writer.release()
        # OpenCV says nothing of a full disk.
        if _length(new) != sum(lasts):
            raise UserError(f"{show_path(path)}: could not be written whole; make room, and the same command goes on")
        with files.naming(path):
            new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _length(path: Path) -> int:
    """How many frames of a clip can be decoded."""
    with _capturing(path) as capture:
        return sum(1 for _ in iter(capture.grab, False))


def _plain(path: Path) -> Path:
    """The path, which OpenCV can be given. Raises UserError for a name that is no text, of which it crashes."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{show_path(path)}: its name is not UTF-8, which OpenCV needs; rename it") from error
    return path


@contextmanager
def _silence() -> Iterator[None]:
    """OpenCV says nothing itself of what goes wrong."""
    former = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(former)


# ---- decoding


def _check_container(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise UserError(f"{show_path(path)}: cannot be read ({error.strerror}); check its permissions") from error
    if not any(start[place:].startswith(known) for place, known in CONTAINERS.items()):
        raise UserError(f"{show_path(path)}: no video of a known form; convert it to .mp4 or remove it")


def _capture(path: Path | str) -> cv2.VideoCapture:
    """With FFmpeg, since OpenCV's other readers take numbers in names for sequences of images."""
    with _silence():
        return cv2.VideoCapture(str(_plain(Path(path))), cv2.CAP_FFMPEG)


@contextmanager
def _capturing(path: Path) -> Iterator[cv2.VideoCapture]:
    capture = _capture(path)
    try:
        yield capture
    finally:
        capture.release()


class _Open:
    """A clip that frames are read of, and where the next one comes from."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.capture = _capture(path)
        self.next = 0
        self.seeks = True  # until it is led to another frame

    def frame(self, number: int, checksum: int) -> np.ndarray:
        """BGR `(H, W, 3)`, by its checksum the one that the pass from the start has decoded."""
        if self.seeks and not 0 <= number - self.next <= READ_ON:
            self.capture.set(cv2.CAP_PROP_POS_FRAMES, number)
            self.next = number
        elif number < self.next:
            self._again()
        frame = self._read_on(number)
        if frame is None or _checksum(frame) != checksum:
            self.seeks = False
            self._again()
            frame = self._read_on(number)
        if frame is None or _checksum(frame) != checksum:
            raise UserError(
                f"{show_path(self.path)}: frame {number} is not the one that was there at the start; put the file back"
            )
        return frame

    def _read_on(self, number: int) -> np.ndarray | None:
        while self.next < number and self.capture.grab():
            self.next += 1
        frame = self.capture.read()[1] if self.next == number else None
        self.next += 1
        return frame

    def _again(self) -> None:
        self.capture.release()
        self.capture, self.next = _capture(self.path), 0


# By process: a worker that was forked neither uses nor ends the captures of its parent, whose threads it has not.
_CLIPS: dict[int, dict[str, _Open]] = {}


def _opened(path: str) -> _Open:
    own = _CLIPS.setdefault(os.getpid(), {})
    if path in own:
        own[path] = own.pop(path)  # the latest last
    else:
        while len(own) >= OPENED:
            own.pop(next(iter(own))).capture.release()
        own[path] = _Open(path)
    return own[path]
