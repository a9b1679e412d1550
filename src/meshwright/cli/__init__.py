"""Defines the command line: one function per verb."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from meshwright.cli import discovering, emulating, planning, profiling, running
from meshwright.cli.options import INTERRUPTED_STATUS, app

if TYPE_CHECKING:
    from meshwright.errors import MeshwrightError

__all__ = ["app", "discovering", "emulating", "main", "planning", "profiling", "running"]

UNREAD, MISTAKE = 1, 2
"""Exit statuses: output to a closed pipe, and an error with a message."""


def main() -> None:
    """Runs the command line, the entry point of `meshwright`.

    A mistake of the user, a broken file or a failure of the machine ends with a message and an exit
    status. A traceback is always a bug of ours.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # closed, or replaced by the caller
            # A character that a terminal cannot show is written as its code.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    status = _status()
    if _flushed() is not None:  # Python would try again at exit, and print an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _status() -> int:
    """Runs a verb, and returns its exit status."""
    from meshwright.errors import MachineError, MeshwrightError, Problem

    status = 0
    try:
        app()  # typer reports unreadable options itself and raises SystemExit
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0
        if status == INTERRUPTED_STATUS:
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
    from meshwright.os_errors import machine_error

    return machine_error(failure)


def _flushed() -> OSError | None:
    """Flushes the output; returns why that failed, or None."""
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
