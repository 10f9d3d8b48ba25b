"""The command line: words in, one of the stages' functions called, a few lines out.

A file beside this one for each concern: `looking` before a training, `training`, `using` a model, `reading` results.
Heavy libraries are imported inside the commands, after the words have been looked at, so `--help` and a wrong file name
answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated

import typer

from ssl_seg.cli import looking, reading, training, using
from ssl_seg.cli.shell import run

__all__ = ["app", "main", "run"]

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for group in (looking, training, using, reading):
    app.add_typer(group.commands)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("ssl_seg"))
        raise typer.Exit


@app.callback(epilog="ssl-seg COMMAND --help ends with examples; ssl-seg keys STAGE lists what a config may say.")
def about(
    version: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Pretrain an encoder on unlabelled images, fine-tune it for segmentation, and see whether it helped."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit.

    0 done, 1 faults that `check` found, 2 something the user can mend, 3 a leak, 128 + n stopped by signal n.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    sys.exit(run(lambda: app(args=words, prog_name="ssl-seg", standalone_mode=False)))
