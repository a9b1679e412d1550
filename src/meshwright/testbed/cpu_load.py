"""Measures what other programs do on the machine during a measurement."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable

import psutil


class CpuLoadMeter:
    """Measures the CPU time of other programs since it was made. It does not count this process,
    its descendants that have been waited for, and the seconds that `more` returns."""

    def __init__(self, more: Callable[[], float] = lambda: 0.0) -> None:
        self._more = more
        self._wall, self._others = time.monotonic(), self._foreign()

    def foreign_share(self) -> float:
        """Returns the share of the whole machine's CPU time that others have used."""
        wall = time.monotonic() - self._wall
        foreign = self._foreign() - self._others
        return max(0.0, foreign / (wall * (os.cpu_count() or 1)))

    def _foreign(self) -> float:
        return _busy() - _own() - self._more()


def _busy() -> float:
    """Returns the CPU seconds of all programs since the machine started, without what the kernel
    does on its own account (interrupts, packets)."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _own() -> float:
    """Returns the CPU seconds of this process and the descendants that it has waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)
