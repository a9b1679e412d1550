"""Lets long work be stopped cleanly: its loops check regularly whether they shall stop.

The caller of the work passes a function that says whether to stop; the work calls
`raise_if_stopped` wherever nothing is half done. Outside of `stoppable`, `raise_if_stopped` costs
nothing and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Stopped(Exception):  # noqa: N818 - named for what happened
    """Is raised in work that was asked to stop, and has no result."""


def never() -> bool:
    """Returns False: the default for work that is never stopped."""
    return False


_told: ContextVar[Callable[[], bool]] = ContextVar("told", default=never)


@contextmanager
def stoppable(told: Callable[[], bool]) -> Iterator[None]:
    """Makes every `raise_if_stopped` in the block ask `told`, and raises Stopped as soon as it
    returns True."""
    before = _told.set(told)
    try:
        yield
    finally:
        _told.reset(before)


def raise_if_stopped() -> None:
    """Raises Stopped if the enclosing work was asked to stop."""
    if _told.get()():
        raise Stopped
