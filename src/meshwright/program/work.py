"""Describes a pipeline's work in seconds and bytes, and computes how long any order of it takes:
quickly enough to try thousands of orders.

Timing follows the rules of program/instructions.py on links that nothing else uses, so that the
simulator comes to the same seconds there.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, pairwise

from meshwright.plan.ranks import StageLayout
from meshwright.plan.spec import ScheduleName
from meshwright.program.actions import Order, single_action
from meshwright.program.compile import RECEIVES_AHEAD
from meshwright.program.operations import Op
from meshwright.program.schedules import schedule_orders
from meshwright.records import record

F, B, I, W = range(4)  # noqa: E741 - the words of schedules
OPS = (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
CODES = {op: code for code, op in enumerate(OPS)}

Codes = list[int]
"""An order as numbers, 4 x stage + F, B, I or W: every kind of work of a stage takes its
micro-batches in turn, so that they need not be named."""

Waits = list[float | None]
"""Seconds of the message that the forward or backward of each stage waits for. None means that no
message is sent: at the ends of the pipeline, and inside a group."""


@record
class Work:
    """Says what the stages of one pipeline have to do for every micro-batch, in seconds and
    bytes."""

    layout: StageLayout
    micro_batches: int
    forward: tuple[float, ...]
    """Seconds of a forward, by stage; the next three are by stage, too."""
    whole: tuple[float, ...]
    """Seconds of a backward that is not split in two."""
    inputs: tuple[float, ...]
    weights: tuple[float, ...]
    onward: tuple[float, ...]
    """Seconds of the transfer of activations to the next stage, for each cut."""
    back: tuple[float, ...]
    """Seconds of the transfer of gradients from the next stage, for each cut."""
    full: tuple[float, ...]
    """Bytes that a micro-batch keeps on each stage between forward and backward."""
    half: tuple[float, ...]
    """Bytes that it keeps on each stage between I and W."""
    room: tuple[float, ...]
    """Bytes that activations may take on each group of devices."""
    further: tuple[float, ...] = ()
    """Seconds of each further micro-batch of a weight part that follows one of the same stage: they
    are joined. Empty: as many as those of the first."""
    afterwards: tuple[float, ...] = ()
    """Seconds that each group goes on after its last action, to sum gradients; none if empty."""

    @property
    def tails(self) -> tuple[float, ...]:
        """Returns the seconds of `afterwards`, zeros if there are none."""
        return self.afterwards or (0.0,) * len(self.layout)

    @property
    def group_of(self) -> tuple[int, ...]:
        """Returns the group that holds each stage."""
        places = {s: g for g, held in enumerate(self.layout) for s in held}
        return tuple(places[s] for s in range(len(places)))

    @property
    def waits(self) -> tuple[Waits, Waits]:
        """Returns the waits of all forwards, then those of all backwards."""
        group = self.group_of
        cut = [one != other for one, other in pairwise(group)]
        onward = [wait if sent else None for wait, sent in zip(self.onward, cut, strict=True)]
        back = [wait if sent else None for wait, sent in zip(self.back, cut, strict=True)]
        return [None, *onward], [*back, None]


def to_orders(codes: Sequence[Codes]) -> tuple[Order, ...]:
    """Turns orders written as numbers into orders of actions."""
    return tuple(_to_order(own) for own in codes)


def _to_order(own: Codes) -> Order:
    forwards, backwards = Counter[int](), Counter[int]()
    waiting: defaultdict[int, deque[int]] = defaultdict(deque)
    order = []
    for code in own:
        kind, s = code & 3, code >> 2
        if kind == F:
            m = forwards[s]
            forwards[s] += 1
        elif kind == W:
            m = waiting[s].popleft()
        else:
            m = backwards[s]
            backwards[s] += 1
            if kind == I:
                waiting[s].append(m)
        order.append(single_action(OPS[kind], s, m))
    return tuple(order)


def to_codes(orders: Sequence[Order]) -> list[Codes]:
    """Turns orders of actions into numbers; a batched W becomes several single ones."""
    return [
        [4 * a.stage + CODES[a.op] for a in order for _ in range(a.last - a.first)]
        for order in orders
    ]


@lru_cache(maxsize=64)
def schedule_codes(name: ScheduleName, layout: StageLayout, micro_batches: int) -> list[Codes]:
    """Returns the order of a schedule with a rule as numbers: the same list each time, which is not
    to be changed."""
    return to_codes(schedule_orders(name, layout, micro_batches))


def fits(work: Work, codes: Sequence[Codes]) -> bool:
    """True if no group holds more than it has room for."""
    return all(most_held(work, own) <= work.room[g] for g, own in enumerate(codes))


def most_held(work: Work, own: Codes) -> float:
    """Returns the most bytes of activations that an order holds at once."""
    change = [0.0] * (4 * len(work.full))
    for s, (full, half) in enumerate(zip(work.full, work.half, strict=True)):
        change[4 * s : 4 * s + 4] = (full, -full, half - full, -half)
    held = most = 0.0
    for code in own:
        held += change[code]
        most = max(most, held)
    return most


def play(work: Work, codes: Sequence[Codes]) -> list[list[float]] | None:
    """Returns when every action ends, by group; None if some wait for ever.

    A receive is posted AHEAD actions before its reader, when the action before these ends; messages
    of one cut and direction go one after the other.
    """
    step = _Play(work, codes)
    upwards = True
    while True:
        groups = range(len(codes))
        if not any([step.advance(g) for g in (groups if upwards else reversed(groups))]):  # noqa: C419
            break
        upwards = not upwards
    if any(len(ends) < len(own) for ends, own in zip(step.ends, codes, strict=True)):
        return None
    return step.ends


def seconds(work: Work, codes: Sequence[Codes]) -> float:
    """Returns the seconds from the first action until all groups have ended; infinite if that never
    comes."""
    ends = play(work, codes)
    return max(group_ends(work, ends)) if ends is not None else float("inf")


def group_ends(work: Work, ends: Sequence[Sequence[float]]) -> list[float]:
    """Returns when each group has done all, what comes after its last action with it."""
    return [own[-1] + tail for own, tail in zip(ends, work.tails, strict=True)]


def last_backwards(
    work: Work, codes: Sequence[Codes], ends: Sequence[Sequence[float]]
) -> list[tuple[float, float]]:
    """Returns when the last backward of every stage begins and ends, or the part of it that
    computes the gradients of the weights, if it is in two parts."""
    durations, *_ = _durations(work)
    spans = [(0.0, 0.0)] * len(work.forward)
    for own, ended in zip(codes, ends, strict=True):
        for code, end in zip(own, ended, strict=True):
            if code & 3 in (B, W):
                spans[code >> 2] = end - durations[code], end
    return spans


@lru_cache(maxsize=1)
def _durations(work: Work) -> tuple[list[float], list[float], tuple[Waits, Waits]]:
    """Returns the seconds of every action, by its code, the same where it follows one of its code,
    and what each stage waits for; they are the same for thousands of orders."""
    parts = (work.forward, work.whole, work.inputs)
    alone, joined = (
        list(chain.from_iterable(zip(*parts, weights, strict=True)))
        for weights in (work.weights, work.further or work.weights)
    )
    return alone, joined, work.waits


class _Play:
    """Plays the orders of all groups of a pipeline, and keeps when each of their actions ends."""

    def __init__(self, work: Work, codes: Sequence[Codes]) -> None:
        stages = len(work.forward)
        self.codes = codes
        self.ends: list[list[float]] = [[] for _ in codes]
        self.last = stages - 1
        self.took, self.joined, (self.wait_f, self.wait_b) = _durations(work)
        self.forwards: list[list[float]] = [[] for _ in range(stages)]
        self.backwards: list[list[float]] = [[] for _ in range(stages)]
        self.free_f, self.free_b = [0.0] * stages, [0.0] * stages

    def advance(self, group: int) -> bool:
        """Plays a group until it has to wait for another; returns True if it advanced."""
        own, ends = self.codes[group], self.ends[group]
        began = k = len(ends)
        now = ends[-1] if ends else 0.0
        while k < len(own):
            code = own[k]
            kind, s = code & 3, code >> 2
            if kind == F:
                done, made = self.forwards[s], self.forwards[s - 1] if s else None
                wait, free = self.wait_f[s], self.free_f
            elif kind == W:
                done, made, wait, free = None, None, None, self.free_b
            else:
                done, made = self.backwards[s], self.backwards[s + 1] if s < self.last else None
                wait, free = self.wait_b[s], self.free_b
            if made is not None:
                assert done is not None
                m = len(done)
                if m >= len(made):
                    break
                ready = made[m]
                if wait is not None:
                    posted = ends[k - RECEIVES_AHEAD - 1] if k > RECEIVES_AHEAD else 0.0
                    ready = max(ready, posted, free[s]) + wait
                    free[s] = ready
                now = max(now, ready)
            now += self.joined[code] if k and own[k - 1] == code else self.took[code]
            ends.append(now)
            if done is not None:
                done.append(now)
            k += 1
        return k > began
