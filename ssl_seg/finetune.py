"""The second stage: learn segmentation from a few labelled images, from scratch or from what pretraining left.

With `tasks` it is joint training: each step takes `batch_size` labelled and `batch_size` unlabelled images through the
same module and loop.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, SerializeAsAny, field_validator, model_validator

from ssl_seg import evaluate, store, weights
from ssl_seg.config import Config, UserError
from ssl_seg.data import Augment, Examples, Labels, Samples, Subset, hold_out, pixel_counts
from ssl_seg.datasets import Dataset
from ssl_seg.metrics import SegmentationScores
from ssl_seg.models import ModelConfig, SegmentationModel
from ssl_seg.pretrain import TaskMapping, check_images
from ssl_seg.stage import (
    DryRun,
    Job,
    Options,
    StopRule,
    build_module,
    check_sizes,
    dry_run,
    fit,
    open_run,
    prepare_tasks,
    say,
)
from ssl_seg.tasks import MultiTask, Segment
from ssl_seg.train import Learner, Processes, TrainConfig

SEGMENT = "segment"  # the name of the supervised task among the heads; comes first, so its bits do not depend on others


class FinetuneData(Config):
    """Where the images come from."""

    labelled: SerializeAsAny[Dataset]
    val: SerializeAsAny[Dataset] | None = None  # None: whole sequences, or a fifth, of the labelled images are held out
    test: SerializeAsAny[Dataset] | None = None  # scored once, at the end, with the weights that `select` names
    pool: SerializeAsAny[Dataset] | None = None  # unlabelled images of joint training
    resize: tuple[PositiveInt, PositiveInt] | None = None  # (H, W) of every image; scores stay at the label's own size


class FinetuneConfig(Config):
    """`ssl-seg finetune`: what its YAML may hold."""

    data: FinetuneData
    labels: Labels = Labels()
    # None: the model of the encoder that `init` names, else a U-Net on resnet18.
    model: ModelConfig | None = None
    segment: Segment = Segment()
    tasks: TaskMapping = Field(default={})  # of joint training, on data.pool
    augment: Augment = Augment()
    train: TrainConfig = TrainConfig()
    init: str | None = None  # a pretraining run, its encoder/ folder, or a file of weights; None: scratch, or timm's
    init_allow: tuple[str, ...] = ()  # globs of tensors that need not match it
    transfer: str = "encoder"  # or encoder+<task>: that task's decoder too (Brempong et al. 2022)
    # best: the weights of the best validation score; last: those of the last step, when val must not choose.
    select: Literal["best", "last"] = "best"
    stop: StopRule = StopRule()
    seed: int = 0

    @field_validator("transfer")
    @classmethod
    def _known_transfer(cls, transfer: str) -> str:
        first, _, rest = transfer.partition("+")
        if first != "encoder" or "+" in rest or transfer.endswith("+"):
            raise ValueError(
                f"'{transfer}' is not known; write encoder, or encoder+denoise with a task of the init run"
            )
        return transfer

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneConfig:
        if self.tasks and self.data.pool is None:
            raise ValueError("data.pool: missing; joint training (tasks is not empty) takes unlabelled images from it")
        if self.transfer != "encoder" and self.init is None:
            raise ValueError(f"transfer: '{self.transfer}' needs init=RUN, the pretraining run whose decoder is meant")
        if SEGMENT in self.tasks:
            raise ValueError(f"tasks.{SEGMENT}: the name is taken by the supervised task; choose another")
        return self


@dataclass(frozen=True)
class Finetuned:
    """What `finetune` gives back; the same is in the folder's result.json."""

    folder: Path
    model: Path
    steps: int
    selected_step: int
    labelled: tuple[str, ...]  # the names of the images whose masks were used
    class_names: tuple[str, ...]
    val: SegmentationScores
    test: SegmentationScores | None


def finetune(config: FinetuneConfig, options: Options) -> Finetuned:
    """Fine-tune into a run folder, going on from its last checkpoint if it has one.

    Raises UserError for what the user can mend, `stage.Interrupted` after a signal (the state is saved first).
    """
    config = resolve(config)
    processes = Processes(config.train)
    check_sizes(config.train, processes, len(config.tasks))
    check_data(config)
    labelled, val = choose_images(config)
    with open_run("finetune", config, options, processes) as run:
        learner, sources = assemble(config, processes, run, labelled, options.quiet)
        resize = config.data.resize
        model = SegmentationModel(
            learner.module.encoder, learner.module.heads[SEGMENT], config.data.labelled.class_names
        )

        def score(examples: Examples) -> SegmentationScores:
            return evaluate.score_segmentation(model, examples, resize, config.train.workers, processes)

        def figures() -> dict[str, float]:
            named = evaluate.named_scores(score(val), model.class_names)
            return {f"val/{name}": value for name, value in named.items() if value is not None}

        job = Job(
            run=run,
            learner=learner,
            sources=sources,
            seed=config.seed,
            evaluate=figures,
            pictures=lambda: {"predictions": evaluate.prediction_panel(model, val, resize)},
            score="val/miou",
            stop=config.stop,
            quiet=options.quiet,
        ).resume()
        steps = fit(job)
        selected = steps
        if config.select == "best" and job.progressed.best_step != steps:
            selected = job.progressed.best_step
            state = store.load_state(run.folder, selected)
            learner.restore(state.tensors, state.data["learner"])
        val_scores = score(val)
        test_scores = None if config.data.test is None else score(config.data.test)
        if processes.is_main:
            extra = {"resize": resize, "step": selected}
            weights.export_model(run.folder, model, config.model.dump(), extra)
            parts = {"val": val_scores, "test": test_scores}
            scored = {part: scores for part, scores in parts.items() if scores is not None}
            named = {part: evaluate.named_scores(scores, model.class_names) for part, scores in scored.items()}
            matrices = {part: scores.confusion.tolist() for part, scores in scored.items()}
            run.write_json("confusion.json", {"classes": model.class_names, **matrices})
            run.write_json("result.json", {"steps": steps, "selected_step": selected, **named})
        processes.barrier()
    names = tuple(labelled.name(index) for index in range(len(labelled)))
    return Finetuned(
        run.folder, run.folder / "model", steps, selected, names, model.class_names, val_scores, test_scores
    )


def try_out(config: FinetuneConfig) -> DryRun:
    """One batch through every head; writes nothing."""
    config = resolve(config)
    processes = Processes(config.train)
    check_sizes(config.train, processes, len(config.tasks))
    check_data(config)
    labelled, _ = choose_images(config)
    learner, sources = assemble(config, processes, None, labelled, quiet=True)
    return dry_run(learner, sources)


def resolve(config: FinetuneConfig) -> FinetuneConfig:
    """The config with what other files decide written out: the model of `init`, the number of classes."""
    model = config.model
    info = weights.read_encoder_info(config.init) if config.init else {}
    if model is None and info:
        model = ModelConfig.model_validate(info["config"])
    names = config.data.labelled.class_names
    if not names:
        raise UserError("data.labelled: has no classes; give it masks and class names (classes: [background, ...])")
    count = config.segment.num_classes or len(names)
    if count != len(names):
        raise UserError(f"segment.num_classes: {count}, but data.labelled names {len(names)} classes; drop the key")
    segment = config.segment.model_copy(update={"num_classes": count})
    return config.model_copy(update={"model": model or ModelConfig(), "segment": segment})


def check_data(config: FinetuneConfig) -> None:
    """The data sets hold images, and the same classes in the same order."""
    for part in ("labelled", "val", "test", "pool"):
        dataset = getattr(config.data, part)
        if dataset is None:
            continue
        check_images(f"data.{part}", dataset)
        if part in ("val", "test") and dataset.class_names != config.data.labelled.class_names:
            raise UserError(
                f"data.{part}: its classes ({', '.join(dataset.class_names) or 'none'}) are not those of data.labelled "
                f"({', '.join(config.data.labelled.class_names)}); give both the same list"
            )


def choose_images(config: FinetuneConfig) -> tuple[Subset, Examples]:
    """The images whose masks are used, and those on which the run is validated."""
    if config.data.val is not None:
        return config.labels.choose(config.data.labelled), config.data.val
    kept, held = hold_out(config.data.labelled, config.labels.seed)
    if len(kept) == 0 or len(held) == 0:
        raise UserError(
            f"data.labelled: {len(config.data.labelled)} images are too few to hold some out; give data.val its own"
        )
    return config.labels.choose(kept), held


def assemble(
    config: FinetuneConfig, processes: Processes, run: store.Run | None, labelled: Subset, quiet: bool
) -> tuple[Learner, dict[str, Samples]]:
    """The learner with its starting weights, and the streams as the loaders read them."""
    sources = {"labelled": Samples(labelled, config.augment, config.seed, config.data.resize, with_labels=True)}
    if config.tasks:
        sources["pool"] = Samples(config.data.pool, config.augment, config.seed, config.data.resize)
    recorded = None if run is None else run.read_json("tasks.json")
    if recorded is not None:
        segment = Segment.model_validate(recorded[SEGMENT])
    elif config.segment.class_weights == "median":
        segment = config.segment.prepare(*pixel_counts(labelled))
    else:
        segment = config.segment
    tasks = {SEGMENT: segment, **prepare_tasks(config.tasks, sources.get("pool"), recorded)}
    module = build_module(config.model.without_pretrained() if config.init else config.model, tasks, config.seed)
    receipts = load_weights(config, module)
    for receipt in receipts.values():
        say(receipt.summary(), quiet or not processes.is_main)
    if run is not None and recorded is None:
        run.write_json("labelled.json", {"images": [labelled.name(index) for index in range(len(labelled))]})
        run.write_json("receipts.json", {part: asdict(receipt) for part, receipt in receipts.items()})
        run.write_json("tasks.json", {name: task.dump() for name, task in tasks.items()})
    return Learner(module, config.train, processes), sources


def load_weights(config: FinetuneConfig, module: MultiTask) -> dict[str, weights.Receipt]:
    """Put what `init` and `transfer` name into the module; a receipt for each part."""
    if config.init is None:
        return {}
    receipts = {"encoder": weights.load_encoder(module.encoder, config.init, config.init_allow)}
    _, _, task = config.transfer.partition("+")
    if task:
        decoder = module.heads[SEGMENT].decoder
        receipts["decoder"] = weights.load_decoder(decoder, config.init, task, config.init_allow)
    return receipts
