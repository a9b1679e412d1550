"""Brings a testbed up, and takes it down whatever happens in between."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil

from meshwright.cluster.spec import devices_of
from meshwright.errors import LaunchError, Problem
from meshwright.launch.signals import unwind_on_signals
from meshwright.records import dumps, load, record
from meshwright.testbed.capabilities import (
    COMMAND_SECONDS,
    Capabilities,
    Quotas,
    probe_capabilities,
)
from meshwright.testbed.cleanup import (
    CleanupRecord,
    clean_up_orphans,
    cleanup_folder,
    existing_namespaces,
    own_record,
    save_record,
    tear_down,
)
from meshwright.testbed.network import Command, Wiring, as_text, wiring
from meshwright.testbed.spec import Testbed, check_room, device_shares

TESTBED_VARIABLE = "MESHWRIGHT_TESTBED"
"""Environment variable with the path of a file that describes the testbed in which a command
runs."""
QUOTA_PERIOD = 10_000
"""Smallest period of a CPU quota in microseconds: short compared with an instruction, so that a
quota slows it evenly."""


@record
class RunningTestbed:
    """Describes a testbed that is up: the namespaces, addresses and control groups of its devices'
    processes."""

    testbed: Testbed
    """The testbed as asked for, but in a mode that this machine supports."""
    namespaces: dict[str, str]
    """Network namespace of each node, by name; empty if there are none, and all processes meet on
    the loopback."""
    addresses: dict[str, str]
    """IP address of each node, by name."""
    groups: dict[str, str]
    """Control group of each device, by name, if CPU quotas make the speed."""
    absent: tuple[str, ...]
    """Ways in which the testbed is not as the cluster says, with the reasons; every result
    must be shown with them."""

    @property
    def shares(self) -> dict[str, float]:
        """Returns the share of a core of each dilated device, by name."""
        return device_shares(self.testbed) if self.testbed.mode == "dilation" else {}


@record
class TestbedDesign:
    """Lists all that bringing a testbed up will do to this machine."""

    running: RunningTestbed
    up: tuple[Command, ...]
    """Commands that make the network."""
    down: tuple[Command, ...]
    """Commands that take it down."""
    groups: tuple[tuple[str, float], ...]
    """(Folder of a control group, its share of a core)."""
    namespaces: tuple[str, ...]


def new_identity() -> str:
    """Returns a prefix for the testbed's names that is not in use, such as `mw-1f09ac`."""
    taken = existing_namespaces()
    while True:
        identity = f"mw-{secrets.token_hex(3)}"
        if not any(name.startswith(identity) for name in taken):
            return identity


def design_testbed(testbed: Testbed, capabilities: Capabilities, identity: str) -> TestbedDesign:
    """Designs a testbed for this machine, without making anything."""
    mode, absent = testbed.mode, list[str]()
    quotas = capabilities.quotas if mode == "quota" else None
    if mode == "quota" and quotas is None:
        mode = "dilation"
        absent.append(f"CPU quotas ({capabilities.missing['CPU quotas']}): dilation in their place")
    groups = _groups(testbed, quotas, identity) if quotas else {}
    if capabilities.namespaces:
        net = wiring(testbed, capabilities, identity)
    else:
        reason = capabilities.missing["namespaces and link rates"]
        absent.append(f"namespaces and link rates ({reason}): all messages take the loopback")
        net = Wiring(namespaces=(), by_node={}, addresses={}, up=(), down=(), absent=())
    return TestbedDesign(
        running=RunningTestbed(
            testbed=replace(testbed, mode=mode),
            namespaces=net.by_node,
            addresses=net.addresses,
            groups={device: folder for device, (folder, _) in groups.items()},
            absent=(*absent, *net.absent),
        ),
        up=net.up,
        down=net.down,
        groups=tuple(groups.values()),
        namespaces=net.namespaces,
    )


def _groups(testbed: Testbed, quotas: Quotas, identity: str) -> dict[str, tuple[str, float]]:
    shares = device_shares(testbed)
    return {
        device.name: (str(Path(quotas.folder) / f"{identity}-d{i}"), shares[device.name])
        for i, device in enumerate(devices_of(testbed.cluster))
    }


def preview_testbed(testbed: Testbed) -> tuple[TestbedDesign, tuple[str, ...]]:
    """Returns what bringing the testbed up would do on this machine: the design, and its commands
    as text. It leaves nothing behind."""
    identity = new_identity()
    drawn = design_testbed(testbed, probe_capabilities(f"{identity}-probe"), identity)
    lines = [as_text(command) for command in drawn.up]
    for folder, share in drawn.groups:
        lines.append(f"mkdir {folder}  # {share:g} of a core")
    lines += [as_text(command) for command in drawn.down]
    lines += [f"rmdir {folder}" for folder, _ in drawn.groups]
    return drawn, tuple(lines)


@contextmanager
def running_testbed(testbed: Testbed, *, folder: Path | None = None) -> Iterator[RunningTestbed]:
    """Keeps a testbed up for the duration of its `with` block.

    What earlier launchers left is taken down first. Nothing of the testbed outlives the block: not
    after an exception, Ctrl-C or SIGTERM; after SIGKILL the next start takes it down. Raises
    LaunchError if the machine has too few cores or too little memory, or a command fails.
    """
    check_room(testbed, cores=os.cpu_count() or 1, free_bytes=psutil.virtual_memory().available)
    folder = folder or cleanup_folder()
    clean_up_orphans(folder)
    identity = new_identity()
    traces = own_record(identity, (f"{identity}-probe",), ())
    with unwind_on_signals():
        save_record(traces, folder)
        try:
            drawn = design_testbed(testbed, probe_capabilities(f"{identity}-probe"), identity)
            groups = tuple(path for path, _ in drawn.groups)
            traces = replace(traces, namespaces=drawn.namespaces, groups=groups)
            save_record(traces, folder)
            _make(drawn)
            yield drawn.running
        finally:
            _erase_calmly(traces, folder)


def _make(drawn: TestbedDesign) -> None:
    for command in drawn.up:
        _run(command)
    for folder, share in drawn.groups:
        group = Path(folder)
        group.mkdir()
        quota = max(round(share * QUOTA_PERIOD), 1000)
        period = round(quota / share)
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text(f"{quota} {period}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(period))
            (group / "cpu.cfs_quota_us").write_text(str(quota))


def _run(command: Command) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )
    if done.returncode:
        found = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise LaunchError(Problem("testbed", as_text(command), found, "to succeed"))


def _erase_calmly(traces: CleanupRecord, folder: Path) -> None:
    """Takes the testbed down; a second Ctrl-C does not interrupt that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with suppress(ValueError):  # only the main thread may set signal handlers
        for number in before:
            signal.signal(number, signal.SIG_IGN)
    try:
        tear_down(traces, folder)
    finally:
        with suppress(ValueError):
            for number, handler in before.items():
                signal.signal(number, handler)


def save_running_testbed(running: RunningTestbed, path: Path) -> None:
    """Writes a description of the testbed, for commands that run in it; see VARIABLE."""
    path.write_text(dumps(running))


def current_testbed() -> RunningTestbed | None:
    """Returns the testbed in which this command runs, if it runs in one."""
    path = os.environ.get(TESTBED_VARIABLE)
    return load(Path(path), RunningTestbed, error=LaunchError) if path else None
