"""Real runs: who listens, who reads, who is kept out, and what is said when something is wrong."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch._C._distributed_c10d import TCPStore

from actors import gone
from commands import meshwright
from listening import listening
from meshwright.runtime.run_folder import METRICS

CLUSTER = """\
format = 1
name = "laptop"
[links]
network = { bandwidth = "1 Gbit/s", latency = "50 us" }
[[node]]
name = "a"
devices = ["1 x cpu"]
address = "127.0.0.1"
[[node]]
name = "b"
devices = ["1 x cpu"]
address = "127.0.0.1"
"""
LIMIT = 120.0


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan for two nodes of one device each."""
    folder = tmp_path_factory.mktemp("planned")
    (folder / "cluster.toml").write_text(CLUSTER)
    job = ("--global-batch", "4", "--sequence", "16", "--precision", "fp32")
    done = meshwright(
        *("plan", "--model", "gpt-tiny", "--cluster", "cluster.toml", *job), cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder


@contextmanager
def started(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """`meshwright ARGUMENTS`, ended with all that it started when the block is left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "meshwright", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until a condition holds, while a process runs."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps(folder: Path) -> int:
    path = folder / METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def family(process: subprocess.Popen[str]) -> dict[int, str]:
    """A process and all that it has started, by their names."""
    parent = psutil.Process(process.pid)
    return {each.pid: each.name() for each in (parent, *parent.children(recursive=True))}


class Command:
    """What runs a command when it is unpickled."""

    def __init__(self, line: str) -> None:
        self.line = line

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.line,)


def attack(port: int, sentinel: Path) -> int:
    """Write commands into all keys of a store, and into new ones; how many there were."""
    store = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=10))
    poison = pickle.dumps(Command(f"touch {sentinel}"))
    for key in ("torch.rendezvous.none", "/worker/attempt_0/default_pg/0", "here/0", "c10d"):
        store.set(key, poison)
    return store.num_keys()


@pytest.mark.slow
def test_during_a_run_only_the_loopback_listens_and_no_one_else_gets_in(
    planned: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = ("train", "plan.json", "--steps", "99999", "-o", str(folder))
    with started(*arguments, cwd=planned) as process:
        until(lambda: steps(folder) > 1, process)
        names = family(process)
        sockets = listening(names)
        assert {"rank 0", "rank 1", "store"} <= set(names.values())
        assert any(sockets.values())
        assert set().union(*sockets.values()) == {"127.0.0.1"}

        (store,) = [pid for pid, name in names.items() if name == "store"]
        (port,) = [c.laddr.port for c in psutil.Process(store).net_connections("tcp")
                   if c.status == psutil.CONN_LISTEN]  # fmt: skip
        assert attack(port, tmp_path / "sentinel") > 4
        done = steps(folder)
        until(lambda: steps(folder) > done + 2, process)
        assert not (tmp_path / "sentinel").exists()

        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert all(mode & 0o022 == 0 for mode in modes.values()), modes

        second = meshwright(*arguments, cwd=planned)
        assert second.returncode == 2
        assert f"in use by process {process.pid} on" in second.stderr
        done = steps(folder)
        until(lambda: steps(folder) > done + 1, process)

        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert gone([*names])
        assert "Traceback" not in process.communicate()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "number"),
    [
        ("rank 1", signal.SIGSTOP),
        ("store", signal.SIGKILL),
    ],
)
def test_a_run_that_loses_a_process_ends_at_once_and_names_it(
    planned: Path, tmp_path: Path, who: str, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    arguments = ("train", "plan.json", "--steps", "99999", "--timeout", "2", "-o", str(folder))
    with started(*arguments, cwd=planned) as process:
        until(lambda: steps(folder) > 1, process)
        names = family(process)
        (victim,) = [pid for pid, name in names.items() if name == who]
        os.kill(victim, number)
        _, said = process.communicate(timeout=2 + 5)
        assert process.returncode == 2
        assert gone([*names])
    assert number.name in said
    assert who in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_the_launchers_of_two_nodes_meet_and_train_as_one(planned: Path, tmp_path: Path) -> None:
    folder, port = tmp_path / "run", free_port()
    done = meshwright(
        *("train", "plan.json", "--steps", "6", "--dry-run", "--port", port, "-o", str(folder)),
        cwd=planned,
    )
    assert done.stdout.splitlines() == [f"meshwright launch {folder} --node {n}" for n in "ab"]
    assert stat.S_IMODE((folder / "nodes.json").stat().st_mode) == 0o600
    with (
        started("launch", str(folder), "--node", "b", cwd=planned) as b,
        started("launch", str(folder), "--node", "a", cwd=planned) as a,
    ):
        first, second = a.communicate(timeout=LIMIT), b.communicate(timeout=LIMIT)
        assert (a.returncode, b.returncode) == (0, 0), (first, second)
    assert "loss" in first[0]
    assert steps(folder) == 6
    again = meshwright(
        "train", "plan.json", "--steps", "6", "-o", str(tmp_path / "one"), cwd=planned
    )
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "one") == losses(folder)


def losses(folder: Path) -> list[str]:
    lines = (folder / METRICS).read_text().splitlines()
    return [line.partition('"loss": ')[2].partition(",")[0] for line in lines]


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return str(taken.getsockname()[1])


@pytest.mark.slow
def test_a_node_whose_peer_is_killed_says_which_rank_has_gone(
    planned: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = ("train", "plan.json", "--steps", "99999", "--timeout", "20", "--dry-run")
    prepared = meshwright(*arguments, "--port", free_port(), "-o", str(folder), cwd=planned)
    assert prepared.returncode == 0, prepared.stderr
    with (
        started("launch", str(folder), "--node", "a", cwd=planned) as a,
        started("launch", str(folder), "--node", "b", cwd=planned) as b,
    ):
        until(lambda: steps(folder) > 1, a)
        left = [*family(a), *family(b)]
        (victim,) = [pid for pid, name in family(b).items() if name == "rank 1"]
        os.kill(victim, signal.SIGKILL)
        (_, here), (_, there) = a.communicate(timeout=30), b.communicate(timeout=30)
        assert gone(left)
    assert there.startswith("TrainingError:\nrank 1: found a process that was ended by SIGKILL")
    assert "rank 1" in here
    assert "Traceback" not in here + there


ELSEWHERE = "203.0.113.7"
MISTAKES = {
    "a node without ranks": (("--node", "c"), ("'c'", "a node of the run: a, b")),
    "an address of another machine": (
        ("--node", "b"),
        ("203.0.113.7", "one that this machine has"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_launcher_that_is_at_the_wrong_place_says_so(
    planned: Path, tmp_path: Path, name: str
) -> None:
    arguments, words = MISTAKES[name]
    folder = tmp_path / "run"
    meshwright("train", "plan.json", "--dry-run", "-o", str(folder), cwd=planned)
    text = (folder / "nodes.json").read_text()
    elsewhere = text.replace(
        '"b": {\n   "address": "127.0.0.1"', '"b": {\n   "address": "203.0.113.7"'
    )
    (folder / "nodes.json").write_text(elsewhere)
    done = meshwright("launch", str(folder), *arguments, cwd=planned)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(planned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        meshwright(
            *("train", "plan.json", "--dry-run", "--port", port, "-o", str(folder)), cwd=planned
        )
        done = meshwright("launch", str(folder), "--node", "a", cwd=planned)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}: found Address already in use" in done.stderr


@pytest.mark.slow
def test_a_command_runs_on_all_nodes_as_one_group(planned: Path, tmp_path: Path) -> None:
    """As `profile` does it, which measures the links between them."""
    port = free_port()
    what = ("--", sys.executable, "-m", "meshwright", "profile", "--model", "gpt-tiny")
    sizes = ("--sequence", "16", "--rows", "1", "--cluster", "cluster.toml")
    command = (*what, *sizes, "-o", str(tmp_path / "profile.json"))
    where = ("--cluster", "cluster.toml", "--port", port)
    with (
        started("launch", "--node", "b", *where, *command, cwd=planned) as b,
        started("launch", "--node", "a", *where, *command, cwd=planned) as a,
    ):
        first, second = a.communicate(timeout=LIMIT), b.communicate(timeout=LIMIT)
        assert (a.returncode, b.returncode) == (0, 0), (first, second)
    assert '"network"' in (tmp_path / "profile.json").read_text()


SCRIPT = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
import meshwright as mw

plan = mw.load_plan(Path({plan!r}))
def tell(line):  # in one write: two ranks print to the same place
    os.write(1, line.encode() + b"\\n")

tell("parent" if "RANK" not in os.environ else "rank " + os.environ["RANK"])
mw.launch(plan)
dist.init_process_group("gloo")  # as plain PyTorch has it
total = torch.ones(1)
dist.all_reduce(total)
tell(f"sum {{int(total)}} {{sys.argv[1:]}}")
dist.barrier()
if sys.argv[1] != "dies":
    dist.destroy_process_group()  # its threads may abort a process that ends with them
if sys.argv[1] == "fails" and os.environ["RANK"] == "1":
    sys.exit(7)
if sys.argv[1] == "dies" and os.environ["RANK"] == "1":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("ends", 0),
        pytest.param("fails", 7, marks=pytest.mark.slow),
        pytest.param("dies", 128 + 9, marks=pytest.mark.slow),
    ],
)
def test_a_script_of_ones_own_becomes_the_ranks(
    planned: Path, tmp_path: Path, how: str, status: int
) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT.format(plan=str(planned / "plan.json")))
    done = subprocess.run(
        [sys.executable, str(script), how, "a b"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == status, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "parent"
    assert sorted(lines[1:]) == ["rank 0", "rank 1", *[f"sum 2 ['{how}', 'a b']"] * 2]
    assert ("rank 1 was ended by SIGKILL" in done.stderr) == (how == "dies")


@pytest.mark.slow
def test_under_torchrun_a_run_works_and_warns(planned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    meshwright("train", "plan.json", "--steps", "3", "--dry-run", "-o", str(folder), cwd=planned)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", "-m", "meshwright.runtime.worker", str(folder)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("listens on every interface") == 1
    assert steps(folder) == 3
