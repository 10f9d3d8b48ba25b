"""Who holds a run folder: one process at a time, and its death frees it.

Ours is the kernel's lock on a file with the holder's number in it. A lock file alone would stay after `kill -9`.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssl_seg import files
from ssl_seg.config import UserError

LOCK = "lock"  # of the process that runs; its number stands in it


GLANCE = 0.1  # seconds; `is_held` takes the lock for an instant
_locks: set[int] = set()


def is_held(folder: Path) -> bool:
    """Whether a process has the folder open as a run."""
    return holder_of(folder) is not None


def holder_of(folder: Path) -> str | None:
    """The number of the process that has the folder open as a run, '' in the instant before it is written; or None.

    The kernel frees a lock when its process ends, so this tells the end of a run whoever bears its number by now.
    """
    try:
        with os.fdopen(files.open_regular(folder / LOCK), "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read(32).decode(errors="replace")
    except OSError:
        return None  # none there, or a disk without locks
    return None


def take_lock(folder: Path) -> int:
    """Hold the folder until `free_lock` or the end of this process, however it ends."""
    lock = files.open_regular(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(GLANCE)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 32).decode(errors="replace") or "unknown"
        os.close(lock)
        raise UserError(f"{folder}: in use by process {holder}; wait for it or choose another folder") from None
    except OSError:
        os.close(lock)
        raise
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    _locks.add(lock)
    return lock


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes of ours out of a folder that is made where it is missing. Raises UserError if one has it."""
    with files.naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
    try:
        yield
    finally:
        free_lock(lock)


def free_lock(lock: int) -> None:
    """Let go of what `take_lock` gave."""
    if lock in _locks:
        _locks.remove(lock)
        os.close(lock)


def drop_inherited_locks() -> None:
    """In a forked child: its parent alone holds the folders."""
    for lock in list(_locks):
        free_lock(lock)
