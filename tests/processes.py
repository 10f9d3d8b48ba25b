"""Processes that tests start: their exit codes, signals and kills are real, and a start takes a tenth of a second.

They are forked from a server that has imported torch and the stages once and runs no threads; a Python of its own takes
three seconds for the same. What is said of a start by words (`python -m`, torchrun, accelerate launch) has tests that
start by them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection, wait
from pathlib import Path

from ssl_seg import cli
from tests import ROOT

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "hypothesis",
        "pytest",
        "ssl_seg.reports.runs",
        "ssl_seg.stages.evaluate",
        "ssl_seg.stages.finetune",
        "ssl_seg.stages.predict",
        "ssl_seg.stages.pretrain",
        "ssl_seg.studies.study",
        "segmentation_models_pytorch",
    ]
)
TIMEOUT = 240  # seconds; what hangs is killed


class Child:
    """A call in a process, with what it prints; the first of a process group, as a command of a shell is.

    Used as `subprocess.Popen` is. The target is found by its name, so it stands at the top of a module.
    """

    def __init__(
        self, target: Callable[..., object], *arguments: object, folder: Path = ROOT, **environment: str
    ) -> None:
        self.pipes, ends = zip(*(PROCESSES.Pipe(duplex=False) for _ in range(2)), strict=True)
        environment = {**os.environ, **environment}
        self.process = PROCESSES.Process(target=_run, args=(ends, folder, environment, target, arguments))
        self.process.start()
        for end in ends:
            end.close()  # the child's alone, so that its end is the end of what it says

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; -n where signal n has ended it."""
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float = TIMEOUT) -> tuple[str, str]:
        """What it and its own children have printed to stdout and stderr, when the last of them has ended."""
        until = time.monotonic() + timeout
        said = dict.fromkeys(self.pipes, b"")
        still = list(self.pipes)
        while still:
            ready = wait(still, max(0.0, until - time.monotonic()))
            if not ready:
                os.killpg(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired("child", timeout, *said.values())
            for pipe in ready:
                piece = os.read(pipe.fileno(), 2**16)
                said[pipe] += piece
                if not piece:
                    still.remove(pipe)
        self.process.join()
        stdout, stderr = (said[pipe].decode() for pipe in self.pipes)
        return stdout, stderr


def _run(
    ends: tuple[Connection, Connection],
    folder: Path,
    environment: dict[str, str],
    target: Callable[..., object],
    arguments: tuple[object, ...],
) -> None:
    os.setsid()
    for number, end in enumerate(ends, start=1):
        os.dup2(end.fileno(), number)
        end.close()
    multiprocessing.set_start_method(None, force=True)  # of its own children: Python's own, not the one it came by
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(folder))
    target(*arguments)


def command(*words: object, folder: Path = ROOT) -> Child:
    """`ssl-seg WORDS`, in a folder."""
    return Child(cli.main, [str(word) for word in words], folder=folder)


def command_without(library: str, *words: object) -> Child:
    """`ssl-seg WORDS` where a library is not installed."""
    return Child(_run_without, library, [str(word) for word in words])


def _run_without(library: str, words: list[str]) -> None:
    sys.modules[library] = None
    cli.main(words)


def start_torchrun(*words: object, folder: Path = ROOT) -> subprocess.Popen[str]:
    """A start by torchrun itself: ten seconds of work, where `in_pair` shows the same of all but the start."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*launcher, *map(str, words)], cwd=folder, text=True, start_new_session=True, **pipes)


def start_pair(target: Callable[..., object], *arguments: object) -> list[Child]:
    """The call in each of two processes that find each other by gloo, as torchrun starts them."""
    return start_several(2, target, *arguments)


def start_several(count: int, target: Callable[..., object], *arguments: object) -> list[Child]:
    """The same in so many."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    counts = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))
    return [Child(target, *arguments, **shared, **counts, **rank) for rank in ranks]


def in_pair(target: Callable[..., object], *arguments: object) -> None:
    """The call in each of two processes, both of which must end well; one that fails ends the other, which waits."""
    in_several(2, target, *arguments)


def in_several(count: int, target: Callable[..., object], *arguments: object) -> None:
    """The same in so many."""
    started = start_several(count, target, *arguments)
    wait([child.process.sentinel for child in started], TIMEOUT)
    if any(child.returncode for child in started):
        for child in started:
            child.kill()
    said = [child.communicate()[1] for child in started]
    assert [child.returncode for child in started] == [0] * count, said
