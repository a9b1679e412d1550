"""Processes that are forked from a server: what is heard of them, and that none of them stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from actors import alive, gone, marked
from meshwright.errors import LaunchError
from meshwright.launch.accelerators import accelerators
from meshwright.launch.fork_server import ProcessEvent, SpawnRequest
from meshwright.launch.store import open_store
from meshwright.launch.supervise import (
    ForkServer,
    describe_exit,
    exit_status,
    has_failed,
    run_to_end,
)

HERE = str(Path(__file__).parents[1])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")]))
    with ForkServer() as found:
        yield found


def request(rank: int, *arguments: str, log: str = "", module: str = "actors") -> SpawnRequest:
    return SpawnRequest(rank=rank, environment={}, module=module, arguments=arguments, log=log)


def parts(*plays: str, folder: Path | None = None) -> list[SpawnRequest]:
    return [
        request(rank, *play.split(), *([str(folder)] if folder else []))
        for rank, play in enumerate(plays)
    ]


def statuses(events: tuple[ProcessEvent, ...]) -> dict[int, int]:
    return {event.rank: event.status for event in events if event.kind == "exited"}


def test_it_is_told_how_every_process_ended(server: ForkServer) -> None:
    events = run_to_end(server, parts("exits 0", "exits 0"))
    assert statuses(events) == {0: 0, 1: 0}
    assert exit_status(events) == 0
    events = run_to_end(server, parts("exits 3"))
    assert exit_status(events) == 3
    events = run_to_end(server, parts("fails"))
    assert exit_status(events) == 1
    events = run_to_end(server, parts(f"killed {signal.SIGSEGV:d}"))
    assert statuses(events) == {0: -signal.SIGSEGV}
    assert describe_exit(-signal.SIGSEGV) == "was ended by SIGSEGV"
    assert exit_status(events) == 128 + signal.SIGSEGV


def test_the_status_is_that_of_the_cause_not_of_a_process_that_lost_its_peer() -> None:
    aborted = ProcessEvent(rank=0, seconds=1.0, kind="exited", status=-signal.SIGABRT)
    killed = ProcessEvent(rank=1, seconds=2.0, kind="exited", status=-signal.SIGKILL)
    assert exit_status([aborted, killed]) == exit_status([killed, aborted]) == 128 + signal.SIGKILL
    assert exit_status([aborted]) == 128 + signal.SIGABRT


def test_what_a_process_says_comes_before_its_end_and_what_it_prints_is_in_its_log(
    server: ForkServer, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    words = ["first", "x" * 100_000, "ünïcode"]
    events = run_to_end(server, [request(5, "says", *words, log=str(log))])
    assert [event.said for event in events if event.kind == "said"] == words
    assert [event.kind for event in events][-1] == "exited"
    assert log.read_text().split() == words
    assert log.stat().st_mode & 0o077 == 0


def test_a_log_is_not_written_through_a_link(server: ForkServer, tmp_path: Path) -> None:
    target, log = tmp_path / "target", tmp_path / "log"
    log.symlink_to(target)
    assert exit_status(run_to_end(server, [request(0, "exits", "0", log=str(log))])) == 1
    assert not target.exists()


def test_a_module_that_cannot_be_imported_ends_its_process_only(
    server: ForkServer, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    events = run_to_end(server, [request(0, module="no_such_module", log=str(log))])
    assert exit_status(events) == 1
    assert "no_such_module" in log.read_text()
    assert exit_status(run_to_end(server, parts("exits 0"))) == 0


def test_a_command_is_started_as_it_is(server: ForkServer, tmp_path: Path) -> None:
    command = ("sh", "-c", f"echo $RANK > {tmp_path}/$RANK; exit $RANK")
    requests = [
        SpawnRequest(rank=n, environment={"RANK": str(n)}, module="", arguments=command, log="")
        for n in range(2)
    ]
    assert statuses(run_to_end(server, requests)) == {0: 0, 1: 1}
    assert (tmp_path / "1").read_text() == "1\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_its_processes_end_with_it_whatever_ends_it(
    server: ForkServer, tmp_path: Path, number: signal.Signals
) -> None:
    for each in parts("waits", "waits", "stops", folder=tmp_path):
        server.spawn(each)
    pids = marked(tmp_path, 3)
    os.kill(server.pid, number)
    if number == signal.SIGTERM:
        server.close(gracefully=True)  # one of them stands still and cannot be asked
    else:
        with pytest.raises(LaunchError, match=f"was ended by {number.name}"):
            run_to_end(server, parts("exits 0"))
    assert gone(pids)


def test_closing_ends_also_those_that_stand_still_and_what_they_have_started(
    server: ForkServer, tmp_path: Path
) -> None:
    for each in parts("stops", "bears", folder=tmp_path):
        server.spawn(each)
    pids = marked(tmp_path, 3)
    server.close()
    assert gone(pids)


def test_processes_that_are_asked_may_tidy_up(server: ForkServer, tmp_path: Path) -> None:
    server.spawn(request(0, "tidies", str(tmp_path)))
    pids = marked(tmp_path, 1)
    server.close(gracefully=True)
    assert (tmp_path / "tidy").exists()
    assert gone(pids)


def test_one_that_stands_still_is_waited_for_only_so_long(
    server: ForkServer, tmp_path: Path
) -> None:
    events = run_to_end(server, parts("stops", folder=tmp_path), timeout_seconds=0.5)
    assert [event.kind for event in events] == ["stopped"]
    server.close()
    assert gone(marked(tmp_path, 1))


def test_after_a_failure_the_others_are_not_waited_for(server: ForkServer, tmp_path: Path) -> None:
    requests = [request(0, "waits", str(tmp_path)), request(1, "exits", "2")]
    events = run_to_end(server, requests)
    assert statuses(events) == {1: 2}
    server.close()
    assert gone(marked(tmp_path, 1))


def test_a_server_that_stands_still_is_not_waited_for_for_ever(
    server: ForkServer, tmp_path: Path
) -> None:
    server.spawn(request(0, "waits", str(tmp_path)))
    pids = marked(tmp_path, 1)
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(LaunchError, match="the process that ranks are forked from stands still"):
        run_to_end(server, parts("exits 0"), timeout_seconds=0.5)
    server.close()
    assert gone(pids)


@pytest.mark.parametrize(
    "wait", [partial(accelerators, timeout_seconds=0.5), partial(open_store, address="127.0.0.1")]
)
def test_nothing_that_it_is_asked_for_is_waited_for_longer(
    server: ForkServer, wait: Callable[[ForkServer], object]
) -> None:
    server.patience_seconds = 0.5
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(LaunchError, match="the process that ranks are forked from stands still"):
        wait(server)


LAUNCHER = """
import sys
sys.path.insert(0, {here!r})
from meshwright.launch.fork_server import SpawnRequest
from meshwright.launch.supervise import ForkServer, run_to_end
def request(rank, part):
    return SpawnRequest(
        rank=rank, environment={{}}, module="actors", arguments=(part, {folder!r}), log=""
    )
with ForkServer() as server:
    print(server.pid, flush=True)
    run_to_end(server, [request(0, "waits"), request(1, "stops")])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("early", [False, True], ids=["at work", "at the start"])
def test_all_processes_end_with_the_launcher(
    tmp_path: Path, number: signal.Signals, early: bool
) -> None:
    script = textwrap.dedent(LAUNCHER.format(here=HERE, folder=str(tmp_path)))
    path = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
    )
    assert process.stdout is not None
    server = int(process.stdout.readline())
    pids = [] if early else marked(tmp_path, 2)
    process.send_signal(number)
    assert process.wait(10) != 0
    process.stdout.close()
    assert gone([server, *pids])
    # One that was being forked in that moment has left its mark, or never will.
    assert not any(map(alive, [int(path.stem) for path in tmp_path.glob("*.pid")]))


def test_only_the_end_of_a_rank_that_has_done_its_work_is_no_failure() -> None:
    def event(rank: int, status: int) -> ProcessEvent:
        return ProcessEvent(rank=rank, seconds=0.0, kind="exited", status=status)

    assert not has_failed(event(0, 0))
    assert has_failed(event(0, 1))
    assert has_failed(event(-1, 0)), "the store is needed to the end"
