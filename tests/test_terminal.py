"""What a run says while it works, and what signals do."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ssl_seg import cli
from ssl_seg.config import Interrupted
from ssl_seg.terminal import SAME_SIGNAL, reporter, watch_signals
from tests import ROOT
from tests.small import pretraining


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


def test_a_hangup_is_an_end_unless_it_was_to_be_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with watch_signals(), pytest.raises(Interrupted, match="SIGHUP"):
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup hands it on
        with watch_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of a shell, in which `ssl-seg` is that of this tree."""
    started = f'set -o pipefail; ssl-seg() {{ {sys.executable} -m ssl_seg "$@"; }}; {line}'
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", started], text=True, cwd=ROOT, env=environment, check=False, **pipes)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("ssl-seg --version >&-", 0, ""),
        ("ssl-seg --version | true", 0, ""),
        ("ssl-seg --version >&- 2>&- <&-", 0, ""),
        ("ssl-seg --version > /dev/full", 2, "ssl-seg: stdout: cannot be written (No space left on device); "),
        ("ssl-seg --help > /dev/full", 2, "ssl-seg: stdout: cannot be written (No space left on device); "),
        ("ssl-seg --help | true", 0, ""),
    ],
)
def test_a_stream_that_takes_nothing_is_no_traceback(line: str, code: int, said: str) -> None:
    done = shell(line)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_verb_takes_every_stream(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tmp_path / "config.yaml"
    values = pretraining(steps=2)
    config.write_text(OmegaConf.to_yaml(OmegaConf.create({**values, "model": {**values["model"], "norm": "switch"}})))
    made = f"ssl-seg pretrain {config} --plugin tests/small.py --quiet --overwrite --out {out}"
    drawn = f"rm -rf {tmp_path / 'drawn'}; ssl-seg synth squares --count 2 --quiet --out {tmp_path / 'drawn'}"
    for verb in (made, f"ssl-seg compare {out}", f"ssl-seg norms {out}", f"ssl-seg report {out}", drawn):
        for end, code in ((">&-", 0), ("| true", 0), ("2> /dev/full", 0), ("> /dev/full", 2)):
            done = shell(f"{verb} {end}")
            assert (done.returncode, "Traceback" in done.stderr) == (code, False), (verb, end, done.stderr)


def test_signs_that_a_terminal_lacks_are_written_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for encoding in ("ascii", "latin-1", "utf-8"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        assert cli.run(lambda: print("\N{MINUS SIGN}1.5 ± 0.4, äß \N{CJK UNIFIED IDEOGRAPH-732B} \udcff")) == 0
        shown[encoding] = raw.getvalue().decode(encoding).strip()
    assert shown == {
        "ascii": "-1.5 +- 0.4, ?? ? ?",
        "latin-1": "-1.5 ± 0.4, äß ? ?",
        "utf-8": "\N{MINUS SIGN}1.5 ± 0.4, äß \N{CJK UNIFIED IDEOGRAPH-732B} ?",
    }


@pytest.mark.parametrize("moment", ["import typer", "import of a plug-in"])
def test_ctrl_c_while_something_is_imported_is_one_line(tmp_path: Path, moment: str) -> None:
    interrupts = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    if moment == "import typer":
        (tmp_path / "typer.py").write_text(interrupts)
        done = shell("ssl-seg --help", PYTHONPATH=f"{tmp_path}:{ROOT}")
    else:
        wraps = (
            f"try:\n    {interrupts}\nexcept Exception as error:\n    raise ImportError('a half of it') from error\n"
        )
        (tmp_path / "plugin.py").write_text(wraps)
        done = shell(f"ssl-seg compare {tmp_path} --plugin {tmp_path / 'plugin.py'}")
    assert done.returncode == 130
    assert done.stderr.startswith("ssl-seg: SIGINT: stopped")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_a_run_that_has_saved_its_state(tmp_path: Path) -> None:
    out, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(OmegaConf.to_yaml(OmegaConf.create(pretraining(steps=2000, save_every=1000))))
    words = ["-m", "ssl_seg", "pretrain", str(config), "--plugin", "tests/small.py", "--out", str(out)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, *words])
    try:
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
            os.read(terminal, 100_000)
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert json.loads((out / "run.json").read_text())["status"] == "killed"
    assert list((out / "state").glob("step_*"))
