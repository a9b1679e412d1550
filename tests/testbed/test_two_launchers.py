"""Launchers on two machines, each a network namespace: what listens on their interfaces."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from beds import bed

from actors import gone
from commands import meshwright
from listening import listening
from meshwright.runtime.run_folder import METRICS
from meshwright.testbed.lifecycle import running_testbed

CLUSTER = """\
format = 1
name = "two machines"
[links]
network = {{ bandwidth = "1 Gbit/s", latency = "50 us" }}
[[node]]
name = "a"
devices = ["1 x cpu"]
address = "{a}"
[[node]]
name = "b"
devices = ["1 x cpu"]
address = "{b}"
interface = "eth0"
"""
LIMIT = 120.0


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_only_the_named_interfaces_listen(tmp_path: Path) -> None:
    with running_testbed(bed(), folder=tmp_path / "traces") as up:
        (tmp_path / "cluster.toml").write_text(CLUSTER.format(**up.addresses))
        job = ("--global-batch", "4", "--sequence", "16", "--precision", "fp32")
        plan = meshwright("plan", "--model", "gpt-tiny", "--cluster", "cluster.toml", *job,
                          cwd=tmp_path)  # fmt: skip
        assert plan.returncode == 0, plan.stderr
        run = meshwright("train", "plan.json", "--steps", "99999", "--dry-run", "-o", "run",
                         cwd=tmp_path)  # fmt: skip
        assert run.returncode == 0, run.stderr
        launchers = {
            node: subprocess.Popen(
                ["ip", "netns", "exec", up.namespaces[node], sys.executable, "-m", "meshwright",
                 "launch", "run", "--node", node],
                cwd=tmp_path,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for node in ("a", "b")
        }  # fmt: skip
        everyone: list[int] = []
        try:
            _wait_for_steps(tmp_path / "run", launchers["b"])
            for node, launcher in launchers.items():
                own = psutil.Process(launcher.pid)
                pids = [own.pid, *(each.pid for each in own.children(recursive=True))]
                everyone += pids
                sockets = listening(pids, up.namespaces[node])
                assert set().union(*sockets.values()) == {up.addresses[node]}
                assert not set().union(*listening(pids).values()), "nothing outside"
        finally:
            for launcher in launchers.values():
                launcher.terminate()
                launcher.communicate(timeout=10)
        assert gone(everyone)


def _wait_for_steps(folder: Path, launcher: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    metrics = folder / METRICS
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 1):
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
