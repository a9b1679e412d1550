"""Starts one process for each device of a testbed, in its node's network namespace."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from meshwright.cluster.spec import node_of
from meshwright.errors import LaunchError, Problem
from meshwright.launch.fork_server import end_with_parent
from meshwright.launch.local import WORKER, Launcher, Place, environment
from meshwright.launch.store import Meeting
from meshwright.launch.supervise import END_SECONDS, first_status
from meshwright.runtime.variables import INTERFACES, LOOPBACK
from meshwright.testbed.bed import VARIABLE, Standing, save_standing

INTERFACE = "eth0"
"""Name of every node's network interface, inside its namespace."""
EMULATED = "meshwright.testbed.worker"
"""Module that the rank of an emulated device runs."""


@dataclass(frozen=True)
class BedLauncher:
    """Starts ranks on a testbed that is up, each in the namespace and control group of its device;
    a context manager."""

    up: Standing
    ranks: Launcher
    """The launcher of the ranks; its runs raise LaunchError for a device of another cluster."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.ranks.close()


def launcher_on(up: Standing) -> BedLauncher:
    """Returns a launcher for the ranks of a testbed that is up."""
    worker = WORKER if up.bed.mode == "quota" else EMULATED
    return BedLauncher(up, Launcher(partial(_place, up), worker))


def _place(up: Standing, device: str) -> Place:
    node = node_of(device)
    if up.namespaces and node not in up.namespaces:
        wanted = f"a node of testbed {up.bed.name!r}"
        raise LaunchError(Problem("plan", "devices", f"node {node!r}", wanted))
    # A namespace has no other interface, whatever the user has set for outside.
    own = ((variable, INTERFACE) for variable in INTERFACES)
    return Place(
        node=node,
        address=up.addresses.get(node, LOOPBACK),
        namespace=up.namespaces.get(node),
        group=up.groups.get(device),
        environment=(("CUDA_VISIBLE_DEVICES", ""), *(own if up.addresses else ())),
    )


def run_command(up: Standing, devices: Sequence[str], command: Sequence[str]) -> int:
    """Runs a command once for each device of a testbed; returns the exit status as a shell does."""
    with launcher_on(up) as launcher:
        return first_status(launcher.ranks.run_command(devices, command))


def run_verb(up: Standing, command: Sequence[str]) -> int:
    """Runs a verb of meshwright inside the testbed, where it starts ranks of its own; returns its
    exit status. The verb ends when this process does."""
    with tempfile.TemporaryDirectory(prefix="meshwright-") as scratch:
        described = Path(scratch) / "testbed.json"
        save_standing(up, described)
        process = subprocess.Popen(command, env={**os.environ, VARIABLE: str(described)},
                                   preexec_fn=partial(end_with_parent, os.getpid()))  # fmt: skip
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(END_SECONDS)
                process.kill()
                process.wait()


def as_shell(up: Standing, devices: Sequence[str], command: Sequence[str]) -> list[str]:
    """Returns the shell command that would start each device's process. Port and secret of the
    rendezvous are placeholders, since they are chosen at the start."""
    places = [_place(up, device) for device in devices]
    meeting = Meeting(address=places[0].address, port=0, token="SECRET")
    return [
        _line(place, environment(places, rank, meeting) | {"MASTER_PORT": "PORT"}, command)
        for rank, place in enumerate(places)
    ]


def _line(place: Place, variables: dict[str, str], command: Sequence[str]) -> str:
    inside = ["env", *(f"{name}={value}" for name, value in variables.items()), *command]
    netns = ["ip", "netns", "exec", place.namespace] if place.namespace else []
    line = shlex.join([*netns, *inside])
    return f"(echo $BASHPID > {place.group}/cgroup.procs; {line})" if place.group else line
