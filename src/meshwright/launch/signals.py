"""Handles the signals that end a launcher, so that it can end the processes it has started."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def unwind_on_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP unwind the stack while the block runs, as Ctrl-C always does."""

    def stop(number: int, _: FrameType | None) -> None:
        sys.stderr.write(f"ended by {signal.Signals(number).name}\n")
        raise SystemExit(128 + number)

    before = {}
    with suppress(ValueError):  # not the main thread, which alone receives signals
        before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
