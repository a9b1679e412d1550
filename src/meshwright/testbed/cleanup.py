"""Keeps records of what a testbed creates on the machine, so that it can be cleaned up.

A launcher that is killed cannot clean up. It has written down what it creates beforehand; the next
start reads that and takes away exactly what is listed. Anything with another name belongs to
others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from meshwright.errors import LaunchError, Problem
from meshwright.records import dumps, load, record
from meshwright.runtime_folder import runtime_folder
from meshwright.testbed.capabilities import COMMAND_SECONDS

WAIT_SECONDS = 5.0
"""Time that the kernel may take to release killed processes."""


@record
class CleanupRecord:
    """Lists the namespaces and control groups of one testbed, so that they can be removed if its
    owner is killed."""

    identity: str
    """Prefix of all its names."""
    owner: int
    """Id of the process that will take the testbed down."""
    owner_started: float
    """Start time of the owner, which tells it from a later process with the same id."""
    namespaces: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    """Folders of the control groups."""


def cleanup_folder() -> Path:
    """Returns the folder with this user's cleanup records. Raises LaunchError, see
    `runtime_folder`."""
    return runtime_folder() / "testbeds"


def own_record(
    identity: str, namespaces: tuple[str, ...], groups: tuple[str, ...]
) -> CleanupRecord:
    """Returns a cleanup record with this process as owner."""
    started = psutil.Process().create_time()
    return CleanupRecord(
        identity=identity,
        owner=os.getpid(),
        owner_started=started,
        namespaces=namespaces,
        groups=groups,
    )


def save_record(record: CleanupRecord, folder: Path) -> Path:
    """Writes a cleanup record and returns its file, which is complete or does not exist."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{record.identity}.json"
    draft = path.with_suffix(".draft")
    draft.write_text(dumps(record))
    draft.replace(path)
    return path


def cleanup_records(folder: Path) -> list[CleanupRecord]:
    """Reads all cleanup records."""
    found = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return [load(path, CleanupRecord, error=LaunchError) for path in found]


def is_orphaned(record: CleanupRecord) -> bool:
    """Returns True if the owner has ended, so that it cannot take the testbed down."""
    try:
        started: float = psutil.Process(record.owner).create_time()
    except psutil.NoSuchProcess:
        return True
    return abs(started - record.owner_started) > 1.0


def clean_up_orphans(folder: Path) -> tuple[str, ...]:
    """Takes down what launchers that have ended left behind; returns the identities."""
    orphans = [each for each in cleanup_records(folder) if is_orphaned(each)]
    for each in orphans:
        tear_down(each, folder)
    return tuple(each.identity for each in orphans)


def tear_down(record: CleanupRecord, folder: Path) -> None:
    """Ends the processes in a testbed's namespaces and groups, removes these, and deletes the
    record.

    Everything is tried before the first failure is raised. Raises LaunchError.
    """
    here = existing_namespaces()
    left: list[Problem] = []
    for name in record.namespaces:
        if name in here:
            _end(_processes_in(name))
            left += _failure(["ip", "netns", "delete", name], name)
    for group in map(Path, record.groups):
        if group.is_dir():
            left += _remove_group(group)
    LaunchError.check(left)
    (folder / f"{record.identity}.json").unlink(missing_ok=True)


def existing_namespaces() -> frozenset[str]:
    """Returns the names of all network namespaces of this machine."""
    folder = Path("/run/netns")
    return frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()


def _processes_in(namespace: str) -> list[int]:
    command = ["ip", "netns", "pids", namespace]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )
    return [int(pid) for pid in done.stdout.split()]


def _end(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _failure(command: list[str], what: str) -> Iterator[Problem]:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )
    if done.returncode:
        mend = f"as root: {' '.join(command)}"
        yield Problem("testbed", what, done.stderr.strip(), "to take it away", mend)


def _remove_group(group: Path) -> Iterator[Problem]:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        _end([int(pid) for pid in (group / "cgroup.procs").read_text().split()])
        try:
            group.rmdir()
        except OSError as failure:
            if time.monotonic() > deadline:
                yield Problem("testbed", str(group), str(failure), "to take it away")
                return
            time.sleep(0.05)
        else:
            return
