"""The command line: parse, call one function, render, map errors to exit codes. Imports no torch at start."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from types import TracebackType

import click

from distmerge import __version__
from distmerge.cli.checking import verify_command
from distmerge.cli.evaluating import evaluate_command
from distmerge.cli.merging import demo_command, inspect_command, merge_command, plan_command
from distmerge.cli.reporting import report_command
from distmerge.errors import DistmergeError, PeerFailed
from distmerge.parent import die_with_parent, launched
from distmerge.redaction import redacted


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="distmerge")
def cli() -> None:
    """Merge LoRA and QLoRA adapters into sharded Hugging Face checkpoints, file to file.

    Exit codes: 0 done, 1 a bug, 2 usage, 3 input refused, 4 verification failed, 5 the machine could not,
    75 interrupted (the same command resumes).
    """


for _command in (
    *(merge_command, plan_command, verify_command, evaluate_command, report_command),
    *(inspect_command, demo_command),
):
    cli.add_command(_command)


def _open_streams() -> None:
    """Gives a process that was started with closed standard streams empty ones, so that no file takes their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _show_bug(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """Prints a traceback, without the secrets that it may quote."""
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, at))))


def main() -> None:
    """Runs the command line and exits with the code of what happened."""
    _open_streams()
    sys.excepthook = _show_bug
    process = os.getpid()
    if launched():
        die_with_parent()  # before the seconds that importing torch takes
    quiet = os.environ.get("RANK", "0") != "0"
    try:
        cli.main(standalone_mode=False)
        code = 0
    except click.exceptions.Abort:
        code = 75
    except click.ClickException as error:
        if not quiet:
            error.show()
        code = 2
    except PeerFailed as error:
        code = error.exit_code
    except DistmergeError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 75
    if os.getpid() != process:  # a forked rank: what is to be done at the end, its parent will do
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
