"""Where the seconds of a step go: its critical path, by kind."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from meshwright.program.deadlock import READS
from meshwright.program.instructions import GATHERED, GATHERS, Op
from meshwright.program.timeline import Interval, Timeline
from meshwright.records import record

PARTS = ("compute", "bubble", "transfers", "reductions", "optimizer", "overhead")

_BACK = (Op.BACKWARD, Op.BACKWARD_INPUT)
_MAKES = {
    Op.RECV_F: (Op.FORWARD,),
    Op.RECV_B: _BACK,
    Op.SEND_F: (Op.FORWARD,),
    Op.SEND_B: _BACK,
}
_PART = {
    Op.FORWARD: "compute",
    Op.BACKWARD: "compute",
    Op.BACKWARD_INPUT: "compute",
    Op.BACKWARD_WEIGHT: "compute",
    Op.OPTIMIZER_STEP: "optimizer",
    Op.REDUCE_GRAD: "reductions",
    Op.REDUCE_NORM: "reductions",
}


@record
class Segment:
    """A piece of the critical path, on one rank."""

    rank: int
    part: str
    """One of PARTS; here `bubble` is compute too."""
    start_seconds: float
    end_seconds: float


class Row:
    """Intervals of which each ends when or after the one before it does, as they do one after
    another on a rank or in a channel: found by the moment of their end without a look at all."""

    def __init__(self) -> None:
        self.intervals: list[Interval] = []
        self.ends: list[float] = []
        self.in_order = True

    def append(self, interval: Interval) -> None:
        """One more."""
        self.in_order &= not self.ends or self.ends[-1] <= interval.end_seconds
        self.intervals.append(interval)
        self.ends.append(interval.end_seconds)

    def latest(self, before: float, tolerance: float) -> list[Interval]:
        """Those that end last, at or before a moment."""
        if not self.in_order:  # a measured step may hold anything
            return latest(self.intervals, before, tolerance)
        last = bisect_right(self.ends, before + tolerance)
        if not last:
            return []
        first = bisect_left(self.ends, self.ends[last - 1] - tolerance, 0, last)
        return self.intervals[first:last]


def latest(intervals: Iterable[Interval], before: float, tolerance: float) -> list[Interval]:
    """Those that end last, at or before a moment."""
    ended = [i for i in intervals if i.end_seconds <= before + tolerance]
    end = max((i.end_seconds for i in ended), default=0.0)
    return [i for i in ended if i.end_seconds >= end - tolerance]


class _Walk:
    """The intervals of a timeline by what a walk back along its critical path asks for."""

    def __init__(self, timeline: Timeline) -> None:
        self.tolerance = 1e-9 * timeline.step_seconds
        self.compute: dict[int, Row] = defaultdict(Row)
        self.makers: dict[tuple[int, int, int | None], list[Interval]] = defaultdict(list)
        self.reads: dict[tuple[Op, int, int, int | None], list[Interval]] = defaultdict(list)
        self.channels: dict[tuple[Op, int, int | None], Row] = defaultdict(Row)
        self.reductions: list[Interval] = []
        self.norms: dict[int, Interval] = {}
        for i in timeline.intervals:
            if i.stream == "compute":
                self.compute[i.rank].append(i)
                self.makers[i.rank, i.stage, i.micro_batch].append(i)
            elif i.stream == "receive":
                self.reads[i.op, i.rank, i.stage, i.micro_batch].append(i)
                self.channels[i.op, i.rank, i.peer].append(i)
            elif i.op is Op.REDUCE_GRAD:
                self.reductions.append(i)
            elif i.op is Op.REDUCE_NORM:
                self.norms[i.rank] = i

    def latest(self, intervals: Iterable[Interval], before: float) -> list[Interval]:
        """Those that end last, at or before a moment."""
        return latest(intervals, before, self.tolerance)

    def computed(self, rank: int, before: float) -> list[Interval]:
        """What a rank computed last before a moment."""
        return self.compute[rank].latest(before, self.tolerance)

    def gates(self, i: Interval) -> list[Interval]:
        """What may have kept an interval from beginning earlier; the likelier of equals first."""
        before = i.start_seconds
        own = self.computed(i.rank, before)
        if i.op is Op.REDUCE_NORM:
            reductions = self.latest(self.reductions, before)
            reductions.sort(key=lambda r: -self.end_of_compute(r.rank, before))
            return [*own, *self.everyones(before), *reductions]
        if i.op is Op.OPTIMIZER_STEP:
            sums = [r for r in self.reductions if r.rank == i.rank]
            ends = ([self.norms[i.rank]], sums)
            return [*own, *(gate for group in ends for gate in self.latest(group, before))]
        if i.stream == "compute":
            read = READS.get(i.op)
            kinds = (read, GATHERS[read]) if read else ()
            reads = [r for op in kinds for r in self.reads[op, i.rank, i.stage, i.micro_batch]]
            return [*own, *self.latest(reads, before)]
        if i.op in GATHERED:
            parts = self.reads[GATHERED[i.op], i.rank, i.stage, i.micro_batch]
            return [*own, *self.latest(parts, before)]
        if i.op is Op.REDUCE_GRAD:
            # It may wait for its turn, after a sum for which somebody else was late.
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
        """What any rank computed last before a moment."""
        last = [c for rank in sorted(self.compute) for c in self.computed(rank, before)]
        return self.latest(last, before)

    def end_of_compute(self, rank: int, before: float) -> float:
        """When a rank's last compute before a moment ended."""
        return max((c.end_seconds for c in self.computed(rank, before)), default=0.0)


def _maker(i: Interval) -> int:
    """The stage that makes what a message carries."""
    if i.stream == "send":
        return i.stage
    return i.stage - 1 if i.op is Op.RECV_F else i.stage + 1


def critical_path(timeline: Timeline) -> tuple[Segment, ...]:
    """The chain of intervals that ends last, each waiting for the one before; it covers the step.

    A reduction counts from the end of the compute that hides it. `overhead` is time between
    intervals, and outside all.
    """
    walk = _Walk(timeline)
    segments: list[Segment] = []
    now, seen = timeline.step_seconds, set[int]()
    gates = walk.latest(timeline.intervals, now)
    while gates:
        current = _likeliest(gates, walk.tolerance)
        seen.add(id(current))
        start = current.start_seconds
        if current.op is Op.REDUCE_GRAD:
            start = max(start, walk.end_of_compute(current.rank, current.end_seconds))
        end = min(current.end_seconds, now)
        pieces = ((end, now, "overhead"), (start, end, _PART.get(current.op, "transfers")))
        segments += [
            Segment(rank=current.rank, part=part, start_seconds=a, end_seconds=b)
            for a, b, part in pieces
            if a < b
        ]
        now = min(start, end)
        gates = [g for g in walk.gates(_from(current, now)) if id(g) not in seen]
    if now > 0:
        rank = segments[-1].rank if segments else 0
        segments.append(Segment(rank=rank, part="overhead", start_seconds=0.0, end_seconds=now))
    return tuple(reversed(segments))


def _from(interval: Interval, start: float) -> Interval:
    return replace(interval, start_seconds=start)


def _likeliest(gates: Sequence[Interval], tolerance: float) -> Interval:
    """The first of those that end last."""
    end = max(g.end_seconds for g in gates)
    return next(g for g in gates if g.end_seconds >= end - tolerance)


def parts(timeline: Timeline) -> dict[str, float]:
    """Seconds of the critical path by kind, in the order of PARTS; they add up to the step.

    Of the path's forwards and backwards, as much as the busiest rank computes is `compute`: no
    schedule can do without it. The rest is `bubble`: the pipeline filling, draining and waiting.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    for s in critical_path(timeline):
        seconds[s.part] += s.end_seconds - s.start_seconds
    busy: dict[int, float] = defaultdict(float)
    for i in timeline.intervals:
        if _PART.get(i.op) == "compute":
            busy[i.rank] += i.end_seconds - i.start_seconds
    needed = min(seconds["compute"], max(busy.values(), default=0.0))
    seconds["bubble"] = seconds["compute"] - needed
    seconds["compute"] = needed
    return seconds
