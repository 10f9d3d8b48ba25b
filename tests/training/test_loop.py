"""The loop: schedules against torch's, both ways of encoding, bad steps, and a state that is put back whole."""

from __future__ import annotations

import ctypes
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretext.denoise import Denoise
from ssl_seg.config import UserError, load
from ssl_seg.data.loading import Packed, Samples
from ssl_seg.norm.layers import SwitchNorm2d
from ssl_seg.stages import finetune, pretrain
from ssl_seg.stages.finetune import FinetuneConfig
from ssl_seg.stages.fit import open_streams
from ssl_seg.stages.pretrain import PretrainConfig
from ssl_seg.stages.start import build_module, find_start
from ssl_seg.tasks import View
from ssl_seg.training.config import TrainConfig, due, lr_at
from ssl_seg.training.learner import Learner, build_optimizer, layers_above, not_decayed, uses_every_weight
from ssl_seg.training.loop import (
    PATIENCE_FOR_NAN,
    NonFiniteError,
    Step,
    backward,
    finish_gradients,
    passes_of,
    seed_torch,
    train,
)
from ssl_seg.training.memory import bytes_of
from ssl_seg.training.multitask import weighted_total
from ssl_seg.training.processes import Processes, computes_in_bf16, keep_freed_memory, launched_for
from tests.faults import message_of
from tests.processes import Child
from tests.small import MODEL, POOL, finetuning, pretraining

ROUNDING = 1e-4  # of a tensor's largest gradient; the stem's sums over few large maps round to 2e-5 in float32


def make(**changed: Any) -> tuple[Learner, dict[str, Samples]]:
    config = load(PretrainConfig, pretraining(**changed))
    learner = Learner(build_module(config.model, config.tasks, config.seed), config.train, Processes(config.train))
    return learner, {"pool": Samples(config.data.pool, config.augment, config.seed)}


def run(learner: Learner, sources: dict[str, Samples], start: int = 0) -> Iterator[Step]:
    streams = open_streams(sources, learner.config, learner.processes, learner.module.tasks, start)
    return train(learner, streams, start, seed=0)


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learner.module.state_dict().items()}


def test_the_weight_on_a_ramp_is_what_the_loss_has_and_is_told() -> None:
    config = load(PretrainConfig, {**pretraining(steps=3), "tasks": {"denoise": {"ramp": 2}, "rotate": {}}})
    learner = Learner(build_module(config.model, config.tasks, config.seed), config.train, Processes(config.train))
    for step in run(learner, {"pool": Samples(config.data.pool, config.augment, config.seed)}):
        told = step.metrics
        assert told["train/denoise/weight"] == config.tasks["denoise"].weight_at(step.number - 1)
        expected = told["train/denoise/weight"] * told["train/denoise/loss"] + told["train/rotate/loss"]
        assert told["train/loss"] == pytest.approx(expected)
        assert "train/rotate/weight" not in told


@pytest.mark.parametrize("encode", ["together", "in_turn"])
def test_what_a_task_watches_is_the_mean_over_the_whole_batch(encode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def watch(self: Denoise, prediction: torch.Tensor, view: View) -> dict[str, torch.Tensor]:
        assert not prediction.requires_grad
        seen.append(view.input.mean(dim=(1, 2, 3)))
        return {"light": seen[-1]}

    monkeypatch.setattr(Denoise, "watch", watch)
    learner, sources = make(steps=2, accumulate=2, encode=encode)
    told = [step.metrics for step in run(learner, sources)]
    means = [torch.cat(seen[place : place + 2]).mean().item() for place in (0, 2)]
    assert [own["train/denoise/light"] for own in told] == pytest.approx(means)
    assert means[0] != means[1]
    assert "train/inpaint/light" not in told[0]


def test_cosine_equals_torch_after_the_warm_up() -> None:
    config = TrainConfig(steps=50, warmup=10, lr=0.3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for step in range(10, 50):
        assert lr_at(config, step) == pytest.approx(oracle.get_last_lr()[0])
        optimizer.step()
        oracle.step()


def test_poly_equals_torch() -> None:
    config = TrainConfig(steps=30, warmup=0, schedule="poly", power=0.9)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    oracle = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=30, power=0.9)
    for step in range(30):
        assert lr_at(config, step) == pytest.approx(oracle.get_last_lr()[0])
        optimizer.step()
        oracle.step()


def test_multistep_and_constant() -> None:
    config = TrainConfig(steps=10, warmup=0, schedule="multistep", lr=1.0, milestones=(0.5, 0.8), gamma=0.1)
    assert [lr_at(config, step) for step in range(10)] == pytest.approx([1] * 5 + [0.1] * 3 + [0.01] * 2)
    assert lr_at(TrainConfig(steps=10, warmup=0, schedule="constant", lr=0.2), 9) == 0.2


def test_multistep_halves_where_it_is_told_to() -> None:
    config = TrainConfig(steps=8, warmup=0, schedule="multistep", lr=1.0, milestones=(0.25, 0.5, 0.75), gamma=0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    oracle = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 6], gamma=0.5)
    for step in range(8):
        assert lr_at(config, step) == pytest.approx(oracle.get_last_lr()[0])
        optimizer.step()
        oracle.step()
    assert lr_at(config, 7) == 0.125


def test_warm_up_rises_to_the_rate_and_never_starts_at_zero() -> None:
    config = TrainConfig(steps=100, warmup=4, lr=1.0)
    assert [lr_at(config, step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_due() -> None:
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if due(step, None, 10)] == [10]


def test_biases_and_norms_are_not_decayed_and_the_encoder_has_its_own_rate() -> None:
    learner, _ = make(weight_decay=0.1, encoder_lr=0.25)
    names = {id(parameter): name for name, parameter in learner.module.named_parameters()}
    for group in learner.optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name
            assert group["factor"] == (0.25 if name.startswith("encoder.") else 1.0), name
    assert not names, "every parameter is in a group"


def test_layers_of_the_encoder_have_rates_that_fall_towards_the_image() -> None:
    learner, _ = make(layer_decay=0.5, encoder_lr=0.25)
    names = {id(parameter): name for name, parameter in learner.module.named_parameters()}
    factors = {}
    for group in learner.optimizer.param_groups:
        factors |= {names.pop(id(parameter)): group["factor"] for parameter in group["params"]}
    assert not names, "every parameter is in a group"
    encoder = {name.removeprefix("encoder."): factor for name, factor in factors.items() if name.startswith("encoder.")}
    above = layers_above(learner.module.encoder)
    assert encoder == {name: 0.25 * 0.5**count for name, count in above.items()}
    assert max(encoder.values()) == 0.25, "the last layer has the encoder's rate"
    assert encoder["backbone.network.conv_stem.weight"] == min(encoder.values())
    assert {factor for name, factor in factors.items() if name.startswith("heads.")} == {1.0}


def test_the_first_update_moves_a_layer_by_its_rate() -> None:
    """SGD without momentum or decay: the update of one gradient, times the factor."""
    settings = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "steps": 1}
    plain, sources = make(**settings)
    decayed, _ = make(**settings, layer_decay=0.5)
    start = weights(plain)
    for learner in (plain, decayed):
        list(run(learner, sources))
    above = layers_above(plain.module.encoder)
    for name, _ in plain.module.named_parameters():
        factor = 0.5 ** above.get(name.removeprefix("encoder."), 0)
        moved, expected = (weights(learner)[name] - start[name] for learner in (decayed, plain))
        torch.testing.assert_close(moved, factor * expected, rtol=1e-3, atol=1e-7)


def test_a_new_key_of_the_rate_is_not_written_until_it_is_used() -> None:
    assert "layer_decay" not in TrainConfig().dump()
    assert TrainConfig(layer_decay=0.75).dump()["layer_decay"] == 0.75


def test_decay_is_what_the_optimizer_is_used_with() -> None:
    """That of sgd is added to the gradient, and ten times as strong with momentum."""
    assert TrainConfig().weight_decay == TrainConfig(optimizer="adamw").weight_decay == 0.05
    assert TrainConfig(optimizer="sgd").weight_decay == 1e-4
    assert TrainConfig(optimizer="sgd", weight_decay=0.01).weight_decay == 0.01
    assert TrainConfig(optimizer="adam").weight_decay == 0.0
    assert TrainConfig(optimizer="adam", weight_decay=0.01).weight_decay == 0.01
    for optimizer in ("sgd", "adam"):
        assert load(TrainConfig, TrainConfig(optimizer=optimizer).dump()) == TrainConfig(optimizer=optimizer)


@pytest.mark.parametrize(("kind", "named"), [(torch.optim.Adam, "adam"), (torch.optim.AdamW, "adamw")])
def test_the_updates_of_adam_are_those_of_torch(kind: type[torch.optim.Optimizer], named: str) -> None:
    """From the same gradients, with a decay and an epsilon that tell."""
    settings = {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-2}
    learner, sources = make(optimizer=named, steps=3, schedule="constant", warmup=0, clip=None, **settings)
    other, _ = make(steps=3)
    parameters = dict(other.module.named_parameters())
    decayed = [own for own in parameters.values() if own.ndim > 1]
    rest = [own for own in parameters.values() if own.ndim <= 1]
    theirs = kind([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=1e-3, **settings)
    for _ in run(learner, sources):
        for name, own in learner.module.named_parameters():
            parameters[name].grad = own.grad.clone()
        theirs.step()
        for name, own in learner.module.named_parameters():
            torch.testing.assert_close(own, parameters[name], rtol=1e-5, atol=1e-7)


def test_epsilon_reaches_the_optimizer_and_is_written_once_it_is_used() -> None:
    assert TrainConfig().eps == 1e-8
    assert "eps" not in TrainConfig().dump()
    assert TrainConfig(eps=1e-7).dump()["eps"] == 1e-7
    for optimizer in ("adam", "adamw"):
        learner, _ = make(optimizer=optimizer, eps=1e-7)
        assert {group["eps"] for group in learner.optimizer.param_groups} == {1e-7}
    assert {group["weight_decay"] for group in make(optimizer="adam")[0].optimizer.param_groups} == {0.0}


def test_the_shares_of_switch_norm_have_a_rate_of_their_own() -> None:
    values = pretraining(switch_lr=7.0, encoder_lr=0.5)
    config = load(PretrainConfig, {**values, "model": {**values["model"], "norm": "switch"}})
    module = build_module(config.model, config.tasks, config.seed)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    shares = 0
    for group in build_optimizer(module, config.train).param_groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            is_share = name.endswith("_logits")
            part = 0.5 if name.startswith("encoder.") else 1.0
            assert group["factor"] == part * (7.0 if is_share else 1.0), name
            assert not (is_share and group["weight_decay"]), name
            shares += is_share
    assert shares == 2 * sum(isinstance(layer, SwitchNorm2d) for layer in module.modules()) > 0


def test_losses_fall() -> None:
    losses = [step.metrics["train/loss"] for step in run(*make(steps=30))]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_the_same_run_twice_gives_the_same_bits(optimizer: str) -> None:
    first, second = make(optimizer=optimizer), make(optimizer=optimizer)
    assert [step.metrics for step in run(*first)] == [step.metrics for step in run(*second)]
    torch.testing.assert_close(weights(first[0]), weights(second[0]), rtol=0, atol=0)


@pytest.mark.parametrize("views", ["all", "split"])
def test_in_turn_gives_the_gradients_of_together(views: str) -> None:
    gradients = []
    for encode in ("together", "in_turn"):
        learner, sources = make(encode=encode, views=views, clip=None)
        learner.module.eval()  # dropout draws differ between one pass and two
        streams = open_streams(sources, learner.config, learner.processes, learner.module.tasks, 0)
        backward(learner, {"pool": next(streams["pool"])}, last=True)
        gradients.append({name: p.grad for name, p in learner.module.named_parameters()})
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=ROUNDING * scale, msg=name)


def test_head_by_head_gives_the_bits_of_one_backward_pass_and_holds_less() -> None:
    wide = {
        "model": {**MODEL, "decoder": {"type": "unet", "channels": [64] * 5}},
        "tasks": {"denoise": {}, "inpaint": {}},
    }
    config = load(PretrainConfig, {**pretraining(), **wide})
    learner = Learner(build_module(config.model, config.tasks, 0), config.train, Processes(config.train))
    sources = {"pool": Samples(config.data.pool, config.augment, 0)}
    packed = {"pool": next(open_streams(sources, config.train, learner.processes, learner.module.tasks, 0)["pool"])}

    def by_one_pass() -> None:
        (views,) = passes_of(learner, packed, together=True)
        weighted_total(learner.module.tasks, learner.module(views)).backward()

    gradients, held = [], []
    for way in (by_one_pass, lambda: backward(learner, packed, last=True)):
        learner.forget_gradients()
        seed_torch(torch.tensor(0))
        held.append(bytes_of(way))
        gradients.append([weight.grad for weight in learner.module.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert held[1] < 0.9 * held[0]


def test_accumulation_gives_the_gradients_of_the_whole_batch() -> None:
    gradients = []
    for accumulate in (1, 2):
        learner, sources = make(accumulate=accumulate, clip=None)
        learner.module.eval()
        streams = open_streams(sources, learner.config, learner.processes, learner.module.tasks, 0)
        for _ in range(accumulate):
            backward(learner, {"pool": next(streams["pool"])}, last=True)
        gradients.append({name: p.grad for name, p in learner.module.named_parameters()})
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=ROUNDING * scale, msg=name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "4"),
        ("GRADIENT_ACCUMULATION_STEPS", "four"),
        ("MIXED_PRECISION", "bf16"),
        ("DYNAMO_BACKEND", "eager"),
        ("TORCH_DEVICE", "meta"),
        ("USE_DEEPSPEED", "true"),
        ("USE_FSDP", "true"),
        ("USE_MEGATRON_LM", "true"),
        ("USE_PARALLELISM_CONFIG", "true"),
        ("USE_SAGEMAKER", "true"),
    ],
)
def test_accelerate_s_own_variables_change_nothing(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_step() -> Step:
        return next(run(*make(clip=None)))

    plain = first_step()
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert Processes(TrainConfig(device="cpu")).unheeded == [f"ACCELERATE_{name}={value}"]
    assert first_step().metrics == plain.metrics
    assert os.environ[f"ACCELERATE_{name}"] == value, "it is not ours to change"


@pytest.mark.parametrize(
    ("command", "count"),
    [
        ("python /bin/accelerate launch --cpu --num_processes 2 -m ssl_seg pretrain", 2),
        ("python /bin/accelerate launch --cpu --num-processes=4 train.py", 4),
        ("python -m accelerate.commands.launch launch --num_processes 3 train.py", 3),
        ("accelerate launch -m ssl_seg", 1),
        ("accelerate launch train.py --num_processes 7", 1),
        (f"accelerate launch --num_processes {'9' * 5000} train.py", 1),
        ("accelerate launch --num_processes", 1),
        ("torchrun --nproc-per-node 2 -m ssl_seg", 1),
        ("python study.py --num_processes 7", 1),
        ("", 1),
    ],
)
def test_how_many_processes_a_launcher_was_asked_for(command: str, count: int) -> None:
    assert launched_for(command.split()) == count


def test_what_a_launcher_sets_unasked_is_no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MIXED_PRECISION", "no"), ("DYNAMO_BACKEND", "NO"), ("USE_CPU", "True"), ("DEBUG_MODE", "1")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    processes = Processes(TrainConfig(device="cpu"))
    assert processes.unheeded == []
    assert processes.accelerator.state.debug, "a check of shapes, which changes no result"


def test_clipping_bounds_the_norm_and_reports_the_norm_before() -> None:
    learner, sources = make(clip=0.01)
    learner.optimizer.zero_grad()
    streams = open_streams(sources, learner.config, learner.processes, learner.module.tasks, 0)
    backward(learner, {"pool": next(streams["pool"])}, last=True)
    before = math.sqrt(sum(p.grad.square().sum().item() for p in learner.module.parameters()))
    assert finish_gradients(learner) == pytest.approx(before, rel=1e-4)
    after = math.sqrt(sum(p.grad.square().sum().item() for p in learner.module.parameters()))
    assert after == pytest.approx(0.01, rel=1e-3)


def poison(batches: Iterator[Packed], steps: set[int], learner: Learner) -> Iterator[Packed]:
    """Make the network give NaN at some steps, as an overflow would: through the input, so statistics see it too."""
    for step, packed in enumerate(batches):
        learner.module.encoder.std.fill_(float("nan") if step in steps else 0.25)
        yield packed


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_step_that_is_not_finite_changes_nothing(norm: str) -> None:
    values = pretraining(steps=4)
    values["model"] = {**values["model"], "norm": norm}
    config = load(PretrainConfig, values)
    learner = Learner(build_module(config.model, config.tasks, 0), config.train, Processes(config.train))
    samples = {"pool": Samples(config.data.pool, config.augment, 0)}
    streams = open_streams(samples, config.train, learner.processes, learner.module.tasks, 0)
    seen = []
    for step in train(learner, {"pool": poison(streams["pool"], {1, 2}, learner)}, 0, seed=0):
        learner.module.encoder.std.fill_(0.25)
        seen.append(weights(learner))
        assert math.isfinite(step.metrics["train/loss"]) == (step.number not in (2, 3))
    torch.testing.assert_close(seen[0], seen[2], rtol=0, atol=0)
    assert not torch.equal(
        seen[2]["encoder.backbone.network.conv_stem.weight"], seen[3]["encoder.backbone.network.conv_stem.weight"]
    )
    assert all(value.isfinite().all() for value in seen[-1].values())


def test_ten_bad_steps_in_a_row_end_the_run_with_the_names() -> None:
    learner, sources = make(steps=30)
    streams = open_streams(sources, learner.config, learner.processes, learner.module.tasks, 0)
    poisoned = poison(streams["pool"], set(range(3, 30)), learner)
    done = []
    with pytest.raises(NonFiniteError, match=r"10 times in a row; lower train.lr") as caught:
        done.extend(train(learner, {"pool": poisoned}, 0, seed=0))
    assert len(done) == 3 + PATIENCE_FOR_NAN - 1
    assert len(caught.value.names) == learner.config.batch_size
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changed", [{"optimizer": "adamw"}, {"optimizer": "sgd"}, {"channels_last": True}])
def test_a_restored_state_goes_on_bit_for_bit(changed: dict[str, Any]) -> None:
    whole, sources = make(**changed)
    steps = [(step.metrics, weights(whole)) for step in run(whole, sources)]
    half, _ = make(**changed)
    for step in run(half, sources):
        if step.number == 3:
            break
    # A file keeps no memory format.
    saved = {name: value.clone(memory_format=torch.contiguous_format) for name, value in half.tensors().items()}
    other, _ = make(**changed)
    other.restore(saved, half.data())
    for step, (metrics, expected) in zip(run(other, sources, start=3), steps[3:], strict=True):
        assert step.metrics == metrics
        torch.testing.assert_close(weights(other), expected, rtol=0, atol=0)


def test_restoring_copies_so_that_two_learners_do_not_share_moments() -> None:
    learner, sources = make()
    next(run(learner, sources))
    saved = {name: value.clone() for name, value in learner.tensors().items()}
    given = {name: value.clone() for name, value in saved.items()}
    other, _ = make()
    other.restore(given, learner.data())
    next(run(other, sources, start=1))
    torch.testing.assert_close(given, saved, rtol=0, atol=0)


def test_position_embeddings_are_not_decayed() -> None:
    values = pretraining()
    values["model"] = {"encoder": {"name": "vit_tiny_patch16_224"}, "decoder": {"type": "segformer", "channels": 16}}
    config = load(PretrainConfig, {**values, "tasks": {"rotate": {}}})
    module = build_module(config.model, config.tasks, 0)
    spared = not_decayed(module.encoder)
    assert any(name.endswith("pos_embed") for name in spared)
    assert not any(name.endswith("qkv.weight") for name in spared)
    # Rotation looks at the last map alone, so the layers that make the others get no gradient: DDP would not do.
    assert not uses_every_weight(module)
    config = load(PretrainConfig, {**values, "tasks": {"denoise": {}}})
    assert uses_every_weight(build_module(config.model, config.tasks, 0))


def test_a_norm_layer_s_statistics_are_left_alone_by_the_look_at_its_weights() -> None:
    values = pretraining()
    values["model"] = {**values["model"], "norm": "batch"}
    config = load(PretrainConfig, values)
    module = build_module(config.model, config.tasks, 0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert uses_every_weight(module)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_look_at_the_weights_takes_images_of_the_run_s_size(stage: str) -> None:
    joint = {**finetuning(), "model": pretraining()["model"]}
    joint["data"] = {**joint["data"], "pool": POOL}
    values = {"pretrain": pretraining(), "finetune": joint}[stage]
    values |= {"augment": {"crop": [160, 128]}, "tasks": {"denoise": {}, "jigsaw": {"grid": 10}}}
    config = load({"pretrain": PretrainConfig, "finetune": FinetuneConfig}[stage], values)
    processes = Processes(config.train)
    processes.world = 2  # then DDP is to be used, whose reducer wants every weight
    if stage == "pretrain":
        learner, _ = pretrain.assemble(config, find_start(config), processes, None, quiet=True)
    else:
        config, start = finetune.resolve(config)
        labelled, _ = finetune.choose_images(config)
        learner, _ = finetune.assemble(config, start, processes, None, labelled, quiet=True)
    assert learner.uses_ddp


def test_all_images_of_an_accumulated_bad_step_are_named() -> None:
    learner, sources = make(steps=30, accumulate=2)
    streams = open_streams(sources, learner.config, learner.processes, learner.module.tasks, 0)
    with pytest.raises(NonFiniteError) as caught:
        list(train(learner, {"pool": poison(streams["pool"], set(range(99)), learner)}, 0, seed=0))
    assert len(caught.value.names) == learner.config.batch_size


def test_a_checkpoint_of_other_tasks_is_refused_in_a_line() -> None:
    learner, _ = make()
    values = pretraining()
    values["tasks"] = {"denoise": {}}
    config = load(PretrainConfig, values)
    other = Learner(build_module(config.model, config.tasks, 0), config.train, Processes(config.train))
    with pytest.raises(UserError, match=r"heads\.rotate"):
        other.restore(learner.tensors(), learner.data())


def test_short_runs_warm_up_for_a_tenth() -> None:
    assert [lr_at(TrainConfig(steps=40, lr=1.0), step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert lr_at(TrainConfig(steps=40, lr=1.0), 4) == 1.0
    assert lr_at(TrainConfig(steps=5000, lr=1.0), 50) == 1.0


def test_channels_last_and_bf16_train() -> None:
    learner, sources = make(precision="bf16", channels_last=True, steps=3)
    losses = [step.metrics["train/loss"] for step in run(learner, sources)]
    assert all(math.isfinite(loss) for loss in losses)
    assert all(p.dtype == torch.float32 for p in learner.module.parameters())


def test_fp16_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.precision: fp16 needs a GPU"):
        Processes(TrainConfig(precision="fp16", device="cpu"))


@pytest.mark.parametrize(
    ("instructions", "precision"),
    [({"avx2": True}, "fp32"), ({"avx512_f": True}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"bf16": True}, "bf16")],
)
def test_the_device_decides_what_auto_is(
    instructions: dict[str, bool], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert Processes(TrainConfig(precision="auto", device="cpu")).precision == precision
    assert Processes(TrainConfig(precision="bf16", device="cpu")).emulates == (precision == "fp32")
    assert not Processes(TrainConfig(device="cpu")).emulates
    config = TrainConfig(precision="auto", device="cpu")
    other = "fp32" if precision == "bf16" else "bf16"
    assert Processes(config, settled=other).precision == other, "a run that goes on keeps what it began with"
    assert Processes(TrainConfig(device="cpu"), settled="bf16").precision == "fp32", "the config has decided"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks Linux")
def test_bf16_on_a_cpu_that_cannot_train_in_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As oneDNN answers on Lunar Lake, whose AVX2 has bf16 forwards alone (pytorch issue 148861)."""

    class Forwards(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return image[..., :1, :1] * weight[..., :1, :1]

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            raise RuntimeError("DNNL does not support bf16/f16 backward on the platform with avx2_vnni_2\nmore")

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert Processes(TrainConfig(precision="bf16", device="cpu")).emulates
    monkeypatch.setattr(torch.nn.functional, "conv2d", Forwards.apply)
    said = message_of(lambda: Processes(TrainConfig(precision="bf16", device="cpu")))
    assert said == (
        "train.precision: bf16: this CPU cannot train in it (DNNL does not support bf16/f16 backward on the platform "
        "with avx2_vnni_2); give auto or fp32"
    )
    assert Processes(TrainConfig(precision="auto", device="cpu")).precision == "fp32"


def test_bf16_is_where_the_kernel_sees_instructions_for_it() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith(("flags", "Features"))).split()
    expected = bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
    assert computes_in_bf16(torch.device("cpu")) == expected


def test_a_wish_to_stop_is_told_by_the_step() -> None:
    learner, sources = make()
    streams = open_streams(sources, learner.config, learner.processes, learner.module.tasks, 0)
    stops = [step.stop for step in train(learner, streams, 0, seed=0, wants_stop=iter([False, True] * 3).__next__)]
    assert stops == [False, True] * 3


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    # In a process of its own: what glibc was told cannot be taken back.
    kept, plain = (int(Child(print_page_faults, keep).communicate()[0]) for keep in (True, False))
    assert kept < plain / 10


def print_page_faults(keep: bool) -> None:
    """Those of three steps that need 64 MiB."""
    if keep:
        keep_freed_memory()

    def step() -> None:
        _ = [torch.ones(2**23) for _ in range(2)]  # of 32 MiB: beyond what malloc learns to keep by itself

    for _ in range(8):  # the heap finds its size: in two steps not always
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
