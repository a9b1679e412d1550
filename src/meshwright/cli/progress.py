"""Shows the progress of a search on stderr; Ctrl-C ends the search with the best plan so far.

A search that takes less than a second prints nothing.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from meshwright.cli.options import INTERRUPTED_STATUS, say
from meshwright.errors import MeshwrightError
from meshwright.units import format_seconds

QUIET_SECONDS = 1.0
"""Seconds before the first line is shown."""

LINE_SECONDS = 5.0
"""Seconds between two lines if stderr is not a terminal."""


class SearchProgress:
    """Shows the progress of a search on stderr, and records whether Ctrl-C was pressed."""

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.interrupts = 0
        """Number of times that Ctrl-C was pressed."""
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._began = clock()
        self._next = self._began + QUIET_SECONDS
        self._doing = "reading the inputs"
        self._best = ""
        self._live: Live | None = None

    @property
    def interrupted(self) -> bool:
        """True if the search was asked to end."""
        return self.interrupts > 0

    @property
    def seconds(self) -> float:
        """Returns the seconds since the start."""
        return self._clock() - self._began

    def tell(self, what: str, done: int, of: int) -> None:
        """Reports what the search is doing, and how much of that is done."""
        share = f" {done / of:.0%}" if of > 1 else ""
        self._doing = f"{what}{share}"
        self._show()

    def found(self, step_seconds: float) -> None:
        """Reports the step time of the best plan so far."""
        self._best = f"; best so far {format_seconds(step_seconds)} a step"

    def stop(self) -> bool:
        """Returns True if the search shall end; called many times a second."""
        self._show()
        return self.interrupted

    def interrupt(self) -> None:
        """Records Ctrl-C. Raises KeyboardInterrupt the second time."""
        self.interrupts += 1
        if self.interrupts > 1:
            raise KeyboardInterrupt
        self._next = self._clock()

    def close(self) -> None:
        """Removes the progress line."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich__(self) -> Text:
        return Text(self._line(), no_wrap=True, overflow="ellipsis")

    def _line(self) -> str:
        if self.interrupted:
            return "interrupted: finishing with the best plan so far; Ctrl-C again ends at once"
        hint = "Ctrl-C ends it with the best plan so far"
        return f"planning for {self.seconds:.0f} s: {self._doing}{self._best} ({hint})"

    def _show(self) -> None:
        """Shows the line: on a terminal the library rich redraws it, elsewhere a new line is
        printed every LINE_SECONDS."""
        if self._live is not None or self._clock() < self._next:
            return
        if self._console.is_terminal:
            self._live = Live(self, console=self._console, transient=True, refresh_per_second=4)
            self._live.start()
        else:
            self._next = self._clock() + LINE_SECONDS
            self._console.print(self._line(), highlight=False, soft_wrap=True)


@contextmanager
def search_progress() -> Iterator[SearchProgress]:
    """Yields a SearchProgress that records Ctrl-C while the block runs.

    An error of a search that was interrupted, and a second Ctrl-C, end the program with
    INTERRUPTED_STATUS; any other error passes through.
    """
    watch = SearchProgress()
    try:
        with _noticing(watch):
            yield watch
    except KeyboardInterrupt:
        watch.close()
        typer.echo("interrupted again: ended at once, and nothing was written", err=True)
        raise typer.Exit(INTERRUPTED_STATUS) from None
    except MeshwrightError as error:
        if not watch.interrupted:
            raise
        watch.close()
        say(f"{type(error).__name__}:\n{error}", to_errors=True)
        raise typer.Exit(INTERRUPTED_STATUS) from None
    finally:
        watch.close()


@contextmanager
def _noticing(watch: SearchProgress) -> Iterator[None]:
    """Reports Ctrl-C to the watch while the block runs. Only the main thread may set signal
    handlers, and if Ctrl-C is ignored it stays ignored."""
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before in (signal.SIG_IGN, None):
        yield
        return

    def noticed(_number: int, _frame: Any) -> None:
        watch.interrupt()

    signal.signal(signal.SIGINT, noticed)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
