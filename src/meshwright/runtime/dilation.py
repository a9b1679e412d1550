"""Emulation of slower devices: arithmetic is real, then the rank sleeps until it has lasted as long
as on a device that has only a share of a core."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import isfinite
from typing import TypeVar

import torch

from meshwright.records import record
from meshwright.runtime.heap import keep_memory
from meshwright.runtime.pace import Pace, exercise, usual_seconds
from meshwright.runtime.turns import Turn

T = TypeVar("T")

SOON_SECONDS = 1e-3
"""A device that waits longer for others is idle."""
BETWEEN_SECONDS = 0.02
"""At most from one instruction of a device that is not idle to the next."""
LONG_SECONDS = 0.02
"""Of computing, during which the core's pace may have become another."""
SLICE_SECONDS = 0.05
"""Of computing, after which others may compute before the next layer."""
HAND_OVER_SECONDS = 2e-4
"""That those who wait for a turn need to take it."""


@record
class Dilation:
    """How slow the emulated device is."""

    share: float
    """Of a core at its usual pace (see pace.py): computing lasts CPU time / share. Infinite: only
    what is spent takes time."""


class Dilator:
    """Stretches one rank's compute instructions.

    The CPU time of the computing thread counts, so that waiting for a core is not stretched too,
    and devices compute in turns (see turns.py). Whatever others can see within an instruction must
    be preceded by `catch_up` (a bucket on its way) or come between `end` and `resume` (a sum among
    tensor ranks), so that it happens when the slow device would have got there.

    A process that wakes finds cold caches, which no device does whose neighbours do not share its
    core: stretched by 1 / share, half a millisecond of it would be the time of a layer. So a little
    exercise comes first whenever it woke, and does not count but to tell the core's pace (see
    pace.py): the emulated device is as fast while neighbours slow this machine down.
    """

    def __init__(self, dilation: Dilation) -> None:
        self.share = dilation.share
        self._wall = self._cpu = 0.0
        """When the instruction, and when its computing began or went on."""
        self._stretched = self._spent = 0.0
        self.lasted = 0.0
        """Seconds of the emulated device until the last `catch_up`: waiting for a core is none."""
        self._late = self._ended = 0.0
        """Seconds by which the last instruction took too long, and when it ended. The next one
        gives them back, unless the device stood idle between them."""
        self._turn: Turn | None = None
        self._pace: Pace | None = None
        if isfinite(dilation.share):
            keep_memory()
            self._turn = Turn()
            self._pace = Pace(usual_seconds())

    def begin(self) -> None:
        """An instruction starts."""
        self._start(BETWEEN_SECONDS)
        if self._turn is not None:
            exercise(torch.enable_grad())
            self._cpu = time.thread_time()

    def waiting(self, wait: Callable[[], T]) -> T:
        """Waits for others between instructions. A device that stood idle was not late."""
        began = time.perf_counter()
        found = wait()
        if time.perf_counter() - began > SOON_SECONDS:
            self._late = 0.0
        return found

    def spend(self, seconds: float) -> None:
        """The emulated device needs so many seconds more, for something that is not computed."""
        self._spent += seconds

    def catch_up(self) -> None:
        """Sleeps until the work since `begin` has lasted its time on the emulated device."""
        computing = self._turn is not None and self._turn.mine
        self.end()
        if computing:
            self._wake()

    def pause(self) -> None:
        """Between two layers. A device that has computed for long lets others do so: their short
        instructions would wait for all of a large micro-batch."""
        computing = self._turn is not None and self._turn.mine
        if computing and time.thread_time() - self._cpu > SLICE_SECONDS:
            self.end()
            time.sleep(HAND_OVER_SECONDS)
            self._wake()

    def end(self) -> None:
        """Catches up, and others may compute: an instruction ends, or waits for others."""
        self.stop()
        due = self._wall + self.lasted
        left = due - time.perf_counter()
        if left > 0:
            time.sleep(left)
        self._ended = time.perf_counter()
        self._late = self._ended - due if left > 0 or self._turn is not None else 0.0

    def stop(self) -> float:
        """Others may compute; what the work since `begin` lasts, in seconds, is not slept off."""
        computed = time.thread_time() - self._cpu
        slowness = 1.0
        if self._pace is not None:
            if computed > LONG_SECONDS:
                self._pace.learn()
            slowness = self._pace.slowness
        self._stretched += computed / slowness / self.share
        self.lasted = self._spent + self._stretched
        if self._turn is not None:
            self._turn.leave()
        self._cpu = time.thread_time()
        return self.lasted

    def resume(self) -> None:
        """After a wait for others, which is neither computing nor to be slept off."""
        self._start(SOON_SECONDS)

    def _start(self, soon: float) -> None:
        began = time.perf_counter()
        self._wake()
        self._wall = began - (self._late if began - self._ended < soon else 0.0)
        self._late = self._spent = self._stretched = 0.0

    def _wake(self) -> None:
        """Computes (on), when it is this rank's turn. Possibly within a backward."""
        if self._turn is not None and self._pace is not None:
            self._turn.take()
            self._pace.learn()
        self._cpu = time.thread_time()
