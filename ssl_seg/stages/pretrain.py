"""The first stage: train one shared encoder on unlabelled images with any set of pretext tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import (
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ssl_seg.config import Config, PathText, known_to_0_1
from ssl_seg.data.augment import Augment
from ssl_seg.data.loading import Samples
from ssl_seg.data.splits import Subset, names_of
from ssl_seg.datasets import Dataset
from ssl_seg.images import SizeField
from ssl_seg.leaks.guard import Leaks, Question, guard
from ssl_seg.models import ModelConfig
from ssl_seg.runs.writer import Run
from ssl_seg.stages import panels, scoring, trial
from ssl_seg.stages.fit import Evaluator, Job, StopRule, drawing, fit, restore_best
from ssl_seg.stages.probe import FIGURE, ProbeRule, Watch, choose_labelled
from ssl_seg.stages.setup import (
    Options,
    StageConfig,
    TaskMapping,
    check_images,
    check_processes,
    check_same_images,
    check_training,
    enough_to_recalibrate,
    export_heads,
    in_channels,
    open_run,
    read_as,
    recalibrate,
    recalibrated_encoder,
    refuse_channels,
    say_clamped_zoom,
    say_other_ranges,
    say_precision,
    start_processes,
    tell_notes,
)
from ssl_seg.stages.sources import Sources
from ssl_seg.stages.start import Start, find_start, origins, prepare_tasks, record_tasks, start_module
from ssl_seg.tasks import Stream, TaskPlugin, weighty
from ssl_seg.terminal import say
from ssl_seg.tracking import Tracking, TrackingField
from ssl_seg.training.config import TrainConfig
from ssl_seg.training.learner import Learner
from ssl_seg.training.multitask import MultiTask
from ssl_seg.training.processes import Processes
from ssl_seg.weights.export import export_encoder, load_encoder
from ssl_seg.weights.receipt import Receipt

TASKS = {"denoise": {}, "inpaint": {}}  # where images alone are named: fast, and asking nothing of the images
LEAST_LEARNT = 0.02  # of the loss of a guess; jigsaw puzzles of cell nuclei came to 0.00
PROBED_CLEAN = 64  # of the images of `recalibrate`, before a probe: as exported within 7 %, in a quarter of the time


class PretrainData(Config):
    """Where the images come from."""

    pool: SerializeAsAny[Dataset]  # unlabelled; masks are not looked at
    val: SerializeAsAny[Dataset] | None = None  # images on which the tasks are scored; never trained on
    resize: SizeField | None = None  # (H, W) of every image before the crop


class PretrainConfig(StageConfig):
    """`ssl-seg pretrain`: what its YAML may hold."""

    data: PretrainData
    model: ModelConfig = ModelConfig()  # what is left out comes from the model of `init`, if there is one
    tasks: TaskMapping  # by name, each with its options; `null` takes one away
    augment: Augment = Augment()
    train: TrainConfig = TrainConfig()
    init: PathText | None = None  # an exported encoder to go on from
    init_allow: tuple[str, ...] = ()  # globs of tensors that need not match it
    # Images without corruption on which batch statistics are estimated anew for the export, since those of training
    # mix noise, holes and grey; 0: as training left them. Root mean square distance of the last map to that with the
    # statistics of 2,048 images, resnet18 after 1,500 steps: 26 % as trained, 16, 7.1, 3.9, 3.6, 2.7 and 2.1 % with
    # 32, 64, 128, 256, 512 and 1,024 images.
    recalibrate: int = Field(default=256, ge=0, le=1_000_000)
    seed: int = 0  # of everything drawn: weights, order, crops, noise
    leaks: Leaks = Leaks()
    tracking: TrackingField = Tracking()
    # How well the encoder tells classes apart meanwhile, by a few labelled images: those that fine-tuning will have.
    probe: ProbeRule | None = None
    # last: the weights of the last step; probe: those of its best score, which labels have then chosen.
    select: Literal["last", "probe"] = "last"
    stop: StopRule | None = None  # judged by the probe

    @model_validator(mode="after")
    def _fit_channels(self) -> PretrainConfig:
        refuse_channels(self.model, weighty(self.tasks), self.augment)
        return self

    @model_validator(mode="after")
    def _has_a_probe(self) -> PretrainConfig:
        asked = [key for key, value in (("select", self.select == "probe"), ("stop", self.stop)) if value]
        if asked and self.probe is None:
            raise ValueError(f"{asked[0]}: is judged by the probe; give probe.labelled, a few images with masks, too")
        if self.probe is not None and self.probe.every is None and self.train.eval_every is None:
            raise ValueError("probe: is made when the run is evaluated; give probe.every=STEPS")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return known_to_0_1(self, dump(self), since=("probe", "select", "stop"))

    @field_validator("augment")
    @classmethod
    def _without_masks(cls, augment: Augment) -> Augment:
        if augment.rare:
            raise ValueError("rare: looks for rare classes in masks, and pretraining reads none; drop it")
        return augment

    @field_validator("recalibrate")
    @classmethod
    def _more_than_one(cls, recalibrate: int) -> int:
        return enough_to_recalibrate(recalibrate)

    @field_validator("tasks")
    @classmethod
    def _some_task(cls, tasks: dict[str, TaskPlugin]) -> dict[str, TaskPlugin]:
        if not weighty(tasks):
            raise ValueError("no task is left to train; name one or more, such as tasks.denoise={}")
        return tasks


@dataclass(frozen=True)
class Pretrained:
    """What `pretrain` gives back; the same is in the folder's result.json."""

    folder: Path
    encoder: Path
    steps: int
    scores: dict[str, float]  # <task>/<figure> on data.val, empty without one; by the statistics of training
    selected_step: int  # whose weights these are


def pretrain(config: PretrainConfig, options: Options) -> Pretrained:
    """Pretrain into a run folder, going on from its last checkpoint if it has one.

    Raises UserError for what the user can mend, `config.Interrupted` after a signal (the state is saved first).
    """
    processes = start_processes(config.train, options)
    config, start = processes.together(partial(resolve, config, None if options.overwrite else options.folder))
    quiet = options.quiet or not processes.is_main
    processes.together(partial(check, config, processes))
    labelled = processes.together(partial(labelled_of, config))
    given = given_to(config)
    check_processes("pretrain", config, options, given, processes)
    with open_run("pretrain", config, options, processes) as (run, signals, mirror):
        check_same_images(run, given, options.allow_changed)
        tell_notes(given, labelled, quiet)
        say_other_ranges(given, start.exported_range, quiet=quiet)
        # Images whose labels choose the weights count as trained on.
        trained = {"pool": config.data.pool, **labelled}
        question = Question(trained, {"val": config.data.val}, config.leaks, origins(config, start))
        read = Sources(question.given, labelled, processes)
        read.check(run, config.train.reading, options.allow_changed, quiet)
        guard(run, question, processes, config.train.reading, quiet)
        read.record(run)
        learner, sources = assemble(config, start, processes, run, quiet)
        evaluation = {"examples": config.data.val, "augment": config.augment, "resize": config.data.resize}

        def score() -> dict[str, float]:
            if config.data.val is None:
                return {}
            # Where memory has been found to be short, no more than a step takes.
            at_once = min(scoring.CROPS, learner.crops["pool"]) if learner.auto else scoring.CROPS
            place = {"batch_size": at_once, "workers": config.train.reading, "processes": processes}
            return scoring.score_tasks(learner.evaluated, **evaluation, **place)

        latest: dict[str, float] = {}

        def figures(_: int) -> dict[str, float]:
            latest.update(score())
            return {f"val/{name}": value for name, value in latest.items()}

        def pictures() -> dict[str, np.ndarray]:
            shown = {**evaluation, "examples": config.data.val or config.data.pool}
            return panels.task_pictures(learner.evaluated, **shown)

        every = config.train.eval_every
        evaluators = {"scores": Evaluator(figures, every), "pictures": drawing(run, processes, pictures, every)}
        if config.probe is not None:
            few = min(PROBED_CLEAN, config.recalibrate)
            exported = partial(recalibrated_encoder, learner, sources["pool"], few)
            watch = Watch(exported, config.model, labelled["labelled"], config.seed, processes)
            evaluators["probe"] = Evaluator(watch.measure, config.probe.every or every)
        job = Job(
            run=run,
            learner=learner,
            sources=sources,
            seed=config.seed,
            evaluators=evaluators,
            signals=signals,
            mirror=mirror,
            score=FIGURE if config.select == "probe" or config.stop else None,
            stop=config.stop or StopRule(),
            quiet=quiet,
        )
        trial.check_crops(learner)
        job.resume()
        trial.fit_in_memory(learner, quiet)
        steps = fit(job)
        selected = restore_best(job, steps) if config.select == "probe" else steps
        # The last step has been evaluated, unless a former start made it.
        scores = latest if latest and selected == steps else score()
        for line in of_idle_tasks(scores):
            say(line, quiet)
        # After the scores, whose views are corrupted, and after the last checkpoint: only the export has it.
        if recalibrate(learner, sources["pool"], config.recalibrate):
            say(f"batch statistics of the export are those of {config.recalibrate} clean images", quiet)
        if processes.is_main:
            seen = {"range": config.data.pool.value_range()}
            export_encoder(run.folder, learner.evaluated.encoder, config.model.dump(), seen)
            export_heads(run, learner.evaluated)
            run.write_json("result.json", {"steps": steps, "val": scores, **_selected(job, selected, labelled)})
        processes.barrier()
    return Pretrained(run.folder, run.folder / "encoder", steps, scores, selected)


def given_to(config: PretrainConfig) -> dict[str, Dataset | None]:
    """The data sets of a run, by part."""
    probed = {} if config.probe is None else {"labelled": config.probe.labelled}
    return {"pool": config.data.pool, "val": config.data.val, **probed}


def labelled_of(config: PretrainConfig) -> dict[str, Subset]:
    """The labelled images that the probe looks at, as the part that they are of; none without it."""
    rule = config.probe
    if rule is None:
        return {}
    check_images("probe.labelled", rule.labelled)
    return {"labelled": choose_labelled(rule.labelled, rule.labels, rule.holds_out, "probe.labelled")}


def of_idle_tasks(scores: Mapping[str, float]) -> list[str]:
    """A word on each task that knows no more of held-out images than a guess."""
    learnt = {name.removesuffix("/learnt"): value for name, value in scores.items() if name.endswith("/learnt")}
    return [
        f"tasks.{name}: knows no more of data.val than a guess (val/{name}/learnt {value:.2f}), so the encoder has "
        f"little of it; train longer, or leave it out: tasks.{name}=null"
        for name, value in learnt.items()
        if value < LEAST_LEARNT
    ]


def _selected(job: Job, step: int, labelled: Mapping[str, Subset]) -> dict[str, Any]:
    """What result.json says of a run whose weights labels may have chosen."""
    if not labelled:
        return {}
    chosen = job.score is not None  # they have said which step it was, or when it was enough
    names = names_of(labelled["labelled"])
    return {"selected_step": step, "probe": {"chose": chosen, "best": job.progress.best_score, "labelled": names}}


def try_out(config: PretrainConfig) -> trial.DryRun:
    """One batch through every head; writes nothing."""
    processes = start_processes(config.train)
    say_precision(config.train, processes)
    with processes.ending_together():
        config, start = resolve(config)
        quiet = not processes.is_main
        check(config, processes)
        given = given_to(config)
        labelled_of(config)
        tell_notes(given, ("labelled",), quiet)
        say_other_ranges(given, start.exported_range, quiet=quiet)
        learner, sources = assemble(config, start, processes, None, quiet=True)
        trial.check_crops(learner)
        return trial.dry_run(learner, sources)


def resolve(config: PretrainConfig, folder: str | Path | None = None) -> tuple[PretrainConfig, Start]:
    """The config with what other files decide written out, the model, and the start of a run in `folder`."""
    start = find_start(config, folder)
    channels = start.model.channels
    probe = config.probe
    if probe is not None:
        probe = probe.model_copy(update={"labelled": in_channels("probe.labelled", probe.labelled, channels)})
    changed = {} if probe == config.probe else {"probe": probe}
    return read_as(config, channels).model_copy(update={"model": start.model, **changed}), start


def check(config: PretrainConfig, processes: Processes) -> None:
    """What can be known to be wrong before any work is done."""
    check_training(config.train, processes, weighty(config.tasks), ("pool",), config.augment, config.model.channels)
    check_images("data.pool", config.data.pool)
    if config.data.val is not None:
        check_images("data.val", config.data.val)


def assemble(
    config: PretrainConfig, start: Start, processes: Processes, run: Run | None = None, quiet: bool = True
) -> tuple[Learner, dict[Stream, Samples]]:
    """The learner with its starting weights, and the pool as the loader reads it."""
    pool = Samples(config.data.pool, config.augment, config.seed, config.data.resize, channels=start.model.channels)
    say_clamped_zoom(pool, quiet)
    recorded = (run and run.read_json("tasks.json")) or {}
    tasks = prepare_tasks(weighty(config.tasks), {"pool": pool}, recorded, quiet, processes)
    module, receipts = start_module(start, tasks, config.seed, partial(load_weights, config), quiet)
    if run is not None and receipts:
        run.write_json("receipts.json", {part: asdict(receipt) for part, receipt in receipts.items()})
    if run is not None:
        record_tasks(run, config.tasks, tasks)
    return Learner(module, config.train, processes, config.augment.crop), {"pool": pool}


def load_weights(config: PretrainConfig, module: MultiTask) -> dict[str, Receipt]:
    """Put what `init` names into the module; a receipt for it."""
    assert config.init is not None, "else the run starts otherwise"
    return {"encoder": load_encoder(module.encoder, config.init, config.init_allow)}
