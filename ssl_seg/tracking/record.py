"""What a run's folder knows of MLflow: its key there, its run at each server, and what went wrong last.

The key is the folder's name for itself: a run carries it as a tag from its first moment. So it is found again where
its id was never noted (a kill came between), or stands under another address (folder and database were moved).
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ssl_seg import files
from ssl_seg.config import Config, UserError, load

FOLDER = "tracking"  # in the run's: which MLflow run it is, the machine's load, the mirror's log and lock
RECORD = "mlflow.json"
Key = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]  # it goes into queries


class Record(Config):
    """mlflow.json."""

    runs: dict[str, str] = Field(default={})  # the run's id at each server
    error: str | None = None  # of the last message
    key: Key
    folder: str  # where it lay when the key was its own


def read_record(folder: Path) -> Record | None:
    """None where the folder was never mirrored. Raises UserError for a record that is not as it was written."""
    path = folder / FOLDER / RECORD
    if not files.is_there(path):
        return None
    try:
        return load(Record, files.read_json(path))
    except UserError as error:
        raise UserError(f"{path}: {error}; delete it, and the run is sent anew") from error


def write_record(folder: Path, record: Record) -> None:
    """Nothing is written where nothing is new: the file's time tells a mirror's word from an older one."""
    if record != read_record(folder):
        files.write_atomic(folder / FOLDER / RECORD, files.json_bytes(record.dump()))


def claim(folder: Path) -> Record:
    """The folder's record with a key of its own, written before MLflow hears it.

    A folder that was moved keeps its key and so its run. One that was copied gets a new key and a run of its own: the
    original still lies where the record says. Call it under the folder's lock.
    """
    record, here = read_record(folder), str(folder.resolve())
    if record is None:
        record = Record(key=_new_key(), folder=here)
    elif record.folder != here:
        copied = _key_at(record.folder) == record.key
        fresh: dict[str, Any] = {"key": _new_key(), "runs": {}} if copied else {}
        record = record.model_copy(update={"folder": here, **fresh})
    write_record(folder, record)
    return record


def _key_at(place: str) -> str | None:
    with suppress(OSError, UserError, ValueError):  # gone, not ours to read, or no path at all
        record = read_record(Path(place))
        return None if record is None else record.key
    return None


def _new_key() -> str:
    return uuid.uuid4().hex
