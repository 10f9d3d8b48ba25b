"""Where the bytes of an image come from: a file, or a member of an archive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO, FileIO, RawIOBase
from pathlib import Path


@dataclass(frozen=True)
class Packed:
    """An image that is no file of its own, as a member of an archive: what to call it, and how its bytes are got."""

    shown: str
    fetch: Callable[[], bytes]

    def __str__(self) -> str:
        return self.shown

    def fetched(self) -> Packed:
        """The same with its bytes at hand: they may come over a network."""
        payload = self.fetch()
        return Packed(self.shown, lambda: payload)


Source = Path | Packed


def source_of(given: str | Source) -> Source:
    return Path(given) if isinstance(given, str) else given


def bytes_of(source: Source) -> bytes:
    return source.fetch() if isinstance(source, Packed) else source.read_bytes()


def raw_of(source: Source) -> FileIO | RawIOBase:
    """What reads it without a buffer."""
    if isinstance(source, Packed):
        return _Bytes(source.fetch())
    return FileIO(source)


class _Bytes(RawIOBase):
    """Bytes as a raw file, which BytesIO is not."""

    def __init__(self, payload: bytes) -> None:
        self._held = BytesIO(payload)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:
        return self._held.readinto(buffer)

    def seek(self, place: int, whence: int = 0, /) -> int:
        return self._held.seek(place, whence)

    def tell(self) -> int:
        return self._held.tell()
