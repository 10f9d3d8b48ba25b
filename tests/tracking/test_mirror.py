"""MLflow beside the run folder: what arrives, that nothing arrives twice, and servers that are dead, silent or broken.

With a real server on 127.0.0.1 and real runs; where a run's own work does not matter, its folder is written by hand.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.utils.validation import path_not_unique, validate_param_and_metric_name
from PIL import Image

from ssl_seg import images, load_model, tracking
from ssl_seg.config import Config, Interrupted, UserError, load
from ssl_seg.evidence import compare
from ssl_seg.evidence.cautions import notes
from ssl_seg.runs.folder import TIME, RunFolder, described, leak_word, manifest_of, read_metrics
from ssl_seg.runs.lock import hold
from ssl_seg.runs.writer import Run
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.setup import Options
from ssl_seg.tracking import Mirror, Tracking, TrackingField, client, experiments, mirror
from ssl_seg.tracking.record import read_record
from ssl_seg.weights.forms import noise
from tests import ROOT
from tests.cli.test_commands import SMALL, as_words
from tests.faults import message_of
from tests.processes import Child, command, command_without
from tests.small import finetuning, pretraining

PATIENCE = 120  # seconds for what happens in another process


# ---- parts ----


class Settings(Config):
    lr: float = 1e-3
    seed: int = 0
    tracking: TrackingField = Tracking(system_metrics=False)


def written(folder: Path, steps: int = 3, status: str = "finished", ready: bool = True, **settings: object) -> Path:
    """A run folder as a run leaves it, beside a database that has its tables already."""
    if ready:
        make_ready(folder.parent)
    tracked = settings.pop("tracking", {"system_metrics": False})
    config = load(Settings, {**settings, "tracking": tracked})
    run = Run.open(folder, "finetune", config)
    for step in range(1, steps + 1):
        run.metrics(step, {"train/loss": 1 / step, "val/miou": math.nan if step == 1 else step / 10})
    images.write_image(run.picture_path("predictions", steps), np.full((8, 8, 3), 9, dtype=np.uint8))
    run.write_json("result.json", {"steps": steps, "val": {"miou": 0.4 + config.seed / 100, "iou/road": 0.5}})
    run.close(status)
    return folder


@cache
def fresh_database() -> bytes:
    """What MLflow makes of an empty file in some seconds, made once."""
    with tempfile.TemporaryDirectory() as place:
        MlflowClient(sqlite_uri(Path(place))).search_experiments()
        return (Path(place) / "mlflow.db").read_bytes()


def make_ready(place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "mlflow.db").exists():
        (place / "mlflow.db").write_bytes(fresh_database())


def sqlite_uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def only_run(uri: str, experiment: str = "ssl_seg"):
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    (found,) = [run for run in runs if "parent_of" not in run.data.tags]
    return client, client.get_run(found.info.run_id)


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, int, float]]:
    points = client.get_metric_history(run_id, name)
    return sorted((point.step, point.timestamp, point.value) for point in points)


def assert_mirrors(uri: str, folder: Path, experiment: str = "ssl_seg") -> None:
    """Every point of the folder is there, once, and none besides."""
    client, run = only_run(uri, experiment)
    lines = read_metrics(folder)
    names = {name for line in lines for name in line} - {"step", TIME}
    assert names == {name for name in run.data.metrics if not name.startswith(("result/", "system/"))}
    for name in names:
        expected = sorted((line["step"], line[TIME], line[name]) for line in lines if name in line)
        np.testing.assert_equal(history(client, run.info.run_id, name), expected)


def shown(client: MlflowClient, run_id: str) -> list[str]:
    """The keys and steps of a run's images."""
    paths = [artifact.path for artifact in client.list_artifacts(run_id, "images")]
    return sorted(path.removeprefix("images/").partition("+timestamp")[0] for path in paths if path.endswith(".png"))


def wait_for(happened: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < until, what
        time.sleep(0.05)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """A real server that keeps what it has in `folder`."""
    make_ready(folder)
    stored = ["--backend-store-uri", sqlite_uri(folder), "--artifacts-destination", str(folder / "artifacts")]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*command, *stored], stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(lambda: is_open(port), f"no server: {(folder / 'log').read_text()}")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def is_open(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server"), free_port()) as uri:
        yield uri


class _Broken(BaseHTTPRequestHandler):
    """Answers everything by an internal error, or by `answer`."""

    answer = b""

    def do_GET(self) -> None:
        if not self.answer:
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def broken_server(answer: bytes = b"") -> Iterator[str]:
    handler = type("Broken", (_Broken,), {"answer": answer})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Door:
    """A port that leads to a server while it is open: what a run sees of one that is away and comes back."""

    def __init__(self, uri: str) -> None:
        self.behind = ("127.0.0.1", int(uri.rpartition(":")[2]))
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    @contextmanager
    def opened(self) -> Iterator[None]:
        ends = [socket.create_server(("127.0.0.1", self.port))]
        threading.Thread(target=self._let_in, args=(ends,), daemon=True).start()
        try:
            yield
        finally:
            for end in ends:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def _let_in(self, ends: list[socket.socket]) -> None:
        with suppress(OSError):  # shut
            while True:
                pair = (ends[0].accept()[0], socket.create_connection(self.behind))
                ends += pair
                for one, other in (pair, pair[::-1]):
                    threading.Thread(target=_pass_on, args=(one, other), daemon=True).start()


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)


@pytest.fixture(autouse=True)
def no_mirror_is_left() -> Iterator[None]:
    yield
    while tracking._left_behind:
        process = tracking._left_behind.pop()
        process.kill()
        process.wait()


# ---- what arrives ----


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ in runs/mlflow.db as by default: a pretraining beside its mirror, two fine-tunings that were sent later."""
    place = tmp_path_factory.mktemp("tracked") / "runs"
    make_ready(place)
    shown_by = {"every": 0.2, "parent": "trial", "tags": {"team": "x"}}
    values = {**pretraining(steps=4, eval_every=2), "tracking": shown_by}
    pretrain(load(PretrainConfig, values), Options(place / "pre", quiet=True))
    wait_for_mirror(place / "pre")
    for seed in (0, 1):
        later = {**shown_by, "type": "none"}
        values = {**finetuning(steps=3), "seed": seed, "init": str(place / "pre"), "tracking": later}
        finetune(load(FinetuneConfig, values), Options(place / f"fine_{seed}", quiet=True))
        mirror.track(place / f"fine_{seed}")
    return place


def runs_of(place: Path) -> tuple[MlflowClient, dict[str, object]]:
    client = MlflowClient(sqlite_uri(place))
    found = client.search_runs([client.get_experiment_by_name("ssl_seg").experiment_id])
    return client, {run.info.run_name: client.get_run(run.info.run_id) for run in found}


def test_a_run_is_in_mlflow_as_it_is_in_its_folder(tracked: Path) -> None:
    client, runs = runs_of(tracked)
    assert set(runs) == {"pre", "fine_0", "fine_1", "trial"}
    for name in ("pre", "fine_0"):
        run, folder = runs[name], RunFolder.open(tracked / name)
        assert run.info.status == "FINISHED"
        assert run.data.params == described(folder.config, folder.record["origin"])
        lines = read_metrics(folder.folder)
        for key in {key for line in lines for key in line} - {"step", TIME}:
            expected = [(line["step"], line[TIME], line[key]) for line in lines if key in line]
            np.testing.assert_equal(history(client, run.info.run_id, key), expected)
        assert run.data.tags["stage"] == folder.stage
        assert run.data.tags["version.torch"] == folder.record["versions"]["torch"]
        assert run.data.tags["team"] == "x"
        assert run.info.end_time >= run.info.start_time
        assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(tracked / "mlartifacts")
        files = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert {"config.yaml", "run.json", "metrics.jsonl", "result.json", "data.json"} <= files
        assert {"leaks.json", "images.json"} <= files
        assert run.data.tags["leaks"] == leak_word(folder.read("leaks.json")) == "clean"
        own = set(run.data.tags) - {"team"}
        assert own == {tag for tag in own if "is a tag that a run sets itself" in tag_refused(tag)}
    assert "system/cpu_utilization_percentage" in runs["pre"].data.metrics
    assert shown(client, runs["pre"].info.run_id) == [
        f"{task}+step+{step}" for task in ("denoise", "rotate") for step in (0, 2, 4)
    ]
    assert "init.tasks.denoise.weight" in runs["fine_0"].data.params


def tag_refused(name: str) -> str:
    return message_of(lambda: load(Tracking, {"tags": {name: "mine"}}))


def test_a_person_s_tags_are_no_run_s() -> None:
    for name in ("stage", "folder_key", "leaks", "passport.val", "changed.lr", "continues", "mlflow.parentRunId"):
        assert tag_refused(name) == f"tags: '{name}' is a tag that a run sets itself; choose another name"
    assert load(Tracking, {"tags": {"team": "x", "mlflow.note.content": "y"}}).tags["team"] == "x"


def test_leaks_that_were_not_looked_for_are_a_tag(tmp_path: Path) -> None:
    folder = written(tmp_path / "runs" / "a")
    record = {"checked": False, "trained": {}, "scored": {}, "leaks": []}
    (folder / "leaks.json").write_text(json.dumps(record))
    mirror.track(folder)
    found = experiments.compare_experiment("ssl_seg", sqlite_uri(tmp_path / "runs"))
    assert notes(found)[-1].endswith("(leaks.check=false): scratch (1 of 1 runs)")


def test_data_sets_are_inputs_with_digests(tracked: Path) -> None:
    _, runs = runs_of(tracked)
    listed = [({tag.key: tag.value for tag in one.tags}, one.dataset) for one in runs["fine_0"].inputs.dataset_inputs]
    inputs = {tags["part"]: dataset for tags, dataset in listed}
    contexts = {tags["part"]: tags["mlflow.data.context"] for tags, _ in listed}
    assert contexts == {"labelled": "training", "val": "validation", "test": "test"}
    recorded = json.loads((tracked / "fine_0" / "data.json").read_text())
    assert inputs["val"].digest == recorded["val"]["sha256_of_names"][:32]
    assert json.loads(inputs["val"].profile) == {"images": 3}
    assert inputs["val"].digest != inputs["test"].digest


def test_held_out_images_are_an_input_too(tmp_path: Path) -> None:
    folder = written(tmp_path / "runs" / "a")
    record = json.loads((folder / "run.json").read_text())
    record["config"]["data"] = {"labelled": {"type": "folder", "images": str(tmp_path / "photos")}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "data.json").write_text(json.dumps({"labelled": {"images": 3, "sha256_of_names": "ab" * 32}}))
    (folder / "split.json").write_text(json.dumps({"labelled": ["a", "b"], "val": ["c"]}))
    mirror.track(folder)
    _, runs = runs_of(tmp_path / "runs")
    listed = [({tag.key: tag.value for tag in one.tags}, one.dataset) for one in runs["a"].inputs.dataset_inputs]
    inputs = {tags["part"]: (tags["mlflow.data.context"], dataset) for tags, dataset in listed}
    assert {part: context for part, (context, _) in inputs.items()} == {"labelled": "training", "val": "validation"}
    held_out = inputs["val"][1]
    assert json.loads(held_out.profile) == {"images": 1}
    assert held_out.digest != inputs["labelled"][1].digest
    assert mlflow.data.get_source(held_out).uri == str(tmp_path / "photos")


def test_images_that_are_learnt_from_and_held_out_are_one_input_with_both_uses(tmp_path: Path) -> None:
    folder = written(tmp_path / "runs" / "a")
    record = json.loads((folder / "run.json").read_text())
    record["config"]["data"] = {"labelled": {"type": "folder", "images": "photos"}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "data.json").write_text(json.dumps({"labelled": manifest_of(["a", "b"])}))
    (folder / "split.json").write_text(json.dumps({"labelled": ["a", "b"], "val": ["a", "b"]}))
    mirror.track(folder)
    _, runs = runs_of(tmp_path / "runs")
    (only,) = runs["a"].inputs.dataset_inputs
    tags = {tag.key: tag.value for tag in only.tags}
    assert tags == {"mlflow.data.context": "training, validation", "part": "labelled, val"}


@pytest.mark.slow
def test_a_fine_tuned_model_is_loaded_by_mlflow_and_answers_as_ours(tracked: Path) -> None:
    """The model of a real run, logged afterwards, loaded by its id and through its run: shares to 1e-6, at any size."""
    folder = tracked / "fine_0"
    sent = mirror.track(folder, model=True)
    api = MlflowClient(sent.uri)
    experiment = api.get_run(sent.run_id).info.experiment_id
    (logged,) = api.search_logged_models([experiment], f"source_run_id = '{sent.run_id}'")
    assert logged.status == "READY"
    assert [own.model_id for own in api.get_run(sent.run_id).outputs.model_outputs] == [logged.model_id]
    mlflow.set_tracking_uri(sent.uri)
    try:
        loaded = mlflow.pytorch.load_model(f"models:/{logged.model_id}")
        by_run = mlflow.pytorch.load_model(f"runs:/{sent.run_id}/model")
        served = mlflow.pyfunc.load_model(f"models:/{logged.model_id}")
    finally:
        mlflow.set_tracking_uri(None)
    ours = load_model(folder)
    for shape in ((1, 64, 64), (2, 90, 130), (3, 225, 97)):
        image = noise(shape)
        with torch.no_grad():
            shares = ours(image).softmax(dim=1)
            for own in (loaded, by_run):
                torch.testing.assert_close(own(image), shares, rtol=0, atol=1e-6)
        np.testing.assert_allclose(served.predict(image.numpy()), shares.numpy(), rtol=0, atol=1e-6)
    signature = served.metadata.signature
    assert [spec.shape for spec in signature.inputs.inputs] == [(-1, 3, -1, -1)]
    assert [spec.shape for spec in signature.outputs.inputs] == [(-1, 2, -1, -1)]
    with pytest.raises(mlflow.exceptions.MlflowException):
        served.predict(np.zeros((1, 4, 64, 64), dtype=np.float32))
    assert served.metadata.metadata["classes"] == ["ground", "disc"]
    mirror.track(folder, model=True)
    assert len(api.search_logged_models([experiment], f"source_run_id = '{sent.run_id}'")) == 1, "sent once"


def test_results_are_those_of_the_chosen_step(tracked: Path) -> None:
    client, runs = runs_of(tracked)
    run = runs["fine_1"]
    result = json.loads((tracked / "fine_1" / "result.json").read_text())
    assert run.data.metrics["result/test.miou"] == result["test"]["miou"]
    assert run.data.metrics["result/val.iou.disc"] == result["val"]["iou/disc"]
    files = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"confusion.json", "confusion_val.png", "confusion_test.png"} <= files


def test_runs_of_a_parent_are_shown_below_it(tracked: Path) -> None:
    _, runs = runs_of(tracked)
    for name in ("pre", "fine_0", "fine_1"):
        assert runs[name].data.tags["mlflow.parentRunId"] == runs["trial"].info.run_id
    assert runs["trial"].info.status == "FINISHED"
    assert runs["fine_0"].data.tags["init.run_id"] == runs["pre"].info.run_id


def test_an_experiment_compares_as_its_folders_do(tracked: Path) -> None:
    by_folder = compare.compare([tracked / "pre", tracked / "fine_0", tracked / "fine_1"])
    by_name = experiments.compare_experiment("ssl_seg", sqlite_uri(tracked))
    assert [arm.label for arm in by_name.arms] == [arm.label for arm in by_folder.arms]
    assert by_name.differing == by_folder.differing
    for one, other in zip(by_name.arms, by_folder.arms, strict=True):
        assert len(one.outcomes) == len(other.outcomes)
        assert one.spread("test/miou") == other.spread("test/miou")
        assert one.outcomes[0].labelled == other.outcomes[0].labelled
        assert one.outcomes[0].leaks == other.outcomes[0].leaks == "clean"
        splits = [{part: said["split"] for part, said in own.passports.items()} for own in (one, other)]
        assert splits[0] == splits[1]
    assert set(by_name.scores) == set(by_folder.scores)


def test_a_second_replay_sends_nothing(tracked: Path) -> None:
    again = mirror.track(tracked / "pre")
    assert (again.lines, again.pictures) == (0, 0)
    client, runs = runs_of(tracked)
    assert len(shown(client, runs["pre"].info.run_id)) == 6


def test_words_that_cannot_be_compared_are_one_line(tracked: Path) -> None:
    assert "has none of that name, only: " in message_of(lambda: experiments.fetch("nothing", sqlite_uri(tracked)))
    assert "no such database" in message_of(lambda: experiments.fetch("ssl_seg", sqlite_uri(tracked / "elsewhere")))
    assert "no such database" in message_of(lambda: experiments.compare_experiment("ssl_seg", "sqlite:///nowhere.db"))


def test_another_server_gets_a_run_of_its_own(tracked: Path, running_server: str) -> None:
    sent = mirror.track(tracked / "fine_0", uri=running_server, experiment="elsewhere")
    assert sent.lines == len(read_metrics(tracked / "fine_0"))
    assert_mirrors(running_server, tracked / "fine_0", "elsewhere")
    client, run = only_run(running_server, "elsewhere")
    assert run.info.status == "FINISHED"
    assert "confusion_val.png" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}


@pytest.mark.parametrize(("status", "expected"), [("failed", "FAILED"), ("killed", "KILLED"), ("finished", "FINISHED")])
def test_the_status_is_the_true_one(tmp_path: Path, status: str, expected: str) -> None:
    written(tmp_path / "runs" / "a", status=status)
    mirror.track(tmp_path / "runs" / "a")
    _, run = only_run(sqlite_uri(tmp_path / "runs"))
    assert run.info.status == expected
    assert_mirrors(sqlite_uri(tmp_path / "runs"), tmp_path / "runs" / "a")


def test_a_run_deleted_in_mlflow_is_sent_anew(tmp_path: Path) -> None:
    folder = written(tmp_path / "runs" / "a")
    first = mirror.track(folder)
    MlflowClient(first.uri).delete_run(first.run_id)
    second = mirror.track(folder)
    assert second.run_id != first.run_id
    assert second.lines == 3


def test_a_parameter_that_has_changed_is_told_by_a_tag(tmp_path: Path) -> None:
    folder = written(tmp_path / "runs" / "a")
    mirror.track(folder)
    record = json.loads((folder / "run.json").read_text())
    record["config"]["lr"] = 0.5
    (folder / "run.json").write_text(json.dumps(record))
    mirror.track(folder)
    _, run = only_run(sqlite_uri(tmp_path / "runs"))
    assert run.data.params["lr"] == "0.001"
    assert run.data.tags["changed.lr"] == "0.5"


def test_a_setting_that_is_set_back_or_gone_is_told_too(tmp_path: Path) -> None:
    folder = written(tmp_path / "runs" / "a")
    config = json.loads((folder / "run.json").read_text())["config"]
    for changed in ({**config, "lr": 0.5}, {key: value for key, value in config.items() if key != "seed"}):
        change(folder, config=changed)
        mirror.track(folder)
    _, run = only_run(sqlite_uri(tmp_path / "runs"))
    assert (run.data.tags["changed.lr"], run.data.tags["changed.seed"]) == ("0.001", "null")
    (fetched,) = experiments.fetch("ssl_seg", sqlite_uri(tmp_path / "runs"))
    assert (fetched.description["lr"], fetched.description["seed"]) == ("0.001", "null")


def change(folder: Path, **values: object) -> None:
    """Values of run.json, as a run that goes on writes them."""
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, **values}))


def test_name_parent_and_tags_are_those_of_the_last_start(tmp_path: Path) -> None:
    folder, uri = written(tmp_path / "runs" / "a"), sqlite_uri(tmp_path / "runs")
    config = json.loads((folder / "run.json").read_text())["config"]
    for tracked in ({"parent": "one"}, {"parent": "two", "name": "better", "tags": {"team": "y"}}):
        change(folder, config={**config, "tracking": tracked})
        mirror.track(folder)
    client, runs = runs_of(tmp_path / "runs")
    assert set(runs) == {"better", "one", "two"}
    assert runs["better"].data.tags["mlflow.parentRunId"] == runs["two"].info.run_id
    assert runs["better"].data.tags["team"] == "y"
    change(folder, config={**config, "tracking": {}})
    mirror.track(folder)
    assert "mlflow.parentRunId" not in only_run(uri)[1].data.tags
    by_hand = client.create_run(runs["one"].info.experiment_id, run_name="by hand").info.run_id
    client.set_tag(runs["better"].info.run_id, "mlflow.parentRunId", by_hand)
    mirror.track(folder)
    assert client.get_run(runs["better"].info.run_id).data.tags["mlflow.parentRunId"] == by_hand


@given(st.text(min_size=1, max_size=300))
def test_every_name_becomes_one_that_mlflow_takes(key: str) -> None:
    name = client.mlflow_name(key)
    assert validate_param_and_metric_name(name)
    assert not path_not_unique(name)
    assert len(name) <= 250


@pytest.mark.parametrize("pair", [("iou/a(b)", "iou/a[b]"), ("a//b", "a/b"), ("../x", "x"), ("x" * 300, "x" * 301)])
def test_two_names_stay_two(pair: tuple[str, str]) -> None:
    assert client.mlflow_name(pair[0]) != client.mlflow_name(pair[1])


def test_another_experiment_gets_a_run_of_its_own(tmp_path: Path) -> None:
    folder = written(tmp_path / "runs" / "a")
    first = mirror.track(folder)
    other = mirror.track(folder, experiment="other")
    assert other.run_id != first.run_id
    assert_mirrors(first.uri, folder, "other")


def test_a_result_that_has_changed_is_sent(tmp_path: Path) -> None:
    folder = written(tmp_path / "runs" / "a")
    mirror.track(folder)
    (folder / "result.json").write_text(json.dumps({"steps": 9, "val": {"miou": 0.9}}))
    mirror.track(folder)
    _, run = only_run(sqlite_uri(tmp_path / "runs"))
    assert run.data.metrics["result/val.miou"] == 0.9


def test_what_lies_behind_a_link_is_not_sent(tmp_path: Path) -> None:
    folder = written(tmp_path / "runs" / "a")
    (tmp_path / "secret").write_text("{}")
    (folder / "tasks.json").symlink_to(tmp_path / "secret")
    sent = mirror.track(folder)
    files = {artifact.path for artifact in MlflowClient(sent.uri).list_artifacts(sent.run_id)}
    assert "result.json" in files
    assert "tasks.json" not in files


def test_what_links_lead_to_is_sent_nowhere(tmp_path: Path) -> None:
    """A run folder may be a stranger's: neither pictures nor weights nor points are those of other folders."""
    secret = tmp_path / "private"
    secret.mkdir()
    for name in ("holiday.png", "00000009_predictions.png"):
        images.write_image(secret / name, np.zeros((8, 8, 3), dtype=np.uint8))
    (secret / "key.json").write_text("{}")
    (secret / "metrics.jsonl").write_text(json.dumps({"step": 1, TIME: 1, "salary": 5}) + "\n")
    folder = written(tmp_path / "runs" / "a", tracking={"weights": True, "system_metrics": False})
    (folder / "pictures" / "norms.png").symlink_to(secret / "holiday.png")
    (folder / "pictures" / "00000003_denoise.png").symlink_to(secret / "holiday.png")
    (folder / "pictures" / "more").symlink_to(secret)
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to(secret / "metrics.jsonl")
    (folder / "encoder").mkdir()
    (folder / "encoder" / "encoder.json").write_text("{}")
    (folder / "encoder" / "key.json").symlink_to(secret / "key.json")
    (folder / "model").symlink_to(secret)
    other = written(tmp_path / "runs" / "b", tracking={"weights": True, "system_metrics": False})
    shutil.rmtree(other / "pictures")
    (other / "pictures").symlink_to(secret)
    for sent, expected in ((mirror.track(folder), ["predictions+step+3"]), (mirror.track(other), [])):
        client = MlflowClient(sent.uri)
        assert shown(client, sent.run_id) == expected
        assert not [artifact.path for artifact in client.list_artifacts(sent.run_id, "pictures")]
        assert not [artifact.path for artifact in client.list_artifacts(sent.run_id, "model")]
        assert "salary" not in client.get_run(sent.run_id).data.metrics
    client = MlflowClient(sent.uri)
    (run,) = [run for run in client.search_runs(["1"]) if run.info.run_name == "a"]
    own = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "encoder")]
    assert own == ["encoder/encoder.json"]


def test_pipes_in_the_place_of_files_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "run.json", "result.json", "tasks.json", "tracking/mlflow.json", "tracking/lock"):
        folder = written(tmp_path / "runs" / name.replace("/", "_"))
        (folder / "tracking").mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        if name in ("metrics.jsonl", "tasks.json"):
            assert mirror.track(folder).lines == (0 if name == "metrics.jsonl" else 3)
        else:
            assert name.rpartition("/")[2] in message_of(lambda folder=folder: mirror.track(folder))


def test_what_a_mirror_opens_is_no_way_out_of_the_folder(tmp_path: Path) -> None:
    """Its lock and its log are made anew each time; a link by that name must not empty what it leads to."""
    mine = tmp_path / "mine"
    mine.write_text("all I have")
    folder = written(tmp_path / "runs" / "a")
    (folder / "tracking").mkdir()
    (folder / "tracking" / "lock").symlink_to(mine)
    message_of(lambda: mirror.track(folder))
    (folder / "tracking" / "log").symlink_to(mine)
    Mirror(Tracking(), folder, quiet=True).start()
    assert mine.read_text() == "all I have"


def test_a_picture_too_large_or_damaged_is_left_out_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "runs" / "a")
    whole = (folder / "pictures" / "00000003_predictions.png").read_bytes()
    (folder / "pictures" / "00000001_cut.png").write_bytes(whole[:-20])
    bomb = Image.new("1", (14_000, 14_000))  # Pillow refuses from 179 million pixels on
    bomb.save(folder / "pictures" / "00000002_predictions.png")
    sent = mirror.track(folder)
    said = capsys.readouterr().err.splitlines()
    assert [("00000001_cut.png" in line, "00000002_predictions.png" in line) for line in said] == [
        (True, False),
        (False, True),
    ]
    assert sent.pictures == 1
    assert "result.json" in {artifact.path for artifact in MlflowClient(sent.uri).list_artifacts(sent.run_id)}


def test_a_run_that_lives_is_not_sent_by_another(tmp_path: Path) -> None:
    with Run.open(tmp_path / "runs" / "a", "finetune", Settings()):
        assert "is still running" in message_of(lambda: mirror.track(tmp_path / "runs" / "a"))


def test_a_folder_that_cannot_be_tracked_fails_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "a"
    beside = Mirror(Tracking(), folder)
    with beside, Run.open(folder, "finetune", Settings()):
        (folder / "tracking").write_text("in the way")
        beside.start()
    assert "MLflow: no mirror (" in capsys.readouterr().err
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_a_mirror_ends_though_another_program_bears_the_number_of_its_run(tmp_path: Path) -> None:
    """The number of a process is free once that has ended; the lock of the folder tells who holds it."""
    folder = written(tmp_path / "runs" / "a", status="running")
    assert mirror.follow(folder, os.getpid()) == 0
    assert status_of(sqlite_uri(tmp_path / "runs")) == "KILLED"
    with hold(folder):  # a run that was started again is another mirror's
        assert mirror.follow(folder, os.getppid()) == 0


def test_a_mirror_leaves_a_folder_that_another_run_has_taken(tmp_path: Path) -> None:
    folder = written(tmp_path / "runs" / "a", status="running")
    with mirror.alone(folder, 0.0) as lock:
        assert mirror._is_ours(folder, lock)
        Run.open(folder, "finetune", Settings(lr=0.5), overwrite=True).close()
        assert not mirror._is_ours(folder, lock)


# ---- steps that are made again ----


def steps_of(folder: Path, first: int, last: int, lr: float = 1e-3, allow: Sequence[str] = ()) -> Path:
    """What a run of these steps leaves that is killed then; its only checkpoint is that of step 3."""
    run = Run.open(folder, "finetune", Settings(lr=lr), allow_changed=allow)
    run.resume()
    run.go_on()
    for step in range(first, last + 1):
        run.metrics(step, {"train/loss": lr / step})
        if step == 3:
            run.save_state(step, {}, {})
    run.close("killed")
    return folder


def test_steps_made_again_by_the_same_settings_stay_in_their_run(tmp_path: Path) -> None:
    make_ready(tmp_path / "runs")
    first = mirror.track(steps_of(tmp_path / "runs" / "a", 1, 5))
    second = mirror.track(steps_of(tmp_path / "runs" / "a", 4, 7))
    assert second.run_id == first.run_id
    points = history(MlflowClient(first.uri), first.run_id, "train/loss")
    assert [(step, value) for step, _, value in points] == [(step, 1e-3 / step) for step in range(1, 8)]


def test_steps_made_again_by_other_settings_are_a_run_that_continues_the_former(tmp_path: Path) -> None:
    make_ready(tmp_path / "runs")
    first = mirror.track(steps_of(tmp_path / "runs" / "a", 1, 5))
    second = mirror.track(steps_of(tmp_path / "runs" / "a", 4, 7, lr=0.5, allow=("lr",)))
    client = MlflowClient(first.uri)
    old, new = client.get_run(first.run_id), client.get_run(second.run_id)
    assert old.data.tags["continued_by"] == second.run_id
    assert new.data.tags["continues"] == first.run_id
    assert (old.data.params["lr"], new.data.params["lr"]) == ("0.001", "0.5")
    expected = [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path / "runs" / "a")]
    points = history(client, second.run_id, "train/loss")
    assert [(step, value) for step, _, value in points] == expected
    assert expected[2:4] == [(3, 1e-3 / 3), (4, 0.5 / 4)], "those before the checkpoint are the former settings'"
    assert len(history(client, first.run_id, "train/loss")) == 5
    again = mirror.track(tmp_path / "runs" / "a")
    assert (again.run_id, again.lines) == (second.run_id, 0)
    record = json.loads((tmp_path / "runs" / "a" / "tracking" / "mlflow.json").read_text())
    (tmp_path / "runs" / "a" / "tracking" / "mlflow.json").write_text(json.dumps({**record, "runs": {}}))
    assert mirror.track(tmp_path / "runs" / "a").run_id == second.run_id, "by the key alone"
    assert [run.description["lr"] for run in experiments.fetch("ssl_seg", first.uri)] == ["0.5"], (
        "the former is no result"
    )


def test_other_settings_that_make_no_step_again_stay_in_their_run(tmp_path: Path) -> None:
    make_ready(tmp_path / "runs")
    first = mirror.track(steps_of(tmp_path / "runs" / "a", 1, 3))
    second = mirror.track(steps_of(tmp_path / "runs" / "a", 4, 7, lr=0.5, allow=("lr",)))
    assert second.run_id == first.run_id
    run = MlflowClient(first.uri).get_run(first.run_id)
    assert run.data.tags["changed.lr"] == "0.5"


class Killed(BaseException):
    """Where a test lets the mirror die."""


def die_after(monkeypatch: pytest.MonkeyPatch, place: object, name: str) -> None:
    """Do the next call of that name, then nothing more."""
    call = getattr(place, name)

    def last(*arguments: object, **options: object) -> object:
        call(*arguments, **options)
        raise Killed

    monkeypatch.setattr(place, name, last)


def track_and_die(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with monkeypatch.context() as patched:
        die_after(patched, MlflowClient, name)
        with pytest.raises(Killed):
            mirror.track(folder)


@pytest.mark.parametrize("name", ["create_run", "log_batch"])
def test_a_mirror_killed_at_its_start_leaves_no_run_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = written(tmp_path / "runs" / "a")
    track_and_die(folder, monkeypatch, name)
    mirror.track(folder)
    assert only_run(sqlite_uri(tmp_path / "runs"))[1].info.status == "FINISHED"
    assert_mirrors(sqlite_uri(tmp_path / "runs"), folder)


@pytest.mark.parametrize("name", ["create_run", "set_tag", "log_batch"])
def test_a_mirror_killed_while_it_changes_runs_makes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make_ready(tmp_path / "runs")
    first = mirror.track(steps_of(tmp_path / "runs" / "a", 1, 5))
    folder = steps_of(tmp_path / "runs" / "a", 4, 7, lr=0.5, allow=("lr",))
    track_and_die(folder, monkeypatch, name)
    second = mirror.track(folder)
    client = MlflowClient(first.uri)
    runs = client.search_runs([client.get_experiment_by_name("ssl_seg").experiment_id])
    assert {run.info.run_id for run in runs} == {first.run_id, second.run_id}
    assert {run.info.status for run in runs} == {"KILLED"}
    assert client.get_run(first.run_id).data.tags["continued_by"] == second.run_id
    assert len(history(client, second.run_id, "train/loss")) == 7


# ---- folders that are moved and copied ----


def test_a_folder_that_was_moved_goes_on_in_its_run(tmp_path: Path) -> None:
    folder = written(tmp_path / "runs" / "a")
    first = mirror.track(folder)
    moved = folder.rename(tmp_path / "runs" / "b")
    assert (mirror.track(moved).run_id, mirror.track(moved).lines) == (first.run_id, 0)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / "mlflow.db").rename(tmp_path / "elsewhere" / "mlflow.db")
    sent = mirror.track(moved, uri=sqlite_uri(tmp_path / "elsewhere"))
    assert (sent.run_id, sent.lines) == (first.run_id, 0)


def test_a_folder_that_was_copied_gets_a_run_of_its_own(tmp_path: Path) -> None:
    folder = written(tmp_path / "runs" / "a")
    first = mirror.track(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "runs" / "b"))
    second = mirror.track(copy)
    assert second.run_id != first.run_id
    assert mirror.track(folder).run_id == first.run_id
    shutil.rmtree(folder)
    moved = copy.rename(tmp_path / "runs" / "c")
    again = mirror.track(moved)
    assert (again.run_id, again.lines) == (second.run_id, 0)


# ---- folders of strangers ----


def test_a_server_that_only_the_folder_names_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with broken_server() as uri:
        folder = written(tmp_path / "runs" / "a", tracking={"uri": uri})
        assert f"only its own files say that it goes to '{uri}'; give that as --uri" in message_of(
            lambda: mirror.track(folder)
        )
        assert "did not take it" in message_of(lambda: mirror.track(folder, uri=uri))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert "did not take it" in message_of(lambda: mirror.track(folder))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.json", '{"val": 5}'),
        ("data.json", '{"val": {"images": 3}}'),
        ("confusion.json", '{"val": [[1, 2]], "classes": null}'),
        ("run.json", '{"stage": "finetune", "config": {}, "started": 5}'),
        ("run.json", '{"stage": "finetune", "config": {}, "status": "dancing"}'),
        ("run.json", '{"stage": "finetune", "config": {"tracking": {"every": "never"}}}'),
        ("tracking/mlflow.json", '{"runs": 5}'),
        ("tracking/mlflow.json", '{"key": "x\' or 1 = 1"}'),
    ],
)
def test_a_file_that_no_run_wrote_is_one_line(tmp_path: Path, name: str, text: str) -> None:
    folder = written(tmp_path / "runs" / "a")
    (folder / "tracking").mkdir()
    (folder / name).write_text(text)
    said = message_of(lambda: mirror.track(folder))
    assert said.startswith(f"{folder / name}: ")
    assert "; " in said, "what to do"


def test_lines_that_no_run_wrote_are_passed_over(tmp_path: Path) -> None:
    folder = written(tmp_path / "runs" / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n5\n{"step": "x", "time": 1}\n{"step": 9}\ntorn')
    assert mirror.track(folder).lines == 3


def test_a_mirror_that_dies_is_told_with_its_last_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "runs" / "a")
    (folder / "tracking").mkdir()
    (folder / "tracking" / "log").write_text("Traceback (most recent call last):\nKeyError: 'boom'\n")
    with Mirror(Tracking(uri="http://x"), folder) as beside:
        beside.process = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(1)"])
    assert capsys.readouterr().err == (
        f"MLflow: the mirror stopped (KeyError: 'boom'; {folder / 'tracking' / 'log'} says more); "
        f"ssl-seg track {folder} --uri http://x sends the rest\n"
    )


# ---- where ----


def test_runs_are_kept_in_the_folder_called_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    here = tmp_path.resolve()
    assert client.resolved(None, Path("runs/deep/a")) == f"sqlite:///{here}/runs/mlflow.db"
    assert client.resolved(None, Path("out/a")) == f"sqlite:///{here}/out/mlflow.db"
    for place in ("pretrained", "searched", "cells"):
        (here / "out" / "study" / place).mkdir(parents=True)
        assert client.resolved(None, Path("out/study", place, "a")) == f"sqlite:///{here}/out/study/{place}/mlflow.db"
    (here / "out" / "study" / "study.json").touch()
    for place in ("pretrained", "searched", "cells"):
        assert client.resolved(None, Path("out/study", place, "a")) == f"sqlite:///{here}/out/mlflow.db", "of a study"
    assert client.resolved("sqlite:///x.db", Path("runs/a")) == f"sqlite:///{here}/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert client.resolved(None, Path("runs/a")) == "http://server"
    assert client.resolved("http://other", Path("runs/a")) == "http://other"


def test_tracking_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    with Run.open(tmp_path / "a", "finetune", Settings()) as run:
        run.save_state(1, {}, {})
    with Run.open(tmp_path / "a", "finetune", Settings(tracking=Tracking(uri="http://x"))) as run:
        run.go_on()
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["config"]["tracking"]["uri"] == "http://x"
    assert "lr was" in message_of(lambda: Run.open(tmp_path / "a", "finetune", Settings(lr=0.5)))


def test_without_mlflow_a_run_wants_tracking_none(tmp_path: Path) -> None:
    values = {key: value for key, value in pretraining(steps=1).items() if key != "tracking"}
    words = ["pretrain", *as_words(values), "--plugin", SMALL, "--quiet", "--out", str(tmp_path / "a")]
    refused = command_without("mlflow", *words)
    _, said = refused.communicate()
    assert refused.returncode == 2, said
    assert "ssl-seg: tracking: mlflow is not installed; pip install mlflow, or set tracking=none\n" in said
    alone = command_without("mlflow", *words, "tracking=none")
    _, said = alone.communicate()
    assert alone.returncode == 0, said
    assert not (tmp_path / "a" / "tracking").exists()


# ---- how a run ends ----


LONG = {**pretraining(steps=4000, save_every=20, log_every=2), "tracking": {"every": 0.2}}


def pretrain_long(out: Path, *words: str) -> list[str]:
    return ["pretrain", *as_words(LONG), *words, "--plugin", SMALL, "--out", str(out)]


def start_run(out: Path, *words: str, launcher: Sequence[str] = ("-m", "ssl_seg")) -> subprocess.Popen[str]:
    started = [sys.executable, *launcher, *pretrain_long(out, *words)]
    return subprocess.Popen(started, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def has_lines(out: Path, number: int) -> bool:
    path = out / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= number


def is_sent(out: Path) -> bool:
    """Whether the mirror has found or made its MLflow run."""
    record = read_record(out)
    return record is not None and bool(record.runs)


def status_of(uri: str) -> str:
    return only_run(uri)[1].info.status


def test_a_run_killed_without_a_word_is_killed_in_mlflow_and_goes_on_there(tmp_path: Path) -> None:
    out, uri = tmp_path / "runs" / "a", sqlite_uri(tmp_path / "runs")
    make_ready(tmp_path / "runs")
    run = command(*pretrain_long(out))
    wait_for(lambda: has_lines(out, 15) and is_sent(out), "no lines")
    run.kill()
    run.communicate()
    wait_for(lambda: status_of(uri) == "KILLED", "still running in MLflow")
    first = only_run(uri)[1].info.run_id
    assert_mirrors(uri, out)
    wait_for_mirror(out)
    go_on_for_a_while(out)
    assert mirror.track(out).run_id == first
    client, done = only_run(uri)
    assert done.info.status == "KILLED"
    for name in ("train/loss", "lr", "train/denoise/loss"):
        steps = [step for step, _, _ in history(client, first, name)]
        assert steps == [line["step"] for line in read_metrics(out)], "each step once"


def go_on_for_a_while(out: Path) -> None:
    """The same run once more, in this process and sent later; stopped by a signal when it has come further."""
    before = len(read_metrics(out))

    def stop() -> None:
        # Not sooner: a signal before the run takes signals would end the tests.
        wait_for(lambda: has_lines(out, before + 15), "it does not go on")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    config = load(PretrainConfig, {**LONG, "tracking": {"type": "none"}})
    with pytest.raises(Interrupted):
        pretrain(config, Options(out, quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_is_killed_in_mlflow_and_goes_on_there(tmp_path: Path, signum: int, code: int) -> None:
    out, uri = tmp_path / "runs" / "a", sqlite_uri(tmp_path / "runs")
    make_ready(tmp_path / "runs")
    run = start_run(out)
    wait_for(lambda: has_lines(out, 15) and is_sent(out), "no lines")
    run.send_signal(signum)
    run.communicate()
    assert run.returncode == code
    wait_for(lambda: status_of(uri) == "KILLED", "still running in MLflow")
    first = only_run(uri)[1].info.run_id
    assert_mirrors(uri, out)
    # The same command, but for the number of steps, so that it ends; its state is that of the last line.
    more = start_run(out, f"train.steps={read_metrics(out)[-1]['step'] + 5}", "--allow-changed", "train.steps")
    said = more.communicate()[1]
    assert more.returncode == 0, said
    client, done = only_run(uri)
    assert done.info.run_id == first
    assert done.info.status == "FINISHED"
    for name in ("train/loss", "lr", "train/denoise/loss"):
        steps = [step for step, _, _ in history(client, first, name)]
        assert steps == [line["step"] for line in read_metrics(out)], "each step once"


def test_only_the_first_of_several_processes_is_mirrored(tmp_path: Path) -> None:
    beside = Mirror(Tracking(), written(tmp_path / "runs" / "a"), main=False)
    with beside:
        beside.start()
    assert beside.process is None


@pytest.mark.slow
def test_a_run_under_torchrun_is_mirrored_once_and_ends_killed(tmp_path: Path) -> None:
    out, uri = tmp_path / "runs" / "a", sqlite_uri(tmp_path / "runs")
    make_ready(tmp_path / "runs")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ssl_seg"]
    run = start_run(out, launcher=two)
    wait_for(lambda: has_lines(out, 5) and is_sent(out), "no lines")
    run.send_signal(signal.SIGTERM)
    run.communicate()
    wait_for(lambda: status_of(uri) == "KILLED", "still running in MLflow")
    assert_mirrors(uri, out)


def test_a_run_that_fails_is_failed_in_mlflow_with_the_images_it_failed_on(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    make_ready(tmp_path / "runs")
    values = {**pretraining(steps=40, lr=1e30, clip=None), "tracking": {"type": "none"}}
    assert "not finite" in message_of(lambda: pretrain(load(PretrainConfig, values), Options(out, quiet=True)))
    mirror.track(out)
    client, run = only_run(sqlite_uri(tmp_path / "runs"))
    assert run.info.status == "FAILED"
    assert "nonfinite.json" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}


# ---- servers that are down, silent, broken ----


@contextmanager
def mirrored_by_a_thread(folder: Path) -> Iterator[None]:
    """The mirror's own loop without a process of its own, which takes seconds to start."""
    tracking.prepare()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(psutil.Process, "nice", lambda *_: None)
        thread = threading.Thread(target=mirror.follow, args=(folder, os.getpid()))
        thread.start()
        try:
            yield
        finally:
            thread.join(PATIENCE)
    assert not thread.is_alive()


@contextmanager
def mirrored_by_a_process(folder: Path) -> Iterator[None]:
    """As a run does it; leaving takes as long as a run waits for its mirror."""
    with Mirror(Tracking(), folder, quiet=True) as beside:
        beside.start()
        yield


def mirrored_run(
    folder: Path,
    uri: str,
    between: Callable[[int], None] = lambda step: None,
    mirrored: Callable[[Path], AbstractContextManager[None]] = mirrored_by_a_thread,
    experiment: str = "ssl_seg",
) -> None:
    """Write a run with its mirror beside it, calling `between` after each step."""
    shown_by = {"uri": uri, "experiment": experiment, "every": 0.2, "system_metrics": False}
    config = load(Settings, {"tracking": shown_by})
    run = Run.open(folder, "finetune", config)
    with mirrored(folder), run:
        for step in range(1, 41):
            run.metrics(step, {"train/loss": 1 / step})
            between(step)
        images.write_image(run.picture_path("predictions", 40), np.full((8, 8, 3), 9, dtype=np.uint8))
        run.write_json("result.json", {"steps": 40, "val": {"miou": 0.4}})


def wait_for_mirror(folder: Path) -> None:
    """Until no process mirrors the folder."""

    def free() -> bool:
        try:
            with mirror.alone(folder, 0.0):
                return True
        except UserError:
            return False

    wait_for(free, "the mirror does not end")


def test_a_server_that_was_down_gets_everything_later(tmp_path: Path, running_server: str) -> None:
    folder, door = tmp_path / "runs" / "a", Door(running_server)
    mirrored_run(folder, door.uri)
    assert "did not take it" in json.loads((folder / "tracking" / "mlflow.json").read_text())["error"]
    assert "did not take it" in message_of(lambda: mirror.track(folder, door.uri, "down"))
    with door.opened():
        assert mirror.track(folder, door.uri, "down").lines == 40
        assert mirror.track(folder, door.uri, "down").lines == 0
    assert_mirrors(running_server, folder, "down")
    client, run = only_run(running_server, "down")
    assert run.info.status == "FINISHED"
    assert shown(client, run.info.run_id) == ["predictions+step+40"]


def test_a_server_away_in_mid_run_misses_nothing(tmp_path: Path, running_server: str) -> None:
    folder, door = tmp_path / "runs" / "a", Door(running_server)
    with ExitStack() as opened:

        def between(step: int) -> None:
            if step == 1:
                opened.enter_context(door.opened())
            if step == 10:
                wait_for(lambda: is_sent(folder), "nothing was sent")
            if step == 20:
                opened.close()
                time.sleep(1)  # for a message that fails
            if step == 30:
                opened.enter_context(door.opened())

        mirrored_run(folder, door.uri, between, experiment="away")
        mirror.track(folder, door.uri)  # where the mirror came to its end between two tries
    assert_mirrors(running_server, folder, "away")
    assert only_run(running_server, "away")[1].info.status == "FINISHED"


@pytest.mark.slow
def test_a_server_killed_in_mid_run_and_started_again_misses_nothing(tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "runs" / "a"
    servers = [mlflow_server(tmp_path / "server", port), mlflow_server(tmp_path / "server", port)]
    uri = servers[0].__enter__()

    def between(step: int) -> None:
        if step == 10:
            wait_for(lambda: is_sent(folder), "nothing was sent")
        if step == 20:
            servers[0].__exit__(None, None, None)
            time.sleep(1)  # for a message that fails
        if step == 30:
            servers[1].__enter__()

    mirrored_run(folder, uri, between, mirrored_by_a_process)
    try:
        wait_for_mirror(folder)
        mirror.track(folder, uri)  # where the mirror came to its end between two tries
        assert_mirrors(uri, folder)
        assert status_of(uri) == "FINISHED"
    finally:
        servers[1].__exit__(None, None, None)


@pytest.mark.slow
def test_a_server_that_takes_and_never_answers_misses_nothing_later(tmp_path: Path) -> None:
    """A real one, halted in the middle of a run: what was sent to it waits in its queue, and may yet be done."""
    port, folder = free_port(), tmp_path / "runs" / "a"
    with mlflow_server(tmp_path / "server", port) as uri:
        (server,) = [child for child in psutil.Process().children() if str(port) in child.cmdline()]

        def between(step: int) -> None:
            if step == 10:
                wait_for(lambda: is_sent(folder), "nothing was sent")
            if step == 20:
                os.killpg(server.pid, signal.SIGSTOP)
                time.sleep(1)  # for a message that is not answered
            if step == 40:  # the run is over before it answers again
                time.sleep(12)  # longer than the mirror waits for an answer
                os.killpg(server.pid, signal.SIGCONT)

        mirrored_run(folder, uri, between, mirrored_by_a_process)
        wait_for_mirror(folder)
        mirror.track(folder, uri)
        assert_mirrors(uri, folder)
        assert status_of(uri) == "FINISHED"


@pytest.mark.parametrize(
    ("bad", "mirrored"), [(broken_server, mirrored_by_a_thread), (silent_server, mirrored_by_a_process)]
)
def test_a_bad_server_neither_slows_nor_stops_a_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bad: Callable[[], AbstractContextManager[str]],
    mirrored: Callable[[Path], AbstractContextManager[None]],
    running_server: str,
) -> None:
    folder = tmp_path / "runs" / "a"
    monkeypatch.setattr(tracking, "FAREWELL", 1.0)
    with bad() as uri:
        started = time.monotonic()
        mirrored_run(folder, uri, lambda step: time.sleep(0.05), mirrored)
        assert time.monotonic() - started < 2 + tracking.FAREWELL + 5
        assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    sent = mirror.track(folder, uri=running_server, experiment=bad.__name__)
    assert sent.lines == 40
    assert_mirrors(running_server, folder, bad.__name__)


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"experiment": 5}', b'{"run": {"info": 5}}'])
def test_an_answer_without_sense_is_one_line(tmp_path: Path, answer: bytes) -> None:
    folder = written(tmp_path / "runs" / "a", ready=False)
    with broken_server(answer) as uri:
        said = message_of(lambda: mirror.track(folder, uri))
    assert uri in said


def test_a_locked_database_gets_everything_later(tmp_path: Path) -> None:
    folder, uri = tmp_path / "runs" / "a", sqlite_uri(tmp_path / "runs")
    mirror.track(written(tmp_path / "runs" / "first"), experiment="first")  # the tables are there
    with closing(sqlite3.connect(tmp_path / "runs" / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")

        def between(step: int) -> None:
            if step == 40:
                time.sleep(0.5)  # the mirror waits for the lock, the run has not
                assert not is_sent(folder)
                other.rollback()

        mirrored_run(folder, uri, between)
    assert_mirrors(uri, folder)
    assert only_run(uri)[1].info.status == "FINISHED"


# ---- many at once ----


def replay_all(folders: Sequence[Path]) -> list[int]:
    command = [sys.executable, "-m", "ssl_seg", "track"]
    started = [
        subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for folder in folders
    ]
    return [process.wait() if process.communicate() else 0 for process in started]


def replay_all_from_one(folders: Sequence[Path]) -> list[int]:
    """The same by copies of one process, which has imported MLflow once: it takes them a second each."""
    script = (
        "import os, sys\n"
        "from ssl_seg import tracking\n"
        "tracking.prepare()\n"
        "from ssl_seg.tracking import mirror\n"
        "children = []\n"
        "for folder in sys.argv[1:]:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        mirror.track(folder)\n"
        "        os._exit(0)\n"
        "    children.append(child)\n"
        "print([os.waitpid(child, 0)[1] for child in children])\n"
    )
    command = [sys.executable, "-c", script, *map(str, folders)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def half_made(path: Path, *more: str) -> None:
    """As a kill leaves it in the middle of MLflow's tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(fresh_database())
    statements = (
        "CREATE TABLE _alembic_tmp_runs (a INTEGER)",
        "UPDATE alembic_version SET version_num = '7ac759974ad8'",
    )
    with closing(sqlite3.connect(path)) as opened:
        for statement in (*statements, *more):
            opened.execute(statement)
        opened.commit()


def test_a_half_made_database_is_moved_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs" / "mlflow.db"
    half_made(path)
    half = path.read_bytes()
    folder = written(tmp_path / "runs" / "a", ready=False)
    assert mirror.track(folder).lines == 3
    assert path.with_name("mlflow.db.broken").read_bytes() == half
    assert "mlflow.db.broken now" in capsys.readouterr().err
    assert not list(path.parent.glob(".ssl_seg*"))


def test_a_database_with_experiments_is_never_moved(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "mlflow.db"
    half_made(path, "INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (5, 'mine', 'active')")
    folder = written(tmp_path / "runs" / "a", ready=False)
    assert f"sqlite:///{path} did not take it (" in message_of(lambda: mirror.track(folder))
    assert not list(path.parent.glob("*.broken"))


def use_first(place: Path) -> None:
    with client.first_use(sqlite_uri(place), place):
        (place / "made").touch()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_while_the_tables_are_made_leave_none_half_made(tmp_path: Path) -> None:
    began = time.monotonic()
    Child(use_first, tmp_path / "whole").communicate()
    needed = time.monotonic() - began
    random = np.random.default_rng(0)
    killed = 0
    for trial in range(20):
        place = tmp_path / str(trial)
        child = Child(use_first, place)
        time.sleep(random.uniform(0.3, 1.0) * needed)
        child.kill()
        child.communicate()
        killed += not (place / "made").exists()
        folder = written(place / "a", ready=False)
        assert mirror.track(folder).lines == 3
        assert_mirrors(sqlite_uri(place), folder)
        assert not list(place.glob("*.broken"))
    assert killed > 10, "kills came after it was done"


def check_first_uses_at_once(
    place: Path, number: int, replay: Callable[[Sequence[Path]], list[int]] = replay_all
) -> None:
    wanted = {"tracking": {"parent": "study", "system_metrics": False}, "ready": False}
    folders = [written(place / f"cell_{index}", seed=index, **wanted) for index in range(number)]
    assert replay(folders) == [0] * number
    _, runs = runs_of(place)
    assert set(runs) == {"study", *(folder.name for folder in folders)}, "one parent, one run a cell"
    parents = {run.data.tags.get("mlflow.parentRunId") for name, run in runs.items() if name != "study"}
    assert parents == {runs["study"].info.run_id}


@pytest.mark.timeout(900)  # several servers and databases at once: 225 s on a busy machine of two cores
def test_first_uses_at_once_do_not_break_the_database(tmp_path: Path) -> None:
    check_first_uses_at_once(tmp_path / "runs", 4, replay_all_from_one)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_first_uses_at_once_twenty_times(tmp_path: Path) -> None:
    for turn in range(20):
        check_first_uses_at_once(tmp_path / str(turn) / "runs", 8)
