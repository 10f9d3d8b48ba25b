"""The teacher: timm's average of the same weights, moved by no bad step, put back whole, asked without a trace."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

from ssl_seg import rng
from ssl_seg.config import UserError, load
from ssl_seg.data.loading import Samples
from ssl_seg.runs.checkpoint import load_state
from ssl_seg.stages import finetune
from ssl_seg.stages.finetune import SEGMENT, FinetuneConfig
from ssl_seg.stages.fit import open_streams
from ssl_seg.stages.pretrain import PretrainConfig, check, pretrain
from ssl_seg.stages.scoring import score_tasks
from ssl_seg.stages.setup import Options
from ssl_seg.stages.start import build_module
from ssl_seg.training.learner import Learner
from ssl_seg.training.loop import train
from ssl_seg.training.processes import Processes
from ssl_seg.training.teacher import Teacher, decay_at
from tests.small import joining, pretraining
from tests.training.test_loop import make, poison, run, weights


def batch_normed(**changed: Any) -> tuple[Learner, dict[str, Samples]]:
    """A learner whose norms keep statistics, floats and integers."""
    values = pretraining(**changed)
    config = load(PretrainConfig, {**values, "model": {**values["model"], "norm": "batch"}})
    learner = Learner(build_module(config.model, config.tasks, config.seed), config.train, Processes(config.train))
    return learner, {"pool": Samples(config.data.pool, config.augment, config.seed)}


def averaged(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learner.teacher.module.state_dict().items()}


def test_the_average_is_timms_in_weights_and_statistics() -> None:
    learner, sources = batch_normed(ema=0.6)
    # With these its warm-up is the plain mean of the weights so far; its first step only copies.
    oracle = ModelEmaV3(learner.module, decay=0.6, use_warmup=True, warmup_gamma=1.0, warmup_power=1.0)
    for step in run(learner, sources):
        oracle.update(learner.module, step.number + 1)
        torch.testing.assert_close(averaged(learner), oracle.module.state_dict(), rtol=0, atol=0)
    now = weights(learner)
    moved = {name for name, value in averaged(learner).items() if not torch.equal(value, now[name])}
    assert any(name.endswith("running_mean") for name in moved)
    assert moved.isdisjoint(name for name in now if name.endswith("num_batches_tracked"))


def test_a_short_run_forgets_its_start() -> None:
    assert [decay_at(0.999, number) for number in (1, 2, 9)] == pytest.approx([1 / 2, 2 / 3, 9 / 10])
    assert decay_at(0.999, 5000) == 0.999


def test_the_plain_mean_comes_first() -> None:
    module = make()[0].module
    teacher = Teacher(module, 0.999)
    name, weight = next(iter(module.named_parameters()))
    seen = [weight.detach().clone()]
    for number in range(1, 5):
        weight.data.add_(number)
        seen.append(weight.detach().clone())
        teacher.update(module, number)
    torch.testing.assert_close(teacher.module.get_parameter(name), torch.stack(seen).mean(dim=0))


def test_a_bad_step_does_not_move_it() -> None:
    learner, sources = batch_normed(ema=0.5, steps=4)
    before = averaged(learner)
    moved = []
    batches = poison(open_pool(learner, sources), {1, 2}, learner)
    for step in train(learner, {"pool": batches}, 0, seed=0):
        now = averaged(learner)
        same = all(torch.equal(value, before[name]) for name, value in now.items())
        assert same == (not math.isfinite(step.metrics["train/loss"]))
        moved.append(not same)
        before = now
    assert moved == [True, False, False, True]
    assert all(value.isfinite().all() for value in before.values())


def open_pool(learner: Learner, sources: dict[str, Samples]) -> Any:
    return open_streams(sources, learner.config, learner.processes, learner.module.tasks, 0)["pool"]


def test_a_restored_one_goes_on_bit_for_bit() -> None:
    whole, sources = batch_normed(ema=0.9)
    expected = [averaged(whole) for _ in run(whole, sources)]
    half, _ = batch_normed(ema=0.9)
    for step in run(half, sources):
        if step.number == 3:
            break
    saved = {name: value.clone() for name, value in half.tensors().items()}
    other, _ = batch_normed(ema=0.9)
    other.restore(saved, half.data())
    torch.testing.assert_close(averaged(other), expected[2], rtol=0, atol=0)
    for _, wanted in zip(run(other, sources, start=3), expected[3:], strict=True):
        torch.testing.assert_close(averaged(other), wanted, rtol=0, atol=0)


def test_one_that_a_checkpoint_has_not_begins_with_its_weights() -> None:
    without, sources = make()
    next(run(without, sources))
    other, _ = make(ema=0.9)
    other.restore(without.tensors(), without.data())
    torch.testing.assert_close(averaged(other), weights(without), rtol=0, atol=0)
    back, _ = make()
    back.restore(other.tensors(), other.data())
    assert back.teacher is None
    torch.testing.assert_close(weights(back), weights(without), rtol=0, atol=0)


def test_pretraining_scores_and_exports_the_average(tmp_path: Path) -> None:
    config = load(PretrainConfig, pretraining(ema=0.5, steps=2))
    done = pretrain(config, Options(tmp_path, quiet=True))
    state = load_state(tmp_path).tensors
    for name, value in load_file(tmp_path / "encoder" / "encoder.safetensors").items():
        assert torch.equal(value, state[f"teacher/encoder.{name}"]), name
    module = build_module(config.model, config.tasks, config.seed)
    for part, same in (("teacher/", True), ("model/", False)):
        module.load_state_dict({name.removeprefix(part): state[name] for name in state if name.startswith(part)})
        assert (score_tasks(module, config.data.val, config.augment) == done.scores) == same


def test_it_changes_no_bit_of_the_student() -> None:
    alone, taught = make(), make(ema=0.9)
    assert [step.metrics for step in run(*alone)] == [step.metrics for step in run(*taught)]
    torch.testing.assert_close(weights(taught[0]), weights(alone[0]), rtol=0, atol=0)
    assert not any(name.startswith("teacher/") for name in alone[0].tensors())
    assert alone[0].evaluated is alone[0].module


def test_being_asked_leaves_no_trace() -> None:
    learner, _ = batch_normed(ema=0.9)
    image = rng.uniform(rng.fold_in(rng.as_key(0), torch.arange(2)), (3, 64, 64))
    before, state = averaged(learner), torch.get_rng_state()
    learner.module.train()
    first, again = learner.teach("denoise", image), learner.teach("denoise", image)
    assert torch.equal(first, again), "dropout is off"
    assert first.shape == (2, 3, 64, 64)
    assert not first.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(averaged(learner), before, rtol=0, atol=0)
    assert not any(weight.requires_grad for weight in learner.teacher.module.parameters())


def test_the_supervised_task_keeps_its_bits_beside_one_that_asks_it() -> None:
    """Dropout's draws too: the labelled images come first."""
    losses = []
    for tasks in ({}, {"consistent": {"weight": 0.0}}):
        values = {**joining(), "tasks": tasks}
        if not tasks:
            del values["data"]["pool"]
        config, start = finetune.resolve(load(FinetuneConfig, values))
        labelled, _ = finetune.choose_images(config)
        learner, sources = finetune.assemble(config, start, Processes(config.train), None, labelled, quiet=True)
        losses.append([step.metrics[f"train/{SEGMENT}/loss"] for step in run(learner, sources)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": {"ema": None}}, r"tasks\.consistent: asks a teacher, and there is none; give train\.ema"),
        ({"train": {"batch_size": 3}}, r"train\.batch_size: 3 cannot be .* 2 images that are mixed; use 2 or 4"),
        ({"train": {"accumulate": 4}}, r"4 micro-batches x 2 images that are mixed; use 8"),
        ({"train": {"batch_size": 6, "views": "split"}}, r"2 tasks .* x 2 images that are mixed; use 4 or 8"),
    ],
)
def test_what_a_task_cannot_do_without_is_told_in_a_line(changed: dict[str, Any], message: str) -> None:
    config = load(FinetuneConfig, joining(**changed["train"]))
    with pytest.raises(UserError, match=message) as caught:
        finetune.check(finetune.resolve(config)[0], Processes(config.train))
    assert "\n" not in str(caught.value)


def test_a_head_that_is_not_there_cannot_be_borrowed() -> None:
    config = load(PretrainConfig, {**pretraining(ema=0.9), "tasks": {"denoise": {}, "consistent": {}}})
    with pytest.raises(UserError, match=r"tasks\.consistent: uses the head of 'segment', and .* head are: denoise"):
        check(config, Processes(config.train))
