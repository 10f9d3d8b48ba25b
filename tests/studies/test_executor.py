"""Commands that end well, fail, crash, hang or are stopped: each is told of, and none takes another with it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from ssl_seg.config import UserError
from ssl_seg.studies import executor
from ssl_seg.studies.executor import Call, Cluster, End, Here, Limits, Submission, execute

NONE = Limits()
FINE = "print('done')"
FAILS = "import sys; print('first'); sys.exit('what was wrong')"
CRASHES = "import os; os.kill(os.getpid(), 9)"
HANGS = "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
# Needs a while to save, and says so.
POLITE = (
    "import os, signal, sys, time\n"
    "print(os.getpid(), flush=True)\n"
    "signal.signal(15, lambda *_: (time.sleep(1.5), print('saved', flush=True), os._exit(0)))\n"
)
# Leaves a child in its group, as a crashed run leaves its loader workers.
ORPHANS = "import os, sys, time; child = os.fork(); child or time.sleep(60); print(child, flush=True); os._exit(1)"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of a call are a script, so that a test does not wait for torch."""
    monkeypatch.setattr(executor, "_command", lambda call: [sys.executable, "-c", *call.words])


def calls(folder: Path, *scripts: str) -> list[Call]:
    names = [f"{number}" for number in range(len(scripts))]
    return [Call(name, (own,), folder / f"{name}.log", folder / name) for name, own in zip(names, scripts, strict=True)]


def ends(folder: Path, *scripts: str, jobs: int = 2, limits: Limits = NONE) -> dict[str, End]:
    found = execute(calls(folder, *scripts), Here(jobs), jobs, limits)
    return {end.call.name: end for end in found}


def test_one_that_fails_or_crashes_costs_none_but_itself(tmp_path: Path) -> None:
    found = ends(tmp_path, FAILS, FINE, CRASHES, FINE)
    assert [(found[name].how, found[name].code) for name in "0123"] == [
        ("failed", 1),
        ("finished", 0),
        ("failed", -9),
        ("finished", 0),
    ]
    assert found["0"].call.last_words() == "what was wrong"
    assert (tmp_path / "1.log").read_text() == "done\n"


def test_one_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    found = ends(tmp_path, HANGS, FINE, limits=Limits(timeout=1.0))
    assert (found["0"].how, found["1"].how) == ("timeout", "finished")
    assert 1.0 <= found["0"].seconds < 5.0


# A run that makes a step every 0.3 seconds, and what it does between and after.
STEPS = """
import os, pathlib, sys, time
folder = pathlib.Path({folder!r}); folder.mkdir(exist_ok=True)
for step in range({steps}):
    time.sleep(0.3)
    with (folder / 'metrics.jsonl').open('a') as file: file.write('{{}}')
    os.utime(folder / 'metrics.jsonl', ({clock}, {clock}))
"""
FIRST = "import time; time.sleep(1.5)\n"  # imports from a slow disk


def test_one_without_a_sign_of_life_is_given_up_and_one_that_writes_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the clock says: it may jump by hours, as after a suspended night."""
    monkeypatch.setattr(executor, "PATIENCE", 4.0)
    past, future = "time.time() - 86_400", "time.time() + 86_400"
    scripts = [
        STEPS.format(folder=str(tmp_path / "0"), steps=8, clock=past),
        STEPS.format(folder=str(tmp_path / "1"), steps=1, clock=future) + HANGS,
        FIRST + STEPS.format(folder=str(tmp_path / "2"), steps=2, clock=past),
        HANGS,
        FIRST + STEPS.format(folder=str(tmp_path / "4"), steps=1, clock=past) + HANGS,
    ]
    for name in ("2", "4"):  # which go on: what they had done before is no step of theirs
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("{}")
    found = ends(tmp_path, *scripts, jobs=5, limits=Limits(stall=1.0))
    hows = [found[name].how for name in "01234"]
    assert hows == ["finished", "stalled", "finished", "stalled", "stalled"]
    assert found["1"].seconds < 4.0 < found["3"].seconds


def test_no_more_run_at_a_time_than_asked(tmp_path: Path) -> None:
    script = (
        "import os, time, pathlib\n"
        f"own = pathlib.Path({str(tmp_path)!r}) / f'running{{os.getpid()}}'; own.touch()\n"
        "print(len(list(own.parent.glob('running*')))); time.sleep(0.3); own.unlink()\n"
    )
    found = ends(tmp_path, *[script] * 5, jobs=2)
    counts = [int(end.call.log.read_text()) for end in found.values()]
    assert len(counts) == 5
    assert max(counts) == 2


def test_what_runs_is_stopped_when_the_study_is(tmp_path: Path) -> None:
    polite = (
        "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit('saved'))\nprint('up', flush=True)\n" + HANGS
    )
    started = calls(tmp_path, polite, polite)
    running = execute([*started, *calls(tmp_path / "quick", FINE)], Here(3), 3)
    next(running)
    deadline = time.monotonic() + 10
    while any("up" not in call.log.read_text() for call in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.close()
    assert [call.last_words() for call in started] == ["saved", "saved"]


def test_one_that_will_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "GRACE", 0.5)
    found = ends(tmp_path, STUBBORN, limits=Limits(timeout=1.0))
    assert found["0"].how == "timeout"
    assert found["0"].call.last_words() == "up"


def test_nothing_is_left_of_a_group_that_has_crashed(tmp_path: Path) -> None:
    end = ends(tmp_path, ORPHANS)["0"]
    child = int(end.call.log.read_text())
    for _ in range(100):
        if not _lives(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("a child has outlived its run")


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_runs_side_by_side_share_cores_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = "import os; print(os.environ.get('OMP_NUM_THREADS'), os.environ.get('CUDA_VISIBLE_DEVICES'))"
    several = list(execute(calls(tmp_path, script, script), Here(2, ["4", "5"]), 2))
    assert {end.call.log.read_text() for end in several} == {"4 4\n", "4 5\n"}, "8 cores are ours, of 64 there are"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (own,) = execute(calls(tmp_path, script), Here(2, ["4", "5"]), 2)
    assert own.call.log.read_text() == "3 4\n", "what the user has set stays"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (alone,) = execute(calls(tmp_path, script), Here(1, ["4", "5"]), 1)
    assert alone.call.log.read_text() == "None None\n"


def test_jobs_of_submitit_are_told_of_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setattr(Cluster, "poll", 0.2)
    executor = Cluster(tmp_path / "jobs", {"cluster": "local"}, timeout=60)
    found = {end.call.name: end.how for end in execute(calls(tmp_path, FINE, FAILS, CRASHES), executor, 3)}
    assert found == {"0": "finished", "1": "failed", "2": "failed"}
    assert (tmp_path / "0.log").read_text() == "done\n"


def test_a_job_of_submitit_that_hangs_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setattr(Cluster, "poll", 0.2)
    monkeypatch.setattr(executor, "PATIENCE", 6.0)  # submitit takes its time to start
    cluster = Cluster(tmp_path / "jobs", {"cluster": "local"})
    (end,) = execute(calls(tmp_path, POLITE + HANGS), cluster, 1, Limits(stall=1.5))
    assert end.how == "stalled"
    pid, said = end.call.log.read_text().split()
    assert said == "saved", "it was told, and waited for: that takes longer than submitit's own cancel gives"
    assert not _lives(int(pid))


@pytest.mark.parametrize("leave", ["checkpoint", "signal"])
def test_a_submission_stops_its_command_with_all_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave: str
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setattr(executor, "GRACE", 0.5)
    script = "import os; child = os.fork(); print(os.getpid(), flush=True)\n" + STUBBORN
    submission = Submission((sys.executable, "-c", script), tmp_path / "log")

    def stop(*_: object) -> None:
        while submission.log.read_text().count("up") < 2:  # parent and child, each deaf from then on
            time.sleep(0.05)
        if leave == "checkpoint":
            submission.checkpoint()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        assert submission() == -signal.SIGKILL
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    pids = [int(word) for word in submission.log.read_text().split() if word.isdigit()]
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(map(_lives, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_parameters_that_submitit_does_not_know_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(UserError, match=r"^submitit: .*; mend `submitit:` in the study, or use --executor local$"):
        Cluster(tmp_path, {"cluster": "local", "slrm_partition": "gpu"})
    with pytest.raises(UserError, match=r"^submitit: "):
        Cluster(tmp_path, {"cluster": "slurm", "timeout_min": 5})


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of Slurm that refuse every job."""
    pytest.importorskip("submitit")
    commands = tmp_path / "bin"
    commands.mkdir()
    refusal = "echo 'sbatch: error: invalid partition specified: gpu' >&2; echo '(see sinfo)' >&2; exit 1\n"
    for name in ("sbatch", "srun", "scancel", "sacct"):
        (commands / name).write_text("#!/bin/sh\n" + (refusal if name == "sbatch" else ""))
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")


@pytest.mark.usefixtures("slurm")
def test_a_job_that_slurm_refuses_is_one_line(tmp_path: Path) -> None:
    executor = Cluster(tmp_path / "jobs", {"slurm_partition": "gpu", "timeout_min": 5})
    with pytest.raises(UserError) as refused:
        list(execute(calls(tmp_path, FINE), executor, 1))
    assert str(refused.value) == (
        "submitit: sbatch: error: invalid partition specified: gpu; mend `submitit:` in the study, "
        "or use --executor local"
    )


@pytest.mark.usefixtures("slurm")
def test_jobs_of_slurm_need_a_time_limit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^submitit: jobs need a time limit; give `timeout` or submitit.timeout_min"):
        Cluster(tmp_path, {"slurm_partition": "gpu"})
    for given in ({"timeout_min": 5}, {"slurm_time": 5}):
        Cluster(tmp_path, given)
    assert Cluster(tmp_path, {}, timeout=61).executor.parameters["time"] == 2
