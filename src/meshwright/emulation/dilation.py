"""Emulates a slower device: a rank computes for real, then sleeps until the work has taken as long
as on a device that has only a share of a core."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import isfinite
from typing import TypeVar

import torch

from meshwright.emulation.allocator import keep_freed_memory
from meshwright.emulation.compute_lock import ComputeLock
from meshwright.emulation.core_speed import CoreSpeed, run_calibration_kernel, usual_seconds
from meshwright.records import record
from meshwright.runtime.observer import Observer

T = TypeVar("T")

SOON_SECONDS = 1e-3
"""A device that has waited longer than this for other ranks counts as idle."""
BETWEEN_SECONDS = 0.02
"""Longest gap between two instructions of a device that is not idle."""
LONG_SECONDS = 0.02
"""CPU time of one stretch of computing after which the core's speed may have changed, and is
measured again."""
SLICE_SECONDS = 0.05
"""CPU time after which a device lets others compute before its next layer."""
HAND_OVER_SECONDS = 2e-4
"""Time that a waiting process needs to take the lock."""
NAP_SECONDS = 0.02
"""Sleep after each measurement of an emulated device. In a run it sleeps between instructions, and
finds cold caches when it wakes: that has to be measured too."""


@record
class Dilation:
    """Says how fast an emulated device is."""

    share: float
    """The device's share of a core at its usual speed (see `core_speed.py`): computing takes CPU
    time / share. If it is infinite, computing takes no time; only `Dilator.spend` adds some."""


class Dilator:
    """Stretches one rank's compute instructions to the time that the emulated device needs.

    Only CPU time of the computing thread is stretched, not the wait for a core; devices take turns
    at computing (see `compute_lock.py`). Anything inside an instruction that other ranks can
    observe must happen when the slow device would get there: call `catch_up` ahead of it (a
    bucket's all-reduce), or `end` before and `resume` after it (an all-reduce among tensor-parallel
    ranks).

    A process that wakes up finds cold caches, because other devices have used its core; real
    devices do not share one. Half a millisecond of cache misses, stretched by 1 / share, would be
    as long as a layer. So a short calibration kernel runs after each wake-up; its time is not
    stretched, and only tells the core's speed (see `core_speed.py`): the emulated device keeps its
    speed while other programs slow this machine down.
    """

    def __init__(self, dilation: Dilation) -> None:
        self.share = dilation.share
        self._wall = self._cpu = 0.0
        """Wall-clock time when the instruction began, and CPU time when its computing began or was
        resumed."""
        self._stretched = self._spent = 0.0
        self.lasted = 0.0
        """Seconds that the instruction had taken on the emulated device at the last `catch_up`;
        waiting for a core is left out."""
        self._late = self._ended = 0.0
        """Seconds by which the last instruction took too long, and when it ended. The next one is
        shortened by them, unless the device was idle in between."""
        self._turn: ComputeLock | None = None
        self._pace: CoreSpeed | None = None
        if isfinite(dilation.share):
            keep_freed_memory()
            self._turn = ComputeLock()
            self._pace = CoreSpeed(usual_seconds())

    def begin(self) -> None:
        """Starts an instruction."""
        self._start(BETWEEN_SECONDS)
        if self._turn is not None:
            run_calibration_kernel(torch.enable_grad())
            self._cpu = time.thread_time()

    def wait_between(self, wait: Callable[[], T]) -> T:
        """Calls `wait`, which waits for other ranks between instructions, and returns its result.
        After a long wait the device was idle, and nothing is made up for."""
        began = time.perf_counter()
        found = wait()
        if time.perf_counter() - began > SOON_SECONDS:
            self._late = 0.0
        return found

    def spend(self, seconds: float) -> None:
        """Adds seconds to the emulated device's time, for work that is not computed."""
        self._spent += seconds

    def catch_up(self) -> None:
        """Sleeps until the work since `begin` has taken its time on the emulated device."""
        computing = self._turn is not None and self._turn.held
        self.end()
        if computing:
            self._wake()

    def pause(self) -> None:
        """Lets other devices compute between two layers, if this one has computed for long: their
        short instructions would otherwise wait for a whole large micro-batch."""
        computing = self._turn is not None and self._turn.held
        if computing and time.thread_time() - self._cpu > SLICE_SECONDS:
            self.end()
            time.sleep(HAND_OVER_SECONDS)
            self._wake()

    def end(self) -> None:
        """Catches up and lets other devices compute: an instruction ends, or waits for other
        ranks."""
        self.stop()
        due = self._wall + self.lasted
        left = due - time.perf_counter()
        if left > 0:
            time.sleep(left)
        self._ended = time.perf_counter()
        self._late = self._ended - due if left > 0 or self._turn is not None else 0.0

    def stop(self) -> float:
        """Lets other devices compute, without sleeping; returns the seconds that the work since
        `begin` takes on the emulated device."""
        computed = time.thread_time() - self._cpu
        slowness = 1.0
        if self._pace is not None:
            if computed > LONG_SECONDS:
                self._pace.sample()
            slowness = self._pace.slowness
        self._stretched += computed / slowness / self.share
        self.lasted = self._spent + self._stretched
        if self._turn is not None:
            self._turn.release()
        self._cpu = time.thread_time()
        return self.lasted

    def resume(self) -> None:
        """Continues an instruction after a wait for other ranks, which is neither stretched nor
        made up for."""
        self._start(SOON_SECONDS)

    def wait_inside(self, wait: Callable[[], T]) -> T:
        """Calls `wait`, which waits for other ranks within an instruction."""
        self.end()
        found = wait()
        self.resume()
        return found

    def _start(self, soon: float) -> None:
        began = time.perf_counter()
        self._wake()
        self._wall = began - (self._late if began - self._ended < soon else 0.0)
        self._late = self._spent = self._stretched = 0.0

    def _wake(self) -> None:
        """Takes this rank's turn and starts (or resumes) computing. Can be called within a
        backward."""
        if self._turn is not None and self._pace is not None:
            self._turn.acquire()
            self._pace.sample()
        self._cpu = time.thread_time()


def dilation_observer(clock: Dilator) -> Observer:
    """Makes a rank's instructions last as long as on the emulated device."""
    return Observer(
        before=lambda _: clock.begin(),
        after=lambda _: clock.end(),
        failed=clock.stop,
        between_layers=clock.pause,
        posting=clock.catch_up,
        waiting=clock.wait_between,
        waiting_inside=clock.wait_inside,
    )


class EmulatedStopwatch:
    """Measures seconds of the emulated device.

    It sleeps before each measurement, so two micro-batches are measured at a time: in a stage of a
    run, only the first layer finds caches that are cold after a sleep.
    """

    device = torch.device("cpu")
    micro_batches = 2

    def __init__(self, clock: Dilator) -> None:
        self._clock = clock

    def seconds(self, act: Callable[[], object]) -> float:
        """Returns the seconds that `act` takes on the emulated device."""
        self._clock.begin()
        act()
        lasted = self._clock.stop()
        time.sleep(NAP_SECONDS)
        return lasted
