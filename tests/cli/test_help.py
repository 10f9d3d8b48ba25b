"""Help ends with examples, and these work; a shell can complete the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from ssl_seg.cli import app, run
from ssl_seg.cli.shell import EXAMPLES
from tests.test_docs import STUDY, calls, check_call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the examples suppose."""
    for place in ("photos", "labelled/images", "labelled/masks", "test/images", "test/masks", "drawn/images", "others"):
        (tmp_path / place).mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "photos" / name).touch()
    for name in ("pretrained", "encoder"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps({"stage": "finetune"}))
    (tmp_path / "study.yaml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_has_two_examples() -> None:
    assert EXAMPLES.keys() == typer.main.get_command(app).commands.keys()
    assert {len(examples) for examples in EXAMPLES.values()} == {2}


def test_the_examples_are_printed_and_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = [(name, example) for name, examples in EXAMPLES.items() for example in examples]
    for name in EXAMPLES:
        assert run(lambda name=name: app(args=[name, "--help"], prog_name="ssl-seg", standalone_mode=False)) == 0
        lines = [line.strip() for line in capsys.readouterr().out.rstrip().splitlines()]
        assert tuple(lines[-2:]) == EXAMPLES[name]
    for (name, _), words in zip(every, calls("\n".join(example for _, example in every), folder), strict=True):
        assert words[0] == name
        check_call(words)


def test_completion_names_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for key, value in {"_SSL_SEG_COMPLETE": "complete_bash", "COMP_WORDS": "ssl-seg pre", "COMP_CWORD": "1"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit):
        app(args=[], prog_name="ssl-seg", standalone_mode=False)
    assert set(capsys.readouterr().out.split()) == {"predict", "pretrain"}
