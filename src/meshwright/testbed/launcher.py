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
from meshwright.launch.local import WORKER, Launcher, ProcessPlacement, rank_environment
from meshwright.launch.store import Rendezvous
from meshwright.launch.supervise import KILL_SECONDS, exit_status
from meshwright.runtime.launch_variables import INTERFACES, LOOPBACK
from meshwright.testbed.lifecycle import TESTBED_VARIABLE, RunningTestbed, save_running_testbed

INTERFACE = "eth0"
"""Name of every node's network interface, inside its namespace."""
EMULATED_WORKER = "meshwright.testbed.emulated_worker"
"""Module that the rank of an emulated device runs."""


@dataclass(frozen=True)
class TestbedLauncher:
    """Starts ranks on a testbed that is up, each in the namespace and control group of its device.
    It is a context manager."""

    testbed: RunningTestbed
    launcher: Launcher
    """The launcher of the ranks; its runs raise LaunchError for a device of another cluster."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.launcher.close()


def launcher_on_testbed(running: RunningTestbed) -> TestbedLauncher:
    """Returns a launcher for the ranks of a testbed that is up."""
    worker = WORKER if running.testbed.mode == "quota" else EMULATED_WORKER
    return TestbedLauncher(running, Launcher(partial(_place, running), worker))


def _place(running: RunningTestbed, device: str) -> ProcessPlacement:
    node = node_of(device)
    if running.namespaces and node not in running.namespaces:
        wanted = f"a node of testbed {running.testbed.name!r}"
        raise LaunchError(Problem("plan", "devices", f"node {node!r}", wanted))
    # A namespace has no other interface, whatever the user has set for outside.
    own = ((variable, INTERFACE) for variable in INTERFACES)
    return ProcessPlacement(
        node=node,
        address=running.addresses.get(node, LOOPBACK),
        namespace=running.namespaces.get(node),
        group=running.groups.get(device),
        environment=(("CUDA_VISIBLE_DEVICES", ""), *(own if running.addresses else ())),
    )


def run_command(running: RunningTestbed, devices: Sequence[str], command: Sequence[str]) -> int:
    """Runs a command once for each device of a testbed; returns the exit status as a shell does."""
    with launcher_on_testbed(running) as launcher:
        return exit_status(launcher.launcher.run_command(devices, command))


def run_verb(running: RunningTestbed, command: Sequence[str]) -> int:
    """Runs a verb of meshwright inside the testbed, where it starts ranks of its own; returns its
    exit status. The verb ends when this process does."""
    with tempfile.TemporaryDirectory(prefix="meshwright-") as scratch:
        described = Path(scratch) / "testbed.json"
        save_running_testbed(running, described)
        process = subprocess.Popen(command, env={**os.environ, TESTBED_VARIABLE: str(described)},
                                   preexec_fn=partial(end_with_parent, os.getpid()))  # fmt: skip
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(KILL_SECONDS)
                process.kill()
                process.wait()


def shell_commands(
    running: RunningTestbed, devices: Sequence[str], command: Sequence[str]
) -> list[str]:
    """Returns the shell command that would start each device's process. Port and secret of the
    rendezvous are placeholders, since they are chosen at the start."""
    places = [_place(running, device) for device in devices]
    rendezvous = Rendezvous(address=places[0].address, port=0, token="SECRET")
    return [
        _line(place, rank_environment(places, rank, rendezvous) | {"MASTER_PORT": "PORT"}, command)
        for rank, place in enumerate(places)
    ]


def _line(place: ProcessPlacement, variables: dict[str, str], command: Sequence[str]) -> str:
    inside = ["env", *(f"{name}={value}" for name, value in variables.items()), *command]
    netns = ["ip", "netns", "exec", place.namespace] if place.namespace else []
    line = shlex.join([*netns, *inside])
    return f"(echo $BASHPID > {place.group}/cgroup.procs; {line})" if place.group else line
