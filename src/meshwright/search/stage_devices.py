"""Describes the devices of one stage of a candidate: tensor groups, each with its rows of every
micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from meshwright.search.costs import TensorGroup


@dataclass(frozen=True, slots=True)
class StageDevices:
    """Describes the devices of one stage; it knows its hash, for a search looks it up in tables
    again and again."""

    groups: tuple[TensorGroup, ...]
    rows: tuple[int, ...]
    """Rows of every micro-batch that each tensor group works on."""
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.groups, self.rows)))

    def __hash__(self) -> int:
        return self._hash


def moves(source: StageDevices, target: StageDevices) -> Iterator[tuple[int, int, int]]:
    """Yields (source group, target group, rows) of one micro-batch across a cut, in order."""
    ends, goals = accumulate(source.rows), accumulate(target.rows)
    end, goal = next(ends, None), next(goals, None)
    i = j = at = 0
    while end is not None and goal is not None:
        to = min(end, goal)
        yield i, j, to - at
        at = to
        if end == to:
            i, end = i + 1, next(ends, None)
        if goal == to:
            j, goal = j + 1, next(goals, None)
