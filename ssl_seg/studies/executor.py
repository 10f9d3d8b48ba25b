"""The commands of a study: some at a time, each a process of its own with a log, a time limit and a group to stop.

Ours is the small loop: joblib and concurrent.futures lose a whole batch with one worker that dies, and neither knows a
command that hangs. On a cluster submitit does the work, with the same loop around it.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ssl_seg import files
from ssl_seg.config import UserError, first_line
from ssl_seg.studies.forks import Forks, NoForks

POLL = 0.1  # seconds between two looks at processes here
POLL_CLUSTER = 2.0  # at jobs of a cluster: its scheduler is asked
# Seconds of silence before a first step: imports from a slow disk, and a look at every image for leaks, say nothing.
PATIENCE = 3600.0
GRACE = 30.0  # seconds that a stopped run has to save its state
LATE = 5.0  # seconds after which a stop that went through a cluster is given up: those of GRACE begin there
ENDLESS = 60 * 24 * 365  # minutes; of what submitit runs on this machine, it would else end after two
HAS_LIMIT = ("timeout_min", "slurm_timeout_min", "slurm_time")


@dataclass(frozen=True)
class Call:
    """One command of ours, and where it shows that it is alive."""

    name: str
    words: tuple[str, ...]  # after `ssl-seg`
    log: Path  # receives all it prints
    folder: Path  # the run's; what changes in it is a sign of life

    def signs(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What changes whenever something is heard of it, whatever the clocks say of when."""
        names = ("metrics.jsonl", "state", "pictures")
        return tuple(map(_version, (self.log, self.folder, *(self.folder / name for name in names))))

    def num_bytes(self) -> int:
        """Of its metrics: they grow with a step."""
        found = _version(self.folder / "metrics.jsonl")
        return 0 if found is None else found[0]

    def last_words(self) -> str:
        """The last line of its log, for a message; the log of another machine may be late."""
        with suppress(OSError):
            lines = files.read_bytes(self.log).decode(errors="replace").split("\n")
            return next((line.strip() for line in reversed(lines) if line.strip()), "")
        return ""


def _version(path: Path) -> tuple[int, int, int] | None:
    with suppress(OSError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns, found.st_ino
    return None


class Watch:
    """How long a call has been silent, by a clock that nobody sets and that a suspended machine stops."""

    def __init__(self, call: Call, has_stepped: bool = False) -> None:
        self.call = call
        self.has_stepped = has_stepped
        self.signs, self.num_bytes = call.signs(), call.num_bytes()
        self.heard = time.monotonic()

    def silent(self) -> float:
        """Seconds since something was heard of it, at most since the watch began."""
        signs, num_bytes = self.call.signs(), self.call.num_bytes()
        self.has_stepped |= num_bytes > self.num_bytes  # a run that goes on first cuts off what it makes again
        if signs != self.signs:
            self.heard = time.monotonic()
        self.signs, self.num_bytes = signs, num_bytes
        return time.monotonic() - self.heard


@dataclass(frozen=True)
class End:
    """How a command has ended."""

    call: Call
    how: Literal["finished", "failed", "timeout", "stalled"]
    code: int | None
    seconds: float


@dataclass(frozen=True)
class Limits:
    """When a command is given up."""

    timeout: float | None = None  # seconds in all
    stall: float | None = None  # seconds without a sign of life

    def has_stalled(self, watch: Watch) -> bool:
        """Whether what is watched is silent for too long; the clock of `stall` starts with its first step."""
        silent = watch.silent()  # asked each time, or a change would be seen late
        return self.stall is not None and silent > (self.stall if watch.has_stepped else max(self.stall, PATIENCE))


class Handle(ABC):
    """A command that has been handed over."""

    @abstractmethod
    def code(self) -> int | None:
        """Its exit code; None until it has ended."""

    @abstractmethod
    def ask(self) -> None:
        """Tell it to save its state and end. Once: a second word would end it at once."""

    @abstractmethod
    def end(self, patience: float) -> None:
        """Wait for one that was asked, as many seconds at most, then end it for good."""

    def runs(self) -> bool:
        """Whether it has begun, and has not only been queued."""
        return True


class Executor(ABC):
    """Where commands are executed."""

    poll = POLL

    @abstractmethod
    def start(self, call: Call, slot: int) -> Handle:
        """Begin a command, or queue it. `slot` tells those apart that run at one time."""


def execute(calls: Iterable[Call], executor: Executor, jobs: int, limits: Limits = Limits()) -> Iterator[End]:
    """Run all of them, `jobs` at a time; gives how each has ended, as they end.

    One that fails, dies or hangs is an `End` like the others. What still runs when the iterator is closed, or an
    exception passes through it, is stopped and has its state saved.
    """
    waiting = deque(calls)
    running: dict[int, _Running] = {}
    try:
        while waiting or running:
            for slot in range(jobs):
                if waiting and slot not in running:
                    call = waiting.popleft()
                    running[slot] = _Running(call, executor.start(call, slot))
            for slot, one in list(running.items()):
                end = one.ended(limits)
                if end is not None:
                    del running[slot]
                    yield end
            time.sleep(executor.poll)
    finally:
        _stop([one.job for one in running.values()])


@dataclass
class _Running:
    call: Call
    job: Handle
    began: float | None = None  # monotonic; None while it is queued
    watch: Watch | None = None  # from then on

    def ended(self, limits: Limits) -> End | None:
        if self.began is None and self.job.runs():
            self.began, self.watch = time.monotonic(), Watch(self.call)
        seconds = 0.0 if self.began is None else time.monotonic() - self.began
        code = self.job.code()
        if code is not None:
            return End(self.call, "failed" if code else "finished", code, seconds)
        if self.watch is None:
            return None
        how = _exceeded(limits, seconds, self.watch)
        if how is None:
            return None
        _stop([self.job])
        return End(self.call, how, None, seconds)


def _exceeded(limits: Limits, seconds: float, watch: Watch) -> Literal["timeout", "stalled"] | None:
    if limits.timeout is not None and seconds > limits.timeout:
        return "timeout"
    return "stalled" if limits.has_stalled(watch) else None


def _stop(jobs: Sequence[Handle]) -> None:
    for job in jobs:
        job.ask()  # all, before any is waited for
    for job in jobs:
        job.end(GRACE)


# ---- on this machine ----


class Here(Executor):
    """Processes on this machine, each with its share of the cores, and of the GPUs where there are several."""

    def __init__(self, jobs: int, devices: Sequence[str] = ()) -> None:
        self.jobs = jobs
        self.devices = devices  # what CUDA_VISIBLE_DEVICES may name, one for a job

    def start(self, call: Call, slot: int) -> Handle:
        call.log.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(_new_log(call), "wb") as log:
            process = subprocess.Popen(
                _command(call),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._share(slot)},
                start_new_session=True,  # a group that can be stopped whole, with its loader workers
            )
        return _Process(process)

    def _share(self, slot: int) -> dict[str, str]:
        """Several runs share the cores best with a few threads each, and need GPUs of their own."""
        share = {}
        if self.jobs > 1:
            if "OMP_NUM_THREADS" not in os.environ:
                share["OMP_NUM_THREADS"] = str(max(1, _cores() // self.jobs))
            if len(self.devices) > 1:
                share["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        return share


class Forked(Here):
    """The same, by a process that has done the imports; as `Here` does where there is none any more."""

    def __init__(self, jobs: int) -> None:
        super().__init__(jobs)
        self._forks: Forks | None = None

    def start(self, call: Call, slot: int) -> Handle:
        env = {**os.environ, **self._share(slot)}
        if self._forks is None:
            self._forks = Forks(env)  # which reads the number of threads once for all, as the jobs have the same
        call.log.parent.mkdir(parents=True, exist_ok=True)
        os.close(_new_log(call))  # here, where somebody hears of one that cannot be written
        try:
            return _Fork(self._forks, self._forks.start(call.words, call.log, env))
        except NoForks:
            return super().start(call, slot)


class _Fork(Handle):
    def __init__(self, forks: Forks, fork: int) -> None:
        self.forks = forks
        self.fork = fork

    def code(self) -> int | None:
        code = self.forks.code(self.fork)
        if code is not None:
            _signal_group(self.fork, signal.SIGKILL)
        return code

    def ask(self) -> None:
        if self.forks.code(self.fork) is None:
            _signal_group(self.fork, signal.SIGTERM)

    def end(self, patience: float) -> None:
        until = time.monotonic() + patience
        while self.forks.code(self.fork) is None and time.monotonic() < until:
            time.sleep(POLL)
        _signal_group(self.fork, signal.SIGKILL)


def _new_log(call: Call) -> int:
    return files.open_regular(call.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def _cores() -> int:
    """Those that this process may use; a container or a batch job has a part of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Process(Handle):
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def code(self) -> int | None:
        code = self.process.poll()
        if code is not None:
            _signal_group(self.process.pid, signal.SIGKILL)  # what a crashed run has left of its group
        return code

    def ask(self) -> None:
        if self.process.poll() is None:
            _signal_group(self.process.pid, signal.SIGTERM)

    def end(self, patience: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        _signal_group(self.process.pid, signal.SIGKILL)
        self.process.wait()


# ---- on a cluster ----


class Cluster(Executor):
    """Jobs of submitit: Slurm's, or with cluster=local processes that it keeps itself."""

    poll = POLL_CLUSTER

    def __init__(self, folder: Path, parameters: Mapping[str, Any], timeout: float | None = None) -> None:
        """`parameters` are those of submitit, such as `slurm_partition`; `cluster` among them picks the cluster.

        Raises UserError without submitit, without Slurm, for parameters that it does not know, and without a time limit
        for jobs of Slurm, where submitit's own is five minutes.
        """
        if find_spec("submitit") is None:
            raise UserError("--executor submitit: is not installed; pip install 'ssl_seg[slurm]'")
        import submitit

        given = dict(parameters)
        try:
            self.executor = submitit.AutoExecutor(folder, cluster=given.pop("cluster", None))
            self.is_local = self.executor.cluster == "local"
            if timeout is not None:
                given.setdefault("timeout_min", max(1, math.ceil(timeout / 60)))
            elif self.is_local:
                given.setdefault("timeout_min", ENDLESS)
            elif self.executor.cluster == "slurm" and not any(given.get(key) is not None for key in HAS_LIMIT):
                raise UserError("submitit: jobs need a time limit; give `timeout` or submitit.timeout_min in the study")
            self.executor.update_parameters(**given)
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
            raise _refusal(error) from error

    def start(self, call: Call, slot: int) -> Handle:
        call.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            job = self.executor.submit(Submission(tuple(_command(call)), call.log))
        except (RuntimeError, OSError) as error:  # submitit's own are RuntimeErrors
            raise _refusal(error) from error
        return _Submitted(job, self.is_local)


def _refusal(error: Exception) -> UserError:
    """In one line what submitit or Slurm says."""
    return UserError(f"submitit: {first_line(error)}; mend `submitit:` in the study, or use --executor local")


class Submission:
    """A command as a job of submitit; one that is preempted is queued again and goes on from its saved state.

    It is a group of its own, as on this machine, and what stops the job stops the whole group.
    """

    def __init__(self, command: tuple[str, ...], log: Path) -> None:
        self.command = command
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.is_asked = False

    def __call__(self) -> int:
        # submitit leaves SIGTERM aside, and its jobs on this machine are stopped by SIGINT.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked)
        with os.fdopen(files.open_regular(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        if self.is_asked:  # between the two
            self._stop(self.process.pid)
        code = self.process.wait()
        _signal_group(self.process.pid, signal.SIGKILL)  # what a crashed run has left
        return code

    def checkpoint(self) -> Any:
        """What submitit calls when the job has to leave."""
        from submitit.helpers import DelayedSubmission

        self._asked()
        return DelayedSubmission(Submission(self.command, self.log))

    def _asked(self, *_: object) -> None:
        if self.is_asked:
            return  # a cluster may say it several times
        self.is_asked = True
        if self.process is not None:
            self._stop(self.process.pid)

    def _stop(self, pid: int) -> None:
        """Runs inside of a signal handler, so amid `process.wait`, which cannot be called once more there."""
        _signal_group(pid, signal.SIGTERM)
        until = time.monotonic() + GRACE
        while _is_running(pid) and time.monotonic() < until:
            time.sleep(POLL)
        _signal_group(pid, signal.SIGKILL)


def _is_running(pid: int) -> bool:
    """Whether a child has not ended; leaves its code to be fetched."""
    with suppress(ChildProcessError):
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    return False


class _Submitted(Handle):
    def __init__(self, job: Any, is_local: bool) -> None:
        self.job = job
        self.is_local = is_local

    def code(self) -> int | None:
        if not self.job.done():
            return None
        # Of a job that died there is no result, and submitit says so in several ways.
        failed = self.job.exception()
        return self.job.result() if failed is None else 1

    def runs(self) -> bool:
        return str(self.job.state).upper() not in ("PENDING", "UNKNOWN", "CONFIGURING", "REQUEUED")

    def ask(self) -> None:
        if self.job.done():
            return
        if self.is_local:
            # Its id is that of the process that keeps it, which passes this on; `cancel` gives it one second only.
            os.kill(int(self.job.job_id), signal.SIGTERM)
        else:
            self.job.cancel()

    def end(self, patience: float) -> None:
        """A cluster kills what does not end in its own time, and the job itself its command."""
        until = time.monotonic() + patience + LATE
        while not self.job.done() and time.monotonic() < until:
            time.sleep(POLL)
        if not self.job.done():
            self.job.cancel()


def _signal_group(leader: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _command(call: Call) -> list[str]:
    return [sys.executable, "-m", "ssl_seg", *call.words]
