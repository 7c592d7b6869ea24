"""The command line. Its commands lie in `mocosfl_priv.commands`; here they become one program.

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

from mocosfl_priv.commands import devices, experiments, listing, results
from mocosfl_priv.errors import MocosflPrivError

EXIT_UNUSABLE, EXIT_FAILED, EXIT_INTERRUPTED = 2, 3, 130

app = typer.Typer(
    name="mocosfl-priv",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="How much does a split-learning system leak, and at what price is it defended?\n\n"
    "Start with `mocosfl-priv demo`. Exit codes: 0 success, 2 unusable request, 3 failed run.",
)
for commands in (experiments, results, listing, devices):
    app.add_typer(commands.app)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run the command, and turn every error into one line and an exit code."""
    # OpenMP threads that spin for long starve each other beside a busy neighbour; ones that sleep at once cost a
    # quarter of the speed. Must be set before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=words, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except (_Interrupted, KeyboardInterrupt, typer.Abort):
        kept = "what is complete is kept, --resume goes on" if words[:1] == ["sweep"] else "no result was written"
        _fail(f"interrupted; {kept}", EXIT_INTERRUPTED)
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


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM; unlike KeyboardInterrupt it reaches :func:`main` through typer."""


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise _Interrupted


def _fail(message: str, code: int) -> NoReturn:
    print("mocosfl-priv: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
