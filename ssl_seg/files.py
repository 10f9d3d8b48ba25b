"""Files and folders that are on the disk whole or not at all, whatever a kill, a full disk or a power cut interrupts.

safetensors and JSON hold everything, so reading a file runs no code. Ours is what the two and the standard library
lack. A folder replaces another so that a kill at any instant leaves one of them whole: a rename cannot replace a folder
that holds files. Writes are synced before they count. Digests tell a flipped bit, which safetensors loads in silence.
Nothing but a regular file is opened, since a pipe in its place would be waited for without end. Errors are one line
that names the file.

Every function here is for one writing process. Where there are several, the main one writes, and the caller puts
barriers around it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_seg.config import UserError

if TYPE_CHECKING:
    from torch import Tensor

NEW, OLD = ".ssl_seg-new-", ".ssl_seg-old-"  # prefixes of what a kill may leave behind; never a stranger's names


# ---- folders ----


def commit_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Make `target` a folder of just these files: at every instant the old one or the new one can be found, whole.

    Find it by `committed`. Raises UserError, with the old one untouched, where the disk does not take them.
    """
    new, old = target.with_name(NEW + target.name), target.with_name(OLD + target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        settle(target.parent)
        new.mkdir()
        for name, payload in files.items():
            _write_synced(new / name, payload)
        sync(new)
        if target.exists():
            os.rename(target, old)  # `committed` bridges the gap until the next line
        os.rename(new, target)
        sync(target.parent)
    except OSError as error:
        with suppress(OSError):
            settle(target.parent)
        size = sum(len(payload) for payload in files.values())
        raise UserError(
            f"{target}: not written ({error.strerror}); it needs {size} bytes, make room or choose another folder"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def committed(target: Path) -> Path:
    """Where the folder committed as `target` lies: under its other name if a kill came between the two renames."""
    old = target.parent / (OLD + target.name)  # `with_name` refuses `.`, the folder we are in
    # os.path, since `Path.exists` raises for a name so long that nothing can have it with a prefix.
    return old if os.path.exists(old) and not os.path.exists(target) else target


def committed_names(parent: Path) -> set[str]:
    """The names in `parent`, those between two renames included; empty where there is no such folder."""
    if not parent.is_dir():
        return set()
    return {entry.name.removeprefix(OLD) for entry in parent.iterdir() if not is_unfinished(entry)}


def is_unfinished(path: Path) -> bool:
    """Whether a kill has left this: the beginning of a file or folder, or the rest of a discarded one."""
    return path.name.startswith(NEW)


def settle(parent: Path) -> None:
    """Undo what a kill has left half done in `parent`: drop what is unfinished, put back what is between two names."""
    if not parent.is_dir():
        return
    for entry in sorted(parent.iterdir()):
        target = entry.with_name(entry.name.removeprefix(OLD))
        if target != entry and not target.exists():
            os.rename(entry, target)
        elif target != entry or is_unfinished(entry):
            _remove(entry)


def discard(path: Path) -> None:
    """Delete a file or folder so that a kill half way leaves nothing under its name. A link goes, not its target."""
    new = path.with_name(NEW + path.name)
    os.rename(path, new)
    _remove(new)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# ---- files ----


def write_atomic(path: Path, payload: bytes) -> None:
    """Make `path` hold `payload`: at every instant it is the old file or the new one. Raises UserError as `naming`."""
    new = path.with_name(NEW + path.name)
    with naming(path):
        _write_synced(new, payload)
        os.replace(new, path)
        sync(path.parent)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """As `os.open`, and never waiting. Raises OSError for a pipe, a device or a socket in the place of a file.

    A link is followed for reading alone: what is written stays in its folder.
    """
    if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        flags |= os.O_NOFOLLOW
    # Without these a pipe is waited for, and a terminal may become that of the process.
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "a pipe, a device or a folder, and no file", str(path))
    return handle


def read_bytes(path: Path) -> bytes:
    """All of a regular file. Raises OSError as `open_regular`."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read()


def append(path: Path, text: str) -> None:
    """Add to a regular file, which is made where there is none. Raises OSError as `open_regular`, also for a link."""
    with os.fdopen(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
        file.write(text.encode())


def is_there(path: Path) -> bool:
    """Whether there is anything by that name. Raises UserError where that cannot be seen, for it is not absent then."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _hidden(path, error) from error
    return True


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, sorted; nothing where there is none. Raises UserError where it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _hidden(folder, error) from error


def _hidden(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); mend the rights, or leave it out")


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a regular file is the folder's own, and is not reached by a link that leads out of it.

    A run folder may be a stranger's, with links to what is ours: that is neither shown nor sent.
    """
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def sync(path: Path) -> None:
    """Have the kernel write a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_synced(path: Path, payload: bytes) -> None:
    if os.path.lexists(path):  # of a killed write; a link by that name would lead the payload elsewhere
        _remove(path)
    with path.open("xb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(path: Path, what: str = "cannot be written") -> Iterator[None]:
    """An OSError inside becomes one line about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: {what} ({error.strerror}); make room, mend the rights or choose another folder"
        ) from error


def slug(text: str) -> str:
    """A text fit for a file's name, and short: what tells two apart that are cut alike has to stand beside it."""
    return re.sub(r"[^\w+.]+", "_", text).strip("_")[:32]


# ---- what is in them ----


def sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def is_intact(path: Path, digest: str) -> bool:
    """Whether the file can be read and is the one whose `sha256` was taken."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except OSError:
        return False


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A .safetensors file of the tensors, whatever their device, strides or shared memory."""
    import safetensors.torch
    import torch  # here, for those who only read JSON

    # Each is copied: safetensors refuses tensors that share memory, and knows no strides.
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    # As bytes and not by its own save_file, which hides a full disk's OSError and gives the file to its owner alone.
    return safetensors.torch.save(copies)


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """A JSON file; NaN and infinity are written as Python reads them, so use `finite` first where others read it."""
    return (json.dumps(values, indent=2) + "\n").encode()


def finite(values: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, Mapping):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for a file that is absent, damaged or holds anything else."""
    try:
        values = json.loads(read_bytes(path))
    except OSError as error:
        raise UserError(f"{path}: not readable as JSON ({error.strerror}); restore it or make it anew") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON; restore it or make it anew") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no JSON object; restore it or make it anew")
    return values
