"""Runs the process from which all ranks of a machine are forked.

python -m meshwright.launch.fork_server PARENT_PID OUTPUT_FD MODULE ...

It imports PyTorch and the given modules once, so that a rank starts in milliseconds. Each line on
its standard input is a SpawnRequest; each line on its standard output is an Event of one of its
ranks. It listens on no socket and unpickles nothing.

No process outlives it. It ends with its launcher and its ranks end with it, whichever of them is
killed and by whatever signal: Linux sends SIGKILL to each when its parent dies, and on other
systems it ends when its standard input ends. On SIGTERM it asks its ranks to end first.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from meshwright.errors import LaunchError
from meshwright.records import parse, plain, record
from meshwright.runtime.launch_variables import REPORT

LONGEST_LINE = 1 << 20
"""Longest report of a process in bytes."""
NEW_NETWORK = 0x40000000
"""CLONE_NEWNET of setns(2)."""
PARENT_DEATH_SIGNAL, NAME = 1, 15
"""PR_SET_PDEATHSIG and PR_SET_NAME of prctl(2)."""


EventKind = Literal["refused", "said", "stopped", "continued", "exited"]
"""Kinds of events of a process; `refused`: the system could not create it."""


@record
class SpawnRequest:
    """Asks the fork server to start a process."""

    rank: int
    """Its rank; negative for a process that is no rank, such as the store."""
    environment: dict[str, str]
    """Environment variables that are added to the launcher's."""
    namespace: str | None = None
    """Network namespace; None: the launcher's."""
    group: str | None = None
    """Folder of its control group; None: the launcher's."""
    module: str
    """Module whose `main()` is called; empty: `arguments` are a command."""
    arguments: tuple[str, ...]
    log: str
    """File for its output; empty: it prints where the launcher does."""


@record
class ProcessEvent:
    """Reports something that happened to a process, such as its end."""

    rank: int
    seconds: float
    """Time of the event by the machine's clock, in seconds since the epoch."""
    kind: EventKind
    status: int = 0
    """Exit status, or minus the signal that ended or stopped it."""
    said: str = ""
    """One line that it wrote into its report pipe, or the reason why it was `refused`."""


def end_with_parent(parent: int | None = None, signal_number: int = signal.SIGKILL) -> None:
    """Asks Linux to end this process when its parent dies; ends at once if it has died already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal_number)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def enter_namespace(namespace: str) -> None:
    """Enters a network namespace. Raises OSError."""
    handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(handle, NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {namespace}")
    finally:
        os.close(handle)


@dataclass(slots=True)
class _Child:
    """Describes a forked process, and the pipe through which it reports."""

    rank: int
    pipe: int | None
    unread: bytes = b""


@dataclass(slots=True)
class _Server:
    """Runs the fork server, and keeps the processes that it has started, by process id."""

    events: int
    """File descriptor to which ProcessEvents are written."""
    output: int
    """File descriptor for the output of processes without a log."""
    wake: int
    """File descriptor that becomes readable when a child has changed its state."""
    own: tuple[int, ...]
    """File descriptors that every child closes."""
    children: dict[int, _Child] = field(default_factory=dict)
    unread: bytes = b""
    ending: bool = False

    def serve(self) -> None:
        """Forks the processes that the launcher asks for and reports their events, until the input
        ends or SIGTERM has come."""
        while not self.ending:
            pipes = {child.pipe: child for child in self.children.values() if child.pipe}
            ready, _, _ = select.select([0, self.wake, *pipes], [], [])
            for pipe in ready:
                if pipe in pipes:
                    self.hear(pipes[pipe])
            if self.wake in ready:
                os.read(self.wake, 1 << 12)
                self.reap()
            if 0 in ready and not self.read_requests():
                return

    def read_requests(self) -> bool:
        text = os.read(0, 1 << 16)
        *lines, self.unread = (self.unread + text).split(b"\n")
        for line in lines:
            self.spawn(
                parse(json.loads(line), SpawnRequest, source="fork server", error=LaunchError)
            )
        return bool(text)

    def spawn(self, request: SpawnRequest) -> None:
        if request.module:
            # An import that fails here fails again in the child, which then writes it into its log.
            with suppress(Exception):
                importlib.import_module(request.module)
        ours, theirs = os.pipe()
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as failure:
            self.tell(request.rank, "refused", said=str(failure))
            os.close(ours)
        else:
            if not pid:
                _child(request, server, theirs, self.output, (ours, *self.pipes(), *self.own))
            os.set_blocking(ours, False)
            self.children[pid] = _Child(request.rank, ours)
        os.close(theirs)

    def pipes(self) -> list[int]:
        return [child.pipe for child in self.children.values() if child.pipe]

    def hear(self, child: _Child) -> None:
        """Forwards the complete lines that a child has written."""
        if child.pipe is None:
            return
        try:
            text = os.read(child.pipe, 1 << 16)
        except BlockingIOError:
            return
        *lines, child.unread = (child.unread + text).split(b"\n")
        for line in lines:
            self.tell(child.rank, "said", said=line.decode(errors="replace"))
        if not text or len(child.unread) > LONGEST_LINE:
            os.close(child.pipe)
            child.pipe = None

    def reap(self) -> None:
        """Reports every change of state that has not been reported."""
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if not pid:
                return
            child = self.children[pid]
            if os.WIFSTOPPED(status):
                self.tell(child.rank, "stopped", -os.WSTOPSIG(status))
            elif os.WIFCONTINUED(status):
                self.tell(child.rank, "continued")
            else:
                self.hear(child)
                if child.pipe is not None:
                    os.close(child.pipe)
                del self.children[pid]
                self.tell(child.rank, "exited", os.waitstatus_to_exitcode(status))

    def tell(self, rank: int, kind: EventKind, status: int = 0, said: str = "") -> None:
        event = ProcessEvent(rank=rank, seconds=time.time(), kind=kind, status=status, said=said)
        line = json.dumps(plain(event)).encode() + b"\n"
        while line:
            line = line[os.write(self.events, line) :]

    def ask_to_end(self) -> None:
        """Sends SIGTERM to every process, and returns when all of them have ended."""
        for pid in self.children:
            os.kill(pid, signal.SIGTERM)
        while self.children:
            self.reap()
            select.select([self.wake], [], [], 0.05)


def _child(
    request: SpawnRequest, parent: int, report: int, output: int, others: tuple[int, ...]
) -> None:
    """Runs a process from fork to end. Does not return."""
    status = 1
    try:
        end_with_parent(parent)
        for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        for pipe in others:
            os.close(pipe)
        _live(request, report, output)
        status = 0
    except BaseException as failure:
        sys.stderr.write(f"rank {request.rank}: {failure!r}\n")
        code = getattr(failure, "code", None)  # a SystemExit has one
        status = code if isinstance(code, int) else 1
    finally:
        os._exit(status)


def _live(request: SpawnRequest, report: int, output: int) -> None:
    if request.namespace:
        enter_namespace(request.namespace)
    if request.group:
        (Path(request.group) / "cgroup.procs").write_text(str(os.getpid()))
    os.set_inheritable(report, True)
    os.environ.update(request.environment, **{REPORT: str(report)})
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request.log:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        output = os.open(request.log, flags, 0o600)
        os.dup2(output, 2)
    os.dup2(output, 1)
    if not request.module:
        os.execvpe(request.arguments[0], request.arguments, os.environ)
    if sys.platform == "linux":
        name = f"rank {request.rank}" if request.rank >= 0 else request.module.rpartition(".")[2]
        ctypes.CDLL(None).prctl(NAME, name.encode())
    sys.argv = [request.module, *request.arguments]
    main: Callable[[], None] = importlib.import_module(request.module).main
    main()


def main() -> None:
    """Serves the launcher that started this process."""
    parent, output, modules = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    end_with_parent(parent)
    events = os.dup(1)
    os.dup2(2, 1)  # what a module prints when it is imported must not be read as an Event
    for module in modules:
        importlib.import_module(module)
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    server = _Server(events, output, wake, own=(events, wake, waker))

    def end(*_: object) -> None:
        server.ending = True

    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, end)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    server.serve()
    if server.ending:
        server.ask_to_end()
    # The launcher has ended or asks for an end: end everything that is left in this session.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
