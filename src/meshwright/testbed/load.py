"""What else the machine is doing while something is measured."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable

import psutil


class Watch:
    """Processor time of others since it was made. Own are this process, the descendants that it has
    waited for, and what `more` counts."""

    def __init__(self, more: Callable[[], float] = lambda: 0.0) -> None:
        self._more = more
        self._wall, self._others = time.monotonic(), self._foreign()

    def foreign_share(self) -> float:
        """Share of the whole machine's processor time that others have used."""
        wall = time.monotonic() - self._wall
        foreign = self._foreign() - self._others
        return max(0.0, foreign / (wall * (os.cpu_count() or 1)))

    def _foreign(self) -> float:
        return _busy() - _own() - self._more()


def _busy() -> float:
    """Processor seconds that programs have had since the machine started; what the kernel does on
    behalf of nobody (interrupts, packets) is left out."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _own() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)
