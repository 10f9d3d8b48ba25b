"""What tests start in two processes: the same as they do alone, written down by rank 0."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from ssl_seg import files
from ssl_seg.config import UserError, load
from ssl_seg.data.loading import Packed, Samples
from ssl_seg.models import SegmentationModel
from ssl_seg.norm.layers import SwitchNorm2d
from ssl_seg.runs import checkpoint
from ssl_seg.scores import COLUMNS
from ssl_seg.segment import Segment
from ssl_seg.stages import trial
from ssl_seg.stages.finetune import SEGMENT, FinetuneConfig, assemble, finetune, resolve
from ssl_seg.stages.fit import open_streams
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.scoring import Also, measure, score_tasks
from ssl_seg.stages.setup import Options, recalibrate
from ssl_seg.stages.start import build_module
from ssl_seg.training.config import TrainConfig
from ssl_seg.training.learner import Learner
from ssl_seg.training.loop import backward, finish_gradients, train
from ssl_seg.training.multitask import make_views
from ssl_seg.training.processes import Processes
from tests.small import POOL, Textured, finetuning, joining, pretraining, semisupervised, sharing

MODES = tuple(product(("all", "split"), ("together", "in_turn")))
# A task that asks a network which nobody trains, and one that shows two inputs a sample.
UNUSUAL = {"distill": {"teacher": {"name": "resnet10t", "pretrained": False}}, "dense_siamese": {}}
STEPS = 10
# At ten times this rate AdamW's first steps, which are all signs, turn rounding into 0.2 % of the loss by step 20.
LR = 1e-4
# The default network, narrow: better conditioned than the small one of the other tests.
MODEL = {"encoder": {"name": "resnet18"}, "decoder": {"channels": [64, 32, 16, 16, 16]}, "norm": "group"}


def record(views: str, encode: str, tasks: dict[str, Any] | None = None, steps: int = STEPS) -> dict[str, Any]:
    """The first step's gradients, and the losses of ten AdamW steps; no dropout, which differs between processes."""
    values = pretraining(views=views, encode=encode, steps=steps, batch_size=8, lr=LR)
    values["tasks"] = tasks or values["tasks"]
    config = load(PretrainConfig, {**values, "model": MODEL, "augment": {"crop": [32, 32]}})
    processes = Processes(config.train)
    learner = Learner(build_module(config.model, config.tasks, config.seed), config.train, processes)
    samples = {"pool": Samples(config.data.pool, config.augment, config.seed)}
    tasks = learner.module.tasks
    backward(learner, {"pool": next(open_streams(samples, config.train, processes, tasks, 0)["pool"])}, last=True)
    finish_gradients(learner)
    gradients = {name: parameter.grad.clone() for name, parameter in learner.module.named_parameters()}
    streams = open_streams(samples, config.train, processes, tasks, 0)
    losses = [step.metrics["train/loss"] for step in train(learner, streams, 0, seed=0)]
    scores = score_tasks(learner.module, config.data.val, config.augment, processes=processes)
    return {"gradients": gradients, "losses": losses, "scores": scores, "world": processes.world}


def evaluate(count: int = 3) -> dict[str, Any]:
    """What an untrained model takes each image for: of three, one process has two and the other one."""
    config = load(FinetuneConfig, finetuning())
    processes = Processes(config.train)
    module = build_module(config.model, {SEGMENT: Segment(num_classes=2)}, seed=1)
    model = SegmentationModel(module.encoder, module.heads[SEGMENT], ("ground", "disc"))
    also = Also(temperature=2.0, pixels=True, contours=True)
    measured = measure(model, Textured(count=count, seed=6), processes=processes, also=also)
    found = measured.confusions
    return {
        "names": found.names,
        **{column: getattr(found, column).tolist() for column in COLUMNS},
        "confidences": measured.confidences.dump(),
        "tempered": measured.tempered.dump(),
        "pixels": measured.pixels.logits.tolist(),
        "contours": [tuple(row) for row in measured.contours.rows],
    }


def score_one_image() -> dict[str, float]:
    """The figures of a validation set with fewer images than there are processes."""
    values = pretraining()
    values["data"]["val"]["count"] = 1
    config = load(PretrainConfig, values)
    module = build_module(config.model, config.tasks, 0)
    return score_tasks(module, config.data.val, config.augment, processes=Processes(config.train))


def jointly(encode: str, **changed: Any) -> list[float]:
    """Losses of a few joint steps: labelled and unlabelled images in each, both dealt out to the processes."""
    values = finetuning(encode=encode, steps=4, lr=LR, **changed)
    values["data"] = {**values["data"], "pool": POOL}
    values["tasks"] = {"denoise": {}, "rotate": {}}
    return losses_of(values)


def recalibrated() -> list[dict[str, Tensor]]:
    """Of each process the running statistics that a fine-tuning estimates anew on its labelled images."""
    values = finetuning()
    values["model"] = {"encoder": {"name": "mobilenetv2_035"}, "decoder": {"channels": [16, 16, 8, 8, 8]}}
    config, start = resolve(load(FinetuneConfig, values))
    processes = Processes(config.train)
    labelled = config.labels.choose(config.data.labelled)
    learner, samples = assemble(config, start, processes, None, labelled, quiet=True)
    assert recalibrate(learner, samples["labelled"], 6, stream="labelled") > 0
    return processes.gather([{name: own for name, own in learner.module.named_buffers() if "running_" in name}])


def on_pseudo_labels(accumulate: int = 1) -> list[float]:
    """Losses of a few steps of the shipped semi-supervised tasks, with other batches of either stream."""
    sizes = {"labelled": 4, "pool": 8}
    values = semisupervised(steps=4, lr=LR, batch_size=sizes, accumulate=accumulate)
    return losses_of(values)


def sharing_a_pass(encode: str) -> list[float]:
    """Losses of a few steps in which one pass of a noisy image answers two tasks."""
    return losses_of(sharing(encode=encode, steps=4, lr=LR))


def losses_of(values: dict[str, Any]) -> list[float]:
    """Those of every step of a FinetuneConfig's values, without dropout."""
    config, start = resolve(load(FinetuneConfig, {**values, "model": without_dropout(values["model"])}))
    processes = Processes(config.train)
    labelled = config.labels.choose(config.data.labelled)
    learner, samples = assemble(config, start, processes, None, labelled, quiet=True)
    streams = open_streams(samples, config.train, processes, learner.module.tasks, 0)
    return [step.metrics["train/loss"] for step in train(learner, streams, 0, seed=0)]


def taught(encode: str) -> dict[str, Any]:
    """A few joint steps of tasks that mix partners, one with a teacher; the encoder learns from the third on.

    Beside the losses: the mixtures of the first batch, the gradients where the encoder learns, and the teacher.
    """
    values = {**joining(encode=encode, steps=4, batch_size=8, lr=LR, freeze_encoder=2), "model": MODEL}
    # Without Dice, of which AdamW makes whole steps where a gradient is next to nothing but rounding.
    values["segment"] = {"mix": "classmix", "dice": 0}
    config, start = resolve(load(FinetuneConfig, values))
    processes = Processes(config.train)
    labelled = config.labels.choose(config.data.labelled)
    learner, samples = assemble(config, start, processes, None, labelled, quiet=True)
    tasks = learner.module.tasks
    packed = {stream: next(own) for stream, own in open_streams(samples, config.train, processes, tasks, 0).items()}
    views = make_views(tasks, {stream: own.to(processes.device) for stream, own in packed.items()}, teach=learner.teach)
    mixed = (views["consistent"].input, views["segment"].input, views["segment"].target)
    mixtures = [files.sha256(sample.numpy().tobytes()) for samples in mixed for sample in samples]
    learner.freeze(False)
    backward(learner, packed, last=True)
    finish_gradients(learner)
    gradients = {name: parameter.grad.clone() for name, parameter in learner.module.named_parameters()}
    learner.freeze(True)
    streams = open_streams(samples, config.train, processes, tasks, 0)
    losses = [step.metrics["train/loss"] for step in train(learner, streams, 0, seed=0)]
    teacher = learner.teacher.module.state_dict()
    total = sum(value.double().sum().item() for value in teacher.values())
    return {
        "mixtures": sorted(processes.gather(mixtures)),
        "gradients": gradients,
        "losses": losses,
        "teacher": teacher,
        "totals": processes.gather([total]),
        "uses_ddp": learner.uses_ddp,
    }


def meet_nan() -> dict[str, Any]:
    """The last process alone meets NaN at steps 2 and 3; all must skip them and go on with the same weights."""
    config = load(PretrainConfig, pretraining(steps=5))
    processes = Processes(config.train)
    learner = Learner(build_module(config.model, config.tasks, 0), config.train, processes)
    samples = {"pool": Samples(config.data.pool, config.augment, 0)}
    batches = open_streams(samples, config.train, processes, learner.module.tasks, 0)["pool"]

    def poisoned() -> Iterator[Packed]:
        for step, packed in enumerate(batches):
            bad = step in (1, 2) and processes.rank == processes.world - 1
            learner.module.encoder.std.fill_(float("nan") if bad else 0.25)
            yield packed

    def flat() -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in learner.module.parameters()])

    weights = [flat() for _ in train(learner, {"pool": poisoned()}, 0, seed=0)]
    return {"weights": weights, "of_last": processes.gather([weights[-1].sum().item()])}


def settle_accumulate(room: int) -> dict[str, Any]:
    """What `auto` becomes where the last process alone has no room for more images than `room`; what it has changed."""
    values = joining(accumulate="auto", batch_size=8)
    config, start = resolve(load(FinetuneConfig, values))
    processes = Processes(config.train)
    learner, _ = assemble(config, start, processes, None, config.labels.choose(config.data.labelled), quiet=True)
    before = {name: value.clone() for name, value in learner.tensors().items()}

    def with_little_room(learner: Learner, packed: dict[str, Packed], last: bool) -> dict[str, torch.Tensor]:
        if processes.rank == processes.world - 1 and len(packed["pool"].image) > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return backward(learner, packed, last)

    with mock.patch.object(trial, "backward", with_little_room):
        trial.fit_in_memory(learner)
    changed = [name for name, value in learner.tensors().items() if not torch.equal(value, before[name])]
    return {"found": processes.gather([learner.config.accumulate]), "changed": processes.gather(changed)}


def settle_accumulate_amid_norms(room: int) -> list[int]:
    """The same where memory runs out in the middle of the network, whose norms take all images of all processes."""
    model = {**MODEL, "norm": "switch_sync"}
    config = load(PretrainConfig, {**pretraining(accumulate="auto", batch_size=8), "model": model})
    processes = Processes(config.train)
    learner = Learner(build_module(config.model, config.tasks, 0), config.train, processes)
    layers = [layer for layer in learner.module.encoder.modules() if isinstance(layer, SwitchNorm2d)]

    def with_little_room(_: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
        if processes.rank == processes.world - 1 and len(given[0]) > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = layers[len(layers) // 2].register_forward_pre_hook(with_little_room)
    trial.fit_in_memory(learner)
    hook.remove()
    assert all(layer.sync for layer in layers)
    return processes.gather([learner.config.accumulate])


def without_dropout(model: dict[str, Any]) -> dict[str, Any]:
    """Dropout draws from the process's own generator, so with it one process and two differ."""
    encoder = {key: value for key, value in model["encoder"].items() if key != "drop_path"}
    return {**model, "encoder": encoder, "decoder": {**model["decoder"], "dropout": 0.0}}


def cut_after(step: int, finished: Path, folder: Path) -> None:
    """The folder as a kill right after the checkpoint of `step` leaves it: no later checkpoint and no export."""
    assert (finished / "state" / f"step_{step:08}").is_dir(), "a run that is cut there needs a checkpoint: save_every"
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
    with mock.patch.object(checkpoint, "NUM_NEWEST", steps):  # keep them all
        run(folder / "whole")
        for step in range(1, steps):
            if processes is None or processes.is_main:
                cut_after(step, folder / "whole", folder / f"after_{step}")
            if processes is not None:
                processes.barrier()
            run(folder / f"after_{step}")


def start_apart(folder: Path) -> dict[str, list[str | None]]:
    """What each of the processes is told where the last of them is started with, or sees, something else."""
    processes = Processes(load(PretrainConfig, pretraining()).train)
    is_last = processes.rank == processes.world - 1
    cases: dict[str, dict[str, Any]] = {
        "seed": {"seed": 7},
        "crop": {"augment": {"crop": [32, 32]}},
        "steps": {"train": {**pretraining()["train"], "steps": 8}},
        "task": {"tasks": {"denoise": {}}},
        "cannot": {"train": {**pretraining()["train"], "batch_size": 5}},
    }
    read = Textured.read
    views: dict[str, tuple[str, Any]] = {
        "fewer": ("__len__", lambda self: 11),
        "names": ("name", lambda self, index: f"other_{index}"),
        "pixels": ("read", lambda self, index: replace(read(self, index), image=255 - read(self, index).image)),
    }
    told = {}
    for name, changed in cases.items():
        told[name] = refusal_of({**pretraining(), **(changed if is_last else {})}, folder / name)
    told["folder"] = refusal_of(pretraining(), folder / f"rank_{processes.rank}")
    for name, (method, other) in views.items():
        with mock.patch.object(Textured, method, other) if is_last else nullcontext():
            told[name] = refusal_of(pretraining(), folder / name)
    with mock.patch.object(torch.cpu, "get_capabilities", return_value={"avx512_bf16": is_last}):
        told["precision"] = refusal_of(pretraining(precision="auto"), folder / "precision")
    told["slow workers"] = refusal_of(pretraining(workers=1, worker_timeout=700), folder / "slow workers")
    told["nothing"] = refusal_of(pretraining(steps=1, workers=int(is_last)), folder / "nothing")
    return {name: processes.gather([text]) for name, text in told.items()}


def refusal_of(values: dict[str, Any], folder: Path) -> str | None:
    try:
        pretrain_quietly(load(PretrainConfig, values), folder)
    except UserError as error:
        return str(error)
    return None


def share_state(encode: str) -> list[float]:
    """A sum over the state of each process, where each has begun with other weights."""
    config = load(PretrainConfig, pretraining(encode=encode, ema=0.9, channels_last=True))
    processes = Processes(config.train)
    module = build_module(config.model, config.tasks, seed=processes.rank)
    learner = Learner(module, config.train, processes)
    learner.share()
    total = sum(value.double().sum().item() for value in learner.tensors().values())
    alone = sum(value.double().sum().item() for value in build_module(config.model, config.tasks, 0).parameters())
    weights = sum(value.double().sum().item() for value in learner.module.parameters())
    assert weights == alone
    return processes.gather([total])


def compare_modes(out: str) -> None:
    seen = {f"{views}-{encode}": record(views, encode) for views, encode in MODES}
    seen["unusual"] = {mode: record(*mode, UNUSUAL, steps=3) for mode in MODES[::3]}
    seen["confusions"] = [evaluate(count) for count in range(4)]
    seen["one image"] = score_one_image()
    seen["jointly"] = {encode: jointly(encode) for encode in ("together", "in_turn")}
    seen["shared"] = {encode: sharing_a_pass(encode) for encode in ("together", "in_turn")}
    seen["taught"] = {encode: taught(encode) for encode in ("together", "in_turn")}
    seen["recalibrated"] = recalibrated()
    seen["pseudo-labels"] = on_pseudo_labels()
    seen["nan"] = meet_nan()
    seen["auto"] = settle_accumulate(room=2)
    if Processes(load(PretrainConfig, pretraining()).train).is_main:
        torch.save(seen, out)


def who_tells() -> dict[str, list[bool | None]]:
    """Which process tells an error that all meet, and one that the last meets alone; None: it has met none."""
    processes = Processes(load(PretrainConfig, pretraining()).train)
    told = {}
    for who, meets_it in (("all", True), ("last", processes.rank == processes.world - 1)):
        tells = None
        try:
            with processes.ending_together():
                if meets_it:
                    raise UserError(f"met by {who}")
        except UserError as error:
            tells = error.of_one_process
        told[who] = processes.gather([tells])
    return told


def group_timeout() -> float:
    """Seconds that gloo waits."""
    backend = distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    return backend.options._timeout.total_seconds()


def begin_alike(out: str) -> None:
    seen = {
        "apart": start_apart(Path(out).parent / "apart"),
        "tells": who_tells(),
        "timeout": Processes(TrainConfig(device="cpu")).gather([group_timeout()]),
        "shared": {encode: share_state(encode) for encode in ("together", "in_turn")},
        "auto amid norms": settle_accumulate_amid_norms(room=4),  # two images for each of two tasks
    }
    if Processes(load(PretrainConfig, pretraining()).train).is_main:
        torch.save(seen, out)


def resume(folder: str, encode: str, workers: int, steps: int) -> None:
    config = load(PretrainConfig, pretraining(encode=encode, workers=workers, steps=steps, save_every=1))
    run = partial(pretrain_quietly, config)
    resume_after_every_step(run, Path(folder) / "pretrained", config.train.steps, Processes(config.train))
    if encode == "together":
        joint = load(FinetuneConfig, joining(steps=4, freeze_encoder=2, save_every=1))
        run = partial(finetune_quietly, joint)
        resume_after_every_step(run, Path(folder) / "joint", joint.train.steps, Processes(joint.train))


def pretrain_quietly(config: PretrainConfig, folder: Path) -> None:
    pretrain(config, Options(folder, quiet=True))


def finetune_quietly(config: FinetuneConfig, folder: Path) -> None:
    finetune(config, Options(folder, quiet=True))
