"""Locks a run folder, so that it belongs to one run at a time.

The lock is the system's own (flock): it is released when its holder ends, however it ends. The
content of the lock file only tells others who holds it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meshwright.errors import LaunchError, MeshwrightError, Problem
from meshwright.records import dumps, load, record

LOCK = "lock"


@record
class LockHolder:
    """Describes the process that holds the lock of a folder."""

    process: int
    host: str
    since: str
    """Date and time by the clock of that host."""
    command: str


@contextmanager
def lock_folder(folder: Path, node: str | None = None) -> Iterator[None]:
    """Keeps every other run out of a folder while the block runs; the folder is created if it is
    missing.

    With `node`, only runs of the same node and runs that want the whole folder are kept out. Raises
    LaunchError, naming the process that holds the folder and since when, or if the folder cannot be
    created or written to.
    """
    wanted = {LOCK: fcntl.LOCK_EX}
    if node is not None:
        wanted = {LOCK: fcntl.LOCK_SH, f"{LOCK}-{node}": fcntl.LOCK_EX}
    files: list[int] = []
    try:
        for name, kind in wanted.items():
            files.append(_open(folder / name))
            _lock(files[-1], kind, folder, folder / name)
            if kind == fcntl.LOCK_EX:
                os.ftruncate(files[-1], 0)
                os.pwrite(files[-1], dumps(_myself()).encode(), 0)
        yield
    finally:
        for file in files:
            os.close(file)


def private_folder(folder: Path) -> None:
    """Creates a folder that only its owner can read; an existing one stays as it is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def _open(path: Path) -> int:
    try:
        private_folder(path.parent)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as failure:
        where = str(failure.filename or path)
        wanted = "a folder that this run can write to"
        mend = "give it another one with --output"
        raise LaunchError(Problem(where, "", str(failure.strerror), wanted, mend)) from None


def _lock(file: int, kind: int, folder: Path, path: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as failure:
        if failure.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            sys.stderr.write(
                f"warning: {folder}: this file system keeps no locks ({failure.strerror}): two "
                "runs in one folder would mix their files\n"
            )
            return
        raise LaunchError(
            Problem(
                str(folder),
                "",
                f"in use by {_holder(path)}",
                "a folder in which no other run is at work",
                "wait for it or end it, or give this run another folder with --output",
            )
        ) from None


def _myself() -> LockHolder:
    return LockHolder(
        process=os.getpid(),
        host=socket.gethostname(),
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        command=shlex.join(sys.argv)[:200],
    )


def _holder(path: Path) -> str:
    with suppress(MeshwrightError):  # the holder may not have written its name yet
        known = load(path, LockHolder, error=LaunchError)
        return f"process {known.process} on {known.host} since {known.since} ({known.command})"
    return "another process"
