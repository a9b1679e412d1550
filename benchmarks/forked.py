"""Runs functions in processes forked from this one, a few at a time, and leaves none behind.

Each process leads a session of its own, writes what it prints to a file, has limits of CPU time and
of waiting, and hands its result over as JSON. Whatever is left of its session is killed at its end.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT_OF_TIME = (signal.SIGPROF, signal.SIGVTALRM, signal.SIGXCPU, signal.SIGALRM)
MEMORY_BYTES = 6 * 2**30
"""Beyond what this process has."""
CRASHED = 70
END_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux: whatever ends this process, those forked from it end too."""


@dataclass(frozen=True)
class Work:
    """A function to run, and what it may take."""

    run: Callable[[], Any]
    """Its result must be plain data."""
    log: Path
    cpu_seconds: int
    wall_seconds: float = 3600.0


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    work: Work
    result: Any
    """None if it did not come to an end."""
    status: int
    """As of subprocess: minus the number of the signal that ended it."""
    late: bool
    """It used up its time."""
    cpu_seconds: float


@dataclass(frozen=True)
class _Started:
    work: Work
    pid: int
    watch: int
    """A descriptor that becomes readable when the process ends."""
    result: Path
    end: float


def all_of(works: Iterable[Work], jobs: int) -> Iterator[Ended]:
    """Yields how each process ended, in the order in which they do; `jobs` run at a time."""
    waiting, running = iter(works), dict[int, _Started]()
    try:
        while True:
            while len(running) < jobs and (work := next(waiting, None)) is not None:
                started = _start(work)
                running[started.watch] = started
            if not running:
                return
            soonest = min(each.end for each in running.values())
            ready, _, _ = select.select(list(running), [], [], max(0.0, soonest - time.monotonic()))
            now = time.monotonic()
            for watch in ready or [w for w, each in running.items() if each.end <= now]:
                yield _ended(running.pop(watch), late=watch not in ready)
    finally:
        for each in running.values():
            _ended(each, late=True)


def _start(work: Work) -> _Started:
    result = work.log.with_suffix(".json")
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _live(work, result)
    return _Started(work, pid, os.pidfd_open(pid), result, time.monotonic() + work.wall_seconds)


def _live(work: Work, result: Path) -> None:
    """The whole life of a forked process. Does not return."""
    status = CRASHED
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
        out = os.open(work.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(out, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (work.cpu_seconds, work.cpu_seconds + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        found = work.run()
        result.write_text(json.dumps(found), encoding="utf-8")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _ended(started: _Started, *, late: bool) -> Ended:
    with suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    _, state, used = os.wait4(started.pid, 0)
    os.close(started.watch)
    status = os.waitstatus_to_exitcode(state)
    found = None
    if status == 0:
        found = json.loads(started.result.read_text(encoding="utf-8"))
    late = late or -status in OUT_OF_TIME
    return Ended(started.work, found, status, late, used.ru_utime + used.ru_stime)
