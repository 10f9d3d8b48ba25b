"""Keys that no config has: told as the classes tell them, from a list that is theirs, before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssl_seg.cli import known
from ssl_seg.cli.looking import CONFIGS, config_of
from ssl_seg.config import UserError, load, unflatten
from ssl_seg.keys import places_of
from tests.faults import message_of

FILE = Path(known.__file__).with_name(known.FILE)


def places() -> dict[str, list[str]]:
    return {stage: list(places_of(config_of(stage))) for stage in CONFIGS}


def test_the_list_is_that_of_the_classes() -> None:
    assert json.loads(FILE.read_text()) == places(), "write it anew: python -m tests.cli.test_known"


@pytest.mark.parametrize("stage", CONFIGS)
def test_every_key_is_known_wherever_it_stands(stage: str) -> None:
    for place in places()[stage]:
        known.check_keys(stage, unflatten({place: None}))


@pytest.mark.parametrize(
    ("stage", "values"),
    [
        ("pretrain", {"trian": {}}),
        ("pretrain", {"data": {"pool": {"type": "synthetic"}}, "train": {"stesp": 5}, "tasks": {"denoise": {}}}),
        ("pretrain", {"data": {"pool": {"type": "synthetic"}}, "crop": [64, 64]}),
        ("finetune", {"data": {"labelled": {"type": "synthetic"}, "labeled": {}}}),
        ("finetune", {"data": {"labelled": {"type": "synthetic"}}, "labels": {"cuont": 5}}),
        ("predict", {"modle": "runs/encoder"}),
        ("study", {"seed": [0, 1], "pretrian": {}}),
        ("select", {"data": {"pol": {}}}),
    ],
)
def test_it_says_what_the_classes_say(stage: str, values: dict[str, Any]) -> None:
    assert message_of(lambda: known.check_keys(stage, values)) == message_of(lambda: load(config_of(stage), values))


def test_what_a_plugin_may_say_is_left_to_it() -> None:
    values = {"data": {"pool": {"type": "mine", "anything": 1}}, "tasks": {"mine": {"strength": 2}}}
    known.check_keys("pretrain", {**values, "model": {"encoder": {"type": "mine", "width": 3}}, "tracking": "none"})
    known.check_keys("no stage", {"whatever": 1})
    with pytest.raises(UserError, match="did you mean 'encoder'"):
        known.check_keys("pretrain", {**values, "model": {"encodr": "resnet18"}})


def test_a_wrong_key_is_answered_without_the_heavy_imports() -> None:
    script = (
        "import sys\n"
        "from ssl_seg import cli\n"
        "code = cli.run(lambda: cli.app(args=['pretrain', 'squares', 'train.stesp=5'], standalone_mode=False))\n"
        "print(code, sorted({'torch', 'timm', 'cv2', 'mlflow'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "2 []", done.stderr
    assert "train: unknown key 'stesp'; did you mean 'steps'?" in done.stderr


if __name__ == "__main__":
    FILE.write_text(json.dumps(places(), indent=1) + "\n")
