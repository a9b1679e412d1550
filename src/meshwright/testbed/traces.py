"""What a testbed leaves on the machine while it stands, written down before it is made.

A launcher that is killed cannot clean up. The next start reads what it had written down and takes
away exactly that; whatever bears another name is somebody else's.
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
from meshwright.testbed.machine import COMMAND_SECONDS

WAIT_SECONDS = 5.0
"""How long the kernel may take to let go of killed processes."""


@record
class Traces:
    """One testbed's own namespaces and control groups."""

    identity: str
    """Beginning of all its names."""
    owner: int
    """Process that will take it down."""
    owner_started: float
    """Tells the owner from a later process of the same number."""
    namespaces: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    """Folders of control groups."""


def traces_folder() -> Path:
    """Where this user's testbeds are written down. Raises LaunchError, see `runtime_folder`."""
    return runtime_folder() / "testbeds"


def owned(identity: str, namespaces: tuple[str, ...], groups: tuple[str, ...]) -> Traces:
    """Traces that this process answers for."""
    started = psutil.Process().create_time()
    return Traces(
        identity=identity,
        owner=os.getpid(),
        owner_started=started,
        namespaces=namespaces,
        groups=groups,
    )


def write_down(traces: Traces, folder: Path) -> Path:
    """The file that says what there is; it is complete or not there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{traces.identity}.json"
    draft = path.with_suffix(".draft")
    draft.write_text(dumps(traces))
    draft.replace(path)
    return path


def standing_traces(folder: Path) -> list[Traces]:
    """All that is written down."""
    found = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return [load(path, Traces, error=LaunchError) for path in found]


def is_orphan(traces: Traces) -> bool:
    """Whether nobody will take it down any more."""
    try:
        started: float = psutil.Process(traces.owner).create_time()
    except psutil.NoSuchProcess:
        return True
    return abs(started - traces.owner_started) > 1.0


def sweep(folder: Path) -> tuple[str, ...]:
    """Takes down what launchers that are gone have left; their identities."""
    orphans = [each for each in standing_traces(folder) if is_orphan(each)]
    for each in orphans:
        erase(each, folder)
    return tuple(each.identity for each in orphans)


def erase(traces: Traces, folder: Path) -> None:
    """Ends the processes in a testbed's namespaces and groups, and takes these away.

    Everything is tried before the first failure is raised. Raises LaunchError.
    """
    here = existing_namespaces()
    left: list[Problem] = []
    for name in traces.namespaces:
        if name in here:
            _end(_processes_in(name))
            left += _failure(["ip", "netns", "delete", name], name)
    for group in map(Path, traces.groups):
        if group.is_dir():
            left += _remove_group(group)
    LaunchError.check(left)
    (folder / f"{traces.identity}.json").unlink(missing_ok=True)


def existing_namespaces() -> frozenset[str]:
    """Names of the network namespaces of this machine, anybody's."""
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
