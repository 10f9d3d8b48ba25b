"""Faults for tests of what is kept on disk: kills at each system call, disks without room, errors of one line."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from ssl_seg.config import UserError
from tests.processes import PROCESSES

SYSTEM_CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "ftruncate")


def message_of(action: Callable[[], object]) -> str:
    """The one line of the UserError that `action` raises."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    return text


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".ssl_seg")]


def run_in_child(target: Callable, *arguments: object) -> int | None:
    child = PROCESSES.Process(target=target, args=arguments)
    child.start()
    child.join(60)
    return child.exitcode


def exit_at_call(number: int, action: Callable[[Path], None], folder: Path) -> None:
    """Do `action`, but die without a trace right before its system call of that number."""
    calls = count()

    def dying(call: Callable) -> Callable:
        def counted(*arguments, **options):
            if next(calls) == number:
                os._exit(9)
            return call(*arguments, **options)

        return counted

    for name in SYSTEM_CALLS:
        setattr(os, name, dying(getattr(os, name)))
    action(folder)


def crash_everywhere(
    folder: Path, prepare: Callable[[Path], None], action: Callable[[Path], None], check: Callable[[Path], None]
) -> int:
    """Kill `action` at each of its system calls, on a fresh copy of what `prepare` made; then `check` the folder."""
    prepare(folder / "template")
    for number in count():
        trial = folder / str(number)
        shutil.copytree(folder / "template", trial)
        exitcode = run_in_child(exit_at_call, number, action, trial)
        check(trial)
        shutil.rmtree(trial)
        if exitcode == 0:
            return number
        assert exitcode == 9


class FullDisk:
    """System calls of which the one numbered `failing` finds no room."""

    def __init__(self, failing: int) -> None:
        self.failing = failing
        self.calls = 0

    def wrap(self, call: Callable) -> Callable:
        def counted(*arguments, **options):
            self.calls += 1
            if self.calls == self.failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **options)

        return counted
