"""Emulation of slower devices: arithmetic is real, then the rank sleeps until it has lasted as long
as on a device that has only a share of a core."""

from __future__ import annotations

import time
from math import isfinite

import torch

from meshwright.records import record


@record
class Dilation:
    """How slow the emulated device is."""

    share: float
    """Of a core: computing lasts CPU time / share. Infinite: only what is spent takes time."""


class Dilator:
    """Stretches one rank's compute instructions.

    The CPU time of the computing thread counts, so that waiting for a core is not stretched too.
    Whatever others can see (a bucket on its way, a sum among tensor ranks) must be preceded by
    `catch_up`, so that it happens when the slow device would have got there.

    A process that wakes finds cold caches, which no device does whose neighbours do not share its
    core: stretched by 1 / share, half a millisecond of it would be the time of a layer. So a little
    arithmetic, forward and backward, goes before every instruction and does not count.
    """

    def __init__(self, dilation: Dilation) -> None:
        self.share = dilation.share
        self._wall = 0.0
        self._cpu = 0.0
        self._spent = 0.0
        self.lasted = 0.0
        """Seconds of the emulated device until the last `catch_up`: waiting for a core is none."""
        self._late = 0.0
        """Seconds by which the last sleep took too long; the next instruction gives them back."""
        self._idle = torch.ones(64, 64), torch.ones(64, 64, requires_grad=True)

    def begin(self) -> None:
        """An instruction starts."""
        began = time.perf_counter()
        if isfinite(self.share):
            self._warm_up()
        self._start(began)

    def _warm_up(self) -> None:
        x, weight = self._idle
        with torch.enable_grad():
            torch.autograd.grad((x @ weight).sum(), weight)

    def spend(self, seconds: float) -> None:
        """The emulated device needs so many seconds more, for something that is not computed."""
        self._spent += seconds

    def catch_up(self) -> None:
        """Sleeps until the work since `begin` has lasted its time on the emulated device."""
        self.lasted = self._spent + (time.thread_time() - self._cpu) / self.share
        due = self._wall + self.lasted
        left = due - time.perf_counter()
        if left > 0:
            time.sleep(left)
        self._late = min(max(0.0, time.perf_counter() - due), 1e-3) if left > 0 else 0.0

    def resume(self) -> None:
        """After a wait for others, which is neither computing nor to be slept off."""
        self._start(time.perf_counter())

    def _start(self, began: float) -> None:
        self._wall = began - self._late
        self._late = self._spent = 0.0
        self._cpu = time.thread_time()
