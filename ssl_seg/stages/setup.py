"""What pretraining and fine-tuning share: open or resume the run, then log, evaluate and save when due.

A stage is a choice of tasks, image streams and starting weights; this file turns the generator of steps into a run
folder. Every decision that ends a run is taken from numbers all processes share, at a step all of them reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from pydantic import BeforeValidator, Field, PositiveInt, SerializeAsAny

from ssl_seg import images, rng, tracking
from ssl_seg.config import NAME, Config, Interrupted, UserError, load
from ssl_seg.data.loading import Draws, Examples, Packed, Samples, check_batch_size, loader, manifest
from ssl_seg.datasets import Dataset
from ssl_seg.models import DenseHead, ModelConfig
from ssl_seg.norm import convert
from ssl_seg.norm.convert import FrozenNorm, Kind, are_one, convert_norm, has_batch_norm, is_fresh, loads_as
from ssl_seg.runs.writer import Run, has_checkpoint, load_state
from ssl_seg.tasks import MultiTask, PretextTask, Stream, Task, seeded
from ssl_seg.terminal import Signals, reporter, say, watch_signals
from ssl_seg.tracking import Mirror
from ssl_seg.training.loop import Learner, NonFiniteError, Processes, TrainConfig, due, peak_memory, train
from ssl_seg.weights.export import Receipt, export_decoder, read_encoder_info

T = TypeVar("T", bound=Task)
Recorded = Mapping[str, Mapping[str, Any]]
SAVES_PER_RUN = 10
LEAST_BETWEEN_SAVES = 200  # steps: writing one of resnet18 takes as long as ten of small crops on a CPU
CLEAN_BATCH = 32  # images at most; the spread between images counts in a batch's variance by 1 - 1/32
NUM_PREPARED = 64  # images of the pool that `prepare` measures: enough for statistics of colours, read in a second


@dataclass(frozen=True)
class Options:
    """How a stage treats its folder; the command line's flags, with the same names and defaults in Python."""

    out: str | Path
    overwrite: bool = False
    allow_changed: tuple[str, ...] = ()  # dotted config keys that may differ from those of the run that is resumed
    quiet: bool = False


class StopRule(Config):
    """When fine-tuning ends before its last step; judged on the validation mIoU at each evaluation."""

    patience: PositiveInt | None = None  # evaluations without a new best
    target: float | None = Field(default=None, gt=0.0, le=1.0)  # a score that is good enough


@dataclass
class Progressed:
    """What a resumed run must know besides weights: the best evaluation so far, how long ago it was, the time spent."""

    best_score: float | None = None
    best_step: int = 0
    evaluations_since: int = 0
    seconds: float = 0.0  # of training and evaluating; what a kill has lost is not in it

    def better(self, step: int, score: float) -> bool:
        """Take note of a score; says whether it is a new best. NaN is none."""
        if score == score and (self.best_score is None or score > self.best_score):
            self.best_score, self.best_step, self.evaluations_since = score, step, 0
            return True
        self.evaluations_since += 1
        return False


@dataclass
class Job:
    """A stage's parts, ready to run."""

    run: Run
    learner: Learner
    sources: Mapping[Stream, Samples]
    seed: int
    evaluate: Callable[[], dict[str, float]]  # on all processes; the figures of one evaluation, named val/...
    pictures: Callable[[], dict[str, np.ndarray]]  # on the main process
    signals: Signals = field(default_factory=Signals)
    mirror: Mirror | None = None
    score: str | None = None  # the figure whose best step is kept
    stop: StopRule = field(default_factory=StopRule)
    quiet: bool = False
    progressed: Progressed = field(default_factory=Progressed)
    start: int = 0
    counted: float | None = None  # up to when the time spent is in `progressed`; None: the clock stands

    def resume(self) -> Self:
        """Take up the newest whole checkpoint of the run folder, if there is one: the one that rank 0 finds."""
        self._restore()
        self.run.go_on()
        return self

    def _restore(self) -> None:
        processes = self.learner.processes
        state = self.run.resume() if processes.is_main else None
        step = processes.from_first(None if state is None else state.step)
        if step is None:
            return
        if state is None:
            state = load_state(self.run.folder, step)
        for skipped in state.skipped:
            say(f"{skipped}: damaged, an older checkpoint is used", self.quiet)
        self.learner.restore(state.tensors, state.data["learner"])
        self.progressed = Progressed(**state.data["progressed"])
        self.start = step
        over = step == self.learner.config.steps or should_stop(self)
        say("already finished; nothing is left to train" if over else f"resuming after step {step}", self.quiet)

    def save(self, step: int) -> None:
        self.count_time()
        data = {"learner": self.learner.data(), "progressed": vars(self.progressed)}
        keep = [self.progressed.best_step] if self.score else []
        self.run.save_state(step, self.learner.tensors(), data, keep)
        self.learner.processes.barrier()

    def count_time(self) -> None:
        """Add what has passed since the last call to the time spent; the first call starts the clock."""
        now = time.monotonic()
        if self.counted is not None:
            self.progressed.seconds += now - self.counted
        self.counted = now

    def note_cost(self, step: int) -> None:
        """What the run has cost up to `step`, for run.json."""
        self.count_time()
        images = step * self.learner.config.batch_size * len(self.sources)
        memory = peak_memory(self.learner.processes.device)
        self.run.note(cost={"seconds": self.progressed.seconds, "images": images, "peak_memory_mib": memory})


def fit(job: Job) -> int:
    """Run the steps that are left; gives the number of the last one made."""
    if job.mirror is not None:
        job.mirror.start()  # not before: what a resumed run drops and makes again is not sent
    job.count_time()
    if should_stop(job):
        job.note_cost(job.start)
        return job.start  # stopped before, by its own rule
    learner, config = job.learner, job.learner.config
    save_every = config.save_every or max(LEAST_BETWEEN_SAVES, config.steps // SAVES_PER_RUN)
    streams = open_streams(job.sources, config, learner.processes, pool_tasks(learner.module.tasks), job.start)
    last = job.start
    if last == 0:
        draw(job, last)  # what the network does before it has learnt anything
    with job.signals.deferred(), reporter(config.steps, job.start, config.batch_size, job.quiet) as report:
        for step in train(learner, streams, job.start, job.seed, wants_stop=job.signals.asked):
            last = step.number
            stop = step.stop
            figures = {}
            if due(last, config.log_every, config.steps):
                figures.update(step.metrics)
                figures["images_per_s"] = report.images_per_s(last)
            new_best = False
            if due(last, config.eval_every, config.steps):
                evaluated = job.evaluate()
                figures.update(evaluated)
                new_best = job.score in evaluated and job.progressed.better(last, evaluated[job.score])
                draw(job, last)
                stop = learner.processes.any(stop or job.signals.asked())  # evaluating may have taken long
            if figures:
                job.run.metrics(last, figures)
            report.step(last, {**step.metrics, **figures})
            enough = should_stop(job)
            if due(last, save_every, config.steps) or new_best or enough or stop:
                job.save(last)
            if stop:
                job.note_cost(last)
                raise Interrupted(job.signals.first, f"state saved in {job.run.folder}; the same command continues")
            if enough:
                break
    job.note_cost(last)
    return last


def draw(job: Job, step: int) -> None:
    """Write the pictures of what the network does after `step`."""
    if job.learner.processes.is_main:
        for name, picture in job.pictures().items():
            images.write_image(job.run.picture_path(name, step), picture)


def should_stop(job: Job) -> bool:
    """Whether the stop rule is met; every process holds the same scores."""
    done = job.progressed
    if job.stop.target is not None and done.best_score is not None and done.best_score >= job.stop.target:
        return True
    return job.stop.patience is not None and done.evaluations_since >= job.stop.patience


class Opened(NamedTuple):
    """What a stage works with while it holds its folder."""

    run: Run
    signals: Signals
    mirror: Mirror


@contextmanager
def open_run(stage: str, config: Config, options: Options, processes: Processes) -> Iterator[Opened]:
    """The stage's run folder, whose status tells the truth after an error, a signal or the end."""
    tracking.check(config.tracking)
    out = Path(options.out)
    if options.overwrite and config.init and Path(config.init).resolve().is_relative_to(out.resolve()):
        raise UserError(f"--overwrite: would delete {config.init}, which the run is to start from; name another --out")
    flags = {"overwrite": options.overwrite, "allow_changed": options.allow_changed}
    place = {"main": processes.is_main, "device": f"{processes.world} x {processes.device}", "seed": config.seed}
    refusal = None
    try:
        run = Run.open(out, stage, config, **flags, **place)
    except UserError as error:
        refusal = str(error)
    refusal = processes.from_first(refusal)  # so that no process waits for one that has given up
    if refusal:
        raise UserError(refusal)
    mirror = Mirror(config.tracking, out, processes.is_main, options.quiet)
    with mirror, watch_signals() as signals, run:
        try:
            yield Opened(run, signals, mirror)
        except Interrupted:
            run.close("killed")
            raise
        except NonFiniteError as error:
            run.write_json("nonfinite.json", {"images": error.names})
            raise


def resolve_model(config: Config, former: Mapping[str, Any] | None = None) -> ModelConfig:
    """The whole network of a stage, from the few keys of `config.model` that may have been given.

    Each part is the config's own, else that of the run taken up again (its config is `former`), else of `init`, else
    the default. Raises UserError for another encoder than that of `init`.
    """
    given = config.model or ModelConfig()
    if former is not None:
        return _lay_on(load(ModelConfig, former["model"]), given)
    info = read_encoder_info(config.init) if config.init else {}
    return _inherit(load(ModelConfig, info["config"]), given, config) if info else given


def _lay_on(base: ModelConfig, model: ModelConfig) -> ModelConfig:
    """The parts of a model that were given, on those of another."""
    return base.model_copy(update={name: getattr(model, name) for name in model.model_fields_set})


def _inherit(exported: ModelConfig, given: ModelConfig, config: Config) -> ModelConfig:
    """What the config has given of the model laid on the model of `init`; another encoder than that is refused."""
    whole = _lay_on(exported, given)
    names = [encoder.dump().get("name") for encoder in (exported.encoder, whole.encoder)]
    types = [encoder.type for encoder in (exported.encoder, whole.encoder)]
    if (names[0] != names[1] or types[0] != types[1]) and not config.init_allow:
        raise UserError(
            f"init: {config.init} holds a {names[0] or types[0]}, and model.encoder asks for {names[1] or types[1]}; "
            "leave model.encoder out to take that of init, or name another init"
        )
    return whole


def build_module(model: ModelConfig, tasks: Mapping[str, Task], seed: int) -> MultiTask:
    """Encoder and heads with first weights that depend on the seed and on each part's name alone."""
    with seeded(rng.fold_in(rng.as_key(seed), "encoder")):
        encoder = model.build_encoder()
    return MultiTask(encoder, model.spec(encoder), tasks, seed)


def start_module(
    config: Config,
    tasks: Mapping[str, Task],
    run: Run | None,
    load: Callable[[MultiTask], dict[str, Receipt]],
    quiet: bool,
) -> tuple[MultiTask, dict[str, Receipt] | None]:
    """The module with its first weights, and receipts for those that `load` has put in from the config's `init`.

    None instead of receipts where `run` has a checkpoint, whose weights are to come.
    """
    resumes = run is not None and has_checkpoint(run.folder)
    model = config.model.without_pretrained() if config.init or resumes else config.model
    if resumes:
        return build_module(model, tasks, config.seed), None
    module = build_module(as_exported(model, config.init), tasks, config.seed)
    with first_weights(module, model, config.init):
        receipts = load(module)
    for receipt in receipts.values():
        say(receipt.summary(), quiet)
    return module, receipts


def as_exported(model: ModelConfig, init: str | None) -> ModelConfig:
    """`model` as the weights of `init` fit it: what is to be converted from batch norm is loaded as batch norm."""
    if init is None:
        return model
    return model.model_copy(update={"norm": loads_as(_norm_of(init), model.norm)})


@contextmanager
def first_weights(module: MultiTask, model: ModelConfig, init: str | None) -> Iterator[None]:
    """Inside, `init` is loaded into a `module` built `as_exported`; after it, the norm layers are those of `model`.

    Raises UserError that names both norms where weights of another norm do not fit, and for an encoder that is to be
    frozen and has no statistics: it would go without normalization.
    """
    exported = model.norm if init is None else _norm_of(init)
    try:
        yield
    except UserError as error:
        if are_one(exported, model.norm) or loads_as(exported, model.norm) != model.norm:
            raise
        raise UserError(
            f"model.norm: {model.norm}, but init was trained with {exported}, which cannot be converted; "
            f"leave model.norm out to go on with {exported} ({error})"
        ) from error
    if loads_as(exported, model.norm) != model.norm:
        decoders = [part.decoder for part in module.heads.modules() if isinstance(part, DenseHead)]
        convertible = [part for part in (module.encoder, *decoders) if has_batch_norm(part)]
        for part in convertible or [module.encoder]:  # which says, where there are none, that nothing can be converted
            convert_norm(part, model.norm)
    frozen = [layer for layer in module.encoder.modules() if isinstance(layer, FrozenNorm)]
    if frozen and all(is_fresh(layer) for layer in frozen):
        raise UserError("model.norm: frozen: a new encoder has no statistics to keep; give init=RUN, or another norm")


def _norm_of(init: str) -> Kind:
    """What the encoder of `init` was exported with; weights of other origin are taken for the architecture's own."""
    return read_encoder_info(init).get("config", {}).get("norm", "keep")


def pool_tasks(tasks: Mapping[str, Task]) -> int:
    return sum(task.stream == "pool" for task in tasks.values())


def open_streams(
    sources: Mapping[Stream, Samples], config: TrainConfig, processes: Processes, num_pool_tasks: int, start: int
) -> dict[Stream, Iterator[Packed]]:
    """This process's micro-batches of each stream, from step `start` on."""
    streams = {}
    for stream, samples in sources.items():
        deal = num_pool_tasks if stream == "pool" and config.views == "split" else 1
        draws = Draws(config.batch_size, start, config.steps, processes.rank, processes.world, deal, config.accumulate)
        streams[stream] = loader(samples, draws, config.workers, pin=processes.device.type == "cuda")
    return streams


def check_sizes(config: TrainConfig, processes: Processes, num_pool_tasks: int) -> None:
    """Refuse a batch size that cannot be shared out, before any work is done."""
    deal = max(1, num_pool_tasks) if config.views == "split" else 1
    check_batch_size(config.batch_size, processes.world, deal, config.accumulate)


def prepare_tasks(tasks: Mapping[str, PretextTask], pool: Samples | None, recorded: Recorded) -> dict[str, PretextTask]:
    """The tasks after `prepare`: as the run has recorded them, else measured on a fixed sample of the pool."""
    prepared = {name: recall(task, recorded.get(name)) for name, task in tasks.items()}
    new = {name: task for name, task in tasks.items() if prepared[name] is None}
    if any(type(task).prepare is not PretextTask.prepare for task in new.values()):
        draws = [list(range(min(NUM_PREPARED, len(pool.examples))))]
        sample = next(loader(pool, draws, 0)).to(torch.device("cpu")).image
        new = {name: task.prepare(sample) for name, task in new.items()}
    return {name: prepared[name] or new[name] for name in tasks}


def recall(task: T, record: Mapping[str, Any] | None) -> T | None:
    """What a task became by `prepare` in an earlier start of this run; None if the task as given has changed since."""
    if record is None or record["given"] != task.dump():
        return None
    return type(task).model_validate(record["prepared"])


def record_tasks(run: Run, given: Mapping[str, Task], prepared: Mapping[str, Task]) -> None:
    """Write down the tasks for a resumed run."""
    records = {name: {"given": given[name].dump(), "prepared": task.dump()} for name, task in prepared.items()}
    run.write_json("tasks.json", records)


def check_same_images(run: Run, parts: Mapping[str, Examples | None], allow_changed: Sequence[str]) -> None:
    """Refuse to resume on other images than the run began with: the order of an epoch depends on their number."""
    now = {part: manifest(examples) for part, examples in parts.items() if examples is not None}
    for part, former in (run.read_json("data.json") or {}).items():
        allowed = any(fnmatchcase(f"data.{part}", glob) for glob in allow_changed)
        if part in now and now[part] != former and not allowed:
            raise UserError(
                f"data.{part}: {now[part]['images']} images, not the {former['images']} that the run began with (or "
                f"other names); put them back, start anew with --overwrite, or give --allow-changed data.{part}"
            )
    run.write_json("data.json", now)


def check_images(key: str, dataset: Dataset) -> None:
    """An empty data set would only be noticed as a division by zero."""
    if len(dataset) == 0:
        raise UserError(f"{key}: holds no image; name a folder with some")


def recalibrate(learner: Learner, pool: Samples, count: int) -> int:
    """Estimate the batch statistics of encoder and heads on the run's first `count` crops, before any task touches
    them; every process reads the same ones, so all end with the same. Gives the number of layers that have some."""
    module, config, processes = learner.module, learner.config, learner.processes
    # No more than a step takes, for memory; from 3 on, an even split leaves no image alone, without a variance.
    at_once = max(3, min(CLEAN_BATCH, config.batch_size * pool_tasks(module.tasks)))
    chunks = np.array_split(np.arange(count), max(1, -(-count // at_once)))
    clean = loader(pool, [chunk.tolist() for chunk in chunks if len(chunk)], config.workers)
    batches = (packed.to(processes.device, config.channels_last).image for packed in clean)

    def show(image: torch.Tensor) -> None:
        features = module.encoder(image)
        for head in module.heads.values():
            head(features, image.shape[-2:])

    return convert.recalibrate(module, batches, show)


def export_heads(run: Run, module: MultiTask) -> None:
    """Every decoder of a dense head, so that fine-tuning can start from it."""
    for name, head in module.heads.items():
        if isinstance(head, DenseHead):
            export_decoder(run.folder, name, head.decoder)


def _name_tasks(value: Any) -> Any:
    """`tasks:` as the files write it: the name is the type unless one is given, `null` removes, `{}` takes defaults."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        value = {name: {} for name in value}
    if not isinstance(value, Mapping):
        return value
    named = {}
    for name, task in value.items():
        # A name becomes a file's and a module's; torch's containers have attributes such as `half`.
        if not NAME.fullmatch(str(name)) or hasattr(torch.nn.ModuleDict, name):
            raise ValueError(f"'{name}' cannot name a task; use small letters, digits and _, or another word")
        if isinstance(task, Mapping) and "type" not in task:
            named[name] = {"type": name, **task}
        elif task is not None:
            named[name] = task
    return named


TaskMapping = Annotated[dict[str, SerializeAsAny[PretextTask]], BeforeValidator(_name_tasks)]
