"""Two gloo processes against one: the same gradients, losses and scores in every mode, and commands under torchrun."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from torch.distributed import distributed_c10d

from ssl_seg import cli
from ssl_seg.config import UserError, load
from ssl_seg.data import loading
from ssl_seg.runs.checkpoint import load_state
from ssl_seg.runs.writer import Run
from ssl_seg.stages import scoring
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.setup import Options
from ssl_seg.training.config import TrainConfig
from ssl_seg.training.processes import Processes
from tests.processes import Child, in_pair, start_pair, start_torchrun
from tests.small import pretraining, words
from tests.training.test_loop import ROUNDING
from tests.two_processes import (
    MODES,
    UNUSUAL,
    begin_alike,
    compare_modes,
    evaluate,
    jointly,
    on_pseudo_labels,
    recalibrated,
    record,
    score_one_image,
    sharing_a_pass,
    taught,
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes saw in all modes."""
    out = tmp_path_factory.mktemp("ddp") / "seen.pt"
    in_pair(compare_modes, str(out))
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How two processes begin: which of them wait for each other, and what they refuse to begin with."""
    out = tmp_path_factory.mktemp("begun") / "seen.pt"
    in_pair(begin_alike, str(out))
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


@pytest.mark.parametrize("mode", MODES[::3], ids="-".join)
def test_two_processes_learn_alike_from_a_frozen_teacher_and_from_two_crops(two: dict[str, Any], mode: Any) -> None:
    alone, both = record(*mode, UNUSUAL, steps=3), two["unusual"][mode]
    for name, gradient in alone["gradients"].items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(both["gradients"][name], gradient, rtol=0, atol=ROUNDING * largest, msg=name)
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert both["scores"] == pytest.approx(alone["scores"], rel=1e-2, abs=1e-2)


def test_each_image_is_scored_once(two: dict[str, Any]) -> None:
    assert two["confusions"] == [evaluate(count) for count in range(4)]
    assert [sum(found["count"]) for found in two["confusions"]] == [0, 6400, 2 * 6400, 3 * 6400]
    assert two["confusions"][3]["names"] == ("textured_6_0", "textured_6_1", "textured_6_2")


def test_a_process_without_an_image_does_no_harm(two: dict[str, Any]) -> None:
    assert two["one image"] == pytest.approx(score_one_image())


@pytest.mark.parametrize("encode", ["together", "in_turn"])
def test_joint_training_deals_out_both_streams(two: dict[str, Any], encode: str) -> None:
    assert two["jointly"][encode] == pytest.approx(jointly(encode), rel=1e-3)


def test_statistics_that_are_estimated_anew_are_the_same_on_each_process(two: dict[str, Any]) -> None:
    (alone,) = recalibrated()
    for both in two["recalibrated"]:
        assert both.keys() == alone.keys()
        for name, own in alone.items():
            torch.testing.assert_close(both[name], own, rtol=1e-5, atol=1e-6, msg=name)


def test_a_pass_that_two_tasks_share_is_the_same_on_two_processes_and_in_turn(two: dict[str, Any]) -> None:
    alone = sharing_a_pass("together")
    for found in (*two["shared"].values(), sharing_a_pass("in_turn")):
        assert found == pytest.approx(alone, rel=1e-3)


def test_pseudo_labels_are_the_same_on_two_processes_and_in_micro_batches(two: dict[str, Any]) -> None:
    alone = on_pseudo_labels()
    assert two["pseudo-labels"] == pytest.approx(alone, rel=1e-3)
    assert on_pseudo_labels(accumulate=2) == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("encode", ["together", "in_turn"])
def test_a_teacher_pairs_and_an_encoder_that_begins_frozen(two: dict[str, Any], encode: str) -> None:
    """The same mixtures, to the bit; the same gradients after DDP has been wrapped anew; one teacher on both."""
    alone, both = taught(encode), two["taught"][encode]
    assert both["uses_ddp"] == (encode == "together")
    assert both["mixtures"] == alone["mixtures"]
    assert len(set(both["mixtures"])) == 8 + 8 + 8
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


def test_processes_agree_how_finely_a_batch_is_cut_where_one_has_little_memory(two: dict[str, Any]) -> None:
    """Each has four of the eight images, so two micro-batches are needed; neither waits for the one that failed."""
    assert two["auto"] == {"found": [2, 2], "changed": []}


def test_none_waits_in_a_synchronised_norm_for_one_that_runs_out_of_memory(begun: dict[str, Any]) -> None:
    assert begun["auto amid norms"] == [2, 2]


TOLD_APART = {
    "seed": "seed: 0 for rank 0 and 7 for rank 1 (process ",
    "crop": "augment.crop: [64, 64] for rank 0 and [32, 32] for rank 1",
    "steps": "train.steps: 6 for rank 0 and 8 for rank 1",
    "task": "tasks.rotate.weight: 0.5 for rank 0 and null for rank 1",
    "cannot": "rank 1 (process ",
    "folder": "--out: ",
    "slow workers": "train.process_timeout: after 600 s the other processes would not wait",
    "precision": 'precision: "fp32" for rank 0 and "bf16" for rank 1',
    "fewer": "data.pool.images: 12 for rank 0 and 11 for rank 1",
    "names": "data.pool.sha256_of_names: ",
    "pixels": "data.pool.sha256_of_some: ",
}


@pytest.mark.parametrize("case", TOLD_APART)
def test_processes_that_would_train_on_different_things_are_refused(begun: dict[str, Any], case: str) -> None:
    first, second = begun["apart"][case]
    assert first == second
    assert first.startswith(TOLD_APART[case])


def test_the_processes_wait_for_each_other_as_long_as_the_config_says(begun: dict[str, Any]) -> None:
    """gloo's own half hour is not meant, nor accelerate's idea of which times need not be handed on."""
    first, second = begun["timeout"]
    assert first == second == pytest.approx(TrainConfig().process_timeout, abs=0.01)


def test_an_error_is_told_once_and_by_a_process_that_has_met_it(begun: dict[str, Any]) -> None:
    assert sorted(begun["tells"]["all"]) == [False, True]
    assert begun["tells"]["last"] == [None, True]


def test_processes_may_differ_in_what_no_weight_comes_from(begun: dict[str, Any]) -> None:
    assert begun["apart"]["nothing"] == [None, None]


@pytest.mark.parametrize("encode", ["together", "in_turn"])
def test_all_processes_begin_with_the_weights_of_the_first(begun: dict[str, Any], encode: str) -> None:
    first, second = begun["shared"][encode]
    assert first == second


def test_a_folder_that_cannot_be_used_is_told_once_and_keeps_no_process_waiting(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("not a run")
    pair = start_pair(cli.main, ["pretrain", "squares", "--out", str(tmp_path)])
    stderr = "".join(child.communicate()[1] for child in pair)
    assert [child.returncode for child in pair] == [2, 2]
    said = [line for line in stderr.splitlines() if line.startswith("ssl-seg: ")]
    assert len(said) == 1, stderr
    assert "letter.txt" in said[0]
    assert "Traceback" not in stderr


def run_until_one_fails(folder: str) -> None:
    """A run whose second process meets a file that cannot be read, at the third step."""
    real = loading.Samples.__getitem__

    def read(samples: loading.Samples, draw: int) -> loading.Sample:
        if os.environ["RANK"] == "1" and draw >= 8:
            raise UserError("b.png: damaged")
        return real(samples, draw)

    with mock.patch.object(loading.Samples, "__getitem__", read):
        config = load(PretrainConfig, pretraining(steps=6, save_every=1))
        sys.exit(cli.run(lambda: pretrain(config, Options(folder, quiet=True))))


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_the_others_in_a_line(tmp_path: Path) -> None:
    pair = start_pair(run_until_one_fails, str(tmp_path))
    first, second = (child.communicate()[1] for child in pair)
    assert [child.returncode for child in pair] == [2, 2]
    assert second == "ssl-seg: b.png: damaged\n"
    assert first.splitlines()[-1].startswith("ssl-seg: another process of this run has ended")
    assert "Traceback" not in first
    assert load_state(tmp_path).step == 2


def test_a_leak_that_only_the_first_process_looks_for_ends_all_and_is_told_once(tmp_path: Path) -> None:
    same = ("data.pool.seed=5", "data.val.seed=5")  # the first images of one drawn world
    started = start_torchrun("-m", "ssl_seg", "pretrain", "squares", *same, "--out", tmp_path / "run")
    _, stderr = started.communicate(timeout=240)
    assert "exitcode  : 3" in stderr, "the first to end says why; torchrun itself exits with 1"
    said = [line for line in stderr.splitlines() if line.startswith("ssl-seg: ")]
    assert len(said) == 1, stderr
    assert "leaks.allow" in said[0]
    assert "ssl_seg/leaks.py" not in stderr, "no traceback of ours; torchrun prints its own"
    assert (tmp_path / "run" / "leaks.png").is_file()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- processes that do not answer ----


def said_of(stderr: str) -> list[str]:
    assert "Traceback" not in stderr.partition("torch/distributed/")[0], "torchrun prints one of its own"
    return [line for line in stderr.splitlines() if line.startswith("ssl-seg: ")]


def stand_still(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def meet(still: str) -> None:
    """Two processes that meet, and would do so again, but the one of rank `still` stands still."""

    def wait_for_all() -> None:
        processes = Processes(TrainConfig(device="cpu"))
        processes.barrier()
        if os.environ["RANK"] == still:
            stand_still()
        # Not from the beginning: on a busy machine they do not even start within a second of each other.
        processes.timeout = 1
        distributed_c10d._set_pg_timeout(timedelta(seconds=1))
        with processes.ending_together():
            processes.barrier()

    sys.exit(cli.run(wait_for_all))


def ended_without(still: int, pair: list[Child]) -> str:
    """What the process that waited in vain says; the other is killed, as torchrun does after 30 seconds."""
    waiting = pair[1 - still]
    waiting.process.join(120)
    assert waiting.returncode == 2, waiting.communicate()
    assert psutil.Process(pair[still].pid).status() == psutil.STATUS_STOPPED
    pair[still].kill()
    pair[still].communicate()
    (line,) = said_of(waiting.communicate()[1])
    return line


@pytest.mark.parametrize("still", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_does_not_answer_is_named(still: int) -> None:
    """Also the first, who keeps the addresses of all: without torchrun nobody can be asked then where it is."""
    pair = start_pair(meet, str(still))
    line = ended_without(still, pair)
    assert line.startswith(f"ssl-seg: rank {still} of 2")
    assert "no answer within 1 s" in line
    assert "train.process_timeout" in line
    assert still == 0 or f"(process {pair[still].pid} on " in line


def run_until_one_stands_still(folder: str, place: str) -> None:
    """A run whose second process stands still at its third step or an evaluation, or whose first one when it saves."""
    read = {
        "step": (loading.Samples, "__getitem__"),
        "evaluation": (scoring, "score_tasks"),
        "save": (Run, "save_state"),
    }
    owner, name = read[place]
    real: Callable[..., Any] = getattr(owner, name)

    def until_then(*arguments: Any, **options: Any) -> Any:
        if place == "evaluation":
            is_then = os.environ["RANK"] == "1"
        elif place == "step":
            is_then = os.environ["RANK"] == "1" and arguments[1] >= 8
        else:
            is_then = os.environ["RANK"] == "0" and arguments[1] == 4
        if is_then:
            stand_still()
        return real(*arguments, **options)

    with mock.patch.object(owner, name, until_then):
        config = load(PretrainConfig, pretraining(steps=6, save_every=2, eval_every=3, process_timeout=30))
        sys.exit(cli.run(lambda: pretrain(config, Options(folder, quiet=True))))


@pytest.mark.slow
@pytest.mark.parametrize(("place", "still"), [("step", 1), ("evaluation", 1), ("save", 0)])
def test_a_process_that_stands_still_ends_the_run_with_its_checkpoint_whole(
    tmp_path: Path, place: str, still: int
) -> None:
    line = ended_without(still, start_pair(run_until_one_stands_still, str(tmp_path), place))
    assert line.startswith(f"ssl-seg: rank {still} of 2")
    assert load_state(tmp_path).step == 2
    assert json.loads((tmp_path / "run.json").read_text())["status"] == ("failed" if still else "running")


@pytest.mark.slow
@pytest.mark.parametrize("still", [0, 1])
def test_torchrun_ends_where_a_process_stands_still(tmp_path: Path, still: int) -> None:
    """With loader workers, which end with it."""
    values = pretraining(steps=4000, save_every=2, workers=1, worker_timeout=5, process_timeout=30)
    out = tmp_path / "run"
    started = start_torchrun("-m", "ssl_seg", "pretrain", *words(values, tmp_path), "--out", out)
    while not list(out.glob("state/step_*")):
        assert started.poll() is None, started.communicate()
    launcher = psutil.Process(started.pid)
    (one,) = [child for child in launcher.children() if child.environ().get("RANK") == str(still)]
    children = launcher.children(recursive=True)
    one.send_signal(signal.SIGSTOP)
    _, stderr = started.communicate(timeout=120)
    assert started.returncode != 0
    (line,) = said_of(stderr)
    assert line.startswith(f"ssl-seg: rank {still} of 2 (process {one.pid} on ")
    state = load_state(out)
    assert state.step >= 2
    assert not state.skipped
    assert not psutil.wait_procs(children, timeout=10)[1], "none is left"
