"""How MLflow is reached, asked and answered: addresses, names, and which run is meant.

Ours is what its client leaves to chance: a first use by one process at a time, a database that is whole or not there,
artefacts beside it and not in the working directory, names that it takes, and one line for whatever a server does.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import posixpath
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import mlflow
from alembic.script import ScriptDirectory
from google.protobuf.json_format import ParseError
from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from requests import RequestException
from sqlalchemy.exc import SQLAlchemyError

from ssl_seg import files
from ssl_seg.config import UserError, first_line
from ssl_seg.evidence.results import CELLS, FOLDS, PRETRAINED, SEARCHED, STUDY_FILE
from ssl_seg.terminal import say

SECONDS_OF_A_STEP = 2.0  # a step of making MLflow's tables takes a fiftieth of one; this is a slow disk's
DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow 3 opens it as one of language models
LONGEST_NAME = 250
STATUSES = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
# Tags: the folder's key; of a run whose steps were made again under other settings, and of the one that goes on.
KEY, CONTINUED_BY, CONTINUES = "folder_key", "continued_by", "continues"
PARENT, PARENT_OF = "mlflow.parentRunId", "parent_of"


def resolved(uri: str | None, folder: Path) -> str:
    """Where MLflow keeps runs, a path of this machine made absolute; None is the environment's, else the folder's."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{_runs_folder(folder) / DATABASE}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{database(uri)}"
    return uri


def _runs_folder(folder: Path) -> Path:
    """The nearest folder called `runs` that a run or its study lies in, else the one that it lies in directly."""
    parents = folder.resolve().parents
    of_study = parents[0].name in (CELLS, FOLDS, PRETRAINED, SEARCHED) and (parents[1] / STUDY_FILE).exists()
    return next((parent for parent in parents if parent.name == "runs"), parents[2 if of_study else 0])


def database(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///")).resolve()


def place_of(uri: str, folder: Path) -> Path | None:
    """The folder for artefacts; None where a server chooses."""
    if uri.startswith("sqlite:///"):
        return database(uri).parent
    return None if "://" in uri and not uri.startswith("file:") else _runs_folder(folder)


def connect(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def first_use(uri: str, place: Path | None) -> Iterator[None]:
    """One process at a time: several that meet an empty database, or make the same experiment, break it or fail."""
    folder = place or Path(tempfile.gettempdir())
    name = DATABASE if place else f"ssl_seg-{os.getuid()}-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"
    with files.naming(folder, "cannot hold MLflow's files"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(files.open_regular(folder / f".{name}.lock", os.O_CREAT), "rb")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if uri.startswith("sqlite:///"):
            _make_tables(database(uri))
        yield


def _make_tables(path: Path) -> None:
    """A database with MLflow's tables where there is none yet, put in its place when it is whole.

    MLflow makes them in some seventy steps, and cannot go on where a kill has stopped it. What it has left so by other
    hands, and holds no run, is moved aside.
    """
    for entry in path.parent.glob(f"{files.NEW}{path.name}*"):
        shutil.rmtree(entry)  # of one that was killed
    if _has_content(path):
        if not _is_abandoned(path):
            return
        _move_aside(path)
    # A new name each time: MLflow keeps a connection to what it has made, whatever lies there by then.
    with tempfile.TemporaryDirectory(prefix=f"{files.NEW}{path.name}-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        connect(f"sqlite:///{made}").search_experiments(max_results=1)
        files.sync(made)
        if not _has_content(path):  # a server may have made its own meanwhile
            os.replace(made, path)
            files.sync(path.parent)


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _is_abandoned(path: Path) -> bool:
    """Whether a database was half made, and no other process is about to make the rest."""
    while _is_half_made(path):
        former = path.stat().st_mtime_ns
        time.sleep(SECONDS_OF_A_STEP)
        if path.stat().st_mtime_ns == former:
            return True
    return False


def _is_half_made(path: Path) -> bool:
    """Whether a database has neither runs nor experiments, and not the tables of this MLflow."""
    try:
        with closing(sqlite3.connect(path)) as opened:
            tables = {name for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            for table, where in (("runs", ""), ("experiments", "WHERE experiment_id != 0")):
                if table in tables and opened.execute(f"SELECT 1 FROM {table} {where} LIMIT 1").fetchone():
                    return False
            known = "alembic_version" in tables and opened.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error:
        return False  # locked, or no database at all: MLflow says it
    scripts = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    return known != (scripts.get_current_head(),) or any(name.startswith("_alembic_tmp_") for name in tables)


def _move_aside(path: Path) -> None:
    places = (path.with_name(f"{path.name}.broken{number or ''}") for number in count())
    aside = next(place for place in places if not place.exists())
    os.rename(path, aside)
    say(f"MLflow: {path} was half made by a process that was killed, and held no run; it is {aside.name} now")


def experiment_id(client: MlflowClient, name: str, uri: str, place: Path | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # Told where: else MLflow writes artefacts into whatever folder the run was started from.
        return client.create_experiment(name, None if place is None else str(place / ARTIFACTS), TRAINING)
    if found.lifecycle_stage != "active":
        raise UserError(f"tracking.experiment: '{name}' was deleted at {uri}; restore it there or name another")
    return found.experiment_id


def is_open(run: Run) -> bool:
    """Whether a run can be gone on with: a person has not deleted it, and no other has taken its place."""
    return run.info.lifecycle_stage == "active" and CONTINUED_BY not in run.data.tags


def tagged(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> Run | None:
    """The newest run with these tags that can be gone on with."""
    query = " and ".join(f"tags.{name} = '{text}'" for name, text in tags.items())
    found = client.search_runs([experiment], query, order_by=["attributes.start_time DESC"])
    return next((run for run in found if is_open(run)), None)


def hand_over(client: MlflowClient, former: Run, run_id: str) -> None:
    """Mark a run whose place another has taken."""
    client.set_tag(former.info.run_id, CONTINUED_BY, run_id)
    if former.info.status == "RUNNING":
        client.set_terminated(former.info.run_id, STATUSES["killed"])


def points_of(client: MlflowClient, run: Run) -> list[Metric]:
    """Every point of every metric."""
    return [point for name in run.data.metrics for point in client.get_metric_history(run.info.run_id, name)]


def run_of(client: MlflowClient, run_id: str) -> Run | None:
    """A run by its id, None where there is none (any more)."""
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return None


def parent_id(client: MlflowClient, experiment: str, name: str | None) -> str | None:
    """The run that stands above those that name this parent: found again by a tag, made by the first."""
    if name is None:
        return None
    quoted = name.replace("'", "_")
    found = client.search_runs([experiment], f"tags.{PARENT_OF} = '{quoted}'", order_by=["attributes.start_time ASC"])
    if found:
        return found[0].info.run_id
    run_id = client.create_run(experiment, tags={PARENT_OF: quoted}, run_name=name).info.run_id
    client.set_terminated(run_id, "FINISHED")  # it holds no work of its own; its last run sets the time
    return run_id


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """What MLflow raises where a server does not answer or refuses, as one line."""
    try:
        yield
    except (MlflowException, ParseError, RequestException, SQLAlchemyError, OSError) as error:
        raise UserError(f"{uri} did not take it ({first_line(error)[:200]})") from error


def mlflow_name(key: str) -> str:
    """A name that MLflow takes; one that had to be changed gets a digest, so that no two become one."""
    clean = posixpath.normpath(re.sub(r"[^\w.\- /:]", "_", key)).lstrip("/.")[: LONGEST_NAME - 9]
    if clean == key:
        return key
    return f"{clean}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """What one call may hold at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))
