"""Breaks the seconds of a step down by kind, along its critical path."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from meshwright.program.operations import Op, completing
from meshwright.program.timeline import Interval, Timeline
from meshwright.records import record

PARTS = ("compute", "bubble", "transfers", "reductions", "optimizer", "overhead")
"""The kinds of time in a step."""

_BACK = (Op.BACKWARD, Op.BACKWARD_INPUT)
_MAKES = {
    Op.RECV_F: (Op.FORWARD,),
    Op.RECV_B: _BACK,
    Op.SEND_F: (Op.FORWARD,),
    Op.SEND_B: _BACK,
}
"""The compute operations that produce what a message carries."""


@record
class PathSegment:
    """Describes a piece of the critical path on one rank."""

    rank: int
    part: str
    """One of PARTS, with the bubble counted as compute."""
    start_seconds: float
    end_seconds: float


class OrderedIntervals:
    """Holds intervals whose ends do not decrease, such as those of one rank or channel in order.

    It finds the latest one before a moment by bisection.
    """

    def __init__(self) -> None:
        self.intervals: list[Interval] = []
        self.ends: list[float] = []
        self.in_order = True

    def append(self, interval: Interval) -> None:
        """Adds an interval."""
        self.in_order &= not self.ends or self.ends[-1] <= interval.end_seconds
        self.intervals.append(interval)
        self.ends.append(interval.end_seconds)

    def latest(self, before: float, tolerance: float) -> list[Interval]:
        """Returns the intervals that end last, at or before a moment."""
        if not self.in_order:  # a measured step may have any order
            return latest(self.intervals, before, tolerance)
        last = bisect_right(self.ends, before + tolerance)
        if not last:
            return []
        first = bisect_left(self.ends, self.ends[last - 1] - tolerance, 0, last)
        return self.intervals[first:last]


def latest(intervals: Iterable[Interval], before: float, tolerance: float) -> list[Interval]:
    """Returns the intervals that end last, at or before a moment."""
    ended = [i for i in intervals if i.end_seconds <= before + tolerance]
    end = max((i.end_seconds for i in ended), default=0.0)
    return [i for i in ended if i.end_seconds >= end - tolerance]


class _CriticalPath:
    """Indexes the intervals of a timeline for a walk back along its critical path."""

    def __init__(self, timeline: Timeline) -> None:
        self.tolerance = 1e-9 * timeline.step_seconds
        self.compute: dict[int, OrderedIntervals] = defaultdict(OrderedIntervals)
        self.makers: dict[tuple[int, int, int | None], list[Interval]] = defaultdict(list)
        self.reads: dict[tuple[Op, int, int, int | None], list[Interval]] = defaultdict(list)
        self.channels: dict[tuple[Op, int, int | None], OrderedIntervals] = defaultdict(
            OrderedIntervals
        )
        self.reductions: list[Interval] = []
        self.norms: dict[int, Interval] = {}
        for i in timeline.intervals:
            if i.stream == "compute":
                self.compute[i.rank].append(i)
                self.makers[i.rank, i.stage, i.micro_batch].append(i)
            elif i.stream == "receive":
                self.reads[i.op, i.rank, i.stage, i.micro_batch].append(i)
                self.channels[i.op, i.rank, i.peer].append(i)
            elif i.op.of_gradients:
                self.reductions.append(i)
            elif i.op.awaits == "all":
                self.norms[i.rank] = i

    def latest(self, intervals: Iterable[Interval], before: float) -> list[Interval]:
        """Returns the intervals that end last, at or before a moment."""
        return latest(intervals, before, self.tolerance)

    def computed(self, rank: int, before: float) -> list[Interval]:
        """Returns what a rank computed last before a moment."""
        return self.compute[rank].latest(before, self.tolerance)

    def gates(self, i: Interval) -> list[Interval]:
        """Returns the intervals that may have kept this one from beginning earlier; of those with
        equal ends, the likelier comes first."""
        before = i.start_seconds
        own = self.computed(i.rank, before)
        if i.op.awaits == "all":
            reductions = self.latest(self.reductions, before)
            reductions.sort(key=lambda r: -self.end_of_compute(r.rank, before))
            return [*own, *self.everyones(before), *reductions]
        if i.op.awaits == "own":
            sums = [r for r in self.reductions if r.rank == i.rank]
            ends = ([self.norms[i.rank]], sums)
            return [*own, *(gate for group in ends for gate in self.latest(group, before))]
        if i.stream == "compute":
            read = i.op.reads
            kinds = (read, *completing(read)) if read else ()
            reads = [r for op in kinds for r in self.reads[op, i.rank, i.stage, i.micro_batch]]
            return [*own, *self.latest(reads, before)]
        if i.op.blocks and i.op.reads:
            parts = self.reads[i.op.reads, i.rank, i.stage, i.micro_batch]
            return [*own, *self.latest(parts, before)]
        if i.op.kind == "collective":
            # It may wait for an earlier reduction for which another rank was late.
            return [*own, *self.everyones(before)]
        if i.peer is None:
            return own
        source, target = (i.peer, i.rank) if i.stream == "receive" else (i.rank, i.peer)
        made = self.makers[source, _maker(i), i.micro_batch]
        return [
            *self.latest((c for c in made if c.op in _MAKES[i.op]), before),
            *self.channels[i.op, i.rank, i.peer].latest(before, self.tolerance),
            *self.computed(target, before),
        ]

    def everyones(self, before: float) -> list[Interval]:
        """Returns the compute intervals that ended last before a moment, on whichever ranks."""
        last = [c for rank in sorted(self.compute) for c in self.computed(rank, before)]
        return self.latest(last, before)

    def end_of_compute(self, rank: int, before: float) -> float:
        """Returns the end of a rank's last compute before a moment."""
        return max((c.end_seconds for c in self.computed(rank, before)), default=0.0)


def _maker(i: Interval) -> int:
    """Returns the stage that produces what a message carries."""
    if i.stream == "send":
        return i.stage
    return i.stage - 1 if i.op is Op.RECV_F else i.stage + 1


def critical_path(timeline: Timeline) -> tuple[PathSegment, ...]:
    """Returns the chain of intervals that ends last, each waiting for the one before; it covers the
    step.

    A reduction counts from the end of the compute that hides it. Time between the intervals, and
    outside all of them, is `overhead`.
    """
    walk = _CriticalPath(timeline)
    segments: list[PathSegment] = []
    now, seen = timeline.step_seconds, set[int]()
    gates = walk.latest(timeline.intervals, now)
    while gates:
        current = _likeliest(gates, walk.tolerance)
        seen.add(id(current))
        start = current.start_seconds
        if current.op.kind == "collective" and not current.op.blocks:
            start = max(start, walk.end_of_compute(current.rank, current.end_seconds))
        end = min(current.end_seconds, now)
        pieces = ((end, now, "overhead"), (start, end, current.op.part))
        segments += [
            PathSegment(rank=current.rank, part=part, start_seconds=a, end_seconds=b)
            for a, b, part in pieces
            if a < b
        ]
        now = min(start, end)
        gates = [g for g in walk.gates(_from(current, now)) if id(g) not in seen]
    if now > 0:
        rank = segments[-1].rank if segments else 0
        segments.append(PathSegment(rank=rank, part="overhead", start_seconds=0.0, end_seconds=now))
    return tuple(reversed(segments))


def _from(interval: Interval, start: float) -> Interval:
    """Returns an interval with another start."""
    return replace(interval, start_seconds=start)


def _likeliest(gates: Sequence[Interval], tolerance: float) -> Interval:
    """Returns the interval that ends last, and the first of several; before it, its successor could
    not begin."""
    end = max(g.end_seconds for g in gates)
    return next(g for g in gates if g.end_seconds >= end - tolerance)


def step_breakdown(timeline: Timeline) -> dict[str, float]:
    """Returns the seconds of the critical path by kind, in the order of PARTS; they add up to the
    step.

    The path's forwards and backwards count as `compute` up to the compute seconds of the busiest
    rank, which no schedule can avoid. The rest of them is `bubble`: the pipeline fills, drains or
    waits.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    for s in critical_path(timeline):
        seconds[s.part] += s.end_seconds - s.start_seconds
    busy: dict[int, float] = defaultdict(float)
    for i in timeline.intervals:
        if i.op.part == "compute":
            busy[i.rank] += i.end_seconds - i.start_seconds
    needed = min(seconds["compute"], max(busy.values(), default=0.0))
    seconds["bubble"] = seconds["compute"] - needed
    seconds["compute"] = needed
    return seconds
