"""A run that stops and goes on ends in the same bits: after every step, after kill -9, on 1 and 2 processes."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from ssl_seg import cli
from ssl_seg.config import UserError, load
from ssl_seg.runs.checkpoint import checkpoints_in, load_state
from ssl_seg.runs.folder import read_metrics, software_of
from ssl_seg.runs.writer import CHANGING, Run
from ssl_seg.stages import fit
from ssl_seg.stages import pretrain as pretraining_stage
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.fit import open_streams
from ssl_seg.stages.pretrain import PretrainConfig, assemble, pretrain
from ssl_seg.stages.setup import Options
from ssl_seg.stages.start import find_start
from ssl_seg.training.loop import train
from ssl_seg.training.processes import Processes
from tests.processes import Child, command, in_pair, start_torchrun
from tests.small import finetuning, joining, pretraining, semisupervised, sharing, words
from tests.two_processes import cut_after, resume, resume_after_every_step, without_dropout

STAGES = {
    "pretrain": (pretraining, PretrainConfig, pretrain),
    "finetune": (finetuning, FinetuneConfig, finetune),
    "joint": (joining, FinetuneConfig, finetune),
    "shared": (sharing, FinetuneConfig, finetune),
    "semi": (semisupervised, FinetuneConfig, finetune),
}


def figures(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    lines = read_metrics(folder)
    return [{name: value for name, value in line.items() if name not in ("images_per_s", "time")} for line in lines]


def last_state(folder: Path) -> dict[str, torch.Tensor]:
    return load_state(folder).tensors


def assert_same_run(a: Path, b: Path) -> None:
    assert figures(a) == figures(b)
    torch.testing.assert_close(last_state(a), last_state(b), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stage", "workers", "changed"),
    [
        ("pretrain", 0, {}),
        ("pretrain", 2, {"encode": "in_turn", "steps": 4}),
        ("finetune", 0, {"eval_every": 2, "steps": 4}),
        ("finetune", 0, {"optimizer": "adam", "eps": 1e-6, "steps": 3}),
        ("joint", 0, {"eval_every": 2, "freeze_encoder": 2, "steps": 4}),
        ("shared", 0, {"steps": 3}),
        ("semi", 0, {"steps": 4}),
    ],
)
def test_resuming_after_every_step_gives_the_same_bits(
    stage: str, workers: int, changed: dict[str, Any], tmp_path: Path
) -> None:
    values, config_class, run = STAGES[stage]
    config = load(config_class, values(workers=workers, save_every=1, **changed))
    resume_after_every_step(lambda folder: run(config, Options(folder, quiet=True)), tmp_path, config.train.steps)
    assert_all_the_same(tmp_path, config.train.steps - 1)


class Killed(BaseException):
    """As a kill: nobody catches it."""


def test_a_run_that_ends_between_a_save_and_its_evaluation_makes_that_first(tmp_path: Path) -> None:
    """The step is saved before it is evaluated; the evaluation is made up for, and no line is lost or doubled."""
    config = load(FinetuneConfig, joining(steps=3, eval_every=2, save_every=2))
    finetune(config, Options(tmp_path / "whole", quiet=True))
    for killed_at in (2, 3):
        out = tmp_path / f"killed_at_{killed_at}"
        real = fit.evaluate

        def dying(job: Any, evaluators: Any, step: int, real: Any = real, last: int = killed_at) -> dict[str, float]:
            if step == last:
                raise Killed
            return real(job, evaluators, step)

        with mock.patch.object(fit, "evaluate", dying), pytest.raises(Killed):
            finetune(config, Options(out, quiet=True))
        assert load_state(out).step == killed_at
        assert figures(out)[-1]["step"] == killed_at - 1, "what the step is worth is not known yet"
        finetune(config, Options(out, quiet=True))
        assert_same_run(tmp_path / "whole", out)
        ends = [load_state(folder).data for folder in (tmp_path / "whole", out)]
        for end in ends:
            del end["progressed"]["seconds"]
            del end["owed"]["images_per_s"]
        assert ends[0] == ends[1]


def test_no_step_is_saved_twice_nor_evaluated_once_more(tmp_path: Path) -> None:
    """Not even the last, which is saved before it is evaluated: what is missing there is read from the metrics."""
    values = finetuning(steps=4, eval_every=2, save_every=2)
    values["stop"] = {"patience": 9}
    config = load(FinetuneConfig, values)
    saved: list[int] = []
    real = Run.save_state

    def note(run: Run, step: int, *arguments: Any) -> None:
        saved.append(step)
        real(run, step, *arguments)

    with mock.patch.object(Run, "save_state", note):
        finetune(config, Options(tmp_path, quiet=True))
    assert saved == [2, 4]
    scores = {line["step"]: line["val/miou"] for line in figures(tmp_path) if "val/miou" in line}
    progress: list[fit.Progress] = []
    real_fit = fit.fit

    def look(job: fit.Job) -> int:
        progress.append(job.progress)
        return real_fit(job)

    with (
        mock.patch.object(Run, "save_state", note),
        mock.patch.object(fit, "evaluate", side_effect=AssertionError),
        mock.patch.object(sys.modules[finetune.__module__], "fit", look),
    ):
        again = finetune(config, Options(tmp_path, quiet=True))
    assert saved == [2, 4]
    assert again.selected_step == progress[0].best_step == max(scores, key=scores.__getitem__)
    assert progress[0].best_score == max(scores.values())
    assert {line["step"] for line in figures(tmp_path)} == {1, 2, 3, 4}


def test_two_processes_resume_after_every_step_to_the_same_bits(tmp_path: Path) -> None:
    for encode, workers in (("together", 0), ("in_turn", 2)):
        folder = tmp_path / encode
        steps = 6 if encode == "together" else 4  # the pool has three
        in_pair(resume, str(folder), encode, workers, steps)
        assert_all_the_same(folder / "pretrained", steps - 1)
    assert_all_the_same(tmp_path / "together" / "joint", 3)


def assert_all_the_same(folder: Path, count: int) -> None:
    """The whole run and those resumed after each of its steps, as `resume_after_every_step` leaves them."""
    whole = folder / "whole"
    parts = sorted(folder.glob("after_*"))
    assert len(parts) == count
    for part in parts:
        assert figures(whole) == figures(part)
        torch.testing.assert_close(last_state(part), last_state(whole), rtol=0, atol=0)
        for exported in ("encoder/encoder.safetensors", "model/model.safetensors"):
            if (whole / exported).exists():
                torch.testing.assert_close(load_file(part / exported), load_file(whole / exported), rtol=0, atol=0)


def finish(process: Child) -> int:
    process.communicate()
    return process.returncode


def wait_for_step(process: Child | subprocess.Popen[str], out: Path, step: int) -> None:
    """Until metrics.jsonl has the step (or the run is over)."""
    path = out / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= step):
        time.sleep(0.01)


def test_kills_at_random_steps_leave_no_trace(tmp_path: Path) -> None:
    config = words(pretraining(steps=14, save_every=3, eval_every=5), tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(command("pretrain", *config, "--out", whole)) == 0
    random.seed(1)
    kills = 0
    for step in (2, 4, 7, 9, 12):
        process = command("pretrain", *config, "--out", killed)
        wait_for_step(process, killed, step)
        time.sleep(random.uniform(0, 0.1))  # anywhere in the step, also inside a save
        process.kill()
        kills += finish(process) == -signal.SIGKILL
    assert kills == 5, "each must hit a running process"
    assert json.loads((killed / "run.json").read_text())["status"] == "running"
    assert finish(command("pretrain", *config, "--out", killed)) == 0
    assert_same_run(whole, killed)
    assert [line["step"] for line in figures(killed)] == list(range(1, 15))
    assert json.loads((killed / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_the_step_and_tells_the_truth(signum: int, workers: int, tmp_path: Path) -> None:
    """To the process alone; or, with loader workers, to all of its group, as a terminal and a scheduler send it."""
    config = words(pretraining(steps=400, save_every=400, workers=workers), tmp_path)
    out = tmp_path / "run"
    process = command("pretrain", *config, "--out", out)
    wait_for_step(process, out, 3)
    os.killpg(process.pid, signum) if workers else process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, said
    assert "Traceback" not in said
    assert "the same command continues" in said
    check_saved(out)


def test_a_signal_to_every_process_under_torchrun_saves_the_step(tmp_path: Path) -> None:
    """Each gets it twice: from the group, and passed on by torchrun, whose own exit code is not ours."""
    out = tmp_path / "run"
    config = words(pretraining(steps=400, save_every=400, workers=2), tmp_path)
    process = start_torchrun("-m", "ssl_seg", "pretrain", *config, "--out", out)
    wait_for_step(process, out, 3)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert "the same command continues" in said
    check_saved(out)


def check_saved(out: Path) -> None:
    assert json.loads((out / "run.json").read_text())["status"] == "killed"
    assert load_state(out).step == len(figures(out)) >= 3


def test_a_run_of_two_processes_goes_on_with_one(tmp_path: Path) -> None:
    """The same images and keys follow; only dropout's own draws differ, and there is none here."""
    values = pretraining(steps=6, save_every=3, lr=1e-4)
    values["model"] = without_dropout(values["model"])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    in_pair(cli.main, ["pretrain", *words(values, tmp_path), "--out", str(whole)])
    cut_after(3, whole, cut)
    pretrain(load(PretrainConfig, values), Options(cut, quiet=True))
    for alone, both in zip(figures(cut), figures(whole), strict=True):
        assert alone == pytest.approx(both, rel=1e-3)


def test_a_changed_key_is_named_and_refused_unless_allowed(tmp_path: Path) -> None:
    pretrain(load(PretrainConfig, pretraining(steps=2)), Options(tmp_path / "run", quiet=True))
    longer = load(PretrainConfig, pretraining(steps=4))
    with pytest.raises(UserError, match=r"train\.steps was 2 and is now 4") as caught:
        pretrain(longer, Options(tmp_path / "run", quiet=True))
    assert "\n" not in str(caught.value)
    assert len(figures(tmp_path / "run")) == 2, "nothing was touched"
    done = pretrain(longer, Options(tmp_path / "run", allow_changed=("train.steps",), quiet=True))
    assert done.steps == 4
    assert [line["step"] for line in figures(tmp_path / "run")] == [1, 2, 3, 4]
    (resumed,) = json.loads((tmp_path / "run" / "run.json").read_text())["resumed"]
    assert (resumed["after_step"], resumed["changed"]) == (2, {"train.steps": [2, 4]})


def test_what_the_steps_before_were_made_with_is_not_forgotten(tmp_path: Path) -> None:
    config = load(PretrainConfig, pretraining(steps=2))
    pretrain(config, Options(tmp_path, quiet=True))
    now = software_of(json.loads((tmp_path / "run.json").read_text()))
    assert now["device"] == "1 x cpu"
    record = json.loads((tmp_path / "run.json").read_text())
    former = {"device": "1 x cuda", "versions": {"torch": "2.10"}}
    (tmp_path / "run.json").write_text(json.dumps({**record, **former}))
    pretrain(config, Options(tmp_path, quiet=True))
    both = software_of(json.loads((tmp_path / "run.json").read_text()))
    assert both["torch"] == f"2.10, {now['torch']}"
    assert both["device"] == "1 x cuda, 1 x cpu"
    assert both["timm"] == now["timm"]


def test_variables_that_change_bits_are_recorded_and_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in CHANGING:
        monkeypatch.delenv(name, raising=False)
    config = load(PretrainConfig, pretraining(steps=1))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    pretrain(config, Options(tmp_path, quiet=True))
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4: has no effect" in capsys.readouterr().err
    assert software_of(json.loads((tmp_path / "run.json").read_text()))["environment"] == "none set"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    pretrain(config, Options(tmp_path, quiet=True))
    both = software_of(json.loads((tmp_path / "run.json").read_text()))["environment"]
    assert both == "none set, NVIDIA_TF32_OVERRIDE=0 OMP_NUM_THREADS=3"


def test_a_run_keeps_the_precision_that_its_first_machine_gave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(PretrainConfig, pretraining(precision="auto", save_every=2, steps=4))
    whole, cut, anew = tmp_path / "whole", tmp_path / "cut", tmp_path / "anew"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    pretrain(config, Options(whole))
    assert "train.precision: auto is fp32 on this cpu" in capsys.readouterr().err
    cut_after(2, whole, cut)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    pretrain(config, Options(cut, quiet=True))
    assert_same_run(whole, cut)
    pretrain(config, Options(anew, quiet=True))
    assert figures(anew) != figures(whole)
    with_it, without = (software_of(json.loads((run / "run.json").read_text())) for run in (anew, cut))
    assert (with_it["precision"], without["precision"]) == ("bf16", "fp32")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    capsys.readouterr()
    pretrain(config, Options(anew, quiet=True))
    assert "train.precision: bf16 is emulated by this CPU" in capsys.readouterr().err
    pretrain(config, Options(anew, overwrite=True, quiet=True))
    assert figures(anew) == figures(whole)


def test_a_changed_task_is_used_once_it_is_allowed(tmp_path: Path) -> None:
    pretrain(load(PretrainConfig, pretraining(steps=2)), Options(tmp_path / "run", quiet=True))
    values = pretraining(steps=3)
    values["tasks"] = {"denoise": {"weight": 100.0}, "rotate": {"weight": 0.5}}
    allowed = ("tasks.denoise.weight", "train.steps")
    pretrain(load(PretrainConfig, values), Options(tmp_path / "run", allow_changed=allowed, quiet=True))
    last = figures(tmp_path / "run")[-1]
    assert last["train/loss"] == pytest.approx(100 * last["train/denoise/loss"] + 0.5 * last["train/rotate/loss"])
    values["tasks"]["inpaint"] = {}
    with pytest.raises(UserError, match=r"heads\.inpaint"):
        pretrain(load(PretrainConfig, values), Options(tmp_path / "run", allow_changed=("*",), quiet=True))


def test_a_start_that_is_refused_leaves_the_run_to_the_command_it_belongs_to(tmp_path: Path) -> None:
    config = load(PretrainConfig, pretraining(steps=2))
    pretrain(config, Options(tmp_path, quiet=True))
    records = {name: (tmp_path / name).read_bytes() for name in ("config.yaml", "data.json", "tasks.json")}
    values = pretraining(steps=4)
    values["tasks"]["inpaint"] = {}
    with pytest.raises(UserError, match=r"heads\.inpaint"):
        pretrain(load(PretrainConfig, values), Options(tmp_path, allow_changed=("*",), quiet=True))
    wide = pretraining(steps=4)
    wide["model"] = {**wide["model"], "decoder": {**wide["model"]["decoder"], "pyramid_channels": 16}}
    with pytest.raises(UserError, match="another model") as caught:
        pretrain(load(PretrainConfig, wide), Options(tmp_path, allow_changed=("*",), quiet=True))
    assert "\n" not in str(caught.value)
    assert {name: (tmp_path / name).read_bytes() for name in records} == records
    assert pretrain(config, Options(tmp_path, quiet=True)).steps == 2


@pytest.mark.parametrize(("first", "then"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_another_optimizer_begins_with_fresh_moments(tmp_path: Path, first: str, then: str) -> None:
    for steps, optimizer in ((2, first), (4, then)):
        values = pretraining(steps=steps)
        values["train"]["optimizer"] = optimizer
        done = pretrain(load(PretrainConfig, values), Options(tmp_path, allow_changed=("train.*",), quiet=True))
        assert done.steps == steps
    kinds = {name.rpartition("/")[2] for name in last_state(tmp_path) if name.startswith("optimizer/")}
    assert kinds == ({"momentum_buffer"} if then == "sgd" else {"step", "exp_avg", "exp_avg_sq"})


def test_a_fine_tuning_goes_on_with_the_images_that_it_began_with_or_not_at_all(tmp_path: Path) -> None:
    def again(**labelled: Any) -> None:
        values = finetuning(steps=2)
        values["labels"] = {"count": labelled.pop("labels", 3)}
        values["data"] = {"labelled": {**values["data"]["labelled"], "count": 12, **labelled}}
        finetune(load(FinetuneConfig, values), Options(tmp_path, allow_changed=("*",), quiet=True))

    again()
    names = json.loads((tmp_path / "split.json").read_text())
    for changed, said in (({"labels": 4}, "labels: "), ({"seed": 77}, "is not there any more")):
        with pytest.raises(UserError, match=said) as caught:
            again(**changed)
        assert "\n" not in str(caught.value)
    again(count=32)
    assert json.loads((tmp_path / "split.json").read_text()) == names, "more images change neither part"


def test_other_images_than_the_run_began_with_are_refused(tmp_path: Path) -> None:
    pretrain(load(PretrainConfig, pretraining(steps=2)), Options(tmp_path / "run", quiet=True))
    values = pretraining(steps=4)
    values["data"]["pool"] = {**values["data"]["pool"], "count": 13}
    allowed = ("data.pool.count", "train.steps")
    with pytest.raises(UserError, match=r"data\.pool: 13 images, not the 12"):
        pretrain(load(PretrainConfig, values), Options(tmp_path / "run", allow_changed=allowed, quiet=True))
    allowed = (*allowed, "data.pool")
    assert (
        pretrain(load(PretrainConfig, values), Options(tmp_path / "run", allow_changed=allowed, quiet=True)).steps == 4
    )


def test_a_run_goes_on_without_what_it_started_from(tmp_path: Path) -> None:
    pretrain(load(PretrainConfig, pretraining(steps=2)), Options(tmp_path / "pre", quiet=True))
    decoder = {"type": "unet", "channels": [32, 16, 16, 8, 8]}  # the rest of the model is that of init
    values = {**finetuning(steps=3, save_every=1), "model": {"decoder": decoder}}
    config = load(FinetuneConfig, {**values, "init": str(tmp_path / "pre")})
    whole = finetune(config, Options(tmp_path / "fine", quiet=True))
    cut_after(2, whole.folder, tmp_path / "cut")
    shutil.rmtree(tmp_path / "pre")
    again = finetune(config, Options(tmp_path / "cut", quiet=True))
    assert_same_run(whole.folder, again.folder)
    assert again.val.miou == whole.val.miou


def test_overwriting_what_a_run_starts_from_is_refused(tmp_path: Path) -> None:
    pretrain(load(PretrainConfig, pretraining(steps=2)), Options(tmp_path / "pre", quiet=True))
    config = load(FinetuneConfig, {**finetuning(), "init": str(tmp_path / "pre")})
    with pytest.raises(UserError, match="would delete"):
        finetune(config, Options(tmp_path / "pre", overwrite=True, quiet=True))
    assert (tmp_path / "pre" / "encoder" / "encoder.safetensors").is_file()
    other = load(FinetuneConfig, finetuning())
    with pytest.raises(UserError, match="holds a pretrain run"):
        finetune(other, Options(tmp_path / "pre", overwrite=True, quiet=True))


@pytest.mark.parametrize("count", [1, 3])
def test_a_pool_smaller_than_a_batch_trains(count: int, tmp_path: Path) -> None:
    values = pretraining(steps=2)
    values["data"] = {
        part: {"type": "textured", "count": count, "seed": seed} for seed, part in enumerate(("pool", "val"))
    }
    done = pretrain(load(PretrainConfig, values), Options(tmp_path / "run", quiet=True))
    assert done.steps == 2
    assert all(value == value for value in done.scores.values())


def test_a_finished_run_keeps_its_last_checkpoint_and_the_best_one(tmp_path: Path) -> None:
    values = finetuning(steps=8, save_every=1, eval_every=1, lr=1e-7)  # so small that the last is hardly the best
    del values["train"]["keep_state"]
    done = finetune(load(FinetuneConfig, {**values, "select": "best"}), Options(tmp_path / "run", quiet=True))
    assert done.selected_step < 7
    assert set(checkpoints_in(done.folder)) == {done.selected_step, 8}
    exported = (done.folder / "model/model.safetensors").read_bytes()
    again = finetune(load(FinetuneConfig, {**values, "select": "best"}), Options(tmp_path / "run", quiet=True))
    assert (again.selected_step, again.val.miou) == (done.selected_step, done.val.miou)
    assert (done.folder / "model/model.safetensors").read_bytes() == exported
    longer = {**values, "select": "best", "train": {**values["train"], "steps": 10, "keep_state": "all"}}
    options = Options(tmp_path / "run", quiet=True, allow_changed=("train.steps",))
    assert finetune(load(FinetuneConfig, longer), options).steps == 10
    assert {9, 10} <= set(checkpoints_in(done.folder))


def test_a_finished_run_without_its_checkpoints_says_so_and_never_begins_anew(tmp_path: Path) -> None:
    config = load(PretrainConfig, pretraining(steps=2, save_every=1, keep_state="none"))
    done = pretrain(config, Options(tmp_path / "run", quiet=True))
    assert checkpoints_in(done.folder) == {}
    before = tree_of(done.folder)
    with pytest.raises(UserError, match="holds a finished run"):
        pretrain(config, Options(tmp_path / "run", quiet=True))
    assert tree_of(done.folder) == before


def test_a_run_that_has_not_finished_keeps_its_checkpoints_whatever_it_is_told(tmp_path: Path) -> None:
    config = load(PretrainConfig, pretraining(steps=3, save_every=1, keep_state="none"))
    with (
        mock.patch.object(pretraining_stage, "export_encoder", side_effect=UserError("full")),
        pytest.raises(UserError, match="full"),
    ):
        pretrain(config, Options(tmp_path / "run", quiet=True))
    assert set(checkpoints_in(tmp_path / "run")) == {2, 3}
    assert pretrain(config, Options(tmp_path / "run", quiet=True)).steps == 3


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part", ["pool", "val"])
def test_an_empty_data_set_is_one_line(part: str, tmp_path: Path) -> None:
    values = pretraining()
    values["data"][part] = {"type": "textured", "count": 0}
    with pytest.raises(UserError, match=f"data.{part}: holds no image"):
        pretrain(load(PretrainConfig, values), Options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(PretrainConfig, pretraining(steps=4, save_every=1))
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    pretrain(config, Options(whole, quiet=True))
    shutil.copytree(whole, damaged)
    path = damaged / "state" / "step_00000004" / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    pretrain(config, Options(damaged))
    assert "step_00000004/state.safetensors: damaged" in capsys.readouterr().err
    assert_same_run(whole, damaged)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weights_that_are_not_finite_are_not_saved(optimizer: str, tmp_path: Path) -> None:
    """The rate is a finite number; the weights after a step with it are none, though loss and gradient were."""
    pretrain(load(PretrainConfig, pretraining(steps=2, optimizer=optimizer)), Options(tmp_path, quiet=True))
    before = last_state(tmp_path)
    values = pretraining(steps=4, lr=1e38, warmup=0, save_every=1, clip=None, optimizer=optimizer, weight_decay=1e3)
    with pytest.raises(UserError, match=r"step 3: .* not finite .* the checkpoint of step 2 stays") as caught:
        pretrain(load(PretrainConfig, values), Options(tmp_path, quiet=True, allow_changed=("train.*",)))
    assert "\n" not in str(caught.value)
    assert load_state(tmp_path).step == 2
    torch.testing.assert_close(last_state(tmp_path), before, rtol=0, atol=0)
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        pretrain(load(PretrainConfig, values), Options(tmp_path / "new", quiet=True))


def test_every_tensor_of_the_state_is_looked_at() -> None:
    config = load(PretrainConfig, pretraining(ema=0.9))
    learner, sources = assemble(config, find_start(config), Processes(config.train), None)
    streams = open_streams(sources, config.train, learner.processes, learner.module.tasks, 0)
    next(train(learner, streams, 0, seed=0))
    assert not learner.not_finite()
    for part in ("model/", "teacher/", "optimizer/"):
        name = [name for name, tensor in learner.tensors().items() if name.startswith(part) and tensor.ndim][-1]
        last = learner.tensors()[name].view(-1)[-1:]
        kept = last.clone()
        for value in (math.nan, math.inf, -math.inf):
            last.fill_(value)
            assert learner.not_finite() == [name]
        last.copy_(kept)


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(load(PretrainConfig, pretraining(steps=2)), Options(out, quiet=True))
    changed = load(PretrainConfig, {**pretraining(steps=3), "seed": 4})
    assert pretrain(changed, Options(out, overwrite=True, quiet=True)).steps == 3
    assert [line["step"] for line in figures(out)] == [1, 2, 3]
