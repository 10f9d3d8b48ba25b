"""The commands that train: a pretraining, a fine-tuning, rounds of them, a study of many."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssl_seg.calibration import temperature_in_words
from ssl_seg.cli.shell import command
from ssl_seg.cli.words import (
    Classes,
    Images,
    Masks,
    Option,
    Out,
    Plugins,
    Quiet,
    Words,
    labelled_options,
    needed,
    read,
)
from ssl_seg.config import UserError, load
from ssl_seg.reports.console import confidence_lines, print_study, score_lines
from ssl_seg.terminal import print_lines, say, tells

if TYPE_CHECKING:
    from ssl_seg.training.processes import DeviceName

commands = typer.Typer()


DryRun = Annotated[bool, typer.Option("--dry-run", help="One batch through every head; prints, writes nothing.")]


Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from the folder's last checkpoint.")]


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run in the folder first.")]


Allow = Annotated[
    list[str] | None, typer.Option("--allow-changed", metavar="KEY", help="Resume although this key has changed.")
]


Init = Annotated[str | None, typer.Option("--init", metavar="RUN", help="Start from the weights of this run.")]


@command(
    commands,
    "pretrain",
    "ssl-seg pretrain --images photos --out runs/pretrained",
    "ssl-seg pretrain --images photos tasks='{denoise: {}, rotate: {}}' train.steps=5000 --out runs/turned",
)
def pretrain_command(
    words: Words = None,
    images: Images = None,
    out: Out = None,
    dry_run: DryRun = False,
    resume: Resume = True,
    overwrite: Overwrite = False,
    allow_changed: Allow = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Train one encoder with pretext tasks on unlabelled images: denoise and inpaint, where none is named."""
    values = pretrain_values(words, images, plugin)
    from ssl_seg.stages import pretrain
    from ssl_seg.stages.pretrain import PretrainConfig

    config = load(PretrainConfig, values)
    _keep_memory_on_cpu(config.train.device)
    if dry_run:
        print_lines(pretrain.try_out(config).lines())
        return
    result = pretrain.pretrain(config, _options(out, resume, overwrite, allow_changed, quiet))
    print_lines([f"{name}: {value:.4f}" for name, value in result.scores.items()])
    print_lines([f"encoder: {result.encoder}"])
    say(f"next: ssl-seg finetune CONFIG.yaml init={shlex.quote(str(result.folder))} --out FOLDER", quiet or not tells())


@command(
    commands,
    "finetune",
    "ssl-seg finetune --images labelled/images --masks labelled/masks --classes ground,leaf --out runs/scratch",
    "ssl-seg finetune --images labelled --classes ground,leaf --init runs/pretrained --out runs/encoder",
)
def finetune_command(
    words: Words = None,
    images: Images = None,
    masks: Masks = None,
    classes: Classes = None,
    init: Init = None,
    out: Out = None,
    dry_run: DryRun = False,
    resume: Resume = True,
    overwrite: Overwrite = False,
    allow_changed: Allow = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Learn segmentation from labelled images: from scratch, or from a pretrained encoder."""
    values = finetune_values(words, images, masks, classes, init, plugin)
    from ssl_seg.stages import finetune
    from ssl_seg.stages.finetune import FinetuneConfig

    config = load(FinetuneConfig, values)
    _keep_memory_on_cpu(config.train.device)
    if dry_run:
        print_lines(finetune.try_out(config).lines())
        return
    result = finetune.finetune(config, _options(out, resume, overwrite, allow_changed, quiet))
    fitted = result.temperature
    for part, scores in (("val", result.val), ("test", result.test)):
        if scores is not None:
            print_lines(score_lines(part, scores, result.class_names, config.averages))
            print_lines(confidence_lines(part, result.measured[part], fitted and fitted.value))
    if fitted is not None:
        print_lines([temperature_in_words(fitted)])
    print_lines([f"model: {result.model} (weights of step {result.selected_step})"])


@command(
    commands,
    "pseudo_label",
    "ssl-seg pseudo_label squares_joint --out runs/rounds",
    "ssl-seg pseudo_label squares_joint rounds.most=2 train.steps=40 --out runs/two_rounds",
)
def pseudo_label_command(words: Words = None, out: Out = None, plugin: Plugins = None, quiet: Quiet = False) -> None:
    """Fine-tune in rounds, each with the images of a pool that the former has labelled."""
    folder = needed(out)
    values = read("pseudo_label", words, plugin)
    from ssl_seg.stages import pseudo_label
    from ssl_seg.stages.pseudo_label import PseudoLabelConfig
    from ssl_seg.stages.setup import Options

    config = PseudoLabelConfig.of(values)
    _keep_memory_on_cpu(config.finetune.train.device)
    done = pseudo_label.pseudo_label(config, Options(folder, quiet=quiet))
    for run, count in zip(done.trained, done.labelled, strict=True):
        print_lines([f"{run.folder}: {count} pseudo-labelled images, mIoU {run.val.miou:.4f}"])
    unused = sum(times == 0 for times in done.used.values())
    print_lines([f"{unused} of {len(done.used)} images of the pool were never used; {done.folder / 'rounds.json'}"])


@command(
    commands,
    "study",
    "ssl-seg study study.yaml --out runs/study --jobs 2",
    "ssl-seg study study.yaml seeds=8 --out runs/study --dry-run",
)
def study_command(
    words: Words = None,
    out: Out = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    executor: Annotated[str, typer.Option(help="local, or submitit for Slurm.")] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be made; write nothing.")] = False,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune from several starts under the same conditions, and tell by how much pretraining helped, if it did."""
    if executor not in ("local", "submitit"):
        raise UserError(f"--executor {executor}: not known; write local or submitit")
    values = read("study", words, plugin)
    folder = needed(out)
    from ssl_seg.studies import study
    from ssl_seg.studies.config import StudyConfig
    from ssl_seg.studies.study import StudyOptions, outline

    config = load(StudyConfig, values)
    if dry_run:
        print_lines(outline(config, folder))
        return
    options = StudyOptions(folder, jobs, executor, tuple(plugin or ()), quiet)
    print_study(study.study(config, options))


def pretrain_values(
    words: Sequence[str] | None, images: str | None = None, plugins: Sequence[str] | None = None
) -> dict[str, Any]:
    """What the words of `ssl-seg pretrain` say: of images alone, with the tasks that are usual."""
    values = read("pretrain", words, plugins, labelled_options("pool", images, None, None))
    if images is None:
        return values
    from ssl_seg.stages.pretrain import TASKS

    return {"tasks": TASKS, **values}


def finetune_values(
    words: Sequence[str] | None,
    images: str | None = None,
    masks: str | None = None,
    classes: str | None = None,
    init: str | None = None,
    plugins: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What the words of `ssl-seg finetune` say."""
    options = labelled_options("labelled", images, masks, classes)
    options += [] if init is None else [Option("--init", "init", init)]
    return read("finetune", words, plugins, options)


def _keep_memory_on_cpu(device: DeviceName) -> None:
    """A training on a CPU has this process for itself, so it may change its allocator."""
    from ssl_seg.training.processes import choose_device, keep_freed_memory

    if choose_device(device).type == "cpu":
        keep_freed_memory()


def _options(out: Path | None, resume: bool, overwrite: bool, allow_changed: list[str] | None, quiet: bool) -> Any:
    from ssl_seg.stages.setup import Options

    folder = needed(out)
    if not resume and not overwrite and folder.exists():
        raise UserError(f"--no-resume: {folder} exists already; add --overwrite or name a new folder")
    return Options(folder, overwrite, tuple(allow_changed or ()), quiet)
