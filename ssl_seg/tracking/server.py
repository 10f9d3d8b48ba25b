"""What is said to MLflow, and read from it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import posixpath
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
from mlflow import Image, MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from requests import RequestException
from sqlalchemy.exc import SQLAlchemyError

from ssl_seg import files, plots
from ssl_seg.config import UserError
from ssl_seg.runs import TIME, Picture, RunFolder, described, now, scores_of
from ssl_seg.tracking import FOLDER, RECORD, SYSTEM, Tracking, read_record

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
# What is kept beside the points: small files, and pictures that belong to no step.
RECORDS = ("config.yaml", "run.json", "metrics.jsonl", "tasks.json", "data.json", "split.json", "receipts.json")
RESULTS = ("result.json", "confusion.json", "confusion_images.safetensors", "extremes.json", "report.html")
WEIGHTS = ("encoder", "decoders", "model")
TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow 3 opens it as one of language models
RESULT = "result/"  # of metrics: the figures of result.json, which are those of the chosen step and not of the last
POINTS_AT_ONCE, PARAMS_AT_ONCE = 1000, 100  # MLflow's limits of one call
LONGEST_TEXT, LONGEST_NAME = 6000, 250
STATUSES = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


class MirroredRun:
    """One run in MLflow: which it is, what of it has been sent."""

    def __init__(self, run: RunFolder, tracking: Tracking) -> None:
        self.run = run
        self.tracking = tracking
        self.uri = _resolved(tracking.uri, run.folder)
        self.run_id = ""
        self.started = _milliseconds(run.record.get("started")) or now()
        self.num_lines = 0
        self.num_pictures = 0
        self.client: MlflowClient | None = None
        self.tails = [_Tail(run.folder / "metrics.jsonl"), _Tail(run.folder / FOLDER / SYSTEM)]
        self.results: dict[str, float] = {}  # the figures of a result that are there
        self.present: set[tuple[str, int]] = set()  # points that were there before: (name, step)
        self.pictures: set[tuple[str, int]] = set()  # those that are there: (name, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for tail in self.tails:
            tail.close()

    def open(self) -> None:
        """Find the run in MLflow, or make it; once."""
        if self.client is not None:
            return
        place = _place(self.uri, self.run.folder)
        with _first_use(self.uri, place):
            client = _client(self.uri)
            experiment = _experiment(client, self.tracking.experiment, self.uri, place)
            found = self._known(client, experiment)
            parent = _parent(client, experiment, self.tracking.parent)
        self.run_id = found.info.run_id if found else self._create(client, experiment, parent)
        self.note(None)
        if found:
            client.update_run(self.run_id, status="RUNNING")
            self._learn_what_is_there(client, found)
        self._describe(client, found)
        self.client = client

    def send(self) -> None:
        """The points and pictures that are new."""
        self._send_points()
        for picture in self.run.pictures():
            if (picture.name, picture.step) not in self.pictures:
                self._send_picture(picture)

    def finish(self, status: str) -> None:
        """Everything that is known at the end, and how the run ended."""
        client = self.client
        run = RunFolder(self.run.folder)  # as it is now
        if run.result is not None:
            self._send_result(run.result)
            client.set_tag(self.run_id, "selected_step", run.result.get("selected_step", run.result.get("steps")))
        self._send_files((*RECORDS, *RESULTS), client)
        self._draw_confusion()
        for picture in self._lasting_pictures():
            client.log_artifact(self.run_id, str(picture), "pictures")
        if self.tracking.weights:
            for part in WEIGHTS:
                if (run.folder / part).is_dir():
                    client.log_artifacts(self.run_id, str(run.folder / part), part)
        ended = _milliseconds(run.record.get("ended")) or self._last_sign()
        client.set_terminated(self.run_id, STATUSES[status], ended)
        parent = client.get_run(self.run_id).data.tags.get("mlflow.parentRunId")
        if parent:
            client.set_terminated(parent, "FINISHED")

    def _last_sign(self) -> int:
        """When a run that could not say its end wrote last, in milliseconds."""
        metrics = self.run.folder / "metrics.jsonl"
        written = metrics if metrics.exists() else self.run.folder / "run.json"
        return _written_at(written)

    def abandon(self) -> None:
        """The folder is gone or another run's: what was sent is all there is."""
        with suppress(UserError), explained(self.uri):
            if self.client is not None:
                self.client.set_terminated(self.run_id, STATUSES["killed"])

    def note(self, error: str | None) -> None:
        """Write into the folder which run this is, for those who go on with it, and what is wrong, for who waits."""
        path = self.run.folder / FOLDER / RECORD
        known = read_record(self.run.folder)
        runs = known["runs"] | ({self.uri: self.run_id} if self.run_id else {})
        wanted = {"runs": runs, "error": error}
        if wanted != known:
            files.write_atomic(path, files.json_bytes(wanted))

    # ---- what it is ----

    def _known(self, client: MlflowClient, experiment: str) -> Run | None:
        """The run of this experiment that the folder has been mirrored to, unless a person has deleted it."""
        run_id = read_record(self.run.folder)["runs"].get(self.uri)
        if run_id is None:
            return None
        try:
            found = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return None
        is_there = found.info.lifecycle_stage == "active" and found.info.experiment_id == experiment
        return found if is_there else None

    def _create(self, client: MlflowClient, experiment: str, parent: str | None) -> str:
        tags = {} if parent is None else {"mlflow.parentRunId": parent}
        name = self.tracking.name or self.run.name
        return client.create_run(experiment, self.started, tags, name).info.run_id

    def _describe(self, client: MlflowClient, found: Run | None) -> None:
        """Parameters, tags and data sets. A parameter cannot change: of one that has, a tag says what it is now."""
        record = self.run.record
        wanted = {
            _name(key): text[:LONGEST_TEXT] for key, text in described(self.run.config, record.get("origin")).items()
        }
        there = {} if found is None else found.data.params
        params = [Param(key, text) for key, text in wanted.items() if key not in there]
        changed = {f"changed.{key}": text for key, text in wanted.items() if there.get(key, text) != text}
        tags = [RunTag(key, str(text)) for key, text in {**self._tags(record), **changed}.items()]
        for batch in _batches(params, PARAMS_AT_ONCE):
            client.log_batch(self.run_id, params=batch)
        for batch in _batches(tags, PARAMS_AT_ONCE):
            client.log_batch(self.run_id, tags=batch)
        if found is None or not found.inputs.dataset_inputs:
            self._describe_data(client)
        self._send_files(("config.yaml", "run.json"), client)

    def _tags(self, record: Mapping[str, Any]) -> dict[str, str]:
        tags = {
            "mlflow.source.name": record.get("command"),
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": record.get("git_commit"),
            "mlflow.user": os.environ.get("USER"),
            "stage": record.get("stage"),
            "device": record.get("device"),
            "folder": str(self.run.folder.resolve()),
            **{f"version.{package}": version for package, version in record.get("versions", {}).items()},
            **self.tracking.tags,
        }
        init = self.run.config.get("init")
        for place in [] if init is None else [Path(init), Path(init).parent]:
            tags["init.run_id"] = tags.get("init.run_id") or read_record(place)["runs"].get(self.uri)
        return {_name(key): text for key, text in tags.items() if text is not None}

    def _describe_data(self, client: MlflowClient) -> None:
        """Each part's data set with a digest: of its images' names, as the run has recorded them."""
        inputs = []
        for part, known in (self.run.read("data.json") or {}).items():
            source = self.run.config["data"][part]
            place = source.get("root") or source.get("images")
            name = source["type"] if place is None else Path(place).name
            # The digest of a data set has room for 36 characters.
            dataset = Dataset(
                name=name,
                digest=known["sha256_of_names"][:32],
                source_type="local",
                source=json.dumps(source),
                profile=json.dumps({"images": known["images"]}),
            )
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", part)]))
        if inputs:
            client.log_inputs(self.run_id, inputs)

    # ---- what is there ----

    def _learn_what_is_there(self, client: MlflowClient, found: Run) -> None:
        self.results = {name: value for name, value in found.data.metrics.items() if name.startswith(RESULT)}
        for name in found.data.metrics:
            self.present |= {(name, point.step) for point in client.get_metric_history(self.run_id, name)}
        for artifact in client.list_artifacts(self.run_id, "images"):
            # As MLflow names the second file of an image, the smaller one: <name>+step+<step>+timestamp+...
            match = re.fullmatch(r"images/(.+)[+%]step[+%](\d+)[+%]timestamp.*compressed\.webp", artifact.path)
            if match:
                self.pictures.add((match[1], int(match[2])))

    # ---- what is sent ----

    def _send_points(self) -> None:
        for tail in self.tails:
            tail.read()
            while tail.waiting:
                points, taken = self._packed(tail.waiting)
                if points:
                    self.client.log_batch(self.run_id, metrics=points)
                del tail.waiting[:taken]
                self.num_lines += bool(points) and taken

    def _packed(self, lines: Sequence[Mapping[str, Any]]) -> tuple[list[Metric], int]:
        """The points of as many whole lines as one call may hold, and how many lines that is."""
        points: list[Metric] = []
        for taken, line in enumerate(lines):
            own = self._points(line)
            if points and len(points) + len(own) > POINTS_AT_ONCE:
                return points, taken
            points += own
        return points, len(lines)

    def _points(self, line: Mapping[str, Any]) -> list[Metric]:
        step, at = line["step"], line.get(TIME, self.started)  # runs of the first versions have no times
        named = {_name(key): value for key, value in line.items() if key not in ("step", TIME)}
        return [
            Metric(name, math.nan if value is None else value, at, step)
            for name, value in named.items()
            if (name, step) not in self.present
        ]

    def _send_picture(self, picture: Picture) -> None:
        at = _written_at(picture.path)
        key = re.sub(r"[^a-zA-Z0-9_\-. ]", "_", picture.name)
        self.client.log_image(self.run_id, Image(str(picture.path)), key=key, step=picture.step, timestamp=at)
        self.pictures.add((picture.name, picture.step))
        self.num_pictures += 1

    def _send_result(self, result: Mapping[str, Any]) -> None:
        named = {_result_name(score): value for score, value in scores_of(result).items()}
        step = 0  # MLflow draws what has but this one as bars, one a run
        at = _written_at(self.run.folder / "result.json")
        points = [Metric(name, value, at, step) for name, value in named.items() if self.results.get(name) != value]
        for batch in _batches(points, POINTS_AT_ONCE):
            self.client.log_batch(self.run_id, metrics=batch)

    def _send_files(self, names: Sequence[str], client: MlflowClient) -> None:
        for name in names:
            path = self.run.folder / name
            if path.is_file() and not path.is_symlink():
                client.log_artifact(self.run_id, str(path))

    def _draw_confusion(self) -> None:
        matrices = self.run.read("confusion.json") or {}
        for part in set(matrices) - {"classes"}:
            figure = plots.draw_confusion(np.array(matrices[part]), matrices["classes"])
            with tempfile.TemporaryDirectory() as folder:
                picture = Path(folder) / f"confusion_{part}.png"
                picture.write_bytes(plots.to_png(figure))
                self.client.log_artifact(self.run_id, str(picture))

    def _lasting_pictures(self) -> list[Path]:
        of_steps = {picture.path for picture in self.run.pictures()}
        return sorted(set((self.run.folder / "pictures").glob("*.png")) - of_steps)


class _Tail:
    """The whole lines of a file that another process appends to, as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: TextIO | None = None
        self.rest = ""
        self.waiting: list[dict[str, Any]] = []  # read and not yet sent

    def read(self) -> None:
        # Held open: a run that goes on replaces the file, and what belongs to the former one must not be mixed in.
        if self.file is None and self.path.exists():
            self.file = self.path.open(encoding="utf-8", errors="replace")
        if self.file is None:
            return
        *lines, self.rest = (self.rest + self.file.read()).split("\n")
        for line in lines:
            with suppress(ValueError):  # a line that a kill has torn, with another after it
                self.waiting.append(json.loads(line))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


# ---- experiments that others have filled ----


@dataclass(frozen=True)
class Fetched:
    """A run as MLflow knows it, in the words of the folder that it mirrors."""

    name: str
    stage: str
    description: dict[str, str]
    scores: dict[str, float]  # empty until it has finished


def fetch(experiment: str, uri: str | None = None) -> list[Fetched]:
    """The runs of ours in an MLflow experiment, oldest first. Raises UserError where there are none."""
    uri = _resolved(uri, Path("runs", "run"))
    if uri.startswith("sqlite:///") and not _database(uri).exists():
        raise UserError(f"{uri}: no such database; name another with --uri")
    found: list[Run] = []
    with explained(uri):
        client = _client(uri)
        known = client.get_experiment_by_name(experiment)
        if known is None:
            names = ", ".join(other.name for other in client.search_experiments())
            raise UserError(f"--experiment {experiment}: MLflow at {uri} has none of that name, only: {names}")
        token: str | None = None
        while token != "":
            page = client.search_runs(
                [known.experiment_id], order_by=["attributes.start_time ASC"], max_results=1000, page_token=token
            )
            found += page
            token = page.token or ""
    ours = [run for run in found if run.data.tags.get("stage") and run.data.params]
    if not ours:
        raise UserError(f"--experiment {experiment}: holds no run of ssl-seg; name another")
    return [_fetched(run) for run in ours]


def _fetched(run: Run) -> Fetched:
    done = run.info.status == STATUSES["finished"]  # one that goes on holds the result of what it was before
    scores = {_score_name(name): value for name, value in run.data.metrics.items() if name.startswith(RESULT) and done}
    return Fetched(run.info.run_name, run.data.tags["stage"], dict(run.data.params), scores)


def _result_name(score: str) -> str:
    """`result/val.iou.road` for `val/iou/road`: with slashes MLflow would open a section of charts for each part."""
    return _name(f"{RESULT}{score.replace('/', '.', 2)}")


def _score_name(name: str) -> str:
    """The other way round."""
    return name.removeprefix(RESULT).replace(".", "/", 2)


# ---- places and names ----


def _resolved(uri: str | None, folder: Path) -> str:
    """Where MLflow keeps runs, a path of this machine made absolute."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{_runs_folder(folder) / DATABASE}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{_database(uri)}"
    return uri


def _runs_folder(folder: Path) -> Path:
    """The nearest folder called `runs` that a run lies in, else the one it lies in directly."""
    parents = folder.resolve().parents
    return next((parent for parent in parents if parent.name == "runs"), parents[0])


def _database(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///")).resolve()


def _place(uri: str, folder: Path) -> Path | None:
    """The folder for artefacts; None where a server chooses."""
    if uri.startswith("sqlite:///"):
        return _database(uri).parent
    return None if "://" in uri and not uri.startswith("file:") else _runs_folder(folder)


def _client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def _first_use(uri: str, place: Path | None) -> Iterator[None]:
    """One process at a time: several that meet an empty database, or make the same experiment, break it or fail."""
    folder = place or Path(tempfile.gettempdir())
    name = DATABASE if place else f"ssl_seg-{os.getuid()}-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"
    with files.naming(folder, "cannot hold MLflow's files"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".{name}.lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _experiment(client: MlflowClient, name: str, uri: str, place: Path | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # Told where: else MLflow writes artefacts into whatever folder the run was started from.
        return client.create_experiment(name, None if place is None else str(place / ARTIFACTS), TRAINING)
    if found.lifecycle_stage != "active":
        raise UserError(f"tracking.experiment: '{name}' was deleted at {uri}; restore it there or name another")
    return found.experiment_id


def _parent(client: MlflowClient, experiment: str, name: str | None) -> str | None:
    """The run that stands above those that name this parent: found again by a tag, made by the first."""
    if name is None:
        return None
    quoted = name.replace("'", "_")
    found = client.search_runs([experiment], f"tags.parent_of = '{quoted}'", order_by=["attributes.start_time ASC"])
    if found:
        return found[0].info.run_id
    run_id = client.create_run(experiment, tags={"parent_of": quoted}, run_name=name).info.run_id
    client.set_terminated(run_id, "FINISHED")  # it holds no work of its own; its last run sets the time
    return run_id


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """What MLflow raises where a server does not answer or refuses, as one line."""
    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{uri} did not take it ({first[:200]})") from error


def _name(key: str) -> str:
    """A name that MLflow takes; one that had to be changed gets a digest, so that no two become one."""
    clean = posixpath.normpath(re.sub(r"[^\w.\- /:]", "_", key)).lstrip("/.")[: LONGEST_NAME - 9]
    if clean == key:
        return key
    return f"{clean}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """What one call may hold at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _written_at(path: Path) -> int:
    """In milliseconds."""
    return path.stat().st_mtime_ns // 10**6


def _milliseconds(moment: str | None) -> int | None:
    return None if moment is None else round(datetime.fromisoformat(moment).timestamp() * 1000)
