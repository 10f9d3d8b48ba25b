"""The second stage: learn segmentation from a few labelled images, from scratch or from what pretraining left.

With `tasks` it is joint training: each step takes `batch_size` labelled and `batch_size` unlabelled images (or as many
as it says for each) through the same module and loop.
"""

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

from ssl_seg.calibration import Temperature, fit_temperature
from ssl_seg.config import Config, PathText, UserError, known_to_0_1, load
from ssl_seg.data.augment import Augment, region
from ssl_seg.data.loading import Samples
from ssl_seg.data.splits import (
    Examples,
    Labels,
    Subset,
    has_labelled_pixels,
    names_of,
    pixel_counts,
    sample_digest,
    subset_of,
    untrained_classes,
)
from ssl_seg.datasets import Dataset
from ssl_seg.evidence.cautions import unpredicted_in_words
from ssl_seg.images import SizeField
from ssl_seg.leaks.guard import Leaks, Question, guard
from ssl_seg.models import RGB, DenseHead, ModelConfig, SegmentationModel
from ssl_seg.runs.folder import WHOLE
from ssl_seg.runs.writer import Run
from ssl_seg.scores import Average, SegmentationScores, names_share
from ssl_seg.segment import Segment
from ssl_seg.stages import kinds, panels, scoring, trial
from ssl_seg.stages.fit import Evaluator, Job, StopRule, drawing, fit, restore_best
from ssl_seg.stages.scoring import Also, Measured
from ssl_seg.stages.setup import (
    SAME_FILES,
    Options,
    StageConfig,
    TaskMapping,
    check_images,
    check_palettes,
    check_processes,
    check_same_images,
    check_training,
    check_whole,
    enough_to_recalibrate,
    export_heads,
    open_run,
    read_as,
    recalibrate,
    refuse_channels,
    say_clamped_zoom,
    say_other_ranges,
    say_precision,
    start_processes,
    tell_notes,
)
from ssl_seg.stages.sources import Sources
from ssl_seg.stages.start import Start, find_start, origins, prepare_tasks, recall, record_tasks, start_module
from ssl_seg.tasks import Stream, readers, streams_of, weighty
from ssl_seg.terminal import say
from ssl_seg.tracking import Tracking, TrackingField
from ssl_seg.training.config import Share, TrainConfig
from ssl_seg.training.learner import Learner
from ssl_seg.training.multitask import MultiTask
from ssl_seg.training.processes import Processes
from ssl_seg.weights.export import (
    export_encoder,
    export_model,
    load_decoder,
    load_encoder,
    load_model_weights,
    read_model_info,
)
from ssl_seg.weights.receipt import Receipt

LABELLED = ("labelled", "beside", "val", "test")  # parts of `data` whose masks are read
PARTS = (*LABELLED, "pool")
SEGMENT = "segment"  # the name of the supervised task among the heads; comes first, so its bits do not depend on others


class FinetuneData(Config):
    """Where the images come from."""

    labelled: SerializeAsAny[Dataset]  # images with masks
    # More labelled images, of another origin than those that are scored, as a drawn world: all of them are learnt from,
    # `labels` counts them not, none is held out, and "median" class weights do not ask them.
    beside: SerializeAsAny[Dataset] | None = None
    beside_share: Share = 0.5  # of a step's labelled images; a half gives each of the others one of these as a partner
    val: SerializeAsAny[Dataset] | None = None  # None: whole sequences, or a fifth, of the labelled images are held out
    test: SerializeAsAny[Dataset] | None = None  # scored once, at the end, with the weights that `select` names
    pool: SerializeAsAny[Dataset] | None = None  # unlabelled images of joint training
    resize: SizeField | None = None  # (H, W) of every image; scores stay at the label's own size

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return known_to_0_1(self, dump(self), since=("beside", "beside_share"))


class ScoredStop(StopRule):
    """When a fine-tuning ends before its last step, and by which validation figure; `select: best` goes by it too."""

    # A figure of val/ that is a share: miou, accuracy, band/miou, iou/<class>. The mIoU, since a class that covers most
    # pixels makes an accuracy by itself.
    metric: str = "miou"

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return known_to_0_1(self, dump(self), since=("metric",))


class FinetuneConfig(StageConfig):
    """`ssl-seg finetune`: what its YAML may hold."""

    data: FinetuneData
    labels: Labels = Labels()
    # What is left out comes from the model of `init`, else it is a U-Net on resnet18.
    model: ModelConfig | None = None
    segment: Segment = Segment()
    tasks: TaskMapping = Field(default={})  # of joint training
    augment: Augment = Augment()
    train: TrainConfig = TrainConfig()
    init: PathText | None = (
        None  # a pretraining run, its encoder/ folder, or a file of weights; None: scratch, or timm's
    )
    init_allow: tuple[str, ...] = ()  # globs of tensors that need not match it
    # Or encoder+<task>: that task's decoder too (Brempong et al. 2022). Or model: all of a fine-tuned run of the same
    # classes, its last layer too, as after training on drawn masks.
    transfer: str = "encoder"
    # best: the weights of the best validation score, which `stop.metric` names; last: those of the last step, when val
    # must not choose: with `labels.folds` it must not, for it is all that scores, and this is last there.
    select: Literal["best", "last"] = "best"
    stop: ScoredStop = ScoredStop()
    # Training images on which the running statistics are estimated anew after the last step, before the scores at the
    # end: averages in which every image weighs the same, and of the final weights. 0: as training left them. What is
    # scored on the way, and so `select: best`, has those of training.
    recalibrate: int = Field(default=0, ge=0, le=1_000_000)
    averages: tuple[Average, ...] = ()  # of recall, specificity, precision and others, beside the scores of result.json
    contours: bool = False  # Boundary IoU and Hausdorff distances of the scores at the end, as for `evaluate`
    seed: int = 0  # of everything drawn: weights, order, crops, noise
    leaks: Leaks = Leaks()
    tracking: TrackingField = Tracking()

    @model_validator(mode="before")
    @classmethod
    def _folds_choose_nothing(cls, values: Any) -> Any:
        """A fold is scored by a network that it has not chosen, so of cross-validation the last weights are taken."""
        labels = values.get("labels") if isinstance(values, Mapping) else None
        folds = labels.get("folds") if isinstance(labels, Mapping) else getattr(labels, "folds", None)
        return {"select": "last", **values} if folds is not None else values

    @field_validator("recalibrate")
    @classmethod
    def _more_than_one(cls, recalibrate: int) -> int:
        return enough_to_recalibrate(recalibrate)

    @field_validator("transfer")
    @classmethod
    def _known_transfer(cls, transfer: str) -> str:
        first, _, rest = transfer.partition("+")
        if transfer != WHOLE and (first != "encoder" or "+" in rest or transfer.endswith("+")):
            raise ValueError(
                f"'{transfer}' is not known; write encoder, encoder+denoise with a task of the init run, or {WHOLE}"
            )
        return transfer

    @model_validator(mode="after")
    def _fit_channels(self) -> FinetuneConfig:
        refuse_channels(self.model, weighty({SEGMENT: self.segment, **self.tasks}), self.augment)
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneConfig:
        if self.stop != ScoredStop() and self.train.eval_every is None:
            raise ValueError("stop: is looked at when the run is evaluated; give train.eval_every=STEPS too")
        if self.labels.folds is not None and self.data.val is not None:
            raise ValueError("labels.folds: the fold that is held out judges, and data.val would too; drop one of them")
        if self.labels.folds is not None and (self.select == "best" or self.stop.may_end):
            key = "select: best" if self.select == "best" else "stop"
            raise ValueError(f"{key}: would choose by the fold that it scores; drop it, or labels.folds")
        if self.stop.metric != ScoredStop().metric and self.select == "last" and not self.stop.may_end:
            raise ValueError("stop.metric: nothing goes by it; give stop.target, stop.patience or select=best")
        if not weighty({SEGMENT: self.segment, **self.tasks}):
            raise ValueError("segment.weight: 0, so nothing is learnt; give it a weight")
        # Where its tasks weigh nothing it may stay in the config, as in a grid over their weights.
        if self.data.pool is not None and not readers(self.tasks, "pool"):
            raise ValueError("data.pool: would not be looked at; name a task that reads it, or drop it")
        reading = readers(weighty(self.tasks), "pool")
        if reading and self.data.pool is None:
            raise ValueError(f"data.pool: missing; tasks.{reading[0]} takes unlabelled images from it")
        if self.transfer != "encoder" and self.init is None:
            raise ValueError(f"transfer: '{self.transfer}' needs init=RUN, the run whose weights are meant")
        if SEGMENT in self.tasks:
            raise ValueError(f"tasks.{SEGMENT}: the name is taken by the supervised task; choose another")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return known_to_0_1(self, dump(self), since=("averages", "contours", "recalibrate"))

    @property
    def pool(self) -> Dataset | None:
        """The unlabelled images that are looked at: none where no task that has a weight reads them."""
        return self.data.pool if readers(weighty(self.tasks), "pool") else None

    def parts(self) -> dict[str, Dataset | None]:
        """The data sets by the keys of `data`."""
        return {**{part: getattr(self.data, part) for part in PARTS}, "pool": self.pool}


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
    measured: Mapping[str, Measured]  # all that is known of val, and of test
    temperature: Temperature | None  # what the validation images gave


def finetune(config: FinetuneConfig, options: Options) -> Finetuned:
    """Fine-tune into a run folder, going on from its last checkpoint if it has one.

    Raises UserError for what the user can mend, `config.Interrupted` after a signal (the state is saved first).
    """
    processes = start_processes(config.train, options)
    config, start = processes.together(partial(resolve, config, None if options.overwrite else options.folder))
    quiet = options.quiet or not processes.is_main
    processes.together(partial(check, config, processes))
    given = config.parts()
    check_processes("finetune", config, options, given, processes)
    with open_run("finetune", config, options, processes) as (run, signals, mirror):
        check_same_images(run, given, options.allow_changed)
        recorded = run.read_json("split.json")
        labelled, val = choose_images(config, recorded)
        tell_notes(given, LABELLED, quiet)
        check_palettes({part: given[part] for part in LABELLED})
        say_other_ranges(given, start.exported_range, quiet=quiet)
        if config.data.val is None:
            say(of_held_out(config, val), quiet)
        of_classes = of_untrained_classes(labelled, val) if recorded is None else []
        for line in [*of_small_images(config, labelled), *of_classes]:
            say(line, quiet)
        trained = {"labelled": labelled, "beside": config.data.beside, "pool": config.pool}
        judging = {"val": val, "test": config.data.test}
        scored = {part: scoring.Scored.all_of(own) for part, own in judging.items() if own is not None}
        own_cuts = frozenset({("labelled", "val")} if config.data.val is None else ())
        question = Question(trained, scored, config.leaks, origins(config, start), own_cuts)
        read = Sources(question.given, LABELLED, processes)
        read.check(run, config.train.reading, options.allow_changed, quiet)
        guard(run, question, processes, config.train.reading, quiet)
        read.record(run)
        if not config.leaks.check:  # else the guard has read them
            scoring.read_once(scored.values(), config.train.reading, processes)
        learner, sources = assemble(config, start, processes, run, labelled, quiet)
        split: dict[str, Any] = {"labels": config.labels.dump(), "labelled": names_of(labelled)}
        split |= {"val": names_of(val)} if config.data.val is None else {}
        if config.labels.folds is not None:
            cut = config.labels.cut(config.data.labelled) if recorded is None else ()
            named = [names_of(Subset(config.data.labelled, own)) for own in cut]
            split["folds"] = named if recorded is None else recorded.get("folds", [])
        split["sha256_of_labelled"] = sample_digest(labelled)
        processes.check_same({"split": split}, SAME_FILES)
        run.write_json("split.json", split)
        resize = config.data.resize
        judged = learner.evaluated
        model = SegmentationModel(judged.encoder, judged.heads[SEGMENT], config.data.labelled.class_names)

        def scores_of(examples: Examples, also: Also) -> Measured:
            return scoring.measure(model, examples, resize, config.train.reading, processes, also)

        latest: list[Measured] = []

        def figures(_: int) -> dict[str, float]:
            latest[:] = [scores_of(val, Also(pixels=True))]
            named = latest[0].confusions.named()
            return {f"val/{name}": value for name, value in named.items() if value is not None}

        def pictures() -> dict[str, np.ndarray]:
            return {"predictions": panels.prediction_panel(model, val, resize)}

        every = config.train.eval_every
        job = Job(
            run=run,
            learner=learner,
            sources=sources,
            seed=config.seed,
            evaluators={"scores": Evaluator(figures, every), "pictures": drawing(run, processes, pictures, every)},
            signals=signals,
            mirror=mirror,
            # Where nothing asks for the best step, none is kept.
            score=f"val/{config.stop.metric}" if config.select == "best" or config.stop.may_end else None,
            stop=config.stop,
            quiet=quiet,
        )
        trial.Judged(model, scored, resize).check()
        job.resume()
        trial.fit_in_memory(learner, quiet)
        steps = fit(job)
        # No step is the best where no mask counted.
        selected = restore_best(job, steps) if config.select == "best" else steps
        if config.recalibrate:
            latest.clear()  # its statistics are gone
            layers = recalibrate(learner, sources["labelled"], config.recalibrate, "labelled")
            say(of_recalibration(layers, config.recalibrate), quiet)
        is_known = latest and selected == steps and not config.contours
        of_val = latest[0] if is_known else scores_of(val, Also(pixels=True, contours=config.contours))
        found = {"val": (val, of_val)}
        fitted = None if of_val.pixels is None else fit_temperature(of_val.pixels, of_val.confusions.digest)
        if config.data.test is not None:
            also = Also(temperature=None if fitted is None else fitted.value, contours=config.contours)
            found["test"] = (config.data.test, scores_of(config.data.test, also))
        if processes.is_main:
            seen = {"range": config.data.labelled.value_range()}
            extra = {"resize": resize, "step": selected, **seen}
            extra |= {} if fitted is None else {"temperature": fitted.dump()}
            export_model(run.folder, model, start.model.dump(), extra)
            # In parts too, so that another fine-tuning can start here: supervised pretraining on a drawn world.
            export_encoder(run.folder, judged.encoder, start.model.dump(), seen)
            export_heads(run, judged)
            confusions = {part: (examples, own.confusions) for part, (examples, own) in found.items()}
            kinds.tell(run, labelled, confusions, config.train.reading, processes.device, quiet)
            about = {"steps": steps, "selected_step": selected}
            value = None if fitted is None else fitted.value
            panels.write_scores(run, model, found, resize, about, averages=config.averages, temperature=value)
            if told := unpredicted_in_words(run.read_json("confusion.json")):
                say(f"CAUTION: {told}", quiet)
        processes.barrier()
    scores = {part: own.confusions.scores() for part, (_, own) in found.items()}
    return Finetuned(
        folder=run.folder,
        model=run.folder / "model",
        steps=steps,
        selected_step=selected,
        labelled=names_of(labelled),
        class_names=model.class_names,
        val=scores["val"],
        test=scores.get("test"),
        measured={part: own for part, (_, own) in found.items()},
        temperature=fitted,
    )


def try_out(config: FinetuneConfig) -> trial.DryRun:
    """One batch through every head; writes nothing."""
    processes = start_processes(config.train)
    say_precision(config.train, processes)
    with processes.ending_together():
        config, start = resolve(config)
        quiet = not processes.is_main
        check(config, processes)
        labelled, val = choose_images(config)
        given = config.parts()
        tell_notes(given, LABELLED, quiet)
        check_palettes({part: given[part] for part in LABELLED})
        say_other_ranges(given, start.exported_range, quiet=quiet)
        for line in of_untrained_classes(labelled, val):
            say(line, quiet)
        learner, sources = assemble(config, start, processes, None, labelled, quiet=True)
        scored = {"val": val, **({} if config.data.test is None else {"test": config.data.test})}
        head = learner.module.heads[SEGMENT]
        model = SegmentationModel(learner.module.encoder, head, config.data.labelled.class_names)
        return trial.dry_run(learner, sources, trial.Judged(model, scored, config.data.resize))


def resolve(config: FinetuneConfig, folder: str | Path | None = None) -> tuple[FinetuneConfig, Start]:
    """The config with what other files decide written out, and the start of a run in `folder`.

    Others decide the model and the number of classes.
    """
    start = find_start(config, folder)
    config = read_as(config, start.model.channels)
    names = config.data.labelled.class_names
    if not names:
        raise UserError("data.labelled: has no classes; give it masks and class names (classes: [background, ...])")
    if len(names) == 1:
        raise UserError(
            f"data.labelled: one class, {names[0]!r}, leaves nothing to tell it from; write classes: "
            f"[background, {names[0]}], and mapping: {{255: 1}} where masks hold 0 and 255"
        )
    count = config.segment.num_classes or len(names)
    if count != len(names):
        raise UserError(f"segment.num_classes: {count}, but data.labelled names {len(names)} classes; drop the key")
    begun = start.former.get(SEGMENT)
    segment = config.segment.as_begun(begun if isinstance(begun, Mapping) else {})
    segment = load(Segment, {**segment.dump(), "num_classes": count})
    return config.model_copy(update={"model": start.model, "segment": segment}), start


def check(config: FinetuneConfig, processes: Processes) -> None:
    """What can be known to be wrong before any work is done: sizes, empty data sets, other classes, too few labels."""
    streams = ("labelled",) if config.pool is None else ("labelled", "pool")
    tasks = weighty({SEGMENT: config.segment, **config.tasks})
    channels = RGB if config.model is None else config.model.channels
    check_training(config.train, processes, tasks, streams, config.augment, channels)
    check_data(config)
    if not names_share(config.stop.metric, config.data.labelled.class_names):
        raise UserError(
            f"stop.metric: '{config.stop.metric}' is no share that validation gives; write miou, accuracy, band/miou "
            "or iou/ with the name of a class"
        )
    for scored in (candidates(config)[1], config.data.test):
        if scored is not None:
            check_whole(config.train.reading, scored, config.data.resize)


def check_data(config: FinetuneConfig) -> None:
    """That every data set has images, the same classes, and enough labelled ones."""
    for part, dataset in config.parts().items():
        if dataset is None:
            continue
        check_images(f"data.{part}", dataset)
        if part in ("beside", "val", "test") and dataset.class_names != config.data.labelled.class_names:
            raise UserError(
                f"data.{part}: its classes ({', '.join(dataset.class_names) or 'none'}) are not those of data.labelled "
                f"({', '.join(config.data.labelled.class_names)}); give both the same list"
            )
    available, held = candidates(config)
    if len(available) == 0 or len(held) == 0:
        raise UserError(
            f"data.labelled: {len(config.data.labelled)} images are too few to hold some out; give data.val its own"
        )
    config.labels.number(len(available), len(held) if config.data.val is None else 0)


def candidates(config: FinetuneConfig) -> tuple[Examples, Examples]:
    """The images whose masks may be used, and those on which the run is validated."""
    if config.data.val is not None:
        return config.data.labelled, config.data.val
    return config.labels.divide(config.data.labelled)


def choose_images(config: FinetuneConfig, recorded: Mapping[str, Any] | None = None) -> tuple[Subset, Examples]:
    """The images whose masks are used, and those on which it is validated: those that the run has recorded.

    Raises UserError where one of these is gone, for a run that began with another choice of labels, and before that
    where nothing is labelled.
    """
    if recorded is None:
        available, val = candidates(config)
        labelled = config.labels.choose(available)
        if not has_labelled_pixels(labelled):
            raise UserError(
                f"data.labelled: every pixel of all {len(labelled)} masks is ignored, so nothing could be learnt; look "
                "at ignore and mapping, and at what the masks hold"
            )
        return labelled, val
    if recorded.get("labels", config.labels.dump()) != config.labels.dump():
        raise UserError("labels: a run goes on with the images that it began with; give another --out for others")
    if "labelled" not in recorded:
        raise UserError(
            "split.json: does not say which images are labelled; restore it, or start anew with --overwrite"
        )
    labelled = subset_of(config.data.labelled, recorded["labelled"])
    if config.data.val is None and "val" in recorded:
        return labelled, subset_of(config.data.labelled, recorded["val"])
    return labelled, candidates(config)[1]


def of_held_out(config: FinetuneConfig, val: Examples) -> str:
    """On which images a run without data.val is validated."""
    images = f"{len(val)} of the {len(config.data.labelled)} labelled images"
    if config.labels.folds is None:
        return f"no data.val: validated on {images}"
    return f"labels.folds: fold {config.labels.fold} of {config.labels.folds} is held out, {images}"


def of_recalibration(layers: int, count: int) -> str:
    """What has come of `recalibrate`, where it is asked for."""
    if layers:
        return f"running statistics are those of {count} training images, in {layers} norm layers"
    return "recalibrate: has nothing to do, for no norm layer that learns keeps running statistics"


def of_small_images(config: FinetuneConfig, labelled: Examples) -> list[str]:
    """A word where crops enlarge the images that they are cut from: whole images are scored at their own size."""
    size = config.data.resize or labelled.image(0).image.shape[:2]
    crop = config.augment.crop
    if region(size, crop, 1.0, config.augment.pad) == crop:
        return []
    (height, width), (crop_height, crop_width) = size, crop
    return [
        f"augment.crop: {crop_height} x {crop_width} is larger than the images ({height} x {width}), which are "
        f"enlarged for training and scored as they are; give augment.crop=[{min(size)},{min(size)}] or less"
    ]


def of_untrained_classes(labelled: Examples, val: Examples) -> list[str]:
    """A word where validation asks for classes that no training mask shows, as where each has its own subfolder."""
    names = untrained_classes(labelled, val)
    if not names:
        return []
    return [
        f"data.val: shows {', '.join(names)}, and none of the {len(labelled)} masks that are trained on does, so "
        f"{'it' if len(names) == 1 else 'they'} will be scored 0; give data.val of its own, or more labels"
    ]


def assemble(
    config: FinetuneConfig, start: Start, processes: Processes, run: Run | None, labelled: Subset, quiet: bool
) -> tuple[Learner, dict[Stream, Samples]]:
    """The learner with its starting weights, and the streams as the loaders read them."""
    resize = config.data.resize
    beside = {"beside": config.data.beside, "share": config.data.beside_share}
    channels = start.model.channels
    sources: dict[Stream, Samples] = {
        "labelled": Samples(
            labelled, config.augment, config.seed, resize, with_labels=True, channels=channels, **beside
        )
    }
    if config.pool is not None:
        sources["pool"] = Samples(config.pool, config.augment, config.seed, resize, channels=channels)
    say_clamped_zoom(sources["labelled"], quiet)
    recorded = (run and run.read_json("tasks.json")) or {}
    segment = recall(config.segment, recorded.get(SEGMENT))
    if segment is None and config.segment.balances:
        segment = config.segment.prepare(*pixel_counts(labelled))
    others = prepare_tasks(weighty(config.tasks), sources, recorded, quiet, processes)
    tasks = {SEGMENT: segment or config.segment, **others}
    module, receipts = start_module(start, tasks, config.seed, partial(load_weights, config), quiet)
    if run is not None and start.kind != "checkpoint":
        run.write_json("receipts.json", {part: asdict(receipt) for part, receipt in receipts.items()})
    if run is not None:
        record_tasks(run, {SEGMENT: config.segment, **config.tasks}, tasks)
    read = streams_of(module.tasks)
    learner = Learner(module, config.train, processes, config.augment.crop)
    return learner, {stream: samples for stream, samples in sources.items() if stream in read}


def load_weights(config: FinetuneConfig, module: MultiTask) -> dict[str, Receipt]:
    """Put what `init` and `transfer` name into the module; a receipt for each part."""
    assert config.init is not None, "else the run starts otherwise"
    if config.transfer == WHOLE:
        names = config.data.labelled.class_names
        theirs = tuple(read_model_info(config.init)["class_names"])
        if theirs != names:
            raise UserError(
                f"transfer: {WHOLE}: init tells {', '.join(theirs)} apart, and data.labelled {', '.join(names)}; "
                f"transfer=encoder+{SEGMENT} takes all but the last layer"
            )
        model = SegmentationModel(module.encoder, module.heads[SEGMENT], names)
        return {WHOLE: load_model_weights(model, config.init, config.init_allow)}
    receipts = {"encoder": load_encoder(module.encoder, config.init, config.init_allow)}
    _, _, task = config.transfer.partition("+")
    if task:
        head = module.heads[SEGMENT]
        assert isinstance(head, DenseHead), "segmentation has no other"
        receipts["decoder"] = load_decoder(head.decoder, config.init, task, config.init_allow)
    return receipts
