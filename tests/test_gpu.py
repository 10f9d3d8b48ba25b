"""What only a GPU can show, against the same on the CPU: draws, views, gradients, every precision, runs that go on.

Skipped where torch sees no CUDA device. None of it needs more than one.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pretext.colorize import Colorize
from pretext.denoise import Denoise
from pretext.inpaint import Inpaint
from pretext.jigsaw import Jigsaw
from pretext.rotate import Rotate
from ssl_seg import files, rng
from ssl_seg.config import UserError, load
from ssl_seg.data.loading import Samples
from ssl_seg.models import ModelConfig
from ssl_seg.norm.convert import convert_norm
from ssl_seg.runs.checkpoint import load_state
from ssl_seg.runs.folder import software_of
from ssl_seg.stages.evaluate import EvaluateConfig, evaluate
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.fit import open_streams
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.scoring import measure
from ssl_seg.stages.setup import Options
from ssl_seg.stages.start import build_module
from ssl_seg.stages.trial import fit_in_memory
from ssl_seg.tasks import PretextTask, View
from ssl_seg.training.learner import Learner
from ssl_seg.training.loop import NonFiniteError, Step, backward, finish_gradients, train
from ssl_seg.training.processes import Processes
from ssl_seg.weights.export import build_model
from ssl_seg.weights.fingerprint import TOLERANCE, feature_distance, fingerprint
from tests.small import Textured, finetuning, pretraining
from tests.stages.test_resume import figures
from tests.training.test_loop import poison, run
from tests.two_processes import MODEL, cut_after

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

GPU, CPU = torch.device("cuda"), torch.device("cpu")
BATCH_NORM = ModelConfig.model_validate({**MODEL, "norm": "keep"})
WHERE = {"cuda": "auto", "cpu": "cpu"}  # what `train.device` is called where a run is to be made
TASKS: list[PretextTask] = [
    Denoise(),
    Denoise(noise="poisson"),
    Denoise(noise="speckle"),
    Denoise(noise="salt_and_pepper"),
    Inpaint(),
    Inpaint(fill="noise", mask="strokes"),
    Inpaint(mask="grid"),
    Colorize(),
    Colorize(target="ab"),
    Jigsaw(),
    Rotate(),
]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32; torch's default on a GPU is TF32, whose products have ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@contextmanager
def unwaiting() -> Iterator[None]:
    """Whatever makes the host wait for the GPU is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)  # torch 2.11
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def keys(count: int) -> Tensor:
    return rng.fold_in(rng.as_key("gpu"), torch.arange(count))


def pictures(count: int = 4, height: int = 66, width: int = 70) -> Tensor:
    coarse = rng.uniform(keys(count), (3, 6, 6))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)


# ---- draws and views ----


def test_draws_are_those_of_the_cpu() -> None:
    here, there = keys(1000), keys(1000).to(GPU)
    for draw in (
        lambda key: rng.bits(key, (7,)),
        lambda key: rng.uniform(key, (7,), -3.0, 5.0),
        lambda key: rng.randint(key, (7,), 2, 19),
        lambda key: rng.permutation(key, 9),
        lambda key: rng.fold_in(key, "word"),
    ):
        assert torch.equal(draw(here), draw(there).cpu())
    torch.testing.assert_close(rng.normal(there, (7,)).cpu(), rng.normal(here, (7,)), rtol=0, atol=2e-6)


def tensors_of(view: View) -> dict[str, Tensor]:
    return {name: value for name, value in vars(view).items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_a_view_is_that_of_the_cpu_and_keeps_no_one_waiting(task: PretextTask) -> None:
    images, own = pictures(), keys(4)
    task = task.prepare(images)
    here = tensors_of(task.corrupt(images, own))
    far, far_keys = images.to(GPU), own.to(GPU)
    task.corrupt(far, far_keys)  # tables go to the device once
    with unwaiting():
        there = tensors_of(task.corrupt(far, far_keys))
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert there[name].device.type == "cuda", name
        assert there[name].dtype == value.dtype, name
        # A pixel may fall on the other side of a threshold (a count of photons, a colour's bin), an interpolated one
        # be rounded otherwise.
        differs = (there[name].cpu() - value).abs() > 1e-4
        assert differs.float().mean() < 1e-3, name


# ---- gradients, precisions ----


def make(place: str, norm: str = "group", **changed: Any) -> tuple[Learner, dict[str, Samples]]:
    """A learner on `place` without dropout, which draws from another generator there.

    Not of the small network of other tests: weights that differ by 1e-6 there give gradients that differ by 6 % in
    some tensor, here by less than 1e-4.
    """
    values = pretraining(device=WHERE[place], **changed)
    values["model"] = {**MODEL, "norm": norm}
    values["tasks"] = {"denoise": {}, "inpaint": {}, "colorize": {}, "jigsaw": {}}
    config = load(PretrainConfig, values)
    learner = Learner(build_module(config.model, config.tasks, config.seed), config.train, Processes(config.train))
    assert learner.processes.device.type == place
    return learner, {"pool": Samples(config.data.pool, config.augment, config.seed)}


def losses(place: str, **changed: Any) -> list[float]:
    return [step.metrics["train/loss"] for step in run(*make(place, **changed))]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("encode", ["together", "in_turn"])
def test_gradients_are_those_of_the_cpu(encode: str, channels_last: bool, exact: None) -> None:
    found = []
    for place in ("cpu", "cuda"):
        learner, sources = make(place, encode=encode, channels_last=channels_last, clip=None)
        streams = open_streams(sources, learner.config, learner.processes, learner.module.tasks, 0)
        backward(learner, {"pool": next(streams["pool"])}, last=True)
        finish_gradients(learner)
        found.append({name: weight.grad.cpu() for name, weight in learner.module.named_parameters()})
    far = {name: (found[1][name] - gradient).norm() / gradient.norm() for name, gradient in found[0].items()}
    assert max(far.values()) < 5e-3, max(far, key=far.get)


@pytest.mark.parametrize(("precision", "within"), [("fp32", 0.005), ("bf16", 0.03)])
def test_losses_are_near_those_of_the_cpu(precision: str, within: float) -> None:
    changed = {"steps": 8, "lr": 1e-4, "channels_last": True}
    assert losses("cuda", precision=precision, **changed) == pytest.approx(losses("cpu", **changed), rel=within)


def test_fp16_leaves_out_first_steps_until_its_scale_fits() -> None:
    """The scaler begins at 65536, too much for the gradients of a fresh network: it learns later than on the CPU."""
    here = losses("cpu", steps=1)
    learner, sources = make("cuda", steps=12, precision="fp16")
    steps = list(run(learner, sources))
    assert steps[0].metrics["train/loss"] == pytest.approx(here[0], rel=0.03)
    skipped = [step.number for step in steps if not math.isfinite(step.metrics["grad_norm"])]
    assert skipped == list(range(1, len(skipped) + 1)), "the first ones only"
    assert learner.accelerator.scaler.get_scale() == 2.0 ** (16 - len(skipped))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_losses_fall(precision: str, optimizer: str) -> None:
    rate = {"adamw": 1e-3, "sgd": 1e-2}[optimizer]
    seen = losses("cuda", precision=precision, optimizer=optimizer, steps=40, lr=rate)
    assert sum(seen[-8:]) < 0.85 * sum(seen[:8])


def test_the_same_run_twice_is_nearly_the_same() -> None:
    """Not to the bit: some sums on a GPU are made in the order in which threads arrive."""
    once, again = losses("cuda", steps=10, lr=1e-4), losses("cuda", steps=10, lr=1e-4)
    assert again == pytest.approx(once, rel=5e-3)


def poisoned(learner: Learner, sources: dict[str, Samples], steps: set[int]) -> Iterator[Step]:
    streams = open_streams(sources, learner.config, learner.processes, learner.module.tasks, 0)
    return train(learner, {"pool": poison(streams["pool"], steps, learner)}, 0, seed=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_bad_step_changes_nothing_and_ten_end_the_run(precision: str) -> None:
    learner, sources = make("cuda", precision=precision, steps=30, norm="batch")
    scaler = learner.accelerator.scaler
    before: dict[str, Tensor] = {}
    scale = math.inf
    for step in poisoned(learner, sources, {4, 5}):
        now = {
            name: value.clone()
            for name, value in learner.module.state_dict().items()
            if not name.endswith("encoder.std")
        }
        if step.number in (5, 6):
            assert math.isnan(step.metrics["train/loss"])
            torch.testing.assert_close(now, before, rtol=0, atol=0)
            assert scaler is None or scaler.get_scale() < scale
        before, scale = now, scaler.get_scale() if scaler else math.inf
        if step.number == 8:
            break
    assert learner.bad_in_a_row == 0
    with pytest.raises(NonFiniteError):
        list(poisoned(*make("cuda", precision=precision, steps=30), set(range(30))))


# ---- norms ----


@pytest.mark.parametrize("kind", ["batch", "sync", "group", "instance", "layer", "switch", "switch_sync", "frozen"])
def test_norms_are_those_of_the_cpu(kind: str, exact: None) -> None:
    answers = []
    for place in (CPU, GPU):
        torch.manual_seed(0)
        network = build_model(BATCH_NORM, ("ground", "disc"))
        convert_norm(network, "batch" if kind in ("sync", "switch_sync") and place is CPU else kind)
        if kind == "switch_sync" and place is CPU:
            convert_norm(network, "switch")
        network = network.to(place).train()
        answer = network(pictures(4, 64, 64).to(place))
        answer.square().mean().backward()
        stem = next(weight for weight in network.parameters() if weight.ndim == 4)
        answers.append((answer.detach().cpu(), stem.grad.cpu()))
    for here, there in zip(*answers, strict=True):
        torch.testing.assert_close(there, here, rtol=0, atol=1e-2 * here.abs().max().item())


# ---- memory ----


def test_auto_finds_a_cut_that_fits_and_a_batch_beyond_the_memory_is_one_line() -> None:
    """With a hundredth of the GPU: by torch's own limit on this process."""
    total = torch.cuda.mem_get_info()[1]
    share = (torch.cuda.memory_allocated() + 1.5 * 2**30) / total
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        learner, sources = make("cuda", steps=2, batch_size=256)
        with pytest.raises(
            UserError, match=r"step 1: 256 crops of 64 x 64 at a time: out of memory on .* GiB"
        ) as caught:
            list(run(learner, sources))
        assert "train.accumulate=auto" in str(caught.value)
        del learner
        gc.collect()
        torch.cuda.empty_cache()
        learner, sources = make("cuda", steps=2, batch_size=256, accumulate="auto")
        before = {name: value.clone() for name, value in learner.tensors().items()}
        fit_in_memory(learner)
        torch.testing.assert_close(learner.tensors(), before, rtol=0, atol=0)
        assert learner.config.accumulate > 1
        assert [math.isfinite(step.metrics["train/loss"]) for step in run(learner, sources)] == [True, True]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_weights_that_are_not_finite_are_found_with_one_wait() -> None:
    learner, sources = make("cuda", steps=1, ema=0.9)
    list(run(learner, sources))
    assert learner.not_finite() == []
    name = list(learner.tensors())[-1]
    learner.tensors()[name].view(-1)[-1] = math.inf
    assert learner.not_finite() == [name]


# ---- whole runs ----


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_that_was_cut_goes_on_on_the_gpu_and_on_the_cpu(precision: str, tmp_path: Path) -> None:
    values = {**pretraining(steps=8, save_every=4, lr=1e-4, device="auto", precision=precision), "model": MODEL}
    whole = pretrain(load(PretrainConfig, values), Options(tmp_path / "whole", quiet=True)).folder
    assert software_of(files.read_json(whole / "run.json"))["device"] == "1 x cuda"
    cut_after(4, whole, tmp_path / "cut")
    pretrain(load(PretrainConfig, values), Options(tmp_path / "cut", quiet=True))
    for again, once in zip(figures(tmp_path / "cut"), figures(whole), strict=True):
        assert again == pytest.approx(once, rel=1e-2, abs=1e-4, nan_ok=True)  # an overflow's norm in fp16
    assert load_state(whole).data.keys() == load_state(tmp_path / "cut").data.keys()
    if precision == "fp32":
        cut_after(4, whole, tmp_path / "moved")
        values["train"]["device"] = "cpu"
        moved = Options(tmp_path / "moved", quiet=True, allow_changed=("train.device",))
        pretrain(load(PretrainConfig, values), moved)
        assert figures(tmp_path / "moved")[-1] == pytest.approx(figures(whole)[-1], rel=2e-2, abs=1e-3)


def test_what_a_gpu_trained_is_the_same_network_on_the_cpu(tmp_path: Path) -> None:
    values = {**finetuning(steps=6, device="auto", precision="bf16"), "init": str(tmp_path / "pre")}
    pretrain(load(PretrainConfig, pretraining(device="auto", precision="bf16")), Options(tmp_path / "pre", quiet=True))
    done = finetune(load(FinetuneConfig, values), Options(tmp_path / "fine", quiet=True))
    receipt = files.read_json(done.folder / "receipts.json")["encoder"]
    assert (receipt["share"], receipt["features_equal"]) == (1.0, True)
    weights = load_file(done.folder / "model" / "model.safetensors")
    assert all(value.device.type == "cpu" for value in weights.values())
    data = {"images": {"type": "textured", "count": 3, "seed": 7}}
    scores = {}
    for place in ("cpu", "auto"):
        config = load(EvaluateConfig, {"model": str(done.folder), "data": {"test": data["images"]}, "device": place})
        scores[place] = evaluate(config, tmp_path / place).scores.miou
    assert scores["auto"] == pytest.approx(scores["cpu"], abs=5e-3)


def test_predictions_and_fingerprints_do_not_depend_on_the_device(tmp_path: Path) -> None:
    network = build_model(BATCH_NORM, ("ground", "disc")).eval()
    exported = fingerprint(network)
    here = measure(network, Textured(count=3, seed=6)).confusions
    network = network.to(GPU)
    assert feature_distance(exported, fingerprint(network)) < TOLERANCE
    there = measure(network, Textured(count=3, seed=6)).confusions
    assert there.names == here.names
    confusions = [found.scores().confusion for found in (here, there)]
    moved = abs(confusions[0] - confusions[1]).sum() / confusions[0].sum()
    assert moved < 0.02, "twice the share of pixels that got another class"
