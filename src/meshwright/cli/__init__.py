"""The command line: one function per verb."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from meshwright.cli import discovering, planning, running, testbed
from meshwright.cli.options import app

if TYPE_CHECKING:
    from meshwright.errors import MeshwrightError

__all__ = ["app", "discovering", "main", "planning", "running", "testbed"]

UNREAD, MISTAKE, STOPPED = 1, 2, 130
"""Exit statuses: of an output that nobody reads, of what ends with a message, of Ctrl-C."""


def main() -> None:
    """Entry point: what goes wrong by a user's mistake, a file or the machine ends with a message
    and a status of its own. A traceback is a mistake of ours."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # closed, or put in its place by who calls us
            # A terminal that cannot show a letter shows its number.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    status = _status()
    if _flushed() is not None:  # Python would try again when it ends, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _status() -> int:
    """Run a verb; its exit status."""
    from meshwright.errors import MachineError, MeshwrightError, Problem

    status = 0
    try:
        app()  # typer has words of its own for options that it cannot read, and leaves with them
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0
        if status == STOPPED:
            sys.stderr.write("stopped by Ctrl-C\n")
    except MeshwrightError as error:
        status = _tell(error)
    except BrokenPipeError:
        status = UNREAD
    except OSError as failure:
        status = _tell(_fault(failure))
    except MemoryError:
        mend = "close other programs, or ask for less: a smaller model, batch or cluster"
        status = _tell(MachineError(Problem("this machine", "", "no memory left", "more", mend)))
    unwritten = _flushed()
    if isinstance(unwritten, BrokenPipeError):
        return UNREAD
    if unwritten is not None:
        return _tell(_fault(OSError(unwritten.errno, unwritten.strerror, "standard output")))
    return status


def _fault(failure: OSError) -> MeshwrightError:
    from meshwright.faults import fault

    return fault(failure)


def _flushed() -> OSError | None:
    """Why the output could not be written to its end; None if it could."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as failure:
        return failure
    return None


def _tell(error: MeshwrightError) -> int:
    with suppress(OSError):
        sys.stderr.write(f"{type(error).__name__}:\n{error}\n")
    return MISTAKE
