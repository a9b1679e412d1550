"""Makes an order for few micro-batches into one for many, by more rounds of its steady state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from meshwright.program.work import Codes, F, Work, fits, play

ROUNDS = 3
"""Micro-batches, for each stage, of the short order that is made instead of a longer one."""

LEAST = 24
"""Least number of its micro-batches."""


def shortened(work: Work) -> Work:
    """Returns the same work with no more micro-batches than a pipeline needs to run evenly."""
    few = max(LEAST, ROUNDS * len(work.forward))
    return replace(work, micro_batches=min(few, work.micro_batches))


def lengthened(work: Work, short: Work, codes: Sequence[Codes]) -> list[Codes] | None:
    """Returns the order for all micro-batches of `work` that repeats what every group of devices
    does in the middle of an order for `short`; None if no group does everything once in that time,
    or memory does not allow it."""
    more = work.micro_batches - short.micro_batches
    if not more:
        return [list(own) for own in codes]
    for middle in range(short.micro_batches // 2, short.micro_batches - 1):
        found = [_repeated(own, middle, more) for own in codes]
        long = [own for own in found if own is not None]
        if len(long) == len(found) and fits(work, long) and play(work, long) is not None:
            return long
    return None


def _repeated(own: Codes, middle: int, more: int) -> Codes | None:
    """Returns an order with `more` rounds between two forwards of its first stage, the one of
    micro-batch `middle` and the next; None if it does not do everything once between them."""
    first = 4 * min(code >> 2 for code in own) + F
    places = [k for k, code in enumerate(own) if code == first]
    start, end = places[middle], places[middle + 1]
    cycle = own[start:end]
    done = Counter(cycle)
    if set(done.values()) != {1} or not _whole(own, done):
        return None
    return [*own[:end], *(cycle * more), *own[end:]]


def _whole(own: Codes, done: Counter[int]) -> bool:
    """True if a round has the forward and the backward of every stage of the group, and the second
    part of each backward that is in two parts."""
    stages = {code >> 2 for code in own}
    for s in stages:
        kinds = {code & 3 for code in done if code >> 2 == s}
        if kinds not in ({0, 1}, {0, 2, 3}):
            return False
    return True
