"""Commands that are forked from a process with everything imported: each ends, crashes and is stopped by itself."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_seg.runs.folder import read_metrics
from ssl_seg.studies.executor import Call, Forked, Here, Limits, execute
from ssl_seg.studies.forks import Forks, NoForks
from tests.small import pretraining, words

PLUGIN = "import os, sys, time\n"
SLEEPS = PLUGIN + "if os.fork() == 0:\n    time.sleep(600)\nprint(os.getpgid(0), flush=True)\ntime.sleep(600)\n"
EXITS = PLUGIN + "import atexit\natexit.register(print, 'told at the end')\nprint(os.environ['WANTED'])\nsys.exit(7)\n"
CRASHES = PLUGIN + "os.abort()\n"


@pytest.fixture(scope="module")
def forked() -> Forked:
    """One for all tests, since its imports take seconds."""
    return Forked(2)


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., Call]:
    """A call of a command that runs a script, as a plug-in, in the place of its own work."""

    def make(name: str, script: str) -> Call:
        plugin = tmp_path / f"{name}.py"
        plugin.write_text(script)
        return Call(name, ("keys", "pretrain", "--plugin", str(plugin)), tmp_path / f"{name}.log", tmp_path / name)

    return make


def wait_for_end_of(call: Call) -> None:
    """Of its whole group; whoever adopts an orphan has to hear of its end."""
    group = int(call.log.read_text().split()[0])
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"{call.name}: some of its group still run")


def test_each_ends_by_itself(forked: Forked, call: Callable[..., Call], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANTED", "as it is now")
    calls = [call("fine", ""), call("exits", EXITS), call("crashes", CRASHES), call("again", "")]
    found = {end.call.name: end for end in execute(calls, forked, 2)}
    assert {name: (end.how, end.code) for name, end in found.items()} == {
        "fine": ("finished", 0),
        "exits": ("failed", 7),
        "crashes": ("failed", -signal.SIGABRT),
        "again": ("finished", 0),
    }
    assert "train.steps" in found["again"].call.log.read_text()
    assert found["exits"].call.log.read_text() == "as it is now\ntold at the end\n"


def test_one_that_hangs_is_stopped_with_all_it_began(forked: Forked, call: Callable[..., Call]) -> None:
    (end,) = execute([call("sleeps", SLEEPS)], forked, 1, Limits(timeout=1.0))
    assert end.how == "timeout"
    wait_for_end_of(end.call)


def test_what_runs_is_stopped_when_the_study_is(forked: Forked, call: Callable[..., Call]) -> None:
    sleeps = call("sleeps", SLEEPS)
    running = execute([call("fine", ""), sleeps], forked, 2)
    assert next(running).call.name == "fine"
    while not sleeps.log.read_text():
        time.sleep(0.05)
    running.close()
    wait_for_end_of(sleeps)


def test_a_run_is_the_one_that_a_process_of_its_own_makes(forked: Forked, tmp_path: Path) -> None:
    values = pretraining(steps=2)
    calls = []
    for name in ("forked", "alone"):
        out = tmp_path / name
        told = (*words(values, tmp_path), "--out", str(out), "--quiet")
        calls.append(Call(name, ("pretrain", *map(str, told)), tmp_path / f"{name}.log", out))
    for one, executor in zip(calls, (forked, Here(2)), strict=True):
        (end,) = execute([one], executor, 1)
        assert end.how == "finished", one.log.read_text()
    figures = [
        [{name: value for name, value in line.items() if name not in ("time", "images_per_s")} for line in lines]
        for lines in map(read_metrics, (tmp_path / "forked", tmp_path / "alone"))
    ]
    assert figures[0] == figures[1]
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("forked", "alone")]
    own, other = (record["command"].replace(record["config"]["data"]["pool"]["type"], "") for record in records)
    assert own.replace("forked", "alone") == other
    assert records[0]["environment"] == records[1]["environment"]


def test_where_the_process_that_forks_has_died_there_are_others(call: Callable[..., Call]) -> None:
    executor = Forked(1)
    (end,) = execute([call("first", "")], executor, 1)
    assert end.how == "finished"
    assert executor._forks is not None
    os.kill(executor._forks.process.pid, signal.SIGKILL)
    (end,) = execute([call("second", "")], executor, 1)
    assert end.how == "finished"


def test_without_one_nothing_is_begun(tmp_path: Path) -> None:
    forks = Forks({**os.environ, "PYTHONHOME": str(tmp_path)})
    with pytest.raises(NoForks):
        forks.start(("--version",), tmp_path / "log", os.environ)
    assert not (tmp_path / "log").exists()


def test_one_that_does_not_answer_in_time_is_asked_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_seg.studies.forks.PATIENCE", 0.0)
    forks = Forks(dict(os.environ))
    for _ in range(2):
        with pytest.raises(NoForks):
            forks.start(("--version",), tmp_path / "log", os.environ)
    assert forks.code(os.getpid()) is None, "what it has begun may still run"
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert forks.code(ended.pid) == 1, "ended, and nobody has taken its code"


def test_a_number_that_is_used_again_is_of_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Forks, "_next", lambda self, *_: {"begun": 777})
    forks = Forks(dict(os.environ))
    forks.codes[777] = 0
    assert forks.start(("--version",), tmp_path / "log", os.environ) == 777
    assert forks.code(777) is None


def test_a_log_that_cannot_be_written_is_told_before_anything_begins(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    with pytest.raises(OSError, match="No such device"):
        next(execute([Call("one", ("--version",), tmp_path / "log", tmp_path / "one")], Forked(1), 1))


def test_it_ends_with_whoever_asks_it() -> None:
    forks = Forks(dict(os.environ))
    process = forks.process
    del forks
    gc.collect()
    assert process.returncode is not None
