"""The person at the terminal: what a run says while it works, and what Ctrl-C and SIGTERM do to it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssl_seg.config import Interrupted

# Seconds within which a signal that comes again is the same one. What torch 2.14's torchrun passes on came within 7 ms
# of the first, on two busy cores (16 times); a person who presses Ctrl-C a second time takes longer than this.
SAME_SIGNAL = 0.3
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
            print(f"{self.unit} {number}/{self.steps}: {text}, {clock(left)} left", file=sys.stderr, flush=True)


@contextmanager
def reporter(steps: int, start: int, batch_size: int, quiet: bool, unit: str = "step") -> Iterator[Reporter]:
    report = Reporter(steps, start, batch_size, quiet, unit)
    if report.bar is None:
        yield report
        return
    with report.bar:
        yield report


def say(text: str, quiet: bool = False) -> None:
    """A line for the person at the terminal; results go to stdout, this does not."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


class Signals:
    """SIGTERM and SIGINT: an end at once, or inside `deferred` a note, so that a step is never cut in half.

    A second one ends at once everywhere, unless it is the first once more, within `SAME_SIGNAL` seconds: torchrun
    passes on to each process what systemd or Slurm has told every process of the job already.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self.noted_at = 0.0
        self.defers = False

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
        raise Interrupted(signum, "stopped; the same command continues")


@contextmanager
def watch_signals() -> Iterator[Signals]:
    signals = Signals()
    former = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
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
    """Of several processes that come to the same result or the same error, the first tells it."""
    return os.environ.get("RANK", "0") == "0"


def print_lines(lines: Sequence[str]) -> None:
    if tells():
        print("\n".join(lines))
