"""How hard does each task pull at the shared encoder? The norm of its gradient there, while all four are trained.

    python experiments/camvid_tasks/gradients.py --camvid camvid

The figures stand beside the tasks' `weight` defaults: with them, no task's pull is lost beside the others'.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ssl_seg import (
    Batch,
    MultiTask,
    PretrainConfig,
    Processes,
    assemble,
    find_start,
    load,
    make_views,
    open_streams,
    train,
)

SHOWN = (1, 50, 150, 400, 800)
BATCHES = 4  # over which a figure is averaged


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--camvid", type=Path, required=True, help="the folder that holds CamVid")
    words.add_argument("words", nargs="*", help="changes to the recipe, such as model.encoder.name=resnet34")
    given = words.parse_args()
    roots = [f"data.{part}.root={given.camvid}" for part in ("pool", "val")]
    config = load(PretrainConfig, ["camvid", *roots, f"train.steps={SHOWN[-1]}", *given.words])
    learner, sources = assemble(config, find_start(config), Processes(config.train))
    streams = open_streams(sources, config.train, learner.processes, learner.module.tasks, 0)
    fixed = open_streams(sources, config.train, learner.processes, learner.module.tasks, 0)
    device = learner.processes.device
    batches = [{stream: next(source).to(device) for stream, source in fixed.items()} for _ in range(BATCHES)]
    print("step  " + "  ".join(f"{name:>10}" for name in config.tasks) + "   largest / least")
    for step in train(learner, streams, 0, config.seed):
        if step.number in SHOWN:
            norms = encoder_gradients(learner.module, batches)
            row = "  ".join(f"{value:10.3f}" for value in norms.values())
            print(f"{step.number:4}  {row}   {max(norms.values()) / min(norms.values()):.1f}", flush=True)


def encoder_gradients(module: MultiTask, batches: Sequence[Mapping[str, Batch]]) -> dict[str, float]:
    """Per task the norm of its weighted loss's gradient with respect to the encoder, the mean over the batches."""
    weights = [weight for weight in module.encoder.parameters() if weight.requires_grad]
    norms = dict.fromkeys(module.tasks, 0.0)
    for batch in batches:
        for name, view in make_views(module.tasks, batch).items():
            loss = module.tasks[name].weight * module({name: view})[name].mean()
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
            norms[name] += torch.stack(squares).sum().sqrt().item() / len(batches)
    return norms


if __name__ == "__main__":
    main()
