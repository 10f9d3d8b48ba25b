"""The processes that read images for this one: their start, the watch over them, and their end.

torch's `DataLoader` starts them and keeps the order of what they make. Ours is what it leaves open: one line, with the
image's name, for a worker that is killed, crashes or stands still, for shared memory without room and for too few file
handles. By itself it prints tracebacks, raises wherever the main process happens to be, or waits for ever.
"""

from __future__ import annotations

import atexit
import errno
import itertools
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from torch.utils.data import DataLoader, Dataset, get_worker_info

from ssl_seg import images
from ssl_seg.config import UserError
from ssl_seg.terminal import STOPPING

SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps what processes share: batches on their way, and semaphores
AHEAD = 2  # batches that each worker makes before they are asked for; torch's own figure
GLANCE = 1.0  # seconds between two looks at the workers while a batch is waited for
TIMEOUT = 120.0  # seconds; to decode 64 photographs of 12 megapixels takes one core 7
TIMED_OUT = "DataLoader timed out"  # how torch says that there is no batch yet
REASONS: dict[int, str] = {  # by signal: what is behind it, and what to do
    signal.SIGKILL: "Linux does so where memory runs out: set fewer workers or a smaller batch",
    signal.SIGBUS: "shared memory is full perhaps: give it more (docker run --shm-size=1g), or set no workers",
}
NOTHING = -1  # the draw of a worker that has none in hand
QUEUES = 2**15  # bytes of the semaphores of one more worker, and of those that all share: 4 kB each, at most eight
SPARE_HANDLES = 16  # beside those that are counted: an image that is read, what a library opens


class WorkersError(UserError):
    """Workers cannot be started or cannot go on, whatever the image that is read."""

    of_one_process = True


@dataclass(frozen=True)
class Workers:
    """How many processes read images for this one, and how long it waits for them."""

    count: int = 0  # 0: this one reads them itself, when they are asked for
    timeout: float = TIMEOUT  # seconds without the batch that is due, after which its worker stands still
    section: str = "train."  # of the config, where `workers` and `worker_timeout` are set


ALONE = Workers()


class Batches(Sized, Protocol):
    """Draws by batch, the same ones each time it is asked."""

    def __iter__(self) -> Iterator[list[int]]: ...


class Drawable(Protocol):
    """A map from draws to samples, as workers run it. A draw is a number that says which image, and how it is cut."""

    @property
    def nbytes(self) -> int:
        """Of one sample's pixels; 0 where they differ, or do not travel in shared memory."""
        ...

    def name(self, draw: int, /) -> str: ...
    def __getitem__(self, draw: int, /) -> Any: ...


class Handed(ABC):
    """A batch that travels from a worker in shared memory."""

    @property
    @abstractmethod
    def nbytes(self) -> int: ...

    @abstractmethod
    def share(self) -> None:
        """Move it there. Raises RuntimeError where there is no room."""


def collected(
    samples: Drawable,
    batches: Batches,
    workers: Workers,
    collate: Callable[[list[Any]], Any],
    pin: bool = False,
) -> Iterator[Any]:
    """What `collate` makes of the samples of each batch, in the order asked for, or the first UserError among them.

    Raises WorkersError, with the image's name, for a worker that is gone or stands still, and where the machine has too
    little shared memory or too few file handles for workers.
    """
    if workers.count == 0:
        reading = _Reading(samples, collate)
        yield from DataLoader(reading, batch_sampler=batches, collate_fn=reading.batch, pin_memory=pin)
        return
    largest = max((len(batch) for batch in itertools.islice(batches, 1)), default=0)
    check_room(workers, largest * samples.nbytes)
    reading = _Reading(samples, collate, workers)
    with _Team(reading, batches, pin) as team:
        for due in batches:
            yield team.wait_for(due)


def check_room(workers: Workers, nbytes: int) -> None:
    """Raise WorkersError where workers cannot hand over batches of so many bytes: that may come out after hours only.

    They make batches ahead, which wait in shared memory while this process evaluates or saves.
    """
    if workers.count == 0:
        return
    if _free_shared_memory() is None:
        raise WorkersError(
            f"{SHARED_MEMORY}: cannot be written, and loader workers need it; "
            f"set {workers.section}workers=0, or mount it for writing"
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's: those on this machine, which do the same
    if _room(workers, nbytes) * processes > (_free_shared_memory() or 0):
        raise _no_room(workers, nbytes, processes)
    opened, allowed = len(os.listdir("/dev/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    # Two pipes a worker, one for all, and a handle for each tensor of a batch: image, mask and key.
    wanted = opened + 4 * workers.count + 2 + 3 * _waiting(workers) + SPARE_HANDLES
    if allowed != resource.RLIM_INFINITY and wanted > allowed:
        raise _no_handles(workers, f"{wanted} are needed, {allowed} allowed")


def _waiting(workers: Workers) -> int:
    """Batches that there may be at a time: those made ahead, and the one at work."""
    return AHEAD * workers.count + 1


def _room(workers: Workers, nbytes: int) -> int:
    return _waiting(workers) * nbytes + QUEUES * (workers.count + 1)


def _free_shared_memory() -> float | None:
    """Bytes; None where it cannot be written. Other systems than Linux keep it elsewhere, without such a limit."""
    if sys.platform != "linux":
        return math.inf
    return shutil.disk_usage(SHARED_MEMORY).free if os.access(SHARED_MEMORY, os.W_OK) else None


def _no_room(workers: Workers, nbytes: int, processes: int = 1) -> WorkersError:
    free, needed = _free_shared_memory() or 0, _room(workers, nbytes) * processes
    what = f"{_waiting(workers)} batches of {nbytes / 1e6:.3g} MB" if nbytes else "queues"
    return WorkersError(
        f"{SHARED_MEMORY}: {free / 1e6:.3g} MB of shared memory are free, and {workers.count} loader workers need "
        f"{needed / 1e6:.3g} ({what}{f' in each of {processes} processes' if processes > 1 else ''}); "
        f"set {workers.section}workers=0, or give it more (docker run --shm-size=1g)"
    )


def _no_handles(workers: Workers, found: str) -> WorkersError:
    return WorkersError(
        f"{workers.section}workers: too few file handles for loader workers ({found}); raise ulimit -n, or set it to 0"
    )


class _Reading(Dataset[Any]):
    """What a loader's processes do: a sample by its draw, and the batch of some. A worker leaves word what it reads.

    UserErrors come back as values: torch wraps what a worker raises in a page of traceback.
    """

    def __init__(self, samples: Drawable, collate: Callable[[list[Any]], Any], workers: Workers = Workers()) -> None:
        self.samples = samples
        self.collate = collate
        self.workers = workers
        # Shared with the main process, one a worker: the process's number, and the draw that it has in hand.
        self.pids: Any = multiprocessing.RawArray("q", workers.count) if workers.count else ()
        self.draws: Any = multiprocessing.RawArray("q", workers.count) if workers.count else ()

    def begin(self, worker: int) -> None:
        """In a worker, first of all.

        A signal to the whole process group is the main process's to answer, which still wants batches: torch lets a
        worker die of SIGTERM, and then the run fails in place of saving its state. Of a crash the main process tells:
        torch's handlers print a line of their own.
        """
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGSEGV, signal.SIGBUS):
            signal.signal(number, signal.SIG_DFL)
        self.pids[worker], self.draws[worker] = os.getpid(), NOTHING

    def __getitem__(self, draw: int) -> Any:
        self._note(draw)
        try:
            return self.samples[draw]
        except UserError as error:
            return error

    def batch(self, samples: list[Any]) -> Any:
        """One batch, or the first error among the samples."""
        error = next((sample for sample in samples if isinstance(sample, UserError)), None)
        made = self.collate(samples) if error is None else error
        if isinstance(made, Handed) and get_worker_info() is not None:
            made = self._shared(made)
        self._note(NOTHING)
        return made

    def _shared(self, made: Handed) -> Handed | WorkersError:
        """The batch in shared memory: left to torch it gets there in a thread whose errors nobody hears of.

        With handles to spare: that thread needs some for each batch that is fetched.
        """
        try:
            made.share()
            with ExitStack() as spare:
                for _ in range(SPARE_HANDLES // 2):
                    spare.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        except (RuntimeError, OSError) as error:
            if os.strerror(errno.EMFILE) in str(error):
                return _no_handles(self.workers, os.strerror(errno.EMFILE))
            return _no_room(self.workers, made.nbytes)
        return made

    def _note(self, draw: int) -> None:
        worker = get_worker_info()
        if worker is not None:
            self.draws[worker.id] = draw

    def in_hand(self, pid: int | None) -> str | None:
        """The image that this process has in hand, None where it has none."""
        draw = dict(zip(self.pids, self.draws, strict=True)).get(pid, NOTHING)
        return None if draw == NOTHING else self.name(draw)

    def busy(self) -> set[int]:
        """The processes that have an image in hand."""
        return {pid for pid, draw in zip(self.pids, self.draws, strict=True) if draw != NOTHING}

    def name(self, draw: int) -> str:
        return images.show_path(self.samples.name(draw))


class _Team:
    """The workers of one loader, from their start until none is left."""

    def __init__(self, reading: _Reading, batches: Batches, pin: bool) -> None:
        self.reading = reading
        self.workers = reading.workers
        self.loading = DataLoader(
            reading,
            batch_sampler=batches,
            num_workers=self.workers.count,
            prefetch_factor=AHEAD,
            collate_fn=reading.batch,
            pin_memory=pin,
            worker_init_fn=reading.begin,
            timeout=min(GLANCE, self.workers.timeout),
        )
        self.made: Iterator[Any] = iter(())
        self.processes: list[BaseProcess] = []
        self.over = threading.Event()
        self.waits = self.late = False
        self.waited = 0.0  # seconds for the batch that is due
        self.received = 0

    def __enter__(self) -> Self:
        atexit.register(self._end)  # where an error holds on to the loader until then, nobody else ends them
        others = multiprocessing.active_children()
        try:
            with _deaths_unheard():
                self.made = iter(self.loading)
        except OSError as error:
            raise WorkersError(
                f"{self.workers.section}workers: {self.workers.count} loader workers cannot be started "
                f"({error.strerror}); set it to 0"
            ) from error
        finally:
            self.processes = [child for child in multiprocessing.active_children() if child not in others]
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            next(self.made, None)  # torch ends them when it is asked for one more than there are
        self._end()
        atexit.unregister(self._end)

    def _end(self) -> None:
        """None is left: this process could not end before one that stands still."""
        self.over.set()
        with _deaths_unheard():
            for process in self.processes:
                if process.pid in self.reading.busy():  # it reads, so it holds no lock that others wait for
                    process.kill()
            self.made = iter(())  # torch's own is dropped, and asks those that are idle to go
            for process in self.processes:
                if process.is_alive():
                    process.kill()
                process.join(GLANCE)

    def wait_for(self, due: Sequence[int]) -> Any:
        """The next batch, which is that of the draws `due`."""
        self.waited, self.waits = 0.0, True
        try:
            made = self._next(due)
        finally:
            self.waits = False
        if isinstance(made, WorkersError):
            raise made
        self.received += 1
        return made

    def _next(self, due: Sequence[int]) -> Any:
        """The next batch, or an error, which raised in here would hold on to torch's iterator, and so to workers."""
        while True:
            try:
                return next(self.made)
            except (RuntimeError, OSError, EOFError) as error:
                # A worker that ends closes its pipes first, and counts as alive for an instant more.
                moment = GLANCE if isinstance(error, ConnectionError | EOFError) else 0.0
                ended = wait([process.sentinel for process in self.processes], moment)
                gone = [process for process in self.processes if process.sentinel in ended]
                if self.late:
                    return self._standing_still(due)
                if gone:
                    return self._gone(gone)
                if _speaks_of_handles(error):
                    return _no_handles(self.workers, os.strerror(errno.EMFILE))
                if not str(error).startswith(TIMED_OUT):
                    raise

    def _watch(self) -> None:
        """In a thread: end them where this process has waited too long.

        It cannot see to that itself: for the memory of a batch torch asks the worker that made it, and waits for ever
        for one that stands still. Seconds are counted by looks, and no clock is read: Ctrl-Z holds all processes.
        """
        while not self.over.wait(self.loading.timeout):
            if self.waits:
                self.waited += self.loading.timeout
            if self.waits and self.waited > self.workers.timeout:
                self.late = True
                for process in self.processes:
                    process.kill()
                return

    def _gone(self, gone: Sequence[BaseProcess]) -> WorkersError:
        """About workers that have ended though nobody asked them to."""
        gone[0].join()
        code = gone[0].exitcode or 0
        how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        why = REASONS.get(-code, "whatever reads it has crashed: look at it, or remove it")
        name = self.reading.in_hand(gone[0].pid)
        if name is None:
            return WorkersError(f"{self.workers.section}workers: one was ended {how} between two images; {why}")
        return WorkersError(f"{name}: the loader worker that was reading it was ended {how}; {why}")

    def _standing_still(self, due: Sequence[int]) -> WorkersError:
        pid = self.reading.pids[self.received % self.workers.count]  # torch deals batches out in turn
        name = self.reading.in_hand(pid) or self.reading.name(due[0])
        return WorkersError(
            f"{name}: not handed over by its loader worker within {self.workers.timeout:g} s; see whether its disk "
            f"answers, or wait longer with {self.workers.section}worker_timeout"
        )


def _speaks_of_handles(error: BaseException) -> bool:
    """What torch and Python say where a handle of a batch could not be received."""
    return any(words in str(error) for words in (os.strerror(errno.EMFILE), "Too many open files", "ancdata"))


@contextmanager
def _deaths_unheard() -> Iterator[None]:
    """torch raises from a handler of SIGCHLD, wherever the main process is; here it is told when a batch is due."""
    former = None
    with suppress(ValueError):  # not in the main thread, where torch sets none either
        former = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        if former is not None:
            signal.signal(signal.SIGCHLD, former)
