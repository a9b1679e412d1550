"""Long work that may be told to stop: its loops look up now and then, and leave off in good order.

Whoever starts the work says what is to stop it; what does the work calls `look` between two steps
that belong together, wherever nothing is half done. Outside of `until` a look costs nothing and
changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Stopped(Exception):  # noqa: N818 - named for what happened
    """The work was told to stop, and has no result."""


def never() -> bool:
    """What work that nobody stops is told."""
    return False


_told: ContextVar[Callable[[], bool]] = ContextVar("told", default=never)


@contextmanager
def until(told: Callable[[], bool]) -> Iterator[None]:
    """Inside, every `look` asks `told`, and raises Stopped as soon as it says yes."""
    before = _told.set(told)
    try:
        yield
    finally:
        _told.reset(before)


def look() -> None:
    """Raise Stopped if the work around this call was told to stop."""
    if _told.get()():
        raise Stopped
