"""Steps into a run folder: log, evaluate, draw, save and stop when it is time.

Every decision that ends a run is taken from numbers all processes share, at a step all of them reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, Self

import numpy as np
from pydantic import Field, PositiveInt

from ssl_seg import images
from ssl_seg.config import Config, Interrupted, UserError
from ssl_seg.data.loading import Draws, Packed, Samples, loader
from ssl_seg.runs.checkpoint import checkpoints_in, load_state
from ssl_seg.runs.writer import Run
from ssl_seg.tasks import Stream, Task
from ssl_seg.terminal import Signals, reporter, say
from ssl_seg.tracking import Mirror
from ssl_seg.training.config import TrainConfig, due
from ssl_seg.training.learner import Learner
from ssl_seg.training.loop import train
from ssl_seg.training.multitask import dealing
from ssl_seg.training.processes import Processes, peak_memory

SAVES_PER_RUN = 10
LEAST_BETWEEN_SAVES = 200  # steps: writing one of resnet18 takes as long as ten of small crops on a CPU


class StopRule(Config):
    """When a run ends before its last step: judged by the job's score, or a pretraining's probe, at each evaluation."""

    patience: PositiveInt | None = None  # evaluations without a new best
    target: float | None = Field(default=None, gt=0.0, le=1.0)  # a score that is good enough

    @property
    def may_end(self) -> bool:
        """Whether it can end a run at all."""
        return self.patience is not None or self.target is not None


@dataclass
class Progress:
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


@dataclass(frozen=True)
class Evaluator:
    """Something that is measured or drawn while a run trains, at its own cadence and after the last step."""

    # Called on all processes with the step; gives figures for the metrics. What else it makes, it writes itself.
    measure: Callable[[int], Mapping[str, float]]
    every: int | None = None  # steps; None: after the last one only
    at_start: bool = False  # before the first step too: what the network does before it has learnt anything


@dataclass
class Job:
    """A stage's parts, ready to run."""

    run: Run
    learner: Learner
    sources: Mapping[Stream, Samples]
    seed: int
    evaluators: Mapping[str, Evaluator]  # in the order in which they are called
    signals: Signals = field(default_factory=Signals)
    mirror: Mirror | None = None
    score: str | None = None  # the figure whose best step is kept
    stop: StopRule = field(default_factory=StopRule)
    quiet: bool = False
    progress: Progress = field(default_factory=Progress)
    start: int = 0
    owed: dict[str, float] | None = None  # figures of step `start`, where it was saved and is still to be evaluated
    counted: float | None = None  # up to when the time spent is in `progress`; None: the clock stands

    def resume(self) -> Self:
        """Take up the newest whole checkpoint of the run folder, if there is one: the one that rank 0 finds.

        Either way all processes go on from the same weights.
        """
        self._restore()
        self.learner.share()
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
        self.progress = Progress(**state.data["progressed"])
        if state.data.get("score", self.score) != self.score:  # version 0.1 did not say which, and knew one alone
            self.progress = Progress(seconds=self.progress.seconds)  # a figure tells nothing of another's best
        self.start = step
        self.owed = self._settled(step, state.data.get("owed"))  # version 0.1 knew none
        over = step == self.learner.config.steps or should_stop(self)
        say("already finished; nothing is left to train" if over else f"resuming after step {step}", self.quiet)

    def _settled(self, step: int, owed: dict[str, float] | None) -> dict[str, float] | None:
        """What is still owed of `step`: nothing where its line was written, which is after its evaluation."""
        processes = self.learner.processes
        line = processes.from_first(self.run.line_of(step) if processes.is_main else None)
        if owed is None or line is None:
            return owed
        if self.score in line:
            self.progress.better(step, line[self.score])
        return None

    def save(self, step: int, owed: Mapping[str, float] | None = None) -> None:
        """Commit the state after `step`; `owed` are its figures, where it is saved before it is evaluated.

        Raises UserError for weights or moments that are not finite: the checkpoints before stay as they are.
        """
        self._refuse_not_finite(step)
        self.count_time()
        data = {"learner": self.learner.data(), "progressed": vars(self.progress), "score": self.score, "owed": owed}
        keep = [self.progress.best_step] if self.score else []
        self.run.save_state(step, self.learner.tensors(), data, keep)
        self.learner.processes.barrier()

    def _refuse_not_finite(self, step: int) -> None:
        found = self.learner.not_finite()
        if not self.learner.processes.any(bool(found)):
            return
        known = max(checkpoints_in(self.run.folder), default=None)
        remedy = "there is no checkpoint yet; start anew with a lower"
        if known is not None:
            remedy = f"the checkpoint of step {known} stays; go on from it with a lower train.lr and --allow-changed"
        named = f"{found[0]} and {len(found) - 1} more" if len(found) > 1 else "".join(found)
        raise UserError(
            f"step {step}: the weights are not finite any more ({named}), so they are not saved, and {remedy} train.lr"
        )

    def count_time(self) -> None:
        """Add what has passed since the last call to the time spent; the first call starts the clock."""
        now = time.monotonic()
        if self.counted is not None:
            self.progress.seconds += now - self.counted
        self.counted = now

    def note_cost(self, step: int) -> None:
        """What the run has cost up to `step`, for run.json."""
        self.count_time()
        images = step * self.learner.config.images_of(self.sources)
        memory = peak_memory(self.learner.processes.device)
        if self.learner.auto:
            self.run.note(accumulate=self.learner.config.accumulate)
        self.run.note(cost={"seconds": self.progress.seconds, "images": images, "peak_memory_mib": memory})


def fit(job: Job) -> int:
    """Run the steps that are left; gives the number of the last one made.

    A step that is both saved and evaluated is saved first: a damaged file that ends the evaluation costs no training.
    The same command then makes that evaluation before it goes on, unless it finds it in the metrics: so its record is
    that of a run without a stop, and no step is saved twice.
    """
    if job.mirror is not None:
        job.mirror.start()  # not before: what a resumed run drops and makes again is not sent
    job.count_time()
    learner, config = job.learner, job.learner.config
    last = job.start
    if job.owed is not None:
        evaluate_and_log(job, last, job.owed)
    if should_stop(job):
        return end(job, last)  # stopped before, by its own rule
    save_every = config.save_every or max(LEAST_BETWEEN_SAVES, config.steps // SAVES_PER_RUN)
    streams = open_streams(job.sources, config, learner.processes, learner.module.tasks, job.start)
    if last == 0:
        evaluate(job, [evaluator for evaluator in job.evaluators.values() if evaluator.at_start], last)
    with job.signals.deferred(), reporter(config.steps, job.start, config.images_of(job.sources), job.quiet) as report:
        for step in train(learner, streams, job.start, job.seed, wants_stop=job.signals.asked):
            last = step.number
            stop = step.stop
            figures = {}
            if due(last, config.log_every, config.steps):
                figures.update(step.metrics)
                figures["images_per_s"] = report.images_per_s(last)
            saves, evaluates = due(last, save_every, config.steps), bool(evaluators_at(job, last))
            saved = evaluates and (saves or stop)
            if saved:
                job.save(last, owed=figures)
            if saved and stop:
                interrupt(job, last)
            new_best = False
            if evaluates:
                new_best = evaluate_and_log(job, last, figures)
                stop = learner.processes.any(job.signals.asked())  # evaluating may have taken long
            elif figures:
                job.run.metrics(last, figures)
            report.step(last, {**step.metrics, **figures})
            enough = should_stop(job)
            if (saves or new_best or stop or enough) and not saved:
                job.save(last)
            if stop:
                interrupt(job, last)
            if enough:
                break
    return end(job, last)


def end(job: Job, last: int) -> int:
    """Note what a run has cost whose last step, which is given back, is made, and which checkpoints outlive it."""
    job.note_cost(last)
    wanted = job.learner.config.keep_state
    if wanted != "all":
        best = [job.progress.best_step] if job.score else []
        job.run.keep_at_end([] if wanted == "none" else [last, *best])
    return last


def evaluate_and_log(job: Job, step: int, figures: dict[str, float]) -> bool:
    """Evaluate after `step` and write its line, to whose `figures` the scores are added; says whether it is a best."""
    scores = evaluate(job, evaluators_at(job, step), step)
    figures.update(scores)
    if figures:
        job.run.metrics(step, figures)
    return job.score in scores and job.progress.better(step, scores[job.score])


def interrupt(job: Job, step: int) -> NoReturn:
    """End a run that has been saved after `step`, as a signal asked for."""
    job.note_cost(step)
    raise Interrupted(job.signals.first, f"state saved in {job.run.folder}; the same command continues")


def evaluators_at(job: Job, step: int) -> list[Evaluator]:
    """Those that are due after `step`."""
    return [evaluator for evaluator in job.evaluators.values() if due(step, evaluator.every, job.learner.config.steps)]


def evaluate(job: Job, evaluators: Sequence[Evaluator], step: int) -> dict[str, float]:
    """The figures of some evaluators after `step`."""
    return {name: figure for evaluator in evaluators for name, figure in evaluator.measure(step).items()}


def restore_best(job: Job, steps: int) -> int:
    """Bring back the weights of the step with the best score, and give its number; `steps` where none was scored."""
    best = job.progress.best_step if job.progress.best_score is not None else steps
    if best != steps:
        state = load_state(job.run.folder, best)
        job.learner.restore(state.tensors, state.data["learner"])
    return best


def drawing(
    run: Run, processes: Processes, draw: Callable[[], Mapping[str, np.ndarray]], every: int | None
) -> Evaluator:
    """An evaluator that writes what `draw` gives, pictures by name, into the run folder."""

    def measure(step: int) -> dict[str, float]:
        if processes.is_main:
            for name, picture in draw().items():
                images.write_image(run.picture_path(name, step), picture)
        return {}

    return Evaluator(measure, every, at_start=True)


def should_stop(job: Job) -> bool:
    """Whether the stop rule is met; every process holds the same scores."""
    done = job.progress
    if job.stop.target is not None and done.best_score is not None and done.best_score >= job.stop.target:
        return True
    return job.stop.patience is not None and done.evaluations_since >= job.stop.patience


def open_streams(
    sources: Mapping[Stream, Samples],
    config: TrainConfig,
    processes: Processes,
    tasks: Mapping[str, Task],
    start: int,
) -> dict[Stream, Iterator[Packed]]:
    """This process's micro-batches of each stream, from step `start` on, dealt out as `tasks` want them."""
    streams = {}
    for stream, samples in sources.items():
        deal, at_once = dealing(tasks, stream, config.views == "split")
        place = {"rank": processes.rank, "world": processes.world}
        parts = {"deal": deal, "accumulate": config.micro_batches, "at_once": at_once}
        draws = Draws(config.batch_of(stream), start, config.steps, **place, **parts)
        streams[stream] = loader(samples, draws, config.reading, pin=processes.device.type == "cuda")
    return streams
