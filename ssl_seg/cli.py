"""The command line: words in, one of the stages' functions called, a few lines out.

Errors of the user are one line on stderr and exit code 2; a traceback is for our bugs only. Heavy libraries are
imported inside the commands, after the words have been looked at, so `--help` and a wrong file name answer at once.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssl_seg.config import Interrupted, UserError, find_recipe, load, read_words, use_plugin

if TYPE_CHECKING:
    from rich.table import Table

    from ssl_seg.evidence.compare import Comparison, Group
    from ssl_seg.evidence.pairs import Spread
    from ssl_seg.evidence.results import Findings
    from ssl_seg.evidence.statistics import Interval
    from ssl_seg.scores import SegmentationScores

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


GROUPS_ABREAST = 6  # columns of a table that fits a wide terminal
ClickError = typer.BadParameter.__mro__[2]  # typer has click inside, by a path that changes with its version
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="FILE.yaml|key=value ...", help="Config files, later ones over earlier ones; then keys."),
]
Out = Annotated[Path | None, typer.Option("--out", help="The run's folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="One batch through every head; prints, writes nothing.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from the folder's last checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run in the folder first.")]
Allow = Annotated[
    list[str] | None, typer.Option("--allow-changed", metavar="KEY", help="Resume although this key has changed.")
]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", metavar="MODULE", help="A module or .py file with plug-ins.")
]
Runs = Annotated[list[Path] | None, typer.Argument(metavar="RUN ...", help="Run folders, or folders of runs.")]
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
    if dry_run:
        _print_lines(pretrain.try_out(config).lines())
        return
    result = pretrain.pretrain(config, _options(out, resume, overwrite, allow_changed, quiet))
    _print_lines([f"{name}: {value:.4f}" for name, value in result.scores.items()])
    _print_lines([f"encoder: {result.encoder}"])


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
    if dry_run:
        _print_lines(finetune.try_out(config).lines())
        return
    result = finetune.finetune(config, _options(out, resume, overwrite, allow_changed, quiet))
    for part, scores in (("val", result.val), ("test", result.test)):
        if scores is not None:
            _print_lines(_score_lines(part, scores, result.class_names))
    _print_lines([f"model: {result.model} (weights of step {result.selected_step})"])


@app.command("evaluate")
def evaluate_command(words: Words = None, out: Out = None, plugin: Plugins = None) -> None:
    """Score a fine-tuned model on a labelled data set."""
    values = _values(words, plugin)
    from ssl_seg.stages import evaluate
    from ssl_seg.stages.evaluate import EvaluateConfig

    result = evaluate.evaluate(load(EvaluateConfig, values), out)
    _print_lines(_score_lines("test", result.scores, result.class_names))


@app.command("predict")
def predict_command(words: Words = None, out: Out = None, plugin: Plugins = None) -> None:
    """Write a mask for every image."""
    values = _values(words, plugin)
    from ssl_seg.stages import predict
    from ssl_seg.stages.predict import PredictConfig

    result = predict.predict(load(PredictConfig, values), _needed(out))
    _print_lines([f"{len(result.names)} masks: {result.out / 'masks'}"])


@app.command("compare")
def compare_command(
    runs: Runs = None,
    experiment: Annotated[str | None, typer.Option(help="An experiment of MLflow, in place of folders.")] = None,
    uri: Uri = None,
    verify: Annotated[bool, typer.Option("--verify", help="Recompute every score from its matrices.")] = False,
    drawn: Annotated[
        Path | None, typer.Option("--pictures", metavar="DIR", help="Draw the images that changed most, side by side.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Print the scores of runs, those that differ in seeds alone as one, beside only the config keys that differ."""
    if bool(runs) == bool(experiment):
        raise UserError("compare: name run folders, or --experiment NAME for runs of MLflow")
    if experiment and (verify or drawn):
        raise UserError("compare: --verify and --pictures read run folders; name these in place of --experiment")
    for module in plugin or []:
        use_plugin(module)
    from ssl_seg.evidence import compare
    from ssl_seg.evidence.compare import compare_experiment, draw_changed
    from ssl_seg.evidence.passport import verify_all

    if verify:
        for run, verified in verify_all(runs):
            said = f"{verified.figures} figures follow from the confusion matrices"
            without = ", ".join(verified.without_passport)
            more = f"; no passport of {without}, so not by which definition and on which images" if without else ""
            _print_lines([f"{run}: {said} (largest difference {verified.largest:.1g}){more}"])
    found = compare.compare(runs) if runs else compare_experiment(experiment, uri)
    _print_comparison(found)
    if drawn is not None:
        written = draw_changed(found, drawn)
        _print_lines([f"{len(written)} images that changed most: {drawn}"])


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
        _print_lines(outline(config, folder))
        return
    options = StudyOptions(folder, jobs, executor, tuple(plugin or ()), quiet)
    _print_findings(study.study(config, options))


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
        _print_lines([f"{run}: {what} sent to {sent.experiment} at {sent.uri} (run {sent.run_id})"])


@app.command("report")
def report_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN ... | STUDY", help="Run folders, folders of runs, or a study's folder.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="The file; by default report.html in RUN, or beside several of them.")
    ] = None,
) -> None:
    """Write one HTML page about runs or a study: the answer first, then what it rests on, cost and configs."""
    from ssl_seg.reports import runs as of_runs
    from ssl_seg.reports import study as of_study

    page = of_study if any(of_study.is_study(run) for run in runs) else of_runs
    written = page.report(runs, out)
    _print_lines([written.headline, f"report: {written.path}"])


@app.command("norms")
def norms_command(run: Annotated[Path, typer.Argument(metavar="RUN")]) -> None:
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
    _print_lines([f"picture: {found.picture}"])


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
    _print_lines([f"{drawn.count} images and masks: {drawn.out} (look at {drawn.out / 'sheet.png'})"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 something the user can mend, 3 a leak, 128 + n stopped by signal n."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    sys.exit(run(lambda: app(args=words, prog_name="ssl-seg", standalone_mode=False)))


def run(command: Callable[[], Any]) -> int:
    """The exit code of a command; what the user must know goes to stderr in one line."""
    try:
        return command() or 0
    except ClickError as error:
        return _complain(error.format_message())
    except UserError as error:
        return _complain(str(error), error.exit_code, alone=error.of_one_process)
    except typer.Abort:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again at exit
        return 0
    except Interrupted as error:
        print(f"ssl-seg: {error}", file=sys.stderr)
        return 128 + error.signum


def _complain(message: str, code: int = 2, alone: bool = False) -> int:
    line = " ".join(message.split())
    if alone or _tells():
        print(f"ssl-seg: {line}", file=sys.stderr)
    return code


def _tells() -> bool:
    """Of several processes that come to the same result or the same error, the first tells it."""
    return os.environ.get("RANK", "0") == "0"


def _values(words: list[str] | None, plugins: list[str] | None) -> dict[str, Any]:
    """The merged words; files and their YAML are looked at before a heavy library is imported."""
    for word in words or []:
        if "=" not in word:
            find_recipe(word)
    for plugin in plugins or []:
        use_plugin(plugin)
    return read_words(words or [])


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


def _score_lines(part: str, scores: SegmentationScores, class_names: Sequence[str]) -> list[str]:
    width = max(len(name) for name in class_names)
    rows = [f"  {name:<{width}} {iou:.4f}" for name, iou in zip(class_names, scores.iou.tolist(), strict=True)]
    averaged = sum(iou == iou for iou in scores.iou.tolist())  # nan: neither in the truth nor predicted
    over = f" over {averaged} of {len(class_names)} classes" if averaged < len(class_names) else ""
    return [f"{part} mIoU {scores.miou:.4f}{over}, pixel accuracy {scores.accuracy:.4f}", *rows]


def _print_comparison(found: Comparison) -> None:
    """For each table: a row a group with its main score; then what differs, every score and gain, a column a group."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200)
    numbers = {id(group): f"#{number}" for number, group in enumerate(found.groups, start=1)}
    for groups in found.tables:
        console.print(_main_table(found, groups, numbers))
        for start in range(0, len(groups), GROUPS_ABREAST):
            console.print(_figure_table(found, groups[start : start + GROUPS_ABREAST], numbers))
    _print_lines(found.notes)
    for run in found.unfinished:
        print(f"not finished, left out: {run}", file=sys.stderr)


def _main_table(found: Comparison, groups: Sequence[Group], numbers: Mapping[int, str]) -> Table:
    from rich.table import Table

    from ssl_seg.evidence.compare import main_score_of

    score = main_score_of(groups)
    gaining = [group for group in groups if score and found.baseline(group)]
    columns = ["gain over scratch", "95 % over images"] if gaining else []
    table = Table("", "group", "n", *([score] if score else []), *columns)
    for group in groups:
        row = [numbers[id(group)], group.label, str(len(group.outcomes))]
        if score:
            spread = group.spread(score)
            row.append(spread.text() if spread else "-")
        if group in gaining:
            gain = found.gain(group, score)
            row.append(f"{gain.text(sign='+')} (n = {gain.n})" if gain else "no pair: other seeds or labelled images")
            row.append(_interval_text(found.over_images(group, score)))
        table.add_row(*row)
    return table


def _figure_table(found: Comparison, groups: Sequence[Group], numbers: Mapping[int, str]) -> Table:
    """Keys that differ, every score, and the gain over scratch in each."""
    from rich.table import Table

    table = Table("", *(numbers[id(group)] for group in groups))
    for key, values in found.differing.items():
        own = [value for group, value in zip(found.groups, values, strict=True) if group in groups]
        table.add_row(key, *("-" if value is None else value for value in own))
    table.add_section()
    for name in found.scores:
        spreads = [group.spread(name) for group in groups]
        if any(spreads):
            table.add_row(name, *("-" if spread is None else spread.text() for spread in spreads))
    table.add_section()
    for name in (name for name in found.scores if not name.endswith("/averaged_classes")):
        gains = [found.gain(group, name) for group in groups]
        if any(gains):
            cells = (_gain_text(found, group, name, gain) for group, gain in zip(groups, gains, strict=True))
            table.add_row(f"gain in {name}", *cells)
    return table


def _gain_text(found: Comparison, group: Group, name: str, gain: Spread | None) -> str:
    """With its spread over seeds; of the pixels near boundaries also over images, as the main table has it of all."""
    if gain is None:
        return "-"
    over_images = found.over_images(group, name) if name.endswith("/band/miou") else None
    interval = "" if over_images is None else f" (over images {_interval_text(over_images)})"
    return f"{gain.text(sign='+')}{interval}"


def _print_findings(found: Findings) -> None:
    """A row an arm under each condition, the baseline first, and where everything is."""
    from rich.console import Console
    from rich.table import Table

    from ssl_seg.evidence.claims import NOTHING, between, p_as_number, percent, points
    from ssl_seg.evidence.results import CELLS_FILE, GAINS_FILE
    from ssl_seg.evidence.study_claims import answer

    level = f"{100 * found.record['level']:g} %"
    columns = ["arm", "n", f"{found.part} mIoU, %", f"gain over {found.baseline}, points"]
    shares = any(gain.over_starts for gain in found.gains)  # pretrainings, enough for an interval of their own
    over = ["seeds", *(["pretrainings"] if shares else []), "images"]
    table = Table(*found.axes, *columns, *(f"{level} over {what}" for what in over), "exact p")
    gains = {(gain.arm, gain.condition): gain for gain in found.gains}
    for condition in found.conditions:
        for arm in found.arms:
            row = [*dict(condition).values(), arm, str(len(found.of(arm, condition)))]
            row.append(percent(found.spread(arm, condition)))
            gain = gains.get((arm, condition))
            if gain is not None:
                row += [f"{points(gain.gains.mean)} (n = {gain.gains.n})", between(gain.interval)]
                row += [between(gain.over_starts)] if shares else []
                row += [between(gain.images)]
                row += [NOTHING if gain.p is None else p_as_number(gain.p)]
            table.add_row(*row)
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    tables = f"{found.folder / CELLS_FILE}, {found.folder / GAINS_FILE}"
    _print_lines([answer(found).headline, f"tables: {tables}", f"report: {found.folder / 'report.html'}"])


def _interval_text(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.low:+.4f} to {interval.high:+.4f}"


def _print_lines(lines: Sequence[str]) -> None:
    if _tells():
        print("\n".join(lines))
