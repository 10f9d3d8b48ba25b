"""Balancers: cases computed by hand, one update however a batch is cut over processes, and a state that is put back.

Directions were also compared with torchjd 0.18 on random gradients of 2 to 4 tasks: PCGrad (of two) and Aligned-MTL
agree to 1e-14, CAGrad to 1e-4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pretext.denoise import Denoise
from pretext.rotate import Rotate
from ssl_seg import rng
from ssl_seg.config import UserError, load, use_plugin
from ssl_seg.data.loading import Samples
from ssl_seg.models import Decoder, DecoderNet, Encoder, EncoderNet, Features
from ssl_seg.stages.fit import open_streams
from ssl_seg.stages.pretrain import PretrainConfig
from ssl_seg.stages.start import build_module
from ssl_seg.tasks import View
from ssl_seg.training import loop
from ssl_seg.training.balance import (
    METHODS,
    AlignedMTL,
    Balance,
    CAGrad,
    DynamicWeightAverage,
    GradNorm,
    PCGrad,
    Random,
    Uncertainty,
    stages_of,
)
from ssl_seg.training.config import TrainConfig, measures_affinity
from ssl_seg.training.learner import Learner
from ssl_seg.training.processes import Processes
from tests.processes import in_several
from tests.small import Textured, pretraining
from tests.stages.test_resume import assert_all_the_same
from tests.training.test_loop import make, run, weights
from tests.two_processes import pretrain_quietly, resume_after_every_step

KEY = rng.as_key(0)
READING = ("gradnorm", "pcgrad", "cagrad", "aligned_mtl")  # gradients
STEPS = 20
use_plugin(__name__)


def combined(method: Balance, gradients: list[list[float]]) -> np.ndarray:
    matrix = np.array(gradients)
    return method.coefficients(matrix @ matrix.T, KEY) @ matrix


# ---- by hand ----

AT_ODDS = [[1.0, 0.0], [-1.0, 1.0]]
GOLDEN = (math.sqrt(5) - 1) / (2 * math.sqrt(5))  # the least singular value over the root of trace + 2 * root of det


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (PCGrad(), [0.5, 1.5]),  # (1, 0) + (-1, 1) / 2 and (-1, 1) + (1, 0)
        (CAGrad(c=0.5), [2 * 0.25 / 1.25, 2 * 0.5 / 1.25]),  # the mean (0, 1/2) and half its length along (1, 0)
        (AlignedMTL(), [GOLDEN * 1.0, GOLDEN * 3.0]),  # coefficients 4 and 3 times it
    ],
)
def test_two_tasks_at_odds(method: Balance, expected: list[float]) -> None:
    assert combined(method, AT_ODDS) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("method", "gradients"),
    [
        (PCGrad(), [[2.0, 1.0, 0.0], [0.5, 3.0, 0.1], [0.0, 0.0, 5.0]]),
        (CAGrad(c=0.0), AT_ODDS),
        (AlignedMTL(), [[0.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, -2.0]]),
        (GradNorm(), AT_ODDS),  # its weights have been on the losses
    ],
)
def test_without_conflict_it_is_the_plain_sum(method: Balance, gradients: list[list[float]]) -> None:
    assert combined(method, gradients) == pytest.approx(np.sum(gradients, axis=0), abs=1e-12)


def test_pcgrad_takes_the_others_in_an_order_that_the_key_draws() -> None:
    gradients = np.array([[1.0, 0.2, 0.0], [-1.0, 1.0, 0.0], [-0.3, -1.0, 0.5]])
    gram = gradients @ gradients.T
    found = {tuple(PCGrad().coefficients(gram, rng.as_key(seed)).round(9)) for seed in range(40)}
    assert 2 <= len(found) <= 8
    assert (PCGrad().coefficients(gram, KEY) == PCGrad().coefficients(gram, KEY)).all()


@given(st.lists(st.lists(st.floats(-1, 1), min_size=4, max_size=4), min_size=2, max_size=4), st.integers(0, 99))
def test_cagrad_helps_its_worst_task_more_than_any_direction_near_the_mean(rows: list[list[float]], seed: int) -> None:
    gradients = np.array(rows) + 0.1 * np.eye(len(rows), 4)
    mean, c = gradients.mean(axis=0), 0.4
    own = combined(CAGrad(c=c), gradients.tolist()) * (1 + c**2) / len(rows)
    away = np.random.default_rng(seed).normal(size=(200, 4))
    others = mean + c * np.linalg.norm(mean) * away / np.linalg.norm(away, axis=1, keepdims=True)
    assert np.linalg.norm(own - mean) <= c * np.linalg.norm(mean) * (1 + 1e-6)
    assert (gradients @ own).min() >= (gradients @ others.T).min(axis=0).max() - 1e-5


def test_uncertainty_is_the_gradient_of_kendalls_loss() -> None:
    learner, _ = make(balance="uncertainty")
    balancer = learner.balancer
    balancer.log_variances["rotate"].data.fill_(0.3)
    balancer.start(KEY)
    balancer.learn({"denoise": 2.0, "rotate": 1.5})
    assert balancer.factors == pytest.approx({"denoise": 1.0, "rotate": math.exp(-0.3)})
    for name, loss in (("denoise", 2.0), ("rotate", 1.5)):
        value = balancer.log_variances[name].detach().clone().requires_grad_()
        (learner.module.tasks[name].weight * (torch.exp(-value) * loss + value / 2)).backward()
        torch.testing.assert_close(balancer.log_variances[name].grad, value.grad)


def test_dwa_weighs_by_the_ratio_of_two_means() -> None:
    method, memory = DynamicWeightAverage(every=2, temperature=2.0), {}
    nothing = np.full(2, np.nan)
    for losses in ([4.0, 1.0], [2.0, 1.0], [1.0, 1.0]):
        assert method.factors(memory, 2, KEY).tolist() == [1.0, 1.0]
        memory = method.learn(memory, np.array(losses), nothing)
    memory = method.learn(memory, np.array([2.0, 1.0]), nothing)
    first, second = math.exp(1.5 / 3.0 / 2), math.exp(1.0 / 2)  # means 3 -> 1.5 and 1 -> 1
    assert method.factors(memory, 2, KEY) == pytest.approx(2 * np.array([first, second]) / (first + second))


def test_random_weights_have_a_mean_of_one_and_are_drawn_anew() -> None:
    drawn = np.stack([Random().factors({}, 3, rng.as_key(seed)) for seed in range(300)])
    assert drawn.sum(axis=1) == pytest.approx(np.full(300, 3.0))
    assert drawn.mean(axis=0) == pytest.approx(np.ones(3), abs=0.15)
    assert len(np.unique(drawn)) == 900


def test_gradnorm_moves_weights_to_equal_norms() -> None:
    method = GradNorm(alpha=0.0, lr=0.1)
    memory = method.learn({}, np.array([1.0, 1.0]), np.array([3.0, 1.0]))  # mean 2; slopes 3/2 and -1/2
    assert memory["weights"] == pytest.approx(np.array([0.85, 1.05]) * 2 / 1.9)
    for _ in range(300):
        memory = method.learn(memory, np.array([1.0, 1.0]), np.array([3.0, 1.0]) * memory["weights"])
    assert memory["weights"] == pytest.approx([0.5, 1.5], abs=0.1)
    frozen = method.learn(memory, np.array([1.0, 1.0]), np.full(2, np.nan))
    assert (frozen["weights"] == memory["weights"]).all()


def test_gradnorm_lets_a_slow_task_have_more() -> None:
    method, memory = GradNorm(), {"first": np.array([1.0, 1.0])}
    memory = method.learn(memory, np.array([0.9, 0.3]), np.array([1.0, 1.0]))
    slow, fast = memory["weights"]
    assert slow > 1 > fast


# ---- config ----


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_dumped_as_it_is_written(name: str) -> None:
    config = load(TrainConfig, {"balance": name})
    assert config.balance == METHODS[name]()
    assert load(TrainConfig, config.dump()) == config
    assert ("balance" in config.dump()) == (name != "fixed")


def test_options_and_mistakes() -> None:
    assert load(TrainConfig, {"balance": {"type": "gradnorm", "alpha": 0.5}}).balance == GradNorm(alpha=0.5)
    assert load(TrainConfig, {"balance": {"type": "pcgrad"}}).dump()["balance"] == "pcgrad"
    with pytest.raises(UserError, match=r"^balance: unknown type 'pcgard'; choose one of: fixed, "):
        load(TrainConfig, {"balance": "pcgard"})
    with pytest.raises(UserError, match=r"^balance: unknown key 'beta'"):
        load(TrainConfig, {"balance": {"type": "cagrad", "beta": 1}})
    with pytest.raises(UserError, match=r"^balance\.c: "):
        load(TrainConfig, {"balance": {"type": "cagrad", "c": 1.0}})


# ---- in the loop ----


@pytest.mark.parametrize("encode", ["together", "in_turn"])
def test_one_task_is_trained_as_by_a_plain_sum(encode: str) -> None:
    def metrics(balance: str) -> list[float]:
        config = load(
            PretrainConfig, {**pretraining(balance=balance, encode=encode, steps=2), "tasks": {"denoise": {}}}
        )
        learner = Learner(build_module(config.model, config.tasks, 0), config.train, Processes(config.train))
        steps = run(learner, {"pool": Samples(config.data.pool, config.augment, 0)})
        return [step.metrics["train/loss"] for step in steps]

    plain = metrics("fixed")
    for balance in ("random", "pcgrad", "aligned_mtl"):
        assert metrics(balance) == pytest.approx(plain, rel=1e-6), balance


def test_pcgrad_without_conflict_is_in_turn_to_the_bit() -> None:
    """Of factors of 1, the sum of what is kept apart is the one that gradients are added up to."""
    fixed, sources = make(encode="in_turn", steps=3)
    apart, _ = make(balance="pcgrad", steps=3)
    with mock.patch.object(PCGrad, "coefficients", lambda self, gram, key: np.ones(len(gram))):
        for plain, kept in zip(run(fixed, sources), run(apart, sources), strict=True):
            assert plain.metrics["train/loss"] == kept.metrics["train/loss"]
    torch.testing.assert_close(weights(apart), weights(fixed), rtol=0, atol=0)


def test_heads_keep_their_own_gradients() -> None:
    seen = []
    for balance in ("fixed", "cagrad"):
        learner, sources = make(balance=balance, encode="in_turn", clip=None, steps=1)
        list(run(learner, sources))
        seen.append({name: weight.grad for name, weight in learner.module.named_parameters()})
    plain, moved = seen
    assert all(torch.equal(moved[name], plain[name]) for name in plain if name.startswith("heads."))
    assert not torch.equal(
        moved["encoder.backbone.network.conv_stem.weight"], plain["encoder.backbone.network.conv_stem.weight"]
    )


@pytest.mark.parametrize("balance", ["gradnorm", "pcgrad", "uncertainty"])
def test_with_a_frozen_encoder_that_learns_later_and_an_average(balance: str) -> None:
    learner, sources = make(balance=balance, freeze_encoder=2, ema=0.9, steps=4)
    before = weights(learner)
    for step in run(learner, sources):
        moved = not torch.equal(
            weights(learner)["encoder.backbone.network.conv_stem.weight"],
            before["encoder.backbone.network.conv_stem.weight"],
        )
        assert moved == (step.number > 2)
        assert math.isfinite(step.metrics["grad_norm"])
        assert {"train/denoise/factor", "train/rotate/factor"} <= step.metrics.keys()


@pytest.mark.parametrize("balance", ["pcgrad", "gradnorm", "uncertainty", "dwa"])
def test_a_bad_step_changes_nothing(balance: str) -> None:
    learner, sources = make(balance=balance, steps=3)
    steps = run(learner, sources)
    next(steps)
    before = {name: value.clone() for name, value in learner.tensors().items()}
    state = learner.balancer.state()
    learner.module.encoder.std.fill_(float("nan"))
    assert not math.isfinite(next(steps).metrics["grad_norm"])
    learner.module.encoder.std.copy_(before["model/encoder.std"])
    assert all(torch.equal(value, before[name]) for name, value in learner.tensors().items() if "std" not in name)
    assert learner.balancer.state() == state
    assert math.isfinite(next(steps).metrics["grad_norm"])


def test_another_method_begins_anew() -> None:
    learner, sources = make(balance="uncertainty", steps=2)
    list(run(learner, sources))
    for balance in ("fixed", "gradnorm"):
        other, _ = make(balance=balance, steps=2)
        other.restore(learner.tensors(), learner.data())
        assert not other.balancer.memory
    again, _ = make(balance="uncertainty", steps=2)
    again.restore(learner.tensors(), learner.data())
    assert all(torch.equal(value, learner.tensors()[name]) for name, value in again.tensors().items())
    assert again.balancer.log_variances["denoise"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["uncertainty", {"type": "dwa", "every": 2}, "random", *READING])
def test_resuming_at_every_step_is_exact(balance: Any, tmp_path: Path) -> None:
    config = load(PretrainConfig, pretraining(balance=balance, steps=5, save_every=1, affinity=2))
    resume_after_every_step(partial(pretrain_quietly, config), tmp_path, 5)
    assert_all_the_same(tmp_path, 4)


# ---- affinity ----


def test_affinity_changes_no_bit_and_is_measured_at_logged_steps() -> None:
    plain, sources = make(steps=4)
    looked, _ = make(steps=4, affinity=2)
    for step, other in zip(run(plain, sources), run(looked, sources), strict=True):
        found = {name: value for name, value in other.metrics.items() if name.startswith("train/affinity/")}
        assert {name: value for name, value in other.metrics.items() if name not in found} == step.metrics
        assert bool(found) == (step.number % 2 == 0)
        assert all(-1 <= value <= 1 for value in found.values())
    assert "train/affinity/denoise/rotate" in found
    assert "train/affinity/denoise/rotate/stem" in found
    torch.testing.assert_close(weights(looked), weights(plain), rtol=0, atol=0)


def test_affinity_is_a_cosine_by_stage() -> None:
    learner, _ = make()
    shared = learner.balancer.shared
    first, second = ([torch.randn_like(weight) for weight in shared] for _ in range(2))
    gram = learner.balancer.gram_of({"denoise": first, "rotate": second})
    found = learner.balancer.affinities(gram)
    flat = [torch.cat([gradient.flatten() for gradient in own]) for own in (first, second)]
    oracle = torch.nn.functional.cosine_similarity(*flat, dim=0).item()
    assert found["train/affinity/denoise/rotate"] == pytest.approx(oracle, abs=1e-6)
    assert len(found) == 1 + len(learner.balancer.stages)
    same = learner.balancer.affinities(learner.balancer.gram_of({"denoise": first, "rotate": first}))
    assert list(same.values()) == pytest.approx([1.0] * len(same))


def test_stages() -> None:
    names = ["backbone.conv1.weight", "backbone.layer1.0.bn.bias", "backbone.layer1.1.conv.weight", "norm.weight"]
    assert stages_of(names) == {"stem": [0], "layer1": [1, 2, 3]}
    assert list(stages_of(["backbone.stem_0.weight", "backbone.blocks.0.a.b", "backbone.blocks.1.a.b"])) == [
        "stem",
        "blocks_0",
        "blocks_1",
    ]


def test_when_affinity_is_measured() -> None:
    config = TrainConfig(affinity=25, log_every=10, steps=105)
    assert [step + 1 for step in range(105) if measures_affinity(config, step)] == [30, 50, 80, 100]
    assert not any(measures_affinity(TrainConfig(), step) for step in range(100))


# ---- one update, however a batch is cut ----


class Smooth(Encoder):
    """Three levels without a kink, at which rounding could turn a gradient. A step of it takes 20 ms."""

    def build(self, output_stride: int = 32) -> EncoderNet:
        return EncoderNet(SmoothNet(), (8, 16, 32), (1, 2, 4), multiple=4)


class SmoothNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.GELU())
            for before, after, stride in ((3, 8, 1), (8, 16, 2), (16, 32, 2))
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = [image]
        for level in self.levels:
            maps.append(level(maps[-1]))
        return maps[1:]


class Upwards(Decoder):
    """The coarse maps enlarged, on top of the finest."""

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        return UpwardsNet(channels)


class UpwardsNet(DecoderNet):
    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.out_channels = 8
        self.mix = nn.Conv2d(sum(channels), 8, 1)

    def forward(self, features: Features) -> Tensor:
        size = features.maps[0].shape[-2:]
        return F.gelu(self.mix(torch.cat([F.interpolate(level, size, mode="bilinear") for level in features], dim=1)))


# Well conditioned too: of the small network of other tests gradients are mostly rounding.
TINY = {"encoder": {"type": "smooth"}, "decoder": {"type": "upwards"}, "norm": "group"}


class Negative(Denoise):
    """A task at odds with denoising, by the same head: what is to be an image there is to be black, and beyond."""

    borrowed_head = "denoise"

    def corrupt(self, image: Tensor, key: Tensor) -> View:
        view = super().corrupt(image, key)
        return View(view.input, torch.full_like(view.target, -1.0))


def update(out: str, balance: Any, accumulate: int = 1, precision: str = "fp32", wrong: bool = False) -> None:
    """The weights after 20 steps of eight images, written by the first process; with the least conflict seen."""
    values = pretraining(
        balance=balance,
        accumulate=accumulate,
        precision=precision,
        batch_size=8,
        steps=STEPS,
        optimizer="sgd",
        lr=0.02,
        affinity=1,
    )
    config = load(PretrainConfig, {**values, "augment": {"crop": [32, 32]}})
    model = config.model.model_validate(TINY)
    tasks = {"denoise": Denoise(), "negative": Negative(), "rotate": Rotate(weight=0.2)}
    processes = Processes(config.train)
    learner = Learner(build_module(model, tasks, 0), config.train, processes)
    start = torch.cat([weight.detach().flatten().clone() for weight in learner.module.parameters()])
    samples = {"pool": Samples(Textured(count=12), config.augment, 0)}
    streams = open_streams(samples, config.train, processes, tasks, 0)
    with mock.patch.object(loop, "finish_gradients", combined_before_averaged if wrong else loop.finish_gradients):
        steps = loop.train(learner, streams, 0, seed=0)
        cosines = [step.metrics["train/affinity/denoise/negative"] for step in steps]
    if processes.is_main:
        flat = torch.cat([weight.detach().flatten() for weight in learner.module.parameters()])
        torch.save({"weights": flat, "cosines": cosines, "start": start}, out)


REAL = loop.finish_gradients


def combined_before_averaged(learner: Learner) -> float:
    """The mistake: each process combines what its own images say."""
    learner.balancer.combine(lambda own: own)
    return REAL(learner)


def updated(folder: Path, count: int, *arguments: Any) -> dict[str, Any]:
    out = folder / f"{count}.pt"
    if count == 1:
        update(str(out), *arguments)
    else:
        in_several(count, update, str(out), *arguments)
    return torch.load(out, weights_only=True)


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    return (one["weights"] - other["weights"]).abs().max().item()


def test_two_processes_make_the_update_of_one_and_a_wrong_order_is_noticed(tmp_path: Path) -> None:
    alone = updated(tmp_path, 1, "pcgrad")
    assert (alone["weights"] - alone["start"]).abs().max() > 0.05
    assert max(alone["cosines"]) < -0.05, "at odds in every step, and not by a hair"
    assert furthest(updated(tmp_path, 2, "pcgrad"), alone) < 1e-6
    assert furthest(updated(tmp_path, 2, "pcgrad", 1, "fp32", True), alone) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("balance", ["uncertainty", {"type": "dwa", "every": 5}, "random", *READING])
def test_one_two_and_four_processes_make_the_same_update(balance: Any, accumulate: int, tmp_path: Path) -> None:
    alone = updated(tmp_path, 1, balance, 1)
    for count in (2, 4):
        assert furthest(updated(tmp_path, count, balance, accumulate), alone) < 1e-6, count


@pytest.mark.slow
@pytest.mark.parametrize("balance", READING)
def test_in_bf16_to_its_rounding(balance: str, tmp_path: Path) -> None:
    """Measured: up to 7e-4, where weights have moved by 0.1 to 0.2; combining in the wrong order is no further off."""
    alone = updated(tmp_path, 1, balance, 1, "bf16")
    for count in (2, 4):
        assert furthest(updated(tmp_path, count, balance, 1, "bf16"), alone) < 2e-3, count


def test_uncertainty_and_its_moments_are_in_the_state() -> None:
    learner, sources = make(balance="uncertainty", steps=2)
    list(run(learner, sources))
    own = {name for name in learner.tensors() if "balance/" in name}
    moments = {
        f"optimizer/balance/{name}/{kind}"
        for name in ("denoise", "rotate")
        for kind in ("step", "exp_avg", "exp_avg_sq")
    }
    assert own == {"balance/denoise", "balance/rotate", *moments}
    (group,) = [group for group in learner.optimizer.param_groups if group["params"][0].ndim == 0]
    assert (group["factor"], group["weight_decay"]) == (Uncertainty().lr, 0.0)
