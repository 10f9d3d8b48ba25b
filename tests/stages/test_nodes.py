"""Several nodes: two rendezvous groups of torchrun on one machine, and jobs of submitit that are queued again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch

from ssl_seg import cli
from ssl_seg.config import load
from ssl_seg.files import read_json
from ssl_seg.runs.checkpoint import load_state
from ssl_seg.runs.folder import read_metrics
from ssl_seg.stages import setup
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.setup import Options
from tests import ROOT
from tests.processes import in_pair, start_pair
from tests.small import pretraining, words
from tests.two_processes import without_dropout

STEPS = 24  # so many that a signal arrives amid them
ALIKE = 6  # steps, over which what a sum over two processes rounds otherwise has not grown yet


def figures(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    lines = read_metrics(folder)
    return [{key: own for key, own in line.items() if key not in ("images_per_s", "time")} for line in lines]


def config_words(folder: Path) -> list[str]:
    values = pretraining(steps=STEPS, save_every=8, lr=1e-4)
    values["model"] = without_dropout(values["model"])
    return words(values, folder)


def start_nodes(*given: object, folders: tuple[Path, Path]) -> list[subprocess.Popen[str]]:
    """A torchrun for each of two nodes, which know of each other by an address alone, each in a folder of its own."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    # Of one machine both agents have one name, which need not lead anywhere; of two each has its own.
    launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=7", "--local-addr=127.0.0.1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([*launcher, *map(str, given)], cwd=own, env=environment, start_new_session=True, **pipes)
        for own in folders
    ]


def ended(nodes: list[subprocess.Popen[str]]) -> list[str]:
    """What they have said, once both have ended."""
    try:
        return [node.communicate(timeout=400)[1] for node in nodes]
    finally:
        for node in nodes:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)


def wait_for(step: int, folder: Path, nodes: list[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + 400
    while not (folder / "metrics.jsonl").exists() or len(read_metrics(folder)) < step:
        assert all(node.poll() is None for node in nodes), ended(nodes)
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(900)  # seven starts of Python, on a machine that may be busy
def test_two_nodes_make_one_run_and_one_of_them_may_be_told_to_leave(tmp_path: Path) -> None:
    """To the bit what two processes of one machine make, and in figures what one process makes."""
    given = config_words(tmp_path)
    whole, alone, out = (tmp_path / name for name in ("whole", "alone", "run"))
    in_pair(cli.main, ["pretrain", *given, "--out", str(whole)])
    folders = tmp_path / "node0", tmp_path / "node1"
    for folder in folders:
        folder.mkdir()
    command = ("-m", "ssl_seg", "pretrain", *given, "--out", out)

    nodes = start_nodes(*command, folders=folders)
    wait_for(3, out, nodes)
    nodes[1].send_signal(signal.SIGTERM)
    said = ended(nodes)
    assert any("the same command continues" in own for own in said), said
    assert all(node.returncode for node in nodes)
    assert read_json(out / "run.json")["status"] == "killed"
    assert 3 <= load_state(out).step < STEPS

    nodes = start_nodes(*command, folders=folders)
    said = ended(nodes)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert [*folders[0].iterdir(), *folders[1].iterdir()] == [], "all that is written lies in the run's folder"
    assert figures(out) == figures(whole)
    torch.testing.assert_close(load_state(out).tensors, load_state(whole).tensors, rtol=0, atol=0)

    pretrain(load(PretrainConfig, [given[0]]), Options(alone, quiet=True))
    for one, both in zip(figures(alone)[:ALIKE], figures(out), strict=False):
        assert one == pytest.approx(both, rel=1e-3)


def run_on_a_disk_of_its_own(folder: str) -> None:
    """A run into a path that each process begins at a folder of its own, as on two machines that share no disk."""
    os.chdir(Path(folder) / os.environ["RANK"])
    with mock.patch.object(setup, "SEEN_WITHIN", 0.5):
        config = load(PretrainConfig, pretraining(steps=2))
        sys.exit(cli.run(lambda: pretrain(config, Options("run", quiet=True))))


def test_a_node_that_does_not_see_the_folder_is_named_before_the_first_step(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    pair = start_pair(run_on_a_disk_of_its_own, str(tmp_path))
    said = "".join(child.communicate()[1] for child in pair)
    assert [child.returncode for child in pair] == [2, 2]
    (line,) = [line for line in said.splitlines() if line.startswith("ssl-seg: ")]
    assert f"rank 1 (process {pair[1].pid} on " in line
    assert "run/run.json: is not there as the first process has written it" in line
    assert [*(tmp_path / "1").iterdir()] == []
    assert not (tmp_path / "0" / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)  # seven starts of Python, on a machine that may be busy
def test_a_job_of_submitit_that_is_preempted_is_queued_again_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    _, _, behind = (ROOT / "docs" / "scaling.md").read_text().partition("```python\n# submit.py\n")
    (tmp_path / "submit.py").write_text(behind.partition("```")[0])
    given = config_words(tmp_path)
    whole, out = tmp_path / "whole", tmp_path / "run"
    pretrain(load(PretrainConfig, [given[0]]), Options(whole, quiet=True))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert shutil.which("torchrun")
    import submit

    job = submit.submit(["pretrain", *given, "--out", str(out)], cluster="local", timeout_min=60)
    until = time.monotonic() + 400
    while not (out / "metrics.jsonl").exists() or len(read_metrics(out)) < 3:
        assert not job.done(), job.exception()
        assert time.monotonic() < until
        time.sleep(0.05)
    # As Slurm tells each task of a job, by the signal that submitit has asked it for.
    (task,) = psutil.Process(int(job.job_id)).children()
    task.send_signal(signal.SIGUSR2)
    while read_json(out / "run.json")["status"] != "killed":
        assert time.monotonic() < until
        time.sleep(0.05)
    assert job.result() == 0, "the same job, which has begun again"
    (resumed,) = read_json(out / "run.json")["resumed"]
    assert 3 <= resumed["after_step"] < STEPS
    assert figures(out) == figures(whole)
    torch.testing.assert_close(load_state(out).tensors, load_state(whole).tensors, rtol=0, atol=0)
