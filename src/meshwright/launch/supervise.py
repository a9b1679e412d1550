"""Starts, watches and ends processes through the fork server, from the launcher's side."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import psutil

from meshwright.errors import LaunchError, Problem
from meshwright.launch.fork_server import ProcessEvent, SpawnRequest
from meshwright.records import parse, plain

MODULE = "meshwright.launch.fork_server"
PRELOADED = ("torch._dynamo",)
"""Modules that every rank imports in the end and that take seconds: the tracing of models."""
STORE = -1
"""Pseudo rank of the process that keeps the store."""
POLL_SECONDS = 0.2
GRACE_SECONDS = 1.0
"""Grace period after the first failure, in which the other processes may report before they are
ended."""
KILL_SECONDS = 3.0
"""Time between asking a process to end and killing it."""


class ForkServer:
    """Controls the fork server from the launcher's process. It is a context manager.

    It starts to import `modules` at once, while the launcher goes on.
    """

    def __init__(self, *modules: str) -> None:
        self.patience_seconds = float("inf")
        """Longest time that it may be stopped."""
        self._went_on = time.monotonic()
        self._unread = b""
        self._process: subprocess.Popen[bytes] | None = None
        output = os.dup(1)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(os.getpid()), str(output), *modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=(output,),
                start_new_session=True,
            )
        finally:
            os.close(output)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Returns the process id of the server, which is also that of the session of all ranks."""
        assert self._process is not None, "closed"
        return self._process.pid

    def spawn(self, request: SpawnRequest) -> None:
        """Asks the server for a process. Raises LaunchError if the server has ended."""
        assert self._process is not None, "closed"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(plain(request)).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def events(self, seconds: float) -> list[ProcessEvent]:
        """Returns new events; waits for one at most `seconds`, and at most POLL_SECONDS.

        Raises LaunchError if the server has ended, or was stopped for `patience_seconds`.
        """
        assert self._process is not None, "closed"
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        if not select.select([pipe], [], [], max(0.0, min(seconds, POLL_SECONDS)))[0]:
            self._look_whether_it_goes_on()
            return []
        self._went_on = time.monotonic()
        text = os.read(pipe, 1 << 16)
        if not text:
            raise self._ended()
        *lines, self._unread = (self._unread + text).split(b"\n")
        return [
            parse(json.loads(line), ProcessEvent, source="fork server", error=LaunchError)
            for line in lines
        ]

    def _look_whether_it_goes_on(self) -> None:
        """Raises LaunchError if the server has been stopped too long, since it then reports no
        event of any rank."""
        now, stopped = time.monotonic(), False
        with suppress(psutil.NoSuchProcess):
            stopped = psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        if not stopped:
            self._went_on = now
        elif now > self._went_on + self.patience_seconds:
            still = f"stands still for {now - self._went_on:.0f} s"
            found = f"the process that ranks are forked from {still}"
            raise LaunchError(Problem("launcher", "fork server", found, "to go on"))

    def processor_seconds(self) -> float:
        """Returns the processor seconds of the server and of all ranks that have ended; 0 once it
        is closed."""
        if self._process is None:
            return 0.0
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)

    def close(self, *, gracefully: bool = False) -> None:
        """Ends the server and every process in its session; if `gracefully`, they are asked
        first."""
        process, self._process, self._unread = self._process, None, b""
        if process is None:
            return
        try:
            if gracefully:
                process.terminate()
                # A stopped process could not even end.
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(KILL_SECONDS)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    if pipe is not None:
                        pipe.close()

    def _ended(self) -> LaunchError:
        assert self._process is not None
        how = describe_exit(self._process.wait())
        self.close()
        found = f"the process that ranks are forked from {how}"
        return LaunchError(Problem("launcher", "fork server", found, "to live to the end"))


def describe_exit(status: int) -> str:
    """Describes how a process ended: `ended with status 3`, `was ended by SIGKILL`."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal_name(-status)
    return f"was ended by {name}{_HINTS.get(name, '')}"


def exit_status(events: Iterable[ProcessEvent]) -> int:
    """Returns the exit status for all processes as a shell does: 0, or that of the first failure.

    A process that aborted (SIGABRT) counts only if no other one failed: torch's threads abort a
    process that has lost its peer, and its end may be seen before the peer's.
    """
    failed = tuple(filter(has_failed, events))
    if not failed:
        return 0
    causes = (event for event in failed if event.status != -signal.SIGABRT)
    first = next(causes, failed[0])
    return 128 - first.status if first.status < 0 else first.status or 1


def signal_name(number: int) -> str:
    """Returns a signal's name, like `SIGKILL`, or `signal 42` if it has none."""
    names = {each.value: each.name for each in signal.Signals}
    return names.get(number, f"signal {number}")


_HINTS = {
    "SIGKILL": ", as the system does when memory runs out",
    "SIGBUS": ", as when a file that is mapped into memory is cut short",
}


def run_to_end(
    server: ForkServer,
    requests: Sequence[SpawnRequest],
    *,
    look: Callable[[], None] = lambda: None,
    timeout_seconds: float = float("inf"),
) -> tuple[ProcessEvent, ...]:
    """Starts processes, waits until all have ended, and returns what happened.

    `look` is called about every POLL_SECONDS. When one process fails, the others have GRACE_SECONDS
    to report; when one is stopped for `timeout_seconds`, waiting ends. The caller ends the
    processes that are left by `server.close()`. Raises LaunchError if the server ends, or is
    stopped for `timeout_seconds`.
    """
    server.patience_seconds = timeout_seconds
    for request in requests:
        server.spawn(request)
    events: list[ProcessEvent] = []
    left = {request.rank for request in requests}
    stopped: dict[int, float] = {}
    deadline = float("inf")
    while left:
        new = server.events(POLL_SECONDS)
        events += new
        for event in new:
            _note(event, left, stopped)
        look()
        now = time.monotonic()
        if any(map(has_failed, new)):
            deadline = min(deadline, now + GRACE_SECONDS)
        if now > deadline or any(now > since + timeout_seconds for since in stopped.values()):
            break
    look()
    return tuple(events)


def _note(event: ProcessEvent, left: set[int], stopped: dict[int, float]) -> None:
    if event.kind == "stopped":
        stopped[event.rank] = time.monotonic()
    elif event.kind in ("exited", "refused", "continued"):
        stopped.pop(event.rank, None)
        left -= set() if event.kind == "continued" else {event.rank}


def has_failed(event: ProcessEvent) -> bool:
    """True if a process ended without having done its work; the store's work is never done."""
    ended_badly = event.kind == "exited" and (event.status != 0 or event.rank == STORE)
    return event.kind == "refused" or ended_badly
