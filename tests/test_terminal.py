"""What a run says while it works, and what signals do."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from ssl_seg.config import Interrupted
from ssl_seg.terminal import SAME_SIGNAL, reporter, watch_signals
from tests import ROOT


def test_without_a_terminal_lines_tell_step_losses_speed_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with reporter(steps=5, start=0, batch_size=4, quiet=False) as report:
        for step in range(1, 6):
            figures = {"train/denoise/loss": 0.5, "train/loss": 0.5, **({"val/miou": 0.25} if step == 3 else {})}
            report.step(step, figures)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1/5", "step 3/5", "step 5/5"], "first, a score, last"
    assert re.fullmatch(
        r"step 3/5: denoise 0\.5000, loss 0\.5000, val/miou 0\.2500, [\d.]+ images/s, \d+:\d\d left", lines[1]
    )


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with reporter(steps=1, start=0, batch_size=4, quiet=True) as report:
        report.step(1, {"train/loss": 0.5})
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar() -> None:
    script = (
        "from ssl_seg.terminal import reporter\n"
        "with reporter(4, 0, 2, False) as report:\n"
        "    for step in range(1, 5): report.step(step, {'train/loss': 0.5})\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", script], stderr=theirs, env=environment, cwd=ROOT, check=True, timeout=60)
    os.close(theirs)
    said = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "4/4" in said
    assert "loss 0.5000" in said
    assert "step 1/4:" not in said


def test_a_signal_ends_at_once_unless_deferred_and_the_second_always() -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell's background job begins with one that ignores it
    with watch_signals() as signals:
        with pytest.raises(Interrupted, match=r"SIGTERM: stopped"):
            os.kill(os.getpid(), signal.SIGTERM)
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.asked()
            assert signals.first == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)  # the same once more, passed on by a launcher
            assert signals.first == signal.SIGINT
            with pytest.raises(Interrupted, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
            signals.noted_at -= SAME_SIGNAL
            with pytest.raises(Interrupted, match="SIGINT"):
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_person_is_heard_the_second_time() -> None:
    with watch_signals() as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # as fast as one who means it
        with pytest.raises(Interrupted, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
