"""MLflow mirrors a run folder: a process of its own reads what the run has written and sends it. mlflow's only home.

Ours is the mirror, not the tracking: a logger inside the training process waits for a dead server, loses what it could
not send, and cannot say that it was killed. Beside it, the folder stays the truth, `ssl-seg track RUN` sends whatever
the server has not got, and what it has is asked of the server, so nothing arrives twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import posixpath
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TextIO

from pydantic import BeforeValidator, Field, PositiveFloat

from ssl_seg import files
from ssl_seg.config import Config, UserError
from ssl_seg.runs import TIME, Picture, RunFolder, described
from ssl_seg.terminal import say

if TYPE_CHECKING:
    import psutil
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

FOLDER = "tracking"  # in the run's: which MLflow run it is, the machine's load, the mirror's log and lock
RECORD, SYSTEM, LOG, LOCK = "mlflow.json", "system.jsonl", "log", "lock"
DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
# What is kept beside the points: small files, and pictures that belong to no step.
RECORDS = ("config.yaml", "run.json", "metrics.jsonl", "tasks.json", "data.json", "split.json", "receipts.json")
RESULTS = ("result.json", "confusion.json", "confusion_images.safetensors", "extremes.json", "report.html")
WEIGHTS = ("encoder", "decoders", "model")
RESULT = "result"  # result.json's figures are metrics of this prefix: those of the chosen step, not of the last
POINTS_AT_ONCE, PARAMS_AT_ONCE = 1000, 100  # MLflow's limits of one call
LONGEST_TEXT, LONGEST_NAME = 6000, 250
STATUSES = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
# A silent server must not keep the mirror for minutes: MLflow's own are 120 s and 7 times.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a run tells nobody but the server it was given
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
GLANCE = 0.25  # seconds between two looks at whether the run is over
LONGEST_PAUSE = 60.0  # seconds between two tries of a server that does not answer
FAREWELL = 10.0  # seconds that a finished run waits for its mirror, which goes on without it
SAMPLE_EVERY = 10.0  # seconds, of the machine's load; as MLflow's own
LAST_TRY = 30.0  # seconds that `track` waits for the mirror of a run that has just ended
INCOMPLETE = 3  # exit code of a mirror that could not send everything


class Tracking(Config):
    """`tracking`: where a run is shown while and after it runs. It may change when a run goes on."""

    type: Literal["mlflow", "none"] = "mlflow"
    # Where MLflow keeps runs. None: MLFLOW_TRACKING_URI, else mlflow.db in the folder `runs` that the run lies in.
    uri: str | None = None
    experiment: str = Field(default="ssl_seg", min_length=1)
    name: str | None = None  # None: the folder's
    parent: str | None = Field(default=None, min_length=1)  # runs that name the same parent are shown below it
    tags: dict[str, str] = Field(default={})
    system_metrics: bool = True  # load and memory of the machine and its GPUs (those want nvidia-ml-py)
    weights: bool = False  # send the exported weights too; they are in the run's folder anyway
    every: PositiveFloat = 5.0  # seconds between two messages


def _word_is_type(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


TrackingField = Annotated[Tracking, BeforeValidator(_word_is_type)]


# ---- beside the training process ----

_left_behind: list[subprocess.Popen[bytes]] = []  # mirrors that are still sending; Python warns of one it forgets


class Mirror:
    """Starts the process that mirrors a run, and at the end waits for it for a moment.

    It reads files and nothing else, so it can neither slow nor stop the training. It ends by itself once the run has
    ended or its process is gone, and notes then how.
    """

    def __init__(self, tracking: Tracking, folder: Path, main: bool = True, quiet: bool = False) -> None:
        self.folder = folder
        self.quiet = quiet
        self.wanted = main and tracking.type == "mlflow"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Call it when run.json and the metrics are those that the run goes on from."""
        if not self.wanted:
            return
        _left_behind[:] = [process for process in _left_behind if process.poll() is None]
        with files.naming(self.folder / FOLDER):
            (self.folder / FOLDER).mkdir(exist_ok=True)
            log = (self.folder / FOLDER / LOG).open("w")
        command = [sys.executable, "-m", "ssl_seg", "track", str(self.folder), "--follow", str(os.getpid())]
        # A session of its own: Ctrl-C and a killed process group must not take the witness too.
        with log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is None:
            return
        last = self._error()
        until = time.monotonic() + (0.0 if last else FAREWELL)
        while self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        last = last or self._error()
        if self.process.poll() is None:
            _left_behind.append(self.process)
        if last:
            say(f"MLflow: {last}; nothing is lost, ssl-seg track {self.folder} sends the rest", self.quiet)
        elif self.process.poll() is None:
            say("MLflow: the rest is being sent in the background", self.quiet)
        elif self.process.returncode:
            say(f"MLflow: the mirror stopped, see {self.folder / FOLDER / LOG}", self.quiet)

    def _error(self) -> str | None:
        with suppress(UserError):
            return files.read_json(self.folder / FOLDER / RECORD).get("error")
        return None


def check(tracking: Tracking) -> None:
    """Whether the run can be mirrored at all, before any work is done."""
    if tracking.type == "mlflow":
        from importlib.util import find_spec

        if find_spec("mlflow") is None:
            raise UserError("tracking: mlflow is not installed; pip install mlflow, or set tracking=none")


# ---- the mirror ----


@dataclass(frozen=True)
class Tracked:
    """What `track` gives back for each run."""

    folder: Path
    uri: str
    experiment: str
    run_id: str
    lines: int  # of metrics sent now
    pictures: int


def track(folder: str | Path, uri: str | None = None, experiment: str | None = None) -> Tracked:
    """Send what MLflow has not got of a run, whichever way that ended; a second call sends nothing.

    Raises UserError where the server does not take it, and for a run that is being mirrored this moment.
    """
    run = RunFolder.open(folder)
    given = {"uri": uri, "experiment": experiment}
    tracking = _tracking_of(run).model_copy(update={key: value for key, value in given.items() if value is not None})
    check(tracking.model_copy(update={"type": "mlflow"}))
    _set_environment()
    with _alone(run.folder, LAST_TRY), MirroredRun(run, tracking) as mirrored:
        with _explained(mirrored.uri):
            mirrored.open()
            mirrored.send()
            if run.status != "running":
                mirrored.finish(run.status)
        sent = {"lines": mirrored.lines, "pictures": mirrored.num_pictures}
        return Tracked(run.folder, mirrored.uri, tracking.experiment, mirrored.run_id, **sent)


def follow(folder: str | Path, pid: int) -> int:
    """Mirror a run until it ends or process `pid` is gone; the exit code says whether everything arrived."""
    import psutil

    folder = Path(folder)
    with suppress(psutil.Error):
        psutil.Process().nice(10)  # the training comes first
    _set_environment()
    owner = _Owner(pid)
    with _alone(folder, math.inf):
        run = RunFolder.open(folder)
        with MirroredRun(run, _tracking_of(run)) as mirrored:
            return _follow(mirrored, owner)


def _follow(mirrored: MirroredRun, owner: _Owner) -> int:
    run, tracking = mirrored.run, mirrored.tracking
    load = Load(run.folder, owner) if tracking.system_metrics else None
    next_try, pause = time.monotonic(), tracking.every
    while True:
        over = not owner.lives or RunFolder(run.folder).record.get("status") != "running"
        if load is not None:
            load.sample(time.monotonic())
        if over or time.monotonic() >= next_try:
            error = _tried(mirrored, RunFolder(run.folder) if over else None)
            mirrored.record(error)
            if over:
                return INCOMPLETE if error else 0
            pause = min(2 * pause, LONGEST_PAUSE) if error else tracking.every
            next_try = time.monotonic() + pause
        time.sleep(GLANCE)


def _tried(mirrored: MirroredRun, ended: RunFolder | None) -> str | None:
    """Send what there is; what went wrong, in one line."""
    try:
        with _explained(mirrored.uri):
            mirrored.open()
            mirrored.send()
            if ended is not None:
                mirrored.finish(ended.status)
    except UserError as error:
        return str(error)
    return None


class _Owner:
    """The process that trains."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._zombie = psutil.STATUS_ZOMBIE
        self._gone = psutil.Error
        self.process: psutil.Process | None = None
        with suppress(psutil.Error):
            self.process = psutil.Process(pid)

    @property
    def lives(self) -> bool:
        """psutil knows a new process of the same number by its start."""
        if self.process is None:
            return False
        try:
            return self.process.is_running() and self.process.status() != self._zombie
        except self._gone:
            return False


class MirroredRun:
    """One run in MLflow: which it is, what of it has been sent."""

    def __init__(self, run: RunFolder, tracking: Tracking) -> None:
        self.run = run
        self.tracking = tracking
        self.uri = _resolved(tracking.uri, run.folder)
        self.run_id = ""
        self.lines = 0
        self.num_pictures = 0
        self.client: MlflowClient | None = None
        self.tails = [_Tail(run.folder / "metrics.jsonl"), _Tail(run.folder / FOLDER / SYSTEM)]
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
            found = self._known(client)
            parent = _parent(client, experiment, self.tracking.parent)
        self.run_id = found.info.run_id if found else self._create(client, experiment, parent)
        self.record(None)
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
        run = RunFolder(self.run.folder)
        record = run.record
        if run.result is not None:
            self._send_result(run.result)
        self._send_files((*RECORDS, *RESULTS))
        self._draw_confusion()
        for picture in self._lasting_pictures():
            client.log_artifact(self.run_id, str(picture), "pictures")
        if self.tracking.weights:
            for part in WEIGHTS:
                if (run.folder / part).is_dir():
                    client.log_artifacts(self.run_id, str(run.folder / part), part)
        ended = _milliseconds(record.get("ended")) or time.time_ns() // 10**6
        client.set_terminated(self.run_id, STATUSES[status], ended)
        parent = client.get_run(self.run_id).data.tags.get("mlflow.parentRunId")
        if parent:
            client.set_terminated(parent, "FINISHED")

    def record(self, error: str | None) -> None:
        """Note in the folder which run this is, for those who go on with it or wait for it."""
        path = self.run.folder / FOLDER / RECORD
        known = _read_record(path)
        if self.run_id:
            known["runs"][self.uri] = self.run_id
        files.write_atomic(path, files.json_bytes({**known, "error": error}))

    # ---- what it is ----

    def _known(self, client: MlflowClient) -> Run | None:
        """The MLflow run that this folder has been mirrored to, unless a person has deleted it."""
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        run_id = _read_record(self.run.folder / FOLDER / RECORD)["runs"].get(self.uri)
        if run_id is None:
            return None
        try:
            found = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return None
        return found if found.info.lifecycle_stage == "active" else None

    def _create(self, client: MlflowClient, experiment: str, parent: str | None) -> str:
        tags = {} if parent is None else {"mlflow.parentRunId": parent}
        name = self.tracking.name or self.run.name
        started = _milliseconds(self.run.record.get("started"))
        return client.create_run(experiment, started, tags, name).info.run_id

    def _describe(self, client: MlflowClient, found: Run | None) -> None:
        """Parameters, tags and data sets. A parameter cannot change: of one that has, a tag says what it is now."""
        from mlflow.entities import Param, RunTag

        record = self.run.record
        wanted = {
            _name(key): text[:LONGEST_TEXT] for key, text in described(self.run.config, record.get("origin")).items()
        }
        there = {} if found is None else found.data.params
        params = [Param(key, text) for key, text in wanted.items() if key not in there]
        changed = {f"changed.{key}": text for key, text in wanted.items() if there.get(key, text) != text}
        tags = [RunTag(key, str(text)) for key, text in {**self._tags(record), **changed}.items()]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            client.log_batch(self.run_id, params=params[start : start + PARAMS_AT_ONCE])
        for start in range(0, len(tags), PARAMS_AT_ONCE):
            client.log_batch(self.run_id, tags=tags[start : start + PARAMS_AT_ONCE])
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
            tags.setdefault("init.run_id", _read_record(place / FOLDER / RECORD)["runs"].get(self.uri))
        return {_name(key): text for key, text in tags.items() if text is not None}

    def _describe_data(self, client: MlflowClient) -> None:
        """Each part's data set with a digest: of its images' names, as the run has recorded them."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for part, known in (self.run.read("data.json") or {}).items():
            source = self.run.config["data"][part]
            place = source.get("root") or source.get("images")
            name = source["type"] if place is None else f"{source['type']} {Path(place).name}"
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
                self.lines += bool(points) and taken

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
        from mlflow.entities import Metric

        step, at = line["step"], line.get(TIME, 0)
        named = {_name(key): value for key, value in line.items() if key not in ("step", TIME)}
        return [
            Metric(name, math.nan if value is None else value, at, step)
            for name, value in named.items()
            if (name, step) not in self.present
        ]

    def _send_picture(self, picture: Picture) -> None:
        from mlflow import Image

        at = picture.path.stat().st_mtime_ns // 10**6
        key = re.sub(r"[^a-zA-Z0-9_\-. ]", "_", picture.name)
        self.client.log_image(self.run_id, Image(str(picture.path)), key=key, step=picture.step, timestamp=at)
        self.pictures.add((picture.name, picture.step))
        self.num_pictures += 1

    def _send_result(self, result: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        parts = {part: named for part, named in result.items() if isinstance(named, Mapping)}
        flat = {f"{RESULT}/{part}/{name}": value for part, named in parts.items() for name, value in named.items()}
        step = result.get("selected_step", result.get("steps", 0))
        at = (self.run.folder / "result.json").stat().st_mtime_ns // 10**6
        points = [
            Metric(_name(key), value, at, step)
            for key, value in flat.items()
            if isinstance(value, int | float) and (_name(key), step) not in self.present
        ]
        for start in range(0, len(points), POINTS_AT_ONCE):
            self.client.log_batch(self.run_id, metrics=points[start : start + POINTS_AT_ONCE])

    def _send_files(self, names: Sequence[str], client: MlflowClient | None = None) -> None:
        for name in names:
            if (self.run.folder / name).is_file():
                (client or self.client).log_artifact(self.run_id, str(self.run.folder / name))

    def _draw_confusion(self) -> None:
        matrices = self.run.read("confusion.json")
        if matrices is None:
            return
        from ssl_seg import plots

        for part in ("val", "test"):
            if part in matrices:
                figure = plots.confusion(matrices[part], matrices["classes"])
                self.client.log_figure(self.run_id, figure, f"confusion_{part}.png")

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


class Load:
    """The load of machine and run, measured by MLflow's own monitors and kept in the folder until it can be sent."""

    def __init__(self, folder: Path, owner: _Owner) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.path = folder / FOLDER / SYSTEM
        self.owner = owner
        self.monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no GPU
            self.monitors.append(GPUMonitor())
        self.step = self.path.read_bytes().count(b"\n") if self.path.exists() else 0
        self.due = 0.0

    def sample(self, now: float) -> None:
        """Once every SAMPLE_EVERY seconds."""
        if now < self.due:
            return
        self.due = now + SAMPLE_EVERY
        figures: dict[str, float] = {"run_memory_megabytes": self._memory()}
        for monitor in self.monitors:
            monitor.collect_metrics()
            figures |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        line = {"step": self.step, TIME: time.time_ns() // 10**6}
        line |= {f"system/{name}": value for name, value in figures.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.step += 1

    def _memory(self) -> float:
        """Of the training process and its loaders; shared pages count in each."""
        import psutil

        total = 0
        with suppress(psutil.Error):
            for process in [self.owner.process, *self.owner.process.children(recursive=True)]:
                total += process.memory_info().rss
        return total / 1e6


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
    check(Tracking())
    _set_environment()
    uri = _resolved(uri, Path("runs", "run"))
    if uri.startswith("sqlite:///") and not _database(uri).exists():
        raise UserError(f"{uri}: no such database; name another with --uri")
    found: list[Run] = []
    with _explained(uri):
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
    prefix = f"{RESULT}/"
    scores = {name.removeprefix(prefix): value for name, value in run.data.metrics.items() if name.startswith(prefix)}
    return Fetched(run.info.run_name, run.data.tags["stage"], dict(run.data.params), scores)


# ---- places and names ----


def _tracking_of(run: RunFolder) -> Tracking:
    """As the run was started; the folders of older runs know no tracking."""
    given = run.config.get("tracking") or {}
    return Tracking.model_validate({**given, "type": "mlflow"})


def _resolved(uri: str | None, folder: Path) -> str:
    """Where MLflow keeps runs, a path of this machine made absolute."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
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
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def _first_use(uri: str, place: Path | None) -> Iterator[None]:
    """One process at a time: several that meet an empty database, or make the same experiment, break it or fail."""
    folder = place or Path(tempfile.gettempdir())
    name = DATABASE if place else f"ssl_seg-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"
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
        return client.create_experiment(name, None if place is None else str(place / ARTIFACTS))
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
def _alone(folder: Path, patience: float) -> Iterator[None]:
    """One mirror at a time for a run, waiting `patience` seconds for the former, which may still be sending."""
    with files.naming(folder / FOLDER):
        (folder / FOLDER).mkdir(exist_ok=True)
        lock = (folder / FOLDER / LOCK).open("w")
    with lock:
        until = time.monotonic() + patience
        while not _taken(lock):
            if time.monotonic() > until:
                raise UserError(f"{folder}: is being mirrored by the run itself; wait for its end")
            time.sleep(GLANCE)
        yield


def _taken(lock: TextIO) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _set_environment() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """What MLflow raises where a server does not answer or refuses, as one line."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

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


def _read_record(path: Path) -> dict[str, Any]:
    known = files.read_json(path) if path.is_file() else {}
    return {"runs": {}, "error": None, **known}


def _milliseconds(moment: str | None) -> int | None:
    return None if moment is None else round(datetime.fromisoformat(moment).timestamp() * 1000)
