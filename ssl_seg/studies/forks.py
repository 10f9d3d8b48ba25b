"""Commands that begin with everything imported: a process that has done the imports forks one for each.

Imports are some eight seconds of a core, which is more than the steps of a small run. Each command is a process of its
own all the same, in a group of its own: one that crashes or hangs costs itself alone, and its peak memory is its own.

Ours, since `multiprocessing`'s fork server imports the main module once more, which may be anyone's script, and leaves
out what `atexit` has been told. Not where a GPU is seen: what CUDA begins no fork can use.

    python -m ssl_seg.studies.forks     reads orders from stdin, one JSON object a line, and answers on stdout
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil

from ssl_seg import files

# What a training imports, by the modules that do so.
IMPORTED = ("cli", "models.timm", "models.smp", "stages.evaluate", "stages.finetune", "stages.pretrain")
LOOK = 0.05  # seconds between two looks for forks that have ended
PATIENCE = 300.0  # seconds for the imports: a slow disk may take one of them


class NoForks(Exception):
    """There is no process that forks, or there is none any more."""


class Forks:
    """The process that forks, as seen by who asks it. It ends with whoever has begun it; its forks do not."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(env),
            start_new_session=True,
        )
        self.codes: dict[int, int] = {}  # of forks that have ended
        self._answers = b""
        weakref.finalize(self, _end, self.process)

    def start(self, words: Sequence[str], log: Path, env: Mapping[str, str]) -> int:
        """Begin `ssl-seg` with these words; all that it says goes to the file `log`. Gives its id and its group's.

        Raises NoForks, with nothing begun.
        """
        if self.process.poll() is not None:
            raise NoForks
        order = {"words": list(words), "log": str(log), "env": dict(env)}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise NoForks from error
        answer = self._next("begun", PATIENCE)
        if answer is None:
            _kill(self.process)  # late, it would begin what is begun elsewhere by then
            raise NoForks
        self.codes.pop(answer["begun"], None)  # of another that had the same number
        return answer["begun"]

    def code(self, fork: int) -> int | None:
        """The exit code of one that has ended, as `subprocess` gives it; None until then."""
        self._next("nothing", 0.0)
        if fork not in self.codes and self.process.poll() is not None and not _is_there(fork):
            return 1  # nobody has its code
        return self.codes.get(fork)

    def _next(self, wanted: str, patience: float) -> dict[str, Any] | None:
        """The next answer that has this key; None where there is none in time, or no process to give it."""
        assert self.process.stdout is not None
        handle = self.process.stdout.fileno()
        while True:
            while b"\n" in self._answers:
                line, _, self._answers = self._answers.partition(b"\n")
                answer = json.loads(line)
                if "ended" in answer:
                    self.codes[answer["ended"]] = answer["code"]
                elif wanted in answer:
                    return answer
            if not select.select([handle], [], [], patience)[0]:
                return None
            more = os.read(handle, 1 << 16)
            if not more:
                return None
            self._answers += more


def _end(process: subprocess.Popen[bytes]) -> None:
    _kill(process)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # its forks are their own
    process.wait()


def _is_there(pid: int) -> bool:
    """Whether it has not ended: in a container there may be nobody who takes its code."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


# ---- the process that forks ----


def serve() -> None:
    """Fork a process for each order, and tell of it when it has ended, until nobody asks any more."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever an import prints is no answer
    for name in IMPORTED:
        importlib.import_module(f"ssl_seg.{name}")
    assert threading.active_count() == 1, "a thread would not be in the forks, what it holds would"
    unread = b""
    while True:
        if select.select([0], [], [], LOOK)[0]:
            more = os.read(0, 1 << 16)
            if not more:
                return
            unread += more
        while b"\n" in unread:
            line, _, unread = unread.partition(b"\n")
            order = json.loads(line)
            if os.fork() == 0:
                _become(order, answers)
        for fork, code in _ended():
            _answer(answers, {"ended": fork, "code": code})


def _ended() -> list[tuple[int, int]]:
    """Forks that have ended since the last look, with their exit codes."""
    found = []
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found.append((ended[0], os.waitstatus_to_exitcode(ended[1])))
    return found


def _answer(handle: int, answer: Mapping[str, Any]) -> None:
    os.write(handle, json.dumps(answer).encode() + b"\n")


def _become(order: Mapping[str, Any], answers: int) -> NoReturn:
    """What `python -m ssl_seg` with these words would be."""
    code = 1
    try:
        os.setsid()
        _answer(answers, {"begun": os.getpid()})  # not before it is a group, which may be stopped
        os.close(answers)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(order["env"])
        _redirect(Path(order["log"]))
        sys.argv = ["", *order["words"]]  # the first is filled in
        try:
            runpy.run_module("ssl_seg", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # a fork must not come to the loop that it was forked from
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  # os._exit would leave them out
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _redirect(log: Path) -> None:
    """Nothing comes in, and all that is said goes to a file."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    said = files.open_regular(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for handle, place in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(handle, place)
    os.close(nothing)
    os.close(said)


if __name__ == "__main__":
    serve()
