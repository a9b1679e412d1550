"""Breaks the seconds of a step down by kind, along its critical path."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter

from meshwright.program.instructions import Instruction
from meshwright.program.operations import Op, completing
from meshwright.program.timeline import Interval, Timeline
from meshwright.records import record
from meshwright.simulate.simulated_step import Executed, SimulatedStep

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


class InOrder:
    """Holds what was carried out, such as by one rank or channel, with ends that do not decrease as
    a rule.

    It finds what ended last before a moment by bisection.
    """

    def __init__(self, every: Sequence[Executed]) -> None:
        self.every = every
        self.ends = [ended for _, _, _, ended in every]
        self.in_order = self.ends == sorted(self.ends)

    def latest(self, before: float, tolerance: float) -> Sequence[Executed]:
        """Returns what ended last, at or before a moment."""
        if not self.in_order:  # a measured step may have any order
            return latest(self.every, before, tolerance)
        last = bisect_right(self.ends, before + tolerance)
        if not last:
            return []
        first = bisect_left(self.ends, self.ends[last - 1] - tolerance, 0, last)
        return self.every[first:last]


def latest(every: Iterable[Executed], before: float, tolerance: float) -> list[Executed]:
    """Returns what ended last, at or before a moment."""
    ended = [e for e in every if e[3] <= before + tolerance]
    end = max((e[3] for e in ended), default=0.0)
    return [e for e in ended if e[3] >= end - tolerance]


@dataclass(slots=True)
class _Done:
    """Holds what a rank did besides reductions."""

    computed: list[Executed] = field(default_factory=list)
    received: list[Executed] = field(default_factory=list)
    norm: list[Executed] = field(default_factory=list)
    sent: list[Executed] = field(default_factory=list)


@dataclass(slots=True)
class _LookedUp:
    """Holds what a rank computed and received, by what one looks it up."""

    makers: dict[tuple[int, int | None], list[Executed]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """What was computed, by stage and micro-batch."""
    reads: dict[tuple[Op, int, int | None], list[Executed]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """What was received, by operation, stage and micro-batch."""
    channels: dict[tuple[Op, int | None], InOrder] = field(default_factory=dict)
    """The same by operation and the rank that sends."""
    sent: InOrder = field(default_factory=lambda: InOrder(()))
    """What was sent."""


class _CriticalPath:
    """Indexes a step for a walk back along its critical path, each rank when the walk comes to
    it."""

    def __init__(self, step: Timeline | SimulatedStep) -> None:
        self.tolerance = 1e-9 * step.step_seconds
        self.does, self.every = _as_executed(step)
        by_rank: dict[int, list[Executed]] = defaultdict(list)
        for each in self.every:
            by_rank[each[0]].append(each)
        self.ranks: dict[int, _Done] = defaultdict(_Done)
        sums: list[Executed] = []
        for rank, own in sorted(by_rank.items()):
            own.sort(key=_begin)
            kinds = [_kind(i.op) for i in self.does[rank]]
            self.ranks[rank] = _Done(
                computed=[each for each in own if kinds[each[1]] == "compute"],
                received=[each for each in own if kinds[each[1]] == "receive"],
                sent=[each for each in own if kinds[each[1]] == "send"],
                norm=[each for each in own if kinds[each[1]] == "norm"][-1:],
            )
            sums += (each for each in own if kinds[each[1]] == "sum")
        self.reductions = sorted(sums, key=_begin)
        self.compute = {
            rank: InOrder(own.computed) for rank, own in self.ranks.items() if own.computed
        }
        self.known: dict[int, _LookedUp] = {}
        self.measured = isinstance(step, Timeline) and step.source == "measured"

    def indexed(self, rank: int) -> _LookedUp:
        """Returns the index of a rank."""
        if rank in self.known:
            return self.known[rank]
        index = self.known[rank] = _LookedUp()
        for each in self.ranks[rank].computed:
            i = self.does[rank][each[1]]
            index.makers[i.stage, i.micro_batch].append(each)
        channels: dict[tuple[Op, int | None], list[Executed]] = defaultdict(list)
        for each in self.ranks[rank].received:
            i = self.does[rank][each[1]]
            index.reads[i.op, i.stage, i.micro_batch].append(each)
            channels[i.op, i.peer].append(each)
        index.channels = {key: InOrder(own) for key, own in channels.items()}
        index.sent = InOrder(sorted(self.ranks[rank].sent, key=lambda each: each[3]))
        return index

    def latest(self, every: Iterable[Executed], before: float) -> list[Executed]:
        """Returns what ended last, at or before a moment."""
        return latest(every, before, self.tolerance)

    def computed(self, rank: int, before: float) -> Sequence[Executed]:
        """Returns what a rank computed last before a moment."""
        own = self.compute.get(rank)
        return own.latest(before, self.tolerance) if own else ()

    def gates(self, rank: int, i: Instruction | Interval, before: float) -> list[Executed]:
        """Returns what may have kept something from beginning before a moment; of those with equal
        ends, the likelier comes first."""
        own = self.computed(rank, before)
        if i.op.awaits == "all":
            reductions = self.latest(self.reductions, before)
            reductions.sort(key=lambda r: -self.end_of_compute(r[0], before))
            return [*own, *self.everyones(before), *reductions]
        if i.op.awaits == "own":
            sums = [r for r in self.reductions if r[0] == rank]
            ends = (self.ranks[rank].norm, sums)
            return [*own, *(gate for group in ends for gate in self.latest(group, before))]
        if i.op.stream == "compute":
            read = i.op.reads
            reads = self.read((read, *completing(read)) if read else (), rank, i, before)
            return [*own, *reads, *self.waited([*own, *reads], rank, before)]
        if i.op.blocks and i.op.reads:
            return [*own, *self.read((i.op.reads,), rank, i, before)]
        if i.op.kind == "collective":
            # It may wait for an earlier reduction for which another rank was late.
            return [*own, *self.everyones(before)]
        if i.peer is None:
            return list(own)
        source, target = (i.peer, rank) if i.op.stream == "receive" else (rank, i.peer)
        made = self.indexed(source).makers.get((_maker(i), i.micro_batch), ())
        channel = self.indexed(rank).channels.get((i.op, i.peer))
        does = self.does[source]
        return [
            *self.latest((c for c in made if does[c[1]].op in _MAKES[i.op]), before),
            *(channel.latest(before, self.tolerance) if channel else ()),
            *self.computed(target, before),
        ]

    def waited(self, gates: Sequence[Executed], rank: int, before: float) -> Sequence[Executed]:
        """Returns what a rank sent last, if it computed nothing although all gates were open: in a
        simulated step it waited for the message."""
        if self.measured or any(ended >= before - self.tolerance for _, _, _, ended in gates):
            return ()
        return self.indexed(rank).sent.latest(before, self.tolerance)

    def read(
        self, kinds: Iterable[Op], rank: int, i: Instruction | Interval, before: float
    ) -> list[Executed]:
        """Returns what came last, before a moment, of the receives that an instruction reads."""
        reads = self.indexed(rank).reads
        found = (each for op in kinds for each in reads.get((op, i.stage, i.micro_batch), ()))
        return self.latest(found, before)

    def everyones(self, before: float) -> list[Executed]:
        """Returns what was computed last before a moment, on whichever ranks."""
        return self.latest(
            (c for rank in self.compute for c in self.computed(rank, before)), before
        )

    def end_of_compute(self, rank: int, before: float) -> float:
        """Returns the end of a rank's last compute before a moment."""
        return max((ended for _, _, _, ended in self.computed(rank, before)), default=0.0)


_begin = itemgetter(2)


@cache
def _kind(op: Op) -> str:
    """Returns how the walk looks up an operation; empty for those that it never comes to so."""
    if op.stream in ("compute", "receive", "send"):
        return op.stream
    return "sum" if op.of_gradients else "norm" if op.awaits == "all" else ""


def _as_executed(
    step: Timeline | SimulatedStep,
) -> tuple[Mapping[int, Sequence[Instruction | Interval]], Sequence[Executed]]:
    """Returns what every rank did, and when, that of each rank in some order of its own."""
    if isinstance(step, SimulatedStep):
        return dict(enumerate(step.program.ranks)), step.executed
    does: dict[int, list[Interval]] = defaultdict(list)
    every = []
    for i in step.intervals:
        every.append((i.rank, len(does[i.rank]), i.start_seconds, i.end_seconds))
        does[i.rank].append(i)
    return does, every


def _maker(i: Instruction | Interval) -> int:
    """Returns the stage that produces what a message carries."""
    if i.op.stream == "send":
        return i.stage
    return i.stage - 1 if i.op is Op.RECV_F else i.stage + 1


def critical_path(step: Timeline | SimulatedStep) -> tuple[PathSegment, ...]:
    """Returns the chain of instructions that ends last, each waiting for the one before; it covers
    the step.

    A reduction counts from the end of the compute that hides it. Time between the instructions, and
    outside all of them, is `overhead`.
    """
    return _segments(_CriticalPath(step), step.step_seconds)


def _segments(walk: _CriticalPath, step_seconds: float) -> tuple[PathSegment, ...]:
    segments: list[PathSegment] = []
    now, seen = step_seconds, set[tuple[int, int]]()
    # As in a timeline: in the order of the begins, and of ranks.
    gates = sorted(walk.latest(walk.every, now), key=itemgetter(2, 0))
    while gates:
        rank, index, start, ended = _likeliest(gates, walk.tolerance)
        seen.add((rank, index))
        i = walk.does[rank][index]
        if i.op.kind == "collective" and not i.op.blocks:
            start = max(start, walk.end_of_compute(rank, ended))
        end = min(ended, now)
        pieces = ((end, now, "overhead"), (start, end, i.op.part))
        segments += [
            PathSegment(rank=rank, part=part, start_seconds=a, end_seconds=b)
            for a, b, part in pieces
            if a < b
        ]
        now = min(start, end)
        gates = [gate for gate in walk.gates(rank, i, now) if gate[:2] not in seen]
    if now > 0:
        rank = segments[-1].rank if segments else 0
        segments.append(PathSegment(rank=rank, part="overhead", start_seconds=0.0, end_seconds=now))
    return tuple(reversed(segments))


def _likeliest(gates: Sequence[Executed], tolerance: float) -> Executed:
    """Returns what ended last, and the first of several; before it, its successor could not
    begin."""
    end = max(ended for _, _, _, ended in gates)
    return next(gate for gate in gates if gate[3] >= end - tolerance)


def step_breakdown(step: Timeline | SimulatedStep) -> dict[str, float]:
    """Returns the seconds of the critical path by kind, in the order of PARTS; they add up to the
    step.

    The path's forwards and backwards count as `compute` up to the compute seconds of the busiest
    rank, which no schedule can avoid. The rest of them is `bubble`: the pipeline fills, drains or
    waits.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    walk = _CriticalPath(step)
    for s in _segments(walk, step.step_seconds):
        seconds[s.part] += s.end_seconds - s.start_seconds
    busy = [
        sum(e - b for _, n, b, e in own.every if does[n].op.part == "compute")
        for own, does in ((own, walk.does[rank]) for rank, own in walk.compute.items())
    ]
    needed = min(seconds["compute"], max(busy, default=0.0))
    seconds["bubble"] = seconds["compute"] - needed
    seconds["compute"] = needed
    return seconds
