"""The first stage: train one shared encoder on unlabelled images with any set of pretext tasks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, PositiveInt, SerializeAsAny, field_validator

from ssl_seg import evaluate, store, weights
from ssl_seg.config import Config, UserError
from ssl_seg.data import Augment, Samples
from ssl_seg.datasets import Dataset
from ssl_seg.models import ModelConfig
from ssl_seg.stage import (
    DryRun,
    Job,
    Options,
    build_module,
    check_sizes,
    dry_run,
    export_heads,
    fit,
    open_run,
    prepare_tasks,
    say,
    task_mapping,
)
from ssl_seg.tasks import PretextTask
from ssl_seg.train import Learner, Processes, TrainConfig

TaskMapping = Annotated[dict[str, SerializeAsAny[PretextTask]], BeforeValidator(task_mapping)]


class PretrainData(Config):
    """Where the images come from."""

    pool: SerializeAsAny[Dataset]  # unlabelled; masks are not looked at
    val: SerializeAsAny[Dataset] | None = None  # images on which the tasks are scored; never trained on
    resize: tuple[PositiveInt, PositiveInt] | None = None  # (H, W) of every image before the crop


class PretrainConfig(Config):
    """`ssl-seg pretrain`: what its YAML may hold."""

    data: PretrainData
    model: ModelConfig = ModelConfig()
    tasks: TaskMapping
    augment: Augment = Augment()
    train: TrainConfig = TrainConfig()
    init: str | None = None  # an exported encoder to go on from
    init_allow: tuple[str, ...] = ()  # globs of tensors that need not match it
    seed: int = 0

    @field_validator("tasks")
    @classmethod
    def _some_task(cls, tasks: dict[str, PretextTask]) -> dict[str, PretextTask]:
        if not tasks:
            raise ValueError("no task is left to train; name one or more, such as tasks.denoise={}")
        return tasks


@dataclass(frozen=True)
class Pretrained:
    """What `pretrain` gives back; the same is in the folder's result.json."""

    folder: Path
    encoder: Path
    steps: int
    scores: dict[str, float]  # <task>/<figure> on data.val, empty without one


def pretrain(config: PretrainConfig, options: Options) -> Pretrained:
    """Pretrain into a run folder, going on from its last checkpoint if it has one.

    Raises UserError for what the user can mend, `stage.Interrupted` after a signal (the state is saved first).
    """
    processes = Processes(config.train)
    check_sizes(config.train, processes, len(config.tasks))
    check_images("data.pool", config.data.pool)
    if config.init:
        weights.read_encoder_info(config.init)  # before anything is written
    with open_run("pretrain", config, options, processes) as run:
        learner, sources = assemble(config, processes, run, options.quiet)
        evaluation = {"examples": config.data.val, "augment": config.augment, "resize": config.data.resize}

        def score() -> dict[str, float]:
            if config.data.val is None:
                return {}
            workers = config.train.workers
            return evaluate.score_tasks(learner.module, **evaluation, workers=workers, processes=processes)

        shown = {**evaluation, "examples": config.data.val or config.data.pool}
        job = Job(
            run=run,
            learner=learner,
            sources=sources,
            seed=config.seed,
            evaluate=lambda: {f"val/{name}": value for name, value in score().items()},
            pictures=lambda: evaluate.task_pictures(learner.module, **shown),
            quiet=options.quiet,
        )
        steps = fit(job.resume())
        scores = score()
        if processes.is_main:
            weights.export_encoder(run.folder, learner.module.encoder, config.model.dump())
            export_heads(run, learner.module)
            run.write_json("result.json", {"steps": steps, "val": scores})
        processes.barrier()
    return Pretrained(run.folder, run.folder / "encoder", steps, scores)


def try_out(config: PretrainConfig) -> DryRun:
    """One batch through every head; writes nothing."""
    processes = Processes(config.train)
    check_sizes(config.train, processes, len(config.tasks))
    check_images("data.pool", config.data.pool)
    learner, sources = assemble(config, processes, None, quiet=True)
    return dry_run(learner, sources)


def assemble(
    config: PretrainConfig, processes: Processes, run: store.Run | None, quiet: bool
) -> tuple[Learner, dict[str, Samples]]:
    """The learner with its starting weights, and the pool as the loader reads it."""
    pool = Samples(config.data.pool, config.augment, config.seed, config.data.resize)
    recorded = None if run is None else run.read_json("tasks.json")
    tasks = prepare_tasks(config.tasks, pool, recorded)
    if run is not None and recorded is None:
        run.write_json("tasks.json", {name: task.dump() for name, task in tasks.items()})
    model = config.model.without_pretrained() if config.init else config.model
    module = build_module(model, tasks, config.seed)
    if config.init:
        receipt = weights.load_encoder(module.encoder, config.init, config.init_allow)
        say(receipt.summary(), quiet or not processes.is_main)
        if run is not None:
            run.write_json("receipts.json", {"encoder": asdict(receipt)})
    return Learner(module, config.train, processes), {"pool": pool}


def check_images(key: str, dataset: Dataset) -> None:
    """An empty data set would only be noticed as a division by zero."""
    if len(dataset) == 0:
        raise UserError(f"{key}: holds no image; name a folder with some")
