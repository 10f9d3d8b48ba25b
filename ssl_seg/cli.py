"""The command line: words in, one of the stages' functions called, a few lines out.

Errors of the user are one line on stderr and exit code 2; a traceback is for our bugs only. Heavy libraries are
imported inside the commands, after the words have been looked at, so `--help` and a wrong file name answer at once.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssl_seg.config import (
    Interrupted,
    UserError,
    find_recipe,
    load,
    merge,
    names_file,
    read_words,
    use_plugin,
    user_path,
)
from ssl_seg.reports.console import check_lines, gap_lines, print_comparison, print_study, probe_lines, score_lines
from ssl_seg.terminal import print_lines, say, tells, tells_here, usable_streams, watch_signals

if TYPE_CHECKING:
    from ssl_seg.training.processes import DeviceName

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("ssl_seg"))
        raise typer.Exit


ClickError: Any = typer.BadParameter.__mro__[2]  # typer has click inside, by a path that changes with its version


Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="FILE.yaml|key=value ...", help="Config files, later ones over earlier ones; then keys."),
]


Out = Annotated[Path | None, typer.Option("--out", parser=user_path, metavar="PATH", help="The run's folder.")]


DryRun = Annotated[bool, typer.Option("--dry-run", help="One batch through every head; prints, writes nothing.")]


Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from the folder's last checkpoint.")]


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run in the folder first.")]


Allow = Annotated[
    list[str] | None, typer.Option("--allow-changed", metavar="KEY", help="Resume although this key has changed.")
]


Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", metavar="MODULE", help="A module or .py file with plug-ins.")
]


Runs = Annotated[
    list[Path] | None, typer.Argument(parser=user_path, metavar="RUN ...", help="Run folders, or folders of runs.")
]


Uri = Annotated[str | None, typer.Option(help="Where MLflow keeps its runs; runs/mlflow.db by default.")]


Quiet = Annotated[bool, typer.Option("--quiet", help="Print the result only.")]


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Pretrain an encoder on unlabelled images, fine-tune it for segmentation, and see whether it helped."""


@app.command("pretrain")
def pretrain_command(
    words: Words = None,
    out: Out = None,
    dry_run: DryRun = False,
    resume: Resume = True,
    overwrite: Overwrite = False,
    allow_changed: Allow = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Train one encoder with pretext tasks on unlabelled images."""
    values = _values(words, plugin)
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


@app.command("finetune")
def finetune_command(
    words: Words = None,
    out: Out = None,
    dry_run: DryRun = False,
    resume: Resume = True,
    overwrite: Overwrite = False,
    allow_changed: Allow = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Learn segmentation from labelled images: from scratch, or from a pretrained encoder."""
    values = _values(words, plugin)
    from ssl_seg.stages import finetune
    from ssl_seg.stages.finetune import FinetuneConfig

    config = load(FinetuneConfig, values)
    _keep_memory_on_cpu(config.train.device)
    if dry_run:
        print_lines(finetune.try_out(config).lines())
        return
    result = finetune.finetune(config, _options(out, resume, overwrite, allow_changed, quiet))
    for part, scores in (("val", result.val), ("test", result.test)):
        if scores is not None:
            print_lines(score_lines(part, scores, result.class_names, config.averages))
    print_lines([f"model: {result.model} (weights of step {result.selected_step})"])


@app.command("pseudo_label")
def pseudo_label_command(words: Words = None, out: Out = None, plugin: Plugins = None, quiet: Quiet = False) -> None:
    """Fine-tune in rounds, each with the images of a pool that the former has labelled."""
    folder = _needed(out)
    values = _values(words, plugin)
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


@app.command("evaluate")
def evaluate_command(words: Words = None, out: Out = None, plugin: Plugins = None) -> None:
    """Score a fine-tuned model on a labelled data set."""
    values = _values(words, plugin)
    from ssl_seg.stages import evaluate
    from ssl_seg.stages.evaluate import EvaluateConfig

    config = load(EvaluateConfig, values)
    result = evaluate.evaluate(config, out)
    print_lines(score_lines("test", result.scores, result.class_names, config.averages))


@app.command("predict")
def predict_command(words: Words = None, out: Out = None, plugin: Plugins = None) -> None:
    """Write a mask for every image."""
    values = _values(words, plugin)
    from ssl_seg.stages import predict
    from ssl_seg.stages.predict import PredictConfig

    result = predict.predict(load(PredictConfig, values), _needed(out))
    print_lines([f"{len(result.names)} masks: {result.out / 'masks'}"])


@app.command("export")
def export_command(
    model: Annotated[Path, typer.Argument(parser=user_path, metavar="RUN", help="A fine-tuned run or its model/.")],
    out: Out = None,
) -> None:
    """Write a fine-tuned model as an ONNX file, which runs without this package."""
    from ssl_seg.weights import onnx

    done = onnx.export_onnx(model, _needed(out))
    print_lines(
        [
            f"{done.path}: answers as the model at {len(onnx.COMPARED)} sizes, to {done.largest_difference:.0e} of the "
            f"largest logit; takes RGB in [0, 1] of any size, tells {', '.join(done.class_names)} apart"
        ]
    )


@app.command("select")
def select_command(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="A folder of images, or a YAML file with data.pool.")],
    words: Words = None,
    count: Annotated[int | None, typer.Option(min=1, help="How many images; 20 by default.")] = None,
    init: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="RUN", help="Whose encoder compares them; seeds of a fine-tuning, one by one."),
    ] = None,
    out: Out = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Choose which images to label next: those that together look like the whole pool."""
    folder = _needed(out)
    given = [] if user_path(pool).is_dir() else [pool]
    values = _values([*given, *(words or [])], plugin)
    if not given:
        values = merge({"data": {"pool": {"type": "folder", "images": pool}}}, values)
    values |= {key: value for key, value in (("count", count), ("init", init)) if value}
    from ssl_seg.stages import select
    from ssl_seg.stages.select import SelectConfig

    chosen = select.select(load(SelectConfig, values), folder, quiet)
    unsure = [f"  uncertain: {own:.2f}" for own in chosen.uncertain] or [""] * len(chosen.names)
    shown = zip(chosen.shares, chosen.names, unsure, strict=True)
    print_lines([f"{share * 100:4.0f} %  {name}{more}" for share, name, more in shown])
    if chosen.unlabelled:
        print_lines([f"no labelled mask shows {', '.join(chosen.unlabelled)}"])
    before = f", {chosen.covered_before * 100:.0f} % before" if chosen.covered_before else ""
    cover = f"they cover {chosen.covered * 100:.0f} % of what the pool shows{before}"
    print_lines([f"{len(chosen.names)} images: {chosen.out} (look at {chosen.out / 'sheet.png'}); {cover}"])
    where = f"{{type: folder, images: {chosen.out / 'images'}, masks: {chosen.out / 'masks'}, classes: [...]}}"
    print_lines([f"next: draw masks of the same names into {chosen.out / 'masks'}; data.labelled is then {where}"])


@app.command("probe")
def probe_command(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RUN ...", help="Runs, files of weights or names of timm; data.labelled.* and others."),
    ],
    out: Out = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Tell in seconds how much frozen encoders know of the classes of a few labelled images."""
    named = [word for word in words if "=" not in word and not word.endswith((".yaml", ".yml"))]
    values = _values([word for word in words if word not in named], plugin)
    values |= {"init": named} if named else {}
    from ssl_seg.stages import probe
    from ssl_seg.stages.probe import ProbeConfig

    print_lines(probe_lines(probe.probe(load(ProbeConfig, values), out, quiet)))
    if out is not None:
        print_lines([f"pictures: {out} (look at {out / 'sheet.png'})"])


@app.command("gap")
def gap_command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET POOL ...", help="Folders of images, what the model is for first; or data.* and other keys."
        ),
    ],
    init: Annotated[str | None, typer.Option("--with", metavar="RUN", help="Whose encoder compares them.")] = None,
    out: Out = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Tell how far pools of images, drawn ones say, lie from the images that a model is for; the nearest first."""
    folders = [word for word in words if "=" not in word and user_path(word).is_dir()]
    values = _values([word for word in words if word not in folders], plugin)
    data = values["data"] if isinstance(values.get("data"), dict) else {}
    named: dict[str, Any] = {}
    if folders and "target" not in data:
        named = {"target": {"type": "folder", "images": folders.pop(0)}}
    if not folders and "pools" not in data:
        raise UserError("gap: name the folder of the target images, then those of pools")
    named |= {"pools": {folder: {"type": "folder", "images": folder} for folder in folders}}
    values = merge({"data": named}, values) | ({} if init is None else {"init": init})
    from ssl_seg.stages import gap
    from ssl_seg.stages.gap import GapConfig

    found = gap.gap(load(GapConfig, values), out, quiet)
    print_lines(gap_lines(found))
    if out is not None:
        print_lines([f"pictures: {out} (look at {out / 'sheet.png'})"])


@app.command("check")
def check_command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES [MASKS] | CONFIG ...",
            help="Folders; or the config of a pretraining or fine-tuning. Then keys.",
        ),
    ],
    classes: Annotated[str | None, typer.Option(metavar="A,B", help="Names of the classes, in order of ids.")] = None,
    out: Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all that was found as one JSON object.")] = False,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> int:
    """Look at images and masks before anything is trained: what is wrong, and the command that trains on them.

    Exits with 0 where nothing is wrong, with 1 where something is to be mended first.
    """
    folders = [word for word in words if "=" not in word and user_path(word).is_dir()]
    rest = [word for word in words if word not in folders]
    values = _values(rest, plugin)
    both = [Path(folder, name) for folder in folders for name in ("images", "masks")]
    if len(folders) == 1 and all(user_path(path).is_dir() for path in both):
        folders = [str(path) for path in both]
    if len(folders) > 2 or (classes is not None and len(folders) < 2):
        raise UserError("check: name the folder of the images, then that of the masks; --classes goes with these")
    from ssl_seg.stages import check
    from ssl_seg.stages.finetune import FinetuneConfig
    from ssl_seg.stages.pretrain import PretrainConfig

    if folders:
        named: dict[str, Any] = dict(zip(("images", "masks"), folders, strict=False))
        named |= {} if classes is None else {"classes": [name.strip() for name in classes.split(",")]}
        part = "labelled" if len(folders) == 2 else "pool"
        base: dict[str, Any] = {"data": {part: {"type": "folder", **named}}}
        values = merge(base if part == "labelled" else {**base, "tasks": check.TASKS}, values)
    data = values.get("data")
    kind = FinetuneConfig if isinstance(data, dict) and "labelled" in data else PretrainConfig
    typed = [*rest, *(word for module in plugin or [] for word in ("--plugin", module))]
    found = check.check(load(kind, values), out, quiet, typed, propose=bool(folders))
    if as_json:
        print_lines([json.dumps(found.plain(), indent=2)])
        return int(bool(found.faults))
    print_lines(check_lines(found))
    print_lines([f"pictures: {out / 'sheet.png'}" if out is not None else "pictures: add --out FOLDER"])
    return int(bool(found.faults))


@app.command("compare")
def compare_command(
    runs: Runs = None,
    experiment: Annotated[str | None, typer.Option(help="An experiment of MLflow, in place of folders.")] = None,
    uri: Uri = None,
    verify: Annotated[bool, typer.Option("--verify", help="Recompute every score from its matrices.")] = False,
    drawn: Annotated[
        Path | None,
        typer.Option(
            "--pictures", parser=user_path, metavar="DIR", help="Draw the images that changed most, side by side."
        ),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Print the scores of runs, those that differ in seeds alone as one, beside only the config keys that differ."""
    folders = runs or []
    if bool(folders) == bool(experiment):
        raise UserError("compare: name run folders, or --experiment NAME for runs of MLflow")
    if experiment and (verify or drawn):
        raise UserError("compare: --verify and --pictures read run folders; name these in place of --experiment")
    for module in plugin or []:
        use_plugin(module)
    from ssl_seg.evidence import compare
    from ssl_seg.evidence.passport import verify_all
    from ssl_seg.reports.changed import draw_changed
    from ssl_seg.tracking.experiments import compare_experiment

    if verify:
        for run, verified in verify_all(folders):
            said = f"{verified.figures} figures follow from the confusion matrices"
            without = ", ".join(verified.without_passport)
            more = f"; no passport of {without}, so not by which definition and on which images" if without else ""
            print_lines([f"{run}: {said} (largest difference {verified.largest:.1g}){more}"])
    found = compare_experiment(experiment, uri) if experiment else compare.compare(folders)
    print_comparison(found)
    if drawn is not None:
        written = draw_changed(found, drawn)
        print_lines([f"{len(written)} images that changed most: {drawn}"])


@app.command("study")
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
    values = _values(words, plugin)
    folder = _needed(out)
    from ssl_seg.studies import study
    from ssl_seg.studies.config import StudyConfig
    from ssl_seg.studies.study import StudyOptions, outline

    config = load(StudyConfig, values)
    if dry_run:
        print_lines(outline(config, folder))
        return
    options = StudyOptions(folder, jobs, executor, tuple(plugin or ()), quiet)
    print_study(study.study(config, options))


@app.command("track")
def track_command(
    runs: Runs = None,
    experiment: Annotated[str | None, typer.Option(help="In place of the one that the run names.")] = None,
    uri: Uri = None,
    follow: Annotated[int | None, typer.Option(hidden=True, metavar="PID")] = None,
) -> None:
    """Send to MLflow what it has not got of a run: after the server was down, or to another server."""
    if not runs:
        raise UserError("track: name one run folder or more")
    from ssl_seg import tracking

    tracking.prepare()
    from ssl_seg.tracking import mirror

    if follow is not None:
        raise typer.Exit(mirror.follow(runs[0], follow))
    for run in runs:
        sent = mirror.track(run, uri, experiment)
        what = f"{sent.lines} lines and {sent.pictures} pictures"
        print_lines([f"{run}: {what} sent to {sent.experiment} at {sent.uri} (run {sent.run_id})"])


@app.command("report")
def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            parser=user_path, metavar="RUN ... | STUDY", help="Run folders, folders of runs, or a study's folder."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=user_path,
            metavar="PATH",
            help="The file; by default report.html in RUN, or beside several of them.",
        ),
    ] = None,
) -> None:
    """Write one HTML page about runs or a study: the answer first, then what it rests on, cost and configs."""
    from ssl_seg.reports import report

    written = report(runs, out)
    print_lines([written.headline, f"report: {written.path}"])


@app.command("norms")
def norms_command(run: Annotated[Path, typer.Argument(parser=user_path, metavar="RUN")]) -> None:
    """Print and draw which statistics (instance, layer, batch) a run's switch norm layers have learnt to use."""
    from rich.console import Console
    from rich.table import Table

    from ssl_seg.norm.layers import SHARES
    from ssl_seg.reports import norms

    found = norms.norms(run)
    table = Table("", "channels", *(f"{of} {share}" for of in ("mean", "var") for share in SHARES))
    for part in found.parts:
        table.add_section()
        for layer in part.layers:
            shares = (f"{share:.3f}" for share in (*layer.mean, *layer.var))
            table.add_row(f"{part.name}: {layer.name}", str(layer.channels), *shares)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    print_lines([f"picture: {found.picture}"])


@app.command("synth")
def synth_command(
    kind: Annotated[str, typer.Argument(metavar="WORLD", help="What to draw: street, shapes or squares.")],
    words: Words = None,
    out: Out = None,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 500,
    size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Their size in pixels.")] = "480x360",
    seed: Annotated[int, typer.Option(help="The same seed gives the same pixels.")] = 0,
    clip: Annotated[int, typer.Option(min=1, metavar="N", help="Frames of one scene, where the world moves.")] = 1,
    beside: Annotated[
        list[str] | None, typer.Option("--with", metavar="WHAT", help="depth, instances, edges: more than masks.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that draw; one a core by default.")] = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Draw synthetic images with exact masks; the world's options are key=value words, such as noise=0.1."""
    sides = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", size)
    if sides is None:
        raise UserError(f"--size {size}: not WIDTHxHEIGHT; write it as 480x360")
    width, height = sides.groups()
    folder = _needed(out)
    options = _values(words, plugin)
    if "type" in options:
        raise UserError(f"type={options['type']}: the world is the first word; write ssl-seg synth {options['type']}")
    from ssl_seg.data import synth
    from ssl_seg.datasets.synthetic import Synthetic

    values = {"kind": {**options, "type": kind}, "count": count, "size": (int(height), int(width)), "seed": seed}
    dataset = load(Synthetic, {**values, "clip": clip})
    extras = [extra for words in beside or [] for extra in words.split(",")]
    drawn = synth.synth(dataset, folder, extras, jobs, quiet)
    print_lines([f"{drawn.count} images and masks: {drawn.out} (look at {drawn.out / 'sheet.png'})"])


@app.command("models")
def models_command(
    pattern: Annotated[
        str | None,
        typer.Argument(metavar="PATTERN", help="A name of timm, a part of one, or 'maxvit*'; all of docs/support.md."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Build and run each, with every decoder: minutes.")] = False,
) -> int:
    """Tell which networks of timm are encoders, how they are adapted, and what goes with them.

    Exits with 1 where --check finds one that does not do what its row says.
    """
    from ssl_seg.models import support
    from ssl_seg.reports.console import print_support

    rows = support.shipped() if pattern is None else [support.support_of(name) for name in support.matching(pattern)]
    print_support(rows)
    if not check:
        return 0
    from ssl_seg.testing.support import faults_of

    found = {row.encoder: list(faults_of(row)) for row in rows}
    print_lines([f"{name}: {'; '.join(faults) or 'does what its row says'}" for name, faults in found.items()])
    return int(any(found.values()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit.

    0 done, 1 faults that `check` found, 2 something the user can mend, 3 a leak, 128 + n stopped by signal n.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    sys.exit(run(lambda: app(args=words, prog_name="ssl-seg", standalone_mode=False)))


def run(command: Callable[[], Any]) -> int:
    """The exit code of a command; what the user must know goes to stderr in one line."""
    with usable_streams():
        try:
            return _ended(command)
        except ClickError as error:
            return _complain(error.format_message())
        except UserError as error:
            return _complain(str(error), error.exit_code, alone=error.of_one_process)
        except typer.Abort as error:
            if isinstance(error.__cause__, EOFError):  # click takes any for the end of what a person types
                raise error.__cause__ from None
            return 130
        except PermissionError as error:
            return _complain(f"{error.filename}: {error.strerror}; mend the rights, or name what is yours")
        except Interrupted as error:
            return _complain(str(error), 128 + error.signum, alone=True)


def _ended(command: Callable[[], Any]) -> int:
    """What a command returns, once what it has printed is out; raises what the user must know."""
    with watch_signals("stopped") as signals:
        try:
            code = command() or 0
            sys.stdout.flush()
        except Exception as error:
            # A signal amid an import comes out as whatever the library makes of it.
            if signals.raised is None or isinstance(error, Interrupted):
                raise
            raise Interrupted(signals.raised, signals.told) from error
    return code


def _complain(message: str, code: int = 2, alone: bool | None = None) -> int:
    """Say it, if this process is the one of several to do so; where it is not known (None), one of each machine is."""
    say(f"ssl-seg: {' '.join(message.split())}", quiet=not (tells_here() if alone is None else alone))
    return code


def _values(words: list[str] | None, plugins: list[str] | None) -> dict[str, Any]:
    """The merged words; files and their YAML are looked at before a heavy library is imported."""
    for word in words or []:
        if names_file(word):
            find_recipe(word)
    for plugin in plugins or []:
        use_plugin(plugin)
    return read_words(words or [])


def _keep_memory_on_cpu(device: DeviceName) -> None:
    """A training on a CPU has this process for itself, so it may change its allocator."""
    from ssl_seg.training.processes import choose_device, keep_freed_memory

    if choose_device(device).type == "cpu":
        keep_freed_memory()


def _options(out: Path | None, resume: bool, overwrite: bool, allow_changed: list[str] | None, quiet: bool) -> Any:
    from ssl_seg.stages.setup import Options

    folder = _needed(out)
    if not resume and not overwrite and folder.exists():
        raise UserError(f"--no-resume: {folder} exists already; add --overwrite or name a new folder")
    return Options(folder, overwrite, tuple(allow_changed or ()), quiet)


def _needed(out: Path | None) -> Path:
    if out is None:
        raise UserError("--out: missing; name the folder to write, such as --out runs/first")
    return out
