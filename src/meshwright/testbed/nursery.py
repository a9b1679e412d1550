"""The process that all ranks of a testbed are forked from: python -m meshwright.testbed.nursery

It has imported PyTorch once, so that a rank starts in milliseconds. A line of JSON on its standard
input is a Birth; for every rank that ends it writes a Death to its standard output. It ends with
its launcher, and the ranks with it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from meshwright.errors import LaunchError
from meshwright.records import parse, plain, record

POLL_SECONDS = 0.05
NEW_NETWORK = 0x40000000
"""CLONE_NEWNET of setns(2)."""
PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


@record
class Birth:
    """A rank to be started."""

    rank: int
    environment: dict[str, str]
    namespace: str | None = None
    """Network namespace; None: where the launcher is."""
    group: str | None = None
    """Control group; None: the launcher's."""
    module: str
    """Its `main()` is called; empty: `arguments` are a command."""
    arguments: tuple[str, ...]
    log: str
    """File for what it prints; empty: the launcher's own output."""


@record
class Death:
    """How a rank ended."""

    rank: int
    status: int
    """Exit status, or minus the signal that ended it."""


def end_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Ask Linux to end this process when its parent dies."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal_number)


def enter(namespace: str) -> None:
    """Go into a network namespace. Raises OSError."""
    handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(handle, NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {namespace}")
    finally:
        os.close(handle)


def _live(birth: Birth) -> None:
    """The life of a rank, in the forked process."""
    end_with_parent()
    if birth.namespace:
        enter(birth.namespace)
    if birth.group:
        (Path(birth.group) / "cgroup.procs").write_text(str(os.getpid()))
    os.environ.update(birth.environment)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if birth.log:
        log = os.open(birth.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
    else:
        os.dup2(2, 1)
    if not birth.module:
        os.execvpe(birth.arguments[0], birth.arguments, os.environ)
    sys.argv = [birth.module, *birth.arguments]
    main: Callable[[], None] = importlib.import_module(birth.module).main
    main()


def _fork(birth: Birth) -> int:
    if birth.module:
        importlib.import_module(birth.module)
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _live(birth)
        status = 0
    except BaseException as failure:
        sys.stderr.write(f"rank {birth.rank}: {failure!r}\n")
    finally:
        os._exit(status)


def main() -> None:
    """Forks what it is told to, until its input ends."""
    end_with_parent()
    ranks: dict[int, int] = {}
    unread = b""
    while True:
        if select.select([0], [], [], POLL_SECONDS)[0]:
            text = os.read(0, 1 << 16)
            if not text:
                return
            *lines, unread = (unread + text).split(b"\n")
            for line in lines:
                birth = parse(json.loads(line), Birth, source="nursery", error=LaunchError)
                ranks[_fork(birth)] = birth.rank
        while ranks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            death = Death(rank=ranks.pop(pid), status=os.waitstatus_to_exitcode(status))
            sys.stdout.write(json.dumps(plain(death)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
