"""Two gloo processes against one: the same gradients, losses and scores in every mode, and commands under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT
from tests.training.test_loop import ROUNDING
from tests.two_processes import MODES, evaluate, jointly, record, score_one_image, taught


def torchrun(*words: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes saw; all modes in one start, which is what takes the time."""
    out = tmp_path_factory.mktemp("ddp") / "seen.pt"
    done = torchrun("-m", "tests.two_processes", "compare_modes", str(out))
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize(("views", "encode"), MODES)
def test_two_processes_learn_what_one_does(two: dict[str, Any], views: str, encode: str) -> None:
    alone, both = record(views, encode), two[f"{views}-{encode}"]
    assert (alone["world"], both["world"]) == (1, 2)
    for name, gradient in alone["gradients"].items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(both["gradients"][name], gradient, rtol=0, atol=1e-5 * largest, msg=name)
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert both["scores"] == pytest.approx(alone["scores"], rel=1e-2)


def test_each_image_is_scored_once(two: dict[str, Any]) -> None:
    assert two["confusions"] == [evaluate(count) for count in range(4)]
    assert [sum(found["count"]) for found in two["confusions"]] == [0, 6400, 2 * 6400, 3 * 6400]
    assert two["confusions"][3]["names"] == ("textured_6_0", "textured_6_1", "textured_6_2")


def test_a_process_without_an_image_does_no_harm(two: dict[str, Any]) -> None:
    assert two["one image"] == pytest.approx(score_one_image())


@pytest.mark.parametrize("encode", ["together", "in_turn"])
def test_joint_training_deals_out_both_streams(two: dict[str, Any], encode: str) -> None:
    assert two["jointly"][encode] == pytest.approx(jointly(encode), rel=1e-3)


@pytest.mark.parametrize("encode", ["together", "in_turn"])
def test_a_teacher_pairs_and_an_encoder_that_begins_frozen(two: dict[str, Any], encode: str) -> None:
    """The same mixtures, to the bit; the same gradients after DDP has been wrapped anew; one teacher on both."""
    alone, both = taught(encode), two["taught"][encode]
    assert both["uses_ddp"] == (encode == "together")
    assert both["mixtures"] == alone["mixtures"]
    assert len(set(both["mixtures"])) == 8
    for name, gradient in alone["gradients"].items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(both["gradients"][name], gradient, rtol=0, atol=ROUNDING * largest, msg=name)
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    torch.testing.assert_close(both["teacher"], alone["teacher"], rtol=0, atol=1e-5)
    first, second = both["totals"]
    assert first == second


def test_nan_on_one_process_is_skipped_by_all(two: dict[str, Any]) -> None:
    weights = two["nan"]["weights"]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert all(step.isfinite().all() for step in weights)
    first, second = two["nan"]["of_last"]
    assert first == second, "the processes hold the same weights"


def test_a_folder_that_cannot_be_used_is_told_once_and_keeps_no_process_waiting(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("not a run")
    done = torchrun("-m", "ssl_seg", "pretrain", "squares", "--out", str(tmp_path))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("ssl-seg: ")]
    assert len(said) == 1, done.stderr
    assert "letter.txt" in said[0]
    assert "ssl_seg/stage.py" not in done.stderr, "no traceback of ours; torchrun prints its own"


def test_a_leak_that_only_the_first_process_looks_for_ends_all_and_is_told_once(tmp_path: Path) -> None:
    same = ("data.pool.seed=5", "data.val.seed=5")  # the first images of one drawn world
    done = torchrun("-m", "ssl_seg", "pretrain", "squares", *same, "--out", str(tmp_path / "run"))
    assert "exitcode  : 3" in done.stderr, "the first to end says why; torchrun itself exits with 1"
    said = [line for line in done.stderr.splitlines() if line.startswith("ssl-seg: ")]
    assert len(said) == 1, done.stderr
    assert "leaks.allow" in said[0]
    assert "ssl_seg/leaks.py" not in done.stderr, "no traceback of ours; torchrun prints its own"
    assert (tmp_path / "run" / "leaks.png").is_file()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
