"""Reports why a rank failed: to its launcher, and in a file of the run folder."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meshwright.errors import MeshwrightError, Problem
from meshwright.records import dumps, plain
from meshwright.runtime.launch_variables import RANK, REPORT
from meshwright.runtime.run_folder import Failure, failure_file

_SIGNS_OF_LOSS = ("gloo", "NCCL", "Connection", "Broken pipe", "Timed out", "Socket")
"""Words by which one recognises PyTorch's errors about a message that did not get through."""


@contextmanager
def rank_process(folder: Path) -> Iterator[None]:
    """Runs a rank's whole life inside its `with` block: reports an exception that leaves the block,
    and ends the process.

    The process ends at once, without shutting the interpreter down: gloo's threads may still hold
    tensors then, and abort a process whose work is done (pytorch/pytorch pull request 179291).
    """
    status = 1
    try:
        yield
        status = 0
    except BaseException as error:
        _tell(error, folder)
        _print(error)
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def _print(error: BaseException) -> None:
    with suppress(OSError):  # the disk that holds the log may be full
        traceback.print_exception(error)
        sys.stderr.flush()


def report_line(text: str) -> bool:
    """Sends one line to the launcher. Returns False if no launcher listens."""
    pipe = os.environ.get(REPORT, "")
    if not pipe.isdecimal():
        return False
    rest = text.replace("\n", " ").encode() + b"\n"
    try:
        while rest:
            rest = rest[os.write(int(pipe), rest) :]
    except OSError:
        return False
    return True


def _tell(error: BaseException, folder: Path) -> None:
    """Reports a failure in two ways: a file, which stays and reaches launchers on other machines
    that share the folder, and a pipe, which works even if the disk is full."""
    rank = int(os.environ.get(RANK, "0"))
    failure = Failure(
        rank=rank,
        seconds=time.time(),
        kind=type(error).__name__,
        problems=_problems(error, rank, folder),
        secondary=type(error).__name__ == "PeerLost" or is_communication_error(error),
    )
    report_line(json.dumps(plain(failure)))
    with suppress(OSError):
        failure_file(folder, rank).write_text(dumps(failure))


def is_communication_error(error: BaseException) -> bool:
    """Returns True if an error comes from communication between ranks, such as one whose peer has
    gone."""
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    signs = (sign in first_line(error) for sign in _SIGNS_OF_LOSS)
    return isinstance(error, RuntimeError) and any(signs)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "")


def _problems(error: BaseException, rank: int, folder: Path) -> tuple[Problem, ...]:
    if isinstance(error, MeshwrightError):
        return error.problems
    wanted = "a run to the end"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and (error.filename or full):
        # A full disk is reported without a file name if the file was open already.
        where, mend = str(error.filename or folder), "make room on its disk" if full else ""
        return (Problem(where, f"rank {rank}", str(error.strerror), wanted, mend),)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    found = f"{type(error).__name__}: {error}"
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return (Problem(f"rank {rank}", where, found, wanted),)
