"""The person at the terminal: what a run says while it works, what Ctrl-C, SIGTERM and a hangup do to it.

What only tells of a run must not end it: a terminal that is gone, a log on a full disk or a reader such as `head` that
has seen enough leaves the work as it is.
"""

from __future__ import annotations

import codecs
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssl_seg.config import Interrupted, UserError

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # signals that ask for an end
# Seconds within which a signal that comes again is the same one. What torch 2.14's torchrun passes on came within 7 ms
# of the first, on two busy cores (16 times); a person who presses Ctrl-C a second time takes longer than this.
SAME_SIGNAL = 0.3
STOPPED = "stopped; the same command continues"  # what a run says of itself
SECONDS_BETWEEN_LINES = 5.0  # of a log without a terminal


class Reporter:
    """A progress bar on a terminal; elsewhere a line now and then with step, losses, images/s and time left.

    `unit` is the word for what is counted.
    """

    def __init__(self, steps: int, start: int, batch_size: int, quiet: bool, unit: str = "step") -> None:
        self.steps = steps
        self.start = start
        self.batch_size = batch_size
        self.quiet = quiet
        self.unit = unit
        self.started = time.monotonic()
        self.said = float("-inf")
        console = Console(stderr=True)
        self.bar: Progress | None = None
        if console.is_terminal and not quiet:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=console)
            self.line = self.bar.add_task("", total=steps, completed=start)

    def images_per_s(self, step: int) -> float:
        return (step - self.start) * self.batch_size / max(1e-9, time.monotonic() - self.started)

    def step(self, number: int, figures: Mapping[str, float]) -> None:
        shown = {name: value for name, value in figures.items() if name.endswith("/loss") or name == "val/miou"}
        words = [f"{name.removeprefix('train/').removesuffix('/loss')} {value:.4f}" for name, value in shown.items()]
        scored = any(name.startswith("val/") for name in figures)
        rate = self.images_per_s(number)
        text = ", ".join([*words, f"{rate:.1f} images/s"])
        if self.bar is not None:
            self.bar.update(self.line, completed=number, description=text)
            return
        now = time.monotonic()
        if not self.quiet and (now - self.said >= SECONDS_BETWEEN_LINES or number == self.steps or scored):
            self.said = now
            left = (self.steps - number) * self.batch_size / max(rate, 1e-9)
            say(f"{self.unit} {number}/{self.steps}: {text}, {clock(left)} left")


@contextmanager
def reporter(steps: int, start: int, batch_size: int, quiet: bool, unit: str = "step") -> Iterator[Reporter]:
    report = Reporter(steps, start, batch_size, quiet, unit)
    if report.bar is None:
        yield report
        return
    report.bar.start()
    try:
        yield report
    finally:
        with suppress(OSError):  # the terminal is gone
            report.bar.stop()


def say(text: str, quiet: bool = False) -> None:
    """A line for the person at the terminal; results go to stdout, this does not."""
    if not quiet:
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


class Signals:
    """SIGTERM, SIGINT and SIGHUP: an end at once, or inside `deferred` a note, so that no step is ever cut in half.

    A second one ends at once everywhere, unless it is the first once more, within `SAME_SIGNAL` seconds: torchrun
    passes on to each process what systemd or Slurm has told every process of the job already.
    """

    def __init__(self, told: str = STOPPED) -> None:
        self.told = told
        self.noted: int | None = None
        self.noted_at = 0.0
        self.defers = False
        self.raised: int | None = None  # the signal that ended what was at work

    def asked(self) -> bool:
        return self.noted is not None

    @property
    def first(self) -> int:
        """The signal noted here; SIGTERM where another process has been asked."""
        return self.noted or signal.SIGTERM

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self.defers = True
        try:
            yield
        finally:
            self.defers = False

    def handle(self, signum: int, _: object) -> None:
        now = time.monotonic()
        if self.defers and self.noted is None:
            self.noted, self.noted_at = signum, now
            return
        if self.defers and signum == self.noted and now - self.noted_at < SAME_SIGNAL:
            return
        self.raised = signum
        raise Interrupted(signum, self.told)


@contextmanager
def watch_signals(told: str = STOPPED) -> Iterator[Signals]:
    """Inside, a signal is an `Interrupted` with that text. A hangup that is ignored stays so: nohup asks for it."""
    signals = Signals(told)
    former = {}
    wanted = [number for number in STOPPING if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)]
    try:
        for number in wanted:
            former[number] = signal.signal(number, signals.handle)
    except ValueError:
        pass  # not in the main thread: Python delivers signals there only
    try:
        yield signals
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def clock(seconds: float) -> str:
    """`5:07`, `1:05:07`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def tells() -> bool:
    """Of several processes that come to the same result, the first tells it."""
    return os.environ.get("RANK", "0") == "0"


def tells_here() -> bool:
    """Of several processes that meet an error before they know of each other, the first of each machine tells it."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def print_lines(lines: Sequence[str]) -> None:
    if tells():
        print("\n".join(lines))


# ---- the streams of a process ----

PLAIN = "ssl_seg.plain"  # how letters are written that the terminal's encoding lacks
SIGNS = {"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{PLUS-MINUS SIGN}": "+-", "\N{MULTIPLICATION SIGN}": "x"}


def _in_plain(error: UnicodeError) -> tuple[str, int]:
    """A loss must not lose its sign; any other letter is a question mark."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return "".join(SIGNS.get(letter, "?") for letter in letters), error.end


codecs.register_error(PLAIN, _in_plain)


@contextmanager
def usable_streams() -> Iterator[None]:
    """Inside, whatever is led into stdin, stdout and stderr, or closed, neither ends the work nor takes its files.

    Call it before files are opened: the first would take the number of a closed stream, and whatever is printed there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(nowhere, nowhere == number)  # as every other stream is
            setattr(sys, name, os.fdopen(nowhere, "r" if number == 0 else "w"))
    with suppress(OSError):  # of what was printed before
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors=PLAIN)
    former = sys.stdout
    output: Any = _Output(former)
    sys.stdout = output
    try:
        yield
    finally:
        sys.stdout = former


class _Output:
    """stdout, where a reader that has seen enough, such as `head`, is no error, and a full disk one line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: UserError | None = None

    def write(self, text: str) -> int:
        with self._told():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._told():
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @contextmanager
    def _told(self) -> Iterator[None]:
        if self.failure is not None:  # whoever tries it first may keep it to himself, as typer does before its help
            raise self.failure
        try:
            yield
        except OSError as error:
            # What is left in the buffer goes nowhere, or Python would complain of it once more at the end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                self.failure = UserError(
                    f"stdout: cannot be written ({error.strerror}); make room, or lead the output elsewhere"
                )
                raise self.failure from error
