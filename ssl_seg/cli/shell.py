"""What commands share: how one is declared, and how it ends: an exit code, and one line where a person can mend it.

Errors of the user are one line on stderr and exit code 2; a traceback is for our bugs only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from ssl_seg.cli import meant
from ssl_seg.config import Interrupted, UserError
from ssl_seg.terminal import say, tells_here, usable_streams, watch_signals

ClickError: Any = typer.BadParameter.__mro__[2]  # typer has click inside, by a path that changes with its version
EXAMPLES: dict[str, tuple[str, ...]] = {}  # of each command, as its help ends; the tests call them

Function = Callable[..., Any]


def command(commands: typer.Typer, name: str, *examples: str) -> Callable[[Function], Function]:
    """Declare a command of a group, whose help ends with these examples."""
    EXAMPLES[name] = examples
    lines = "\n".join(f"  {example}" for example in examples)
    return commands.command(name, epilog=f"\b\nExamples:\n{lines}")  # \b: click leaves the lines as they are


def run(called: Callable[[], Any]) -> int:
    """The exit code of a command; what the user must know goes to stderr in one line."""
    with usable_streams():
        try:
            return _ended(called)
        except ClickError as error:
            return _complain(meant.of_option(error) or error.format_message())
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


def _ended(called: Callable[[], Any]) -> int:
    """What a command returns, once what it has printed is out; raises what the user must know."""
    with watch_signals("stopped") as signals:
        try:
            code = called() or 0
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
