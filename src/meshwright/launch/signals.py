"""Signals that end a launcher, so that it can take down what it has started."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the stack while the block runs, as Ctrl-C does anyway."""

    def stop(number: int, _: FrameType | None) -> None:
        sys.stderr.write(f"ended by {signal.Signals(number).name}\n")
        raise SystemExit(128 + number)

    before = {}
    with suppress(ValueError):  # not the main thread: signals do not come here
        before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
