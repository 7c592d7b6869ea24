"""The command-line program `mocosfl-priv`, assembled from the commands in `mocosfl_priv.commands`.

Exit codes: 0 success; 2 the request cannot be run as written; 3 a run failed; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import typer

from mocosfl_priv.commands import audits, devices, experiments, listing, results
from mocosfl_priv.errors import MocosflPrivError

EXIT_UNUSABLE, EXIT_FAILED, EXIT_INTERRUPTED = 2, 3, 130

app = typer.Typer(
    name="mocosfl-priv",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure how much a split-learning system leaks, and what a defense costs.\n\n"
    "Start with `mocosfl-priv demo`. Exit codes: 0 success, 2 invalid request, 3 failed run, 130 interrupted.",
)
for commands in (experiments, audits, results, listing, devices):
    app.add_typer(commands.app)

FORMER_OPTIONS = {"--checkpoints": "--resume-dir"}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run a command, report any error as one line on stderr, and exit with the documented code.

    Args:
        arguments: Command-line words without the program name; those of `sys.argv` by default.

    """
    # GCC's OpenMP threads busy-wait ("spin") for work. Spinning for long slows everything down when other processes use
    # the cores; not spinning at all costs a quarter of the speed. Must be set before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    words = [_present_name(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    try:
        code = app(args=words, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except (_Interrupted, KeyboardInterrupt, typer.Abort):
        _fail(f"interrupted; {_kept(words)}", EXIT_INTERRUPTED)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except MocosflPrivError as error:
        if "--debug" in words:
            traceback.print_exc()
        _fail(str(error), error.exit_code)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error; its class is private to typer's copy of click
            _fail(str(error.format_message()), EXIT_UNUSABLE)
        if "--debug" in words:
            traceback.print_exc()
        _fail(f"unexpected {type(error).__name__}: {error} (add --debug for the traceback)", EXIT_FAILED)


def _present_name(word: str) -> str:
    """`word`, or the present name of an option under its former name, which is read for one version."""
    option, equals, value = word.partition("=")
    if option not in FORMER_OPTIONS:
        return word
    print(
        f"mocosfl-priv: {option} is now called {FORMER_OPTIONS[option]}; its former name is read for the last time",
        file=sys.stderr,
    )
    return FORMER_OPTIONS[option] + equals + value


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Typer catches KeyboardInterrupt; this exception passes through it to :func:`main`."""


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise _Interrupted


def _kept(words: list[str]) -> str:
    """What an interrupted command leaves behind, and how to continue."""
    if words[:1] == ["sweep"]:
        return "completed parts are stored; continue with --resume"
    if words[:1] == ["serve"] or any(word.split("=")[0] == "--resume-dir" for word in words):
        return "no result was written; the same command continues from its checkpoints"
    return "no result was written"


def _fail(message: str, code: int) -> NoReturn:
    print("mocosfl-priv: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
