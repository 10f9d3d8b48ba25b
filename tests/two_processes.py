"""What tests start under torchrun: the same as they do alone, written down by rank 0."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ssl_seg import store
from ssl_seg.config import load
from ssl_seg.data import Samples
from ssl_seg.evaluate import score_segmentation, score_tasks
from ssl_seg.finetune import SEGMENT, FinetuneConfig
from ssl_seg.models import SegmentationModel
from ssl_seg.pretrain import PretrainConfig, pretrain
from ssl_seg.stage import Options, build_module, open_streams, pool_tasks
from ssl_seg.tasks import Segment
from ssl_seg.train import Learner, Processes, backward, finish_gradients, train
from tests.small import finetuning, pretraining

MODES = tuple(product(("all", "split"), ("together", "in_turn")))
STEPS = 20
LR = 1e-4  # at ten times that, AdamW's first steps (all signs) blow rounding up to 1 % of the loss by step 6


def record(views: str, encode: str) -> dict[str, Any]:
    """The first step's gradients, and the losses of twenty AdamW steps; no dropout, which differs between processes."""
    values = pretraining(views=views, encode=encode, steps=STEPS, batch_size=8, lr=LR)
    values["model"] = {**values["model"], "encoder": {"type": "timm", "name": "mobilenetv2_035"}}
    values["model"]["decoder"] = {**values["model"]["decoder"], "dropout": 0.0}
    config = load(PretrainConfig, values)
    processes = Processes(config.train)
    learner = Learner(build_module(config.model, config.tasks, config.seed), config.train, processes)
    samples = {"pool": Samples(config.data.pool, config.augment, config.seed)}
    tasks = pool_tasks(learner.module.tasks)
    backward(learner, {"pool": next(open_streams(samples, config.train, processes, tasks, 0)["pool"])}, last=True)
    finish_gradients(learner)
    gradients = {name: parameter.grad.clone() for name, parameter in learner.module.named_parameters()}
    streams = open_streams(samples, config.train, processes, tasks, 0)
    losses = [step.metrics["train/loss"] for step in train(learner, streams, 0, seed=0)]
    scores = score_tasks(learner.module, config.data.val, config.augment, processes=processes)
    return {"gradients": gradients, "losses": losses, "scores": scores, "world": processes.world}


def evaluate() -> torch.Tensor:
    """The confusion matrix of an untrained model on three images: one process has two of them, the other one."""
    config = load(FinetuneConfig, finetuning())
    processes = Processes(config.train)
    module = build_module(config.model, {SEGMENT: Segment(num_classes=2)}, seed=1)
    model = SegmentationModel(module.encoder, module.heads[SEGMENT], ("ground", "disc"))
    return torch.as_tensor(score_segmentation(model, config.data.val, processes=processes).confusion)


def cut_after(step: int, finished: Path, folder: Path) -> None:
    """The folder as a kill right after the checkpoint of `step` leaves it: no later checkpoint and no export."""
    shutil.copytree(finished, folder)
    for place in (folder / "state").iterdir():
        if int(place.name.removeprefix("step_")) > step:
            shutil.rmtree(place)
    for name in ("encoder", "decoders", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "result.json").unlink()


def resume_after_every_step(
    run: Callable[[Path], object], folder: Path, steps: int, processes: Processes | None = None
) -> None:
    """`run` into folder/whole, and into folder/after_1, ... each cut after that step and taken up again."""
    keep_all = ((), steps)
    former, store.save_state.__defaults__ = store.save_state.__defaults__, keep_all
    try:
        run(folder / "whole")
        for step in range(1, steps):
            if processes is None or processes.is_main:
                cut_after(step, folder / "whole", folder / f"after_{step}")
            if processes is not None:
                processes.barrier()
            run(folder / f"after_{step}")
    finally:
        store.save_state.__defaults__ = former


def compare_modes(out: str) -> None:
    seen = {f"{views}-{encode}": record(views, encode) for views, encode in MODES}
    seen["confusion"] = evaluate()
    if Processes(load(PretrainConfig, pretraining()).train).is_main:
        torch.save(seen, out)


def resume(folder: str, encode: str, workers: str) -> None:
    config = load(PretrainConfig, pretraining(encode=encode, workers=int(workers)))
    run = partial(pretrain_quietly, config)
    resume_after_every_step(run, Path(folder), config.train.steps, Processes(config.train))


def pretrain_quietly(config: PretrainConfig, folder: Path) -> None:
    pretrain(config, Options(folder, quiet=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"compare_modes": compare_modes, "resume": resume}[sys.argv[1]](*sys.argv[2:])
