"""What stages share before the first step and after the last: open the run folder, refuse what cannot work, export."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import BeforeValidator, SerializeAsAny

from ssl_seg import files, tracking
from ssl_seg.config import NAME, Config, Interrupted, UserError, flatten, user_path
from ssl_seg.data.augment import Augment
from ssl_seg.data.loading import Samples, Whole, check_batch_size, loader, pack
from ssl_seg.data.splits import Examples, manifest, sample_digest
from ssl_seg.data.workers import ALONE, Workers, check_room
from ssl_seg.datasets import Dataset
from ssl_seg.images import Range, Size, say_range, written_range
from ssl_seg.models import RGB, DenseHead, EncoderNet, ModelConfig
from ssl_seg.norm import convert
from ssl_seg.runs.writer import FREE, Run, former_precision, versions
from ssl_seg.tasks import Stream, Task, TaskPlugin, check_channels, check_tasks, readers, streams_of
from ssl_seg.terminal import Signals, say, watch_signals
from ssl_seg.tracking import Mirror, TrackingField
from ssl_seg.training.config import TrainConfig
from ssl_seg.training.learner import Learner
from ssl_seg.training.loop import NonFiniteError
from ssl_seg.training.multitask import MultiTask, dealing
from ssl_seg.training.processes import Processes
from ssl_seg.weights.export import export_decoder

SAME_FILES = "give every machine the same files"
C = TypeVar("C", bound="HasData")
# Seconds after which what another machine has written is not there: disks that are shared may tell of it late.
SEEN_WITHIN = 60.0
CLEAN_BATCH = 32  # images at most; the spread between images counts in a batch's variance by 1 - 1/32


class HasData(Config):
    """A config with data sets under `data`. The key is named for the type checker alone, as those of `StageConfig`."""

    if TYPE_CHECKING:
        data: Config


class StageConfig(HasData):
    """What the configs of pretraining and fine-tuning have in common.

    The keys are named for the type checker alone: as fields they would come first wherever a config is written.
    """

    if TYPE_CHECKING:
        model: ModelConfig | None
        init: str | None
        init_allow: tuple[str, ...]
        tasks: TaskMapping
        train: TrainConfig
        seed: int
        tracking: TrackingField


class ReadingConfig(HasData):
    """What the configs of commands have in common that read images and train nothing: how they read them.

    The keys are named for the type checker alone, as those of `StageConfig`.
    """

    if TYPE_CHECKING:
        workers: int
        worker_timeout: float

    @property
    def reading(self) -> Workers:
        return Workers(self.workers, self.worker_timeout, section="")


@dataclass(frozen=True)
class Options:
    """How a stage treats its folder; the command line's flags, with the same names and defaults in Python."""

    out: str | Path
    overwrite: bool = False
    allow_changed: tuple[str, ...] = ()  # dotted config keys that may differ from those of the run that is resumed
    quiet: bool = False

    @property
    def folder(self) -> Path:
        """`out` as a path. Raises UserError as `user_path`."""
        return user_path(self.out)


class Opened(NamedTuple):
    """What a stage works with while it holds its folder."""

    run: Run
    signals: Signals
    mirror: Mirror


@contextmanager
def open_run(stage: str, config: StageConfig, options: Options, processes: Processes) -> Iterator[Opened]:
    """The stage's run folder, whose status tells the truth after an error, a signal or the end."""
    tracking.check(config.tracking)
    out = options.folder
    if options.overwrite and config.init and user_path(config.init).resolve().is_relative_to(out.resolve()):
        raise UserError(f"--overwrite: would delete {config.init}, which the run is to start from; name another --out")
    flags = {"overwrite": options.overwrite, "allow_changed": options.allow_changed}
    place = {"main": processes.is_main, "device": f"{processes.world} x {processes.device}", "seed": config.seed}
    if config.train.precision == "auto":
        place["precision"] = processes.precision
    run = processes.together(partial(Run.open, out, stage, config, **flags, **place))
    say_precision(config.train, processes)
    for wish in processes.unheeded:
        say(f"{wish}: has no effect; give train.precision, train.accumulate or train.device", not processes.is_main)
    if processes.wanted > processes.world:
        say(
            f"one process of {processes.wanted}: on a CPU `accelerate launch` starts no more; for several give "
            f"torchrun --nproc-per-node {processes.wanted} -m ssl_seg ...",
            not processes.is_main,
        )
    mirror = Mirror(config.tracking, out, processes.is_main, options.quiet)
    with mirror, watch_signals() as signals, run, processes.ending_together():
        try:
            _refuse_other_disks(run, processes)
            yield Opened(run, signals, mirror)
        except Interrupted:
            run.close("killed")
            raise
        except NonFiniteError as error:
            run.write_json("nonfinite.json", {"images": error.names})
            raise


def _refuse_other_disks(run: Run, processes: Processes) -> None:
    """Raise UserError where a process does not see the run's folder, as on a node that does not share that disk.

    It could train and write nothing wrong, but neither go on from a checkpoint nor end with the best one.
    """
    if processes.world == 1:
        return
    path = run.folder / "run.json"
    digest = processes.from_first(files.sha256(files.read_bytes(path)) if processes.is_main else "")

    def look() -> None:
        until = time.monotonic() + SEEN_WITHIN
        while not files.is_intact(path, digest):
            if time.monotonic() > until:
                raise UserError(
                    f"{path}: is not there as the first process has written it; give --out a path on a disk that all "
                    "nodes share"
                )
            time.sleep(0.1)

    processes.together(look)


def start_processes(config: TrainConfig, options: Options | None = None) -> Processes:
    """The processes of a stage. A run that goes on in the folder of `options` keeps the precision it began with."""
    settled = None
    if options is not None and not options.overwrite:
        settled = former_precision(options.folder)
    return Processes(config, settled)


def say_precision(config: TrainConfig, processes: Processes) -> None:
    """Tell what is left to the device, and what is slow on it."""
    if processes.emulates:
        say(
            "train.precision: bf16 is emulated by this CPU, about ten times slower than fp32; give fp32, or auto for "
            "bf16 where a device computes in it",
            not processes.is_main,
        )
    elif config.precision == "auto":
        say(f"train.precision: auto is {processes.precision} on this {processes.device.type}", not processes.is_main)


def check_processes(
    stage: str, config: StageConfig, options: Options, parts: Mapping[str, Examples | None], processes: Processes
) -> None:
    """Refuse processes that were not started alike, or see other images, before anything is written.

    What is recorded is the first one's, and batches are dealt out by what each of them is told.
    """
    if processes.world == 1:
        return
    keys = {key: value for key, value in flatten(config.dump()).items() if not any(fnmatchcase(key, to) for to in FREE)}
    started = {"stage": stage, "--out": str(options.out), **keys}
    started |= {"precision": processes.precision, "versions": versions()}
    processes.check_same(started, "start all processes with the same command and the same packages")

    def seen() -> dict[str, Any]:
        given = {part: examples for part, examples in parts.items() if examples is not None}
        digests = {part: sample_digest(examples, with_labels=False) for part, examples in given.items()}
        return {part: {**manifest(given[part]), "sha256_of_some": digest} for part, digest in digests.items()}

    processes.check_same({"data": processes.together(seen)}, SAME_FILES)


def check_training(
    config: TrainConfig,
    processes: Processes,
    tasks: Mapping[str, Task],
    streams: Sequence[Stream],
    augment: Augment,
    channels: int = RGB,
) -> None:
    """Refuse what cannot be trained on images of so many `channels`, before any work is done.

    Tasks, colours that are not there, a batch size that cannot be shared out, crops for which workers have no room,
    processes that would not wait for each other's workers.
    """
    if processes.world > 1 and config.workers and config.worker_timeout >= config.process_timeout:
        raise UserError(
            f"train.process_timeout: after {config.process_timeout:g} s the other processes would not wait for a "
            f"loader worker that may take {config.worker_timeout:g} s (train.worker_timeout); give it more"
        )
    check_channels(tasks, channels)  # again, since `init` may have told how many there are
    augment.check_channels(channels)
    check_tasks(tasks, streams, has_teacher=config.ema is not None)
    read = streams_of(tasks)
    for stream in read:
        deal, at_once = dealing(tasks, stream, config.views == "split")
        key = "train.batch_size" if isinstance(config.batch_size, int) else f"train.batch_size.{stream}"
        check_batch_size(config.batch_of(stream), processes.world, deal, config.micro_batches, at_once, key)
    at_a_time = config.images_of(read) // (processes.world * config.micro_batches)
    check_room(config.reading, at_a_time * math.prod(augment.crop) * channels)


def refuse_channels(model: ModelConfig | None, tasks: Mapping[str, Task], augment: Augment) -> None:
    """Raise ValueError, for a validator, where a config says how many channels and asks for what has no sense there.

    A number that only `init` says is looked at when that is read.
    """
    if model is None or model.channels == RGB:
        return
    try:
        check_channels(tasks, model.channels)
        augment.check_channels(model.channels)
    except UserError as error:
        raise ValueError(str(error)) from error


def read_as(config: C, channels: int) -> C:
    """A config whose data sets give images of so many channels, as its network takes.

    Raises UserError with the key of a data set that has others.
    """
    taken = {}
    for part, given in config.data:
        if isinstance(given, Dataset):
            taken[part] = in_channels(f"data.{part}", given, channels)
        elif isinstance(given, Mapping):  # several of a kind, by their names
            taken[part] = {name: in_channels(f"data.{part}.{name}", own, channels) for name, own in given.items()}
    changed = {part: own for part, own in taken.items() if own != getattr(config.data, part)}
    if not changed:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update=changed)})


def in_channels(key: str, dataset: Dataset, channels: int) -> Dataset:
    """As `Dataset.in_channels`, with the key in what is refused."""
    try:
        return dataset.in_channels(channels)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def check_same_images(run: Run, parts: Mapping[str, Examples | None], allow_changed: Sequence[str]) -> None:
    """Refuse to resume on other images than the run began with: the order of an epoch depends on their number."""
    now = {part: manifest(examples) for part, examples in parts.items() if examples is not None}
    for part, former in (run.read_json("data.json") or {}).items():
        allowed = any(fnmatchcase(f"data.{part}", glob) for glob in allow_changed)
        if part in now and now[part] != former and not allowed:
            raise UserError(
                f"data.{part}: {now[part]['images']} images, not the {former.get('images')} that the run began with "
                f"(or other names); put them back, start anew with --overwrite, or give --allow-changed data.{part}"
            )
    run.write_json("data.json", now)


def check_images(key: str, dataset: Dataset) -> None:
    """An empty data set would only be noticed as a division by zero."""
    if len(dataset) == 0:
        raise UserError(f"{key}: holds no image; name a folder with some")


def say_clamped_zoom(samples: Samples, quiet: bool) -> None:
    """Tell where a zoom that was asked for is not had. By the first image: those of a set are mostly of one size.

    Of the default nothing is told: it is meant for images of any size.
    """
    if quiet or "zoom" not in samples.augment.model_fields_set:
        return
    size = samples.resize or samples.examples.image(0).image.shape[:2]
    told = samples.augment.clamped((size[0], size[1]))
    if told is not None:
        say(told, quiet)


def tell_notes(parts: Mapping[str, Dataset | None], labelled: Collection[str] = (), quiet: bool = False) -> None:
    """Say what a person should know of the files of data sets; the masks of those named in `labelled` will be read."""
    for part, dataset in parts.items():
        for note in () if dataset is None else dataset.notes(with_labels=part in labelled):
            say(f"data.{part}: {note}", quiet)


def check_palettes(parts: Mapping[str, Dataset | None]) -> None:
    """Refuse data sets of which one takes greys of palettes for ids and another indices: one class would have two ids.

    Each has chosen what its own masks allow.
    """
    first: dict[str, tuple[str, str]] = {}
    for part, dataset in parts.items():
        for chosen, mapping in ({} if dataset is None else dataset.greys_read()).items():
            first.setdefault(chosen, (part, mapping))
    if len(first) > 1:
        (part, mapping), (other, theirs) = first["greys"], first["indices"]
        raise UserError(
            f"data.{part}: its masks have palettes of greys, whose greys are taken for ids, and of those of "
            f"data.{other} the indices are; say what each grey is: data.{part}.mapping={mapping} and "
            f"data.{other}.mapping={theirs}, where these are right"
        )


def say_other_ranges(
    parts: Mapping[str, Dataset | None], trained: Range | None = None, whose: str = "init", quiet: bool = False
) -> None:
    """Tell which data sets take other values for black and white than the network, or than the first of them.

    Nothing in such images looks wrong, and two cameras may well want two ranges: so it is said and not refused.
    """
    for part, dataset in parts.items():
        own = None if dataset is None else dataset.value_range()
        if own is None:
            continue
        trained, whose = (own, f"data.{part}") if trained is None else (trained, whose)
        if own != trained:
            theirs = "others are" if isinstance(trained[0], tuple) else "{:g} and {:g} are".format(*trained)
            say(
                f"data.{part}: {say_range(own)}, and for {whose} {theirs}; if the values mean the same, give "
                f"data.{part}.range={written_range(trained)}",
                quiet,
            )


def as_trained(part: str, dataset: Dataset, trained: Range | None, channels: int) -> Dataset:
    """A data set that a model is to look at: in as many channels as that takes, and with its range where it has none.

    The range is told, as another one is.
    """
    dataset = in_channels(f"data.{part}", dataset, channels)
    taken = dataset if trained is None or dataset.value_range() == trained else dataset.in_range(trained)
    if taken is not dataset and trained is not None:
        say(f"data.{part}: no range is given; {say_range(trained)}, as the model has learnt")
    say_other_ranges({part: taken}, trained, "the model")
    return taken


def check_whole(reading: Workers, examples: Examples, resize: Size | None) -> None:
    """That workers can hand over whole images, by the first one: the first evaluation may be hours away."""
    check_room(reading, pack([Whole(examples, resize)[0]]).nbytes)


def recalibrate(learner: Learner, samples: Samples, count: int, stream: Stream = "pool") -> int:
    """Estimate the batch statistics of what is exported on the run's first `count` crops, before any task touches them.

    They are the first of `stream`, which `samples` reads. Every process reads the same ones, so all end with the same.
    An encoder that is frozen keeps its own. Gives the number of layers that have some.
    """
    module = learner.evaluated

    def show(image: torch.Tensor) -> None:
        features = module.encoder(image)
        for head in module.heads.values():
            head(features, image.shape[-2:])

    batches = _clean(learner, samples, count, stream=stream)
    return convert.recalibrate(module.heads if learner.module.frozen else module, batches, show)


def recalibrated_encoder(learner: Learner, pool: Samples, count: int) -> EncoderNet:
    """A copy of the encoder as `recalibrate` would leave it; read by this process alone."""
    encoder = deepcopy(learner.evaluated.encoder)
    if not learner.module.frozen:
        convert.recalibrate(encoder, _clean(learner, pool, count, ALONE), encoder)
    return encoder


def enough_to_recalibrate(count: int) -> int:
    """The number of images of `recalibrate`, for a validator. Raises ValueError for a single one."""
    if count == 1:
        raise ValueError("one image has no batch statistics; use 2 or more, or 0 for none")
    return count


def _clean(
    learner: Learner, samples: Samples, count: int, workers: Workers | None = None, stream: Stream = "pool"
) -> Iterator[torch.Tensor]:
    """The first `count` crops of a stream, in batches."""
    config = learner.config
    # No more than a step takes, for memory; from 3 on, an even split leaves no image alone, without a variance.
    at_once = max(3, min(CLEAN_BATCH, config.batch_of(stream) * len(readers(learner.evaluated.tasks, stream))))
    chunks = np.array_split(np.arange(count), max(1, -(-count // at_once)))
    for packed in loader(samples, [chunk.tolist() for chunk in chunks if len(chunk)], workers or config.reading):
        yield packed.to(learner.processes.device, config.channels_last).image


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


TaskMapping = Annotated[dict[str, SerializeAsAny[TaskPlugin]], BeforeValidator(_name_tasks)]
