"""What is said to MLflow, and read from it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag

from ssl_seg.config import UserError, user_path
from ssl_seg.evidence.passport import passports_in
from ssl_seg.figures import charts, svg
from ssl_seg.files import lies_in, open_regular
from ssl_seg.images import read_image
from ssl_seg.runs.folder import (
    TIME,
    Picture,
    RunFolder,
    beside,
    description_of,
    epoch_ms,
    labelled_digest,
    leak_word,
    manifest_of,
    scores_of,
)
from ssl_seg.terminal import say
from ssl_seg.tracking import SYSTEM, Tracking
from ssl_seg.tracking.client import (
    CONTINUES,
    KEY,
    PARENT,
    PARENT_OF,
    STATUSES,
    batches,
    connect,
    experiment_id,
    explained,
    first_use,
    hand_over,
    is_open,
    mlflow_name,
    parent_id,
    place_of,
    points_of,
    resolved,
    run_of,
    tagged,
)
from ssl_seg.tracking.record import FOLDER, Record, claim, read_record, write_record

# What is kept beside the points: small files, and pictures that belong to no step.
RECORDS = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "tasks.json",
    "data.json",
    "images.json",
    "leaks.json",
    "leaks.png",
    "split.json",
    "receipts.json",
)
RESULTS = (
    "result.json",
    "confusion.json",
    "confusion_images.safetensors",
    "calibration.json",
    "contours.csv",
    "extremes.json",
    "kinds.json",
    "nonfinite.json",
    "report.html",
)
WEIGHTS = ("encoder", "decoders", "model")
SYSTEM_METRIC = "system/"  # of metrics: MLflow's own word for the machine's load
RESULT = "result/"  # of metrics: the figures of result.json, which are those of the chosen step and not of the last
POINTS_AT_ONCE, PARAMS_AT_ONCE = 1000, 100  # MLflow's limits of one call
LONGEST_TEXT = 6000  # of a parameter
CHANGED = "changed."  # before the name of a parameter: a tag with what it is now
# Tags: the machine; a digest of the labelled images; what leaks.json says, in a word.
HOST, LABELLED, LEAKS = "host", "labelled", "leaks"
ABSENT = "null"  # the text of a parameter that a config has no more
TAG = "passport."  # before a part, in MLflow
# What a data set was used for, by the part of `data`: MLflow's words.
CONTEXTS = {"pool": "training", "labelled": "training", "beside": "training", "val": "validation", "test": "test"}


class MirroredRun:
    """One run in MLflow: which it is, what of it has been sent."""

    def __init__(self, run: RunFolder, tracking: Tracking) -> None:
        self.run = run
        self.tracking = tracking
        self.uri = resolved(tracking.uri, run.folder)
        self.run_id = ""
        with _reading(run.folder / "run.json"):
            self.started = _milliseconds(run.record.get("started")) or epoch_ms()
        self.num_lines = 0
        self.num_pictures = 0
        self.opened: MlflowClient | None = None
        self.tails = [_Tail(run.folder, "metrics.jsonl"), _Tail(run.folder, f"{FOLDER}/{SYSTEM}")]
        self.results: dict[str, float] = {}  # the figures of a result that are there
        self.present: set[tuple[str, int]] = set()  # points that were there before: (name, step)
        self.pictures: set[tuple[str, int]] = set()  # those that are there: (name, step)
        self.left_out: set[Path] = set()  # pictures that cannot be sent, and were told of

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for tail in self.tails:
            tail.close()

    @property
    def client(self) -> MlflowClient:
        """What reaches the run, once it is open."""
        assert self.opened is not None
        return self.opened

    def open(self) -> None:
        """Find the run in MLflow, or make it; once.

        MLflow deletes no point, and draws two of one step both. So a run that goes on from a checkpoint with other
        settings, and makes steps again that are there already, goes on as a run of its own; each names the other.
        """
        if self.opened is not None:
            return
        place = place_of(self.uri, self.run.folder)
        record = claim(self.run.folder)
        with first_use(self.uri, place):
            client = connect(self.uri)
            experiment = experiment_id(client, self.tracking.experiment, self.uri, place)
            found = self._known(client, experiment, record)
            parent = parent_id(client, experiment, self.tracking.parent)
        points = points_of(client, found) if found else []
        if found and self._has_changed(found) and self._makes_again(points):
            found, points = self._succeed(client, found, record), []
        self.run_id = found.info.run_id if found else self._create(client, experiment, {KEY: record.key})
        self.note(None)
        if found:
            client.update_run(self.run_id, "RUNNING", self.tracking.name)
            self._learn_what_is_there(client, found, points)
        self._set_parent(client, found, parent)
        self._describe(client, found, record)
        self.opened = client

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
        client.set_tag(self.run_id, LEAKS, leak_word(run.read("leaks.json")))
        self._send_files((*RECORDS, *RESULTS), client)
        self._draw_confusion()
        for path in (*self._lasting_pictures(), *self._weights()):
            client.log_artifact(self.run_id, str(path), path.parent.relative_to(run.folder).as_posix())
        with _reading(run.folder / "run.json"):
            ended = _milliseconds(run.record.get("ended")) or self._last_sign()
            word = STATUSES[status]
        client.set_terminated(self.run_id, word, ended)
        parent = client.get_run(self.run_id).data.tags.get(PARENT)
        if parent:
            client.set_terminated(parent, "FINISHED")
        # Last: it takes the longest, and is the one thing that may fail by itself.
        if self.tracking.model and run.is_done and run.stage == "finetune" and run.files_in("model"):
            from ssl_seg.tracking.model import log_model  # torch, which all else can do without

            log_model(client, self.run_id, run.folder)

    def _last_sign(self) -> int:
        """When a run that could not say its end wrote last, in milliseconds."""
        metrics = self.run.folder / "metrics.jsonl"
        written = metrics if metrics.exists() else self.run.folder / "run.json"
        return _written_at(written)

    def abandon(self) -> None:
        """The folder is gone or another run's: what was sent is all there is."""
        with suppress(UserError), explained(self.uri):
            if self.opened is not None:
                self.opened.set_terminated(self.run_id, STATUSES["killed"])

    def note(self, error: str | None) -> None:
        """Write into the folder which run this is, for those who go on with it, and what is wrong, for who waits."""
        known = claim(self.run.folder)
        runs = known.runs | ({self.uri: self.run_id} if self.run_id else {})
        write_record(self.run.folder, known.model_copy(update={"runs": runs, "error": error}))

    # ---- what it is ----

    def _known(self, client: MlflowClient, experiment: str, record: Record) -> Run | None:
        """The run of this experiment that the folder has been mirrored to, unless a person has deleted it.

        By its id, else by the folder's key: where a kill came before the id was noted, or the database was moved.
        """
        found = run_of(client, record.runs[self.uri]) if self.uri in record.runs else None
        if found is not None and is_open(found) and found.info.experiment_id == experiment:
            return found
        return tagged(client, experiment, {KEY: record.key})

    def _create(self, client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> str:
        name = self.tracking.name or self.run.name
        return client.create_run(experiment, self.started, dict(tags), name).info.run_id

    def _succeed(self, client: MlflowClient, former: Run, record: Record) -> Run:
        """The run that takes the place of `former`; made already, if a kill came before it was noted."""
        experiment, tags = former.info.experiment_id, {KEY: record.key, CONTINUES: former.info.run_id}
        made = tagged(client, experiment, tags) or client.get_run(self._create(client, experiment, tags))
        hand_over(client, former, made.info.run_id)
        return made

    def _set_parent(self, client: MlflowClient, found: Run | None, parent: str | None) -> None:
        """As the config has it now. What a person has put the run below by hand stays, where the config names none."""
        former = None if found is None else found.data.tags.get(PARENT)
        if parent is not None:
            client.set_tag(self.run_id, PARENT, parent)
        elif former is not None and PARENT_OF in client.get_run(former).data.tags:
            client.delete_tag(self.run_id, PARENT)

    def _settings(self) -> dict[str, str]:
        """Every key of the config as a parameter of MLflow."""
        settings = description_of(self.run.record)
        return {mlflow_name(key): text[:LONGEST_TEXT] for key, text in settings.items()}

    def _has_changed(self, found: Run) -> bool:
        """Whether the settings are others than MLflow shows for a run."""
        shown, wanted = shown_settings(found), self._settings()
        return any(shown.get(key, ABSENT) != wanted.get(key, ABSENT) for key in shown.keys() | wanted.keys())

    def _makes_again(self, points: Sequence[Metric]) -> bool:
        """Whether some points belong to steps that the run has dropped since, and makes again or has."""
        with _reading(self.run.folder / "metrics.jsonl"):
            lines = [(line["step"], line[TIME], line) for line in self.run.metrics()]
        kept = {(mlflow_name(key), step, at) for step, at, line in lines for key in line}
        own = [point for point in points if not point.key.startswith((RESULT, SYSTEM_METRIC))]
        return any((point.key, point.step, point.timestamp) not in kept for point in own)

    def _describe(self, client: MlflowClient, found: Run | None, record: Record) -> None:
        """Parameters, tags and data sets. A parameter cannot change: of one that has, a tag says what it is now."""
        there = {} if found is None else found.data.params
        shown = {} if found is None else shown_settings(found)
        wanted = {**dict.fromkeys(there, ABSENT), **self._settings()}
        params = [Param(key, text) for key, text in wanted.items() if key not in there]
        changed = {f"{CHANGED}{key}": text for key, text in wanted.items() if shown.get(key, text) != text}
        given = {KEY: record.key, **self._tags(self.run.record), **changed}
        tags = [RunTag(key, str(text)) for key, text in given.items()]
        for batch in batches(params, PARAMS_AT_ONCE):
            client.log_batch(self.run_id, params=batch)
        for batch in batches(tags, PARAMS_AT_ONCE):
            client.log_batch(self.run_id, tags=batch)
        if found is None or found.inputs is None or not found.inputs.dataset_inputs:
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
            HOST: platform.node(),
            **{f"version.{package}": version for package, version in record.get("versions", {}).items()},
            **self.tracking.tags,
        }
        init = self.run.config.get("init")
        run = None if init is None else beside(init, "run.json")  # of the weights that it started from
        started = None if run is None else read_record(run.parent)
        tags["init.run_id"] = None if started is None else started.runs.get(self.uri)
        return {mlflow_name(key): text for key, text in tags.items() if text is not None}

    def _describe_data(self, client: MlflowClient) -> None:
        """Each part's data set with a digest of its images' names, as the run has recorded them.

        Also the labelled images that a run without data.val has held out. MLflow takes one of a name and digest once,
        so what is several parts, as where folds hold out every image in turn, is one input with all its uses.
        """
        with _reading(self.run.folder / "data.json"):
            data = self.run.config.get("data", {})
            known = dict(self.run.read("data.json") or {})
            held_out = (self.run.read("split.json") or {}).get("val")
            sources = {part: data[part] for part in known}
            if held_out is not None:
                known["val"], sources["val"] = manifest_of(held_out), data["labelled"]
            parts: dict[tuple[str, str], tuple[Dataset, list[str]]] = {}
            for part, source in sources.items():
                dataset = _dataset(source, known[part])
                parts.setdefault((dataset.name, dataset.digest), (dataset, []))[1].append(part)
        if parts:
            client.log_inputs(self.run_id, [_used_as(*own) for own in parts.values()])

    # ---- what is there ----

    def _learn_what_is_there(self, client: MlflowClient, found: Run, points: Sequence[Metric]) -> None:
        self.results = {name: value for name, value in found.data.metrics.items() if name.startswith(RESULT)}
        self.present = {(point.key, point.step) for point in points}
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
        step, at = line["step"], line[TIME]
        named = {mlflow_name(key): value for key, value in line.items() if key not in ("step", TIME)}
        return [
            Metric(name, math.nan if value is None else value, at, step)
            for name, value in named.items()
            if (name, step) not in self.present
        ]

    def _send_picture(self, picture: Picture) -> None:
        at = _written_at(picture.path)
        key = re.sub(r"[^a-zA-Z0-9_\-. ]", "_", picture.name)
        try:
            pixels = read_image(picture.path)
        except UserError as error:
            self._leave_out(picture.path, error)
            return
        self.client.log_image(self.run_id, pixels, key=key, step=picture.step, timestamp=at)
        self.pictures.add((picture.name, picture.step))
        self.num_pictures += 1

    def _leave_out(self, path: Path, error: UserError) -> None:
        """One word about a picture that is too large or damaged; the rest is sent, and it too once it is whole."""
        if path not in self.left_out:
            self.left_out.add(path)
            say(f"MLflow: a picture is not sent: {error}")

    def _send_result(self, result: Mapping[str, Any]) -> None:
        named = {_result_name(score): value for score, value in scores_of(result).items()}
        step = 0  # MLflow draws what has but this one as bars, one a run
        at = _written_at(self.run.folder / "result.json")
        points = [Metric(name, value, at, step) for name, value in named.items() if self.results.get(name) != value]
        for batch in batches(points, POINTS_AT_ONCE):
            self.client.log_batch(self.run_id, metrics=batch)
        tags = {**to_tags(result), LABELLED: labelled_digest(self.run.read("split.json"))}
        self.client.log_batch(self.run_id, tags=[RunTag(name, text) for name, text in tags.items() if text])

    def _send_files(self, names: Sequence[str], client: MlflowClient) -> None:
        for name in names:
            path = self.run.folder / name
            if lies_in(path, self.run.folder):
                client.log_artifact(self.run_id, str(path))

    def _draw_confusion(self) -> None:
        matrices = self.run.read("confusion.json") or {}
        for part in set(matrices) - {"classes"}:
            with _reading(self.run.folder / "confusion.json"):
                figure = charts.draw_confusion(np.array(matrices[part]), matrices["classes"])
            with tempfile.TemporaryDirectory() as folder:
                picture = Path(folder) / f"confusion_{part}.png"
                picture.write_bytes(svg.to_png(figure))
                self.client.log_artifact(self.run_id, str(picture))

    def _lasting_pictures(self) -> list[Path]:
        of_steps = {picture.path for picture in self.run.pictures()}
        return [path for path in self.run.files_in("pictures") if path.suffix == ".png" and path not in of_steps]

    def _weights(self) -> list[Path]:
        parts = WEIGHTS if self.tracking.weights else ()
        return [path for part in parts for path in self.run.files_in(part)]


def _dataset(source: Mapping[str, Any], known: Mapping[str, Any]) -> Dataset:
    """A data set of a config with what data.json knows of it."""
    place = source.get("root") or source.get("images")
    where = {} if place is None else {"uri": str(user_path(place).resolve())}  # what mlflow.data.get_source reads
    return Dataset(
        name=source["type"] if place is None else Path(place).name,
        digest=known["sha256_of_names"][:32],  # it has room for 36 characters
        source_type="local",
        source=json.dumps({**source, **where}),
        profile=json.dumps({"images": known["images"]}),
    )


def _used_as(dataset: Dataset, parts: Sequence[str]) -> DatasetInput:
    contexts = dict.fromkeys(CONTEXTS.get(part, part) for part in parts)
    tags = {"mlflow.data.context": ", ".join(contexts), "part": ", ".join(parts)}
    return DatasetInput(dataset, [InputTag(key, text) for key, text in tags.items()])


class _Tail:
    """The whole lines of a file that another process appends to, as they come."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.path = folder / name
        self.file: TextIO | None = None
        self.rest = ""
        self.waiting: list[dict[str, Any]] = []  # read and not yet sent

    def read(self) -> None:
        # Held open: a run that goes on replaces the file, and what belongs to the former one must not be mixed in.
        if self.file is None and lies_in(self.path, self.folder):
            self.file = os.fdopen(open_regular(self.path), encoding="utf-8", errors="replace")
        if self.file is None:
            return
        *lines, self.rest = (self.rest + self.file.read()).split("\n")
        for line in lines:
            with suppress(ValueError):  # a line that a kill has torn, with another after it
                record = json.loads(line)
                if isinstance(record, dict) and all(isinstance(record.get(name), int) for name in ("step", TIME)):
                    self.waiting.append(record)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _result_name(score: str) -> str:
    """`result/val.iou.road` for `val/iou/road`: with slashes MLflow would open a section of charts for each part."""
    return mlflow_name(f"{RESULT}{score.replace('/', '.', 2)}")


def score_name(name: str) -> str:
    """The other way round."""
    return name.removeprefix(RESULT).replace(".", "/", 2)


# ---- parts ----


def shown_settings(run: Run) -> dict[str, str]:
    """What MLflow shows of a run's config: parameters, and the tags of those that have changed."""
    tags = run.data.tags.items()
    changed = {name.removeprefix(CHANGED): text for name, text in tags if name.startswith(CHANGED)}
    return {**run.data.params, **changed}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A file that is not as a run writes it, as one line."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is not as a run writes it ({error!r}); restore it, or make the run anew") from error


def _written_at(path: Path) -> int:
    """In milliseconds."""
    return path.stat().st_mtime_ns // 10**6


def _milliseconds(moment: str | None) -> int | None:
    return None if moment is None else round(datetime.fromisoformat(moment).timestamp() * 1000)


# ---- as MLflow keeps them ----


def to_tags(result: Mapping[str, Any]) -> dict[str, str]:
    """A tag for each part of a result.json that has a passport."""
    passports = passports_in(result)
    return {f"{TAG}{part}": _to_tag(written) for part, written in passports.items() if written is not None}


def from_tags(tags: Mapping[str, str], scores: Iterable[str]) -> dict[str, Mapping[str, Any] | None]:
    """What `passports_in` says of a run, from its tags and the names of its scores; class names are digests here.

    Raises UserError for a tag that is not one of ours.
    """
    found: dict[str, Mapping[str, Any] | None] = {}
    for part in (name.partition("/")[0] for name in scores if name.endswith("/miou") and name.count("/") == 1):
        try:
            found[part] = json.loads(tags.get(f"{TAG}{part}", "null"))
        except ValueError as error:
            raise UserError(f"tag {TAG}{part}: is no passport; delete the tag or the run in MLflow") from error
        if not isinstance(found[part], Mapping | None):
            raise UserError(f"tag {TAG}{part}: is no passport; delete the tag or the run in MLflow")
    return found


def _to_tag(written: Mapping[str, Any]) -> str:
    """A tag has room for some 6,000 letters, and a thousand classes have longer names."""
    classes = json.dumps(written.get("classes"))
    return json.dumps({**written, "classes": hashlib.sha256(classes.encode()).hexdigest()})
