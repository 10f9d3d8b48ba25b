"""The commands that read what runs have written: tables, pages, and what is sent to MLflow."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ssl_seg.cli.shell import command
from ssl_seg.cli.words import Plugins
from ssl_seg.config import UserError, use_plugin, user_path
from ssl_seg.reports.console import print_comparison
from ssl_seg.terminal import print_lines

commands = typer.Typer()


Runs = Annotated[
    list[Path] | None, typer.Argument(parser=user_path, metavar="RUN ...", help="Run folders, or folders of runs.")
]


Uri = Annotated[str | None, typer.Option(help="Where MLflow keeps its runs; runs/mlflow.db by default.")]


@command(
    commands,
    "compare",
    "ssl-seg compare runs/scratch runs/encoder",
    "ssl-seg compare runs/scratch runs/encoder --verify --pictures changed",
)
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


@command(
    commands,
    "track",
    "ssl-seg track runs/encoder",
    "ssl-seg track runs/encoder --uri http://localhost:5000",
)
def track_command(
    runs: Runs = None,
    experiment: Annotated[str | None, typer.Option(help="In place of the one that the run names.")] = None,
    uri: Uri = None,
    model: Annotated[bool, typer.Option("--model", help="Also the fine-tuned model, as one of MLflow's own.")] = False,
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
        sent = mirror.track(run, uri, experiment, model or None)
        what = f"{sent.lines} lines and {sent.pictures} pictures"
        print_lines([f"{run}: {what} sent to {sent.experiment} at {sent.uri} (run {sent.run_id})"])


@command(
    commands,
    "report",
    "ssl-seg report runs/scratch runs/encoder",
    "ssl-seg report runs/study --out study.html",
)
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


@command(
    commands,
    "norms",
    "ssl-seg norms runs/pretrained",
    "ssl-seg norms runs/encoder",
)
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
