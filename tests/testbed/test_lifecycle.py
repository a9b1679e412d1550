"""A testbed that really stands: where this machine permits it, else its loopback form."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from beds import bed

from meshwright.testbed.capabilities import Capabilities
from meshwright.testbed.cleanup import (
    CleanupRecord,
    clean_up_orphans,
    cleanup_records,
    existing_namespaces,
    is_orphaned,
    own_record,
    save_record,
    tear_down,
)
from meshwright.testbed.launcher import run_command
from meshwright.testbed.lifecycle import running_testbed

HERE = Path(__file__).parent
LIMIT = 60.0


def test_abilities_have_a_reason_for_everything_they_lack(able: Capabilities) -> None:
    has = {
        "link latency": able.latency,
        "CPU quotas": able.quotas is not None,
        "small packets first": able.priority,
    }
    if able.namespaces:
        for what, there in has.items():
            assert there != bool(able.missing.get(what)), what
    else:
        assert able.missing["namespaces and link rates"]


@pytest.mark.usefixtures("namespaces")
def test_each_process_stands_in_its_node(tmp_path: Path) -> None:
    script = f"ip -br address show dev eth0 > {tmp_path}/$RANK; exit $RANK"
    with running_testbed(bed(), folder=tmp_path / "traces") as up:
        assert set(up.namespaces) == {"a", "b", "c"}
        devices = ("a:0", "b:0", "c:0")
        assert run_command(up, devices, ["sh", "-c", script]) in (1, 2)
    assert not cleanup_records(tmp_path / "traces")
    for rank, device in enumerate(devices):
        address = up.addresses[device.partition(":")[0]]
        assert address in (tmp_path / str(rank)).read_text()


@pytest.mark.usefixtures("namespaces")
def test_nothing_stays_after_an_error(tmp_path: Path) -> None:
    seen = []

    def fail() -> None:
        with running_testbed(bed(), folder=tmp_path):
            seen.extend(cleanup_records(tmp_path))
            raise KeyError("something else")

    with pytest.raises(KeyError):
        fail()
    assert len(seen) == 1
    assert not cleanup_records(tmp_path)


KILLED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts aside ignores it
sys.path[:0] = [{here!r}, {tests!r}]
from pathlib import Path
from beds import bed
from meshwright.testbed.lifecycle import running_testbed
from meshwright.testbed.launcher import run_command
with running_testbed(bed(), folder=Path({folder!r})) as up:
    run_command(up, ("a:0", "b:0"), ["sh", "-c", "echo $$ > {folder}/$RANK.pid; sleep 600"])
"""


def _start(folder: Path) -> subprocess.Popen[bytes]:
    script = textwrap.dedent(
        KILLED.format(here=str(HERE), tests=str(HERE.parent), folder=str(folder))
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + LIMIT
    while len([p for p in folder.glob("*.pid") if p.stat().st_size]) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    return process


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + LIMIT
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    try:
        return path.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_everything_down(tmp_path: Path, number: signal.Signals) -> None:
    process = _start(tmp_path)
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    process.send_signal(number)
    assert process.wait(LIMIT) != 0
    _wait_until_gone(pids)
    assert not cleanup_records(tmp_path)


@pytest.mark.usefixtures("namespaces")
def test_the_next_start_takes_down_what_a_killed_launcher_left(tmp_path: Path) -> None:
    process = _start(tmp_path)
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    (left,) = cleanup_records(tmp_path)
    assert not is_orphaned(left)
    assert clean_up_orphans(tmp_path) == (), "its owner is alive"
    process.kill()
    process.wait(LIMIT)
    _wait_until_gone(pids)
    assert set(left.namespaces) <= existing_namespaces()
    assert clean_up_orphans(tmp_path) == (left.identity,)
    assert not set(left.namespaces) & existing_namespaces()


@pytest.mark.usefixtures("namespaces")
def test_namespaces_of_others_are_left_alone(tmp_path: Path) -> None:
    foreign = f"other-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", foreign], check=True)
    try:
        with running_testbed(bed(), folder=tmp_path):
            pass
        clean_up_orphans(tmp_path)
        assert foreign in existing_namespaces()
    finally:
        subprocess.run(["ip", "netns", "delete", foreign], check=True)


def test_quotas_are_set_and_taken_away(able: Capabilities, tmp_path: Path) -> None:
    if able.quotas is None:
        pytest.skip(able.missing["CPU quotas"])
    with running_testbed(bed("quota"), folder=tmp_path) as up:
        group = Path(up.groups["a:0"])
        if (group / "cpu.max").exists():
            quota, period = map(int, (group / "cpu.max").read_text().split())
        else:
            quota = int((group / "cpu.cfs_quota_us").read_text())
            period = int((group / "cpu.cfs_period_us").read_text())
        assert quota / period == pytest.approx(0.4, rel=0.01)
    assert not group.exists()


def test_a_process_number_that_was_given_again_is_no_owner() -> None:
    own = own_record("mw-x", (), ())
    assert not is_orphaned(own)
    assert is_orphaned(CleanupRecord(identity="mw-x", owner=own.owner, owner_started=0.0))


def test_erasing_what_is_gone_already_is_no_mistake(tmp_path: Path) -> None:
    traces = own_record("mw-never", ("mw-never-hub",), (str(tmp_path / "no-group"),))
    path = save_record(traces, tmp_path)
    tear_down(traces, tmp_path)
    assert not path.exists()
