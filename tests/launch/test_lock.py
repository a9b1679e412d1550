"""A run folder belongs to one run at a time."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.errors import LaunchError
from meshwright.launch.lock import lock_folder

HOLDER = """
import signal, sys
from pathlib import Path
from meshwright.launch.lock import lock_folder
with lock_folder(Path({folder!r}), {node!r}):
    print("held", flush=True)
    signal.pause()
"""


def holder(folder: Path, node: str | None = None) -> subprocess.Popen[str]:
    """A process that keeps a folder until it is ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(folder=str(folder), node=node)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_and_told_who_is_there_since_when(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = holder(folder)
    try:
        with pytest.raises(LaunchError) as caught, lock_folder(folder):
            pass
        assert f"in use by process {process.pid} on " in str(caught.value)
        assert " since 20" in str(caught.value)
        assert "--output" in str(caught.value)
    finally:
        end(process)
    with lock_folder(folder):  # what a killed process leaves behind keeps no run out
        pass


def test_nodes_of_one_run_share_its_folder_and_keep_others_out(tmp_path: Path) -> None:
    process = holder(tmp_path, "a")
    try:
        with lock_folder(tmp_path, "b"):
            pass
        for node in ("a", None):
            with pytest.raises(LaunchError, match="in use by"), lock_folder(tmp_path, node):
                pass
    finally:
        end(process)


def test_a_stopped_holder_still_holds(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(LaunchError, match=f"process {process.pid}"), lock_folder(tmp_path):
            pass
    finally:
        end(process)


def test_the_folder_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with lock_folder(tmp_path / "deep" / "run"):
            mode = (tmp_path / "deep" / "run").stat().st_mode
            lock = (tmp_path / "deep" / "run" / "lock").stat().st_mode
    finally:
        os.umask(before)
    assert stat.S_IMODE(mode) == 0o700
    assert stat.S_IMODE(lock) == 0o600


def test_a_lock_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(victim)
    with pytest.raises(LaunchError, match="run/lock"), lock_folder(tmp_path / "run"):
        pass
    assert victim.read_text() == "precious"


def test_a_place_where_no_folder_can_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(LaunchError, match=r"file.*wanted a folder"),
        lock_folder(tmp_path / "file" / "run"),
    ):
        pass
