"""Schedules work by lists: whenever a group of devices is free, it takes the most urgent work at
hand."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from math import inf
from operator import add

from meshwright.program.codes import B, Codes, F, I, W
from meshwright.program.compile import RECEIVES_AHEAD
from meshwright.program.work import Work
from meshwright.records import record

ROUNDING = 1e-9
"""Relative excess over a limit that may be due to the order in which seconds are added up."""

Need = tuple[list[float], list[float] | None, float | None, list[float]]
"""It holds the ends of a stage's forwards or backwards, those of the source of their inputs (None
if there is no source), the seconds of the message (None if it is of the same group), and when the
link is free again."""


@record
class Rule:
    """Says which of the actions at hand is the most urgent."""

    ahead: tuple[int, ...]
    """Number of forwards that may be ahead of the backwards, for each stage."""
    lag: tuple[int, ...]
    """Number of weight parts that may be left to do before they go first, for each stage."""
    patience: float
    """A weight part is begun if what comes next waits at most so much of its length for it."""
    forward_first: bool
    """True if a forward goes before a backward when both could begin."""
    split: int
    """This many last backwards of each stage are in two parts, where there is memory for what
    lies between them."""


Effect = tuple[float, float, float, int, int, list[float], list[float] | None, int]
"""What an action does, by its code: the bytes that it keeps, its seconds, those by which it brings
its group nearer to its end, its kind and stage, the ends that it adds to, when its link is free
again (None if it waits for no message), and the group that waits for it (-1 for none)."""


def listed(work: Work, rule: Rule, limit: float = inf) -> tuple[float, list[Codes]] | None:
    """Returns the seconds of the order that a rule leads to, and the order; None if memory stops
    it, or as soon as it is bound to take more than `limit` seconds."""
    state = _Listing(work, rule, limit)
    state.run()
    total = sum(len(codes) for codes in state.codes)
    wanted = len(work.forward) * work.micro_batches * 2 + state.halves
    if total != wanted:
        return None
    return max(map(add, state.now, work.tails)), state.codes


class _Listing:
    """Plays a pipeline in which every group chooses its next action by a rule."""

    def __init__(self, work: Work, rule: Rule, limit: float = inf) -> None:
        self.work, self.rule = work, rule
        self.limit = limit * (1 + ROUNDING)
        self.stages, self.count = len(work.forward), work.micro_batches
        self.group, self.layout = work.group_of, work.layout
        self.full, self.room, self.ahead = work.full, work.room, rule.ahead
        groups = len(work.layout)
        self.further = work.further or work.weights
        self.codes: list[Codes] = [[] for _ in range(groups)]
        self.now = [0.0] * groups
        self.before = [deque([0.0] * RECEIVES_AHEAD, RECEIVES_AHEAD) for _ in range(groups)]
        """The time when the AHEAD actions before the last one ended: receives of the next are
        posted when the first of these did."""
        self.held = [0.0] * groups
        self.forwards: list[list[float]] = [[] for _ in range(self.stages)]
        self.backwards: list[list[float]] = [[] for _ in range(self.stages)]
        self.halves, self.lags = 0, [0] * self.stages
        """Backwards in two parts so far, and of each stage those whose weight part is left to
        do."""
        onward, back = work.waits
        before, after = [None, *self.forwards[:-1]], [*self.backwards[1:], None]
        needs: list[tuple[int, Need, Need]] = [
            (s, (done, made, wait, [0.0]), (undone, there, way, [0.0]))
            for s, (done, made, wait, undone, there, way) in enumerate(
                zip(self.forwards, before, onward, self.backwards, after, back, strict=True)
            )
        ]
        self.held_by = [[needs[s] for s in held] for held in work.layout]
        """What the forwards and the backwards of every stage need, by group."""
        self.events: list[tuple[float, int]] = [(0.0, g) for g in range(groups)]
        least, busy = _least_seconds(work)
        self.effects = self.effects_of(needs, least)
        self.left = [*map(add, busy, work.tails)]
        """Seconds that each group still needs at least."""

        self.hurry = tuple(each * (1 - rule.patience) for each in work.weights)
        """Seconds of a weight part, of each stage, that what comes next need not wait for."""
        self.first = 0 if rule.forward_first else 2 * self.stages
        """Urgency of a forward on stage 0; that of a backward is the number of stages."""

    def effects_of(
        self, needs: Sequence[tuple[int, Need, Need]], least: Sequence[float]
    ) -> list[Effect]:
        """Returns the effect of every code."""
        work, found = self.work, list[Effect]()
        for s, ahead, back in needs:
            full, half = work.full[s], work.half[s]
            kept = (full, -full, half - full, -half)
            took = (work.forward[s], work.whole[s], work.inputs[s], work.weights[s])
            for kind in (F, B, I, W):
                ends, _, wait, free = ahead if kind == F else back
                target = s + 1 if kind == F else s - 1
                other = self.group[target] if 0 <= target < self.stages and kind != W else -1
                other = -1 if other == self.group[s] else other
                line = free if wait is not None else None
                own = kept[kind], took[kind], least[4 * s + kind], kind, s
                found.append((*own, ends, line, other))
        return found

    def run(self) -> None:
        """Lets groups choose in the order of time until no work is left."""
        events, now, choose = self.events, self.now, self.choose
        while events:
            at, g = heappop(events)
            if at >= now[g]:
                choose(g, at)

    def choose(self, g: int, at: float) -> None:
        """Lets a free group take its most urgent action, or look again when one can begin."""
        best, urgency, coming, arrived = -1, inf, inf, 0.0
        behind, late, lags = 0, -1, self.lags
        posted = self.before[g][0]
        for s, for_f, for_b in self.held_by[g]:
            if lags[s] > behind:
                behind, late = lags[s], s
            done, back = len(for_f[0]), len(for_b[0])
            if done > back:
                ready = _ready(for_b, back, posted)
                if ready > at:
                    coming = ready if ready < coming else coming
                elif self.stages - s < urgency:
                    best, urgency, arrived = 4 * s + self.backward(s), self.stages - s, ready
            if done < self.count and done - back < self.ahead[s]:
                ready = _ready(for_f, done, posted)
                if ready > at:
                    coming = ready if ready < coming else coming
                elif self.first - s < urgency and self.held[g] + self.full[s] <= self.room[g]:
                    best, urgency, arrived = 4 * s + F, self.first - s, ready
        if late >= 0 and self.is_time(late, behind, at, coming if best < 0 else at):
            best = 4 * late + W
        if best >= 0:
            self.take(g, best, at, arrived)
        elif coming < inf:
            heappush(self.events, (coming, g))

    def is_time(self, s: int, behind: int, at: float, coming: float) -> bool:
        """True if a weight part goes first: it is far behind, or is done before what is coming."""
        return behind > self.rule.lag[s] or (at < coming and at + self.hurry[s] <= coming)

    def backward(self, s: int) -> int:
        """Returns a backward's first part, if the rule splits it and there is room; a whole one on
        the first stage once its group has no forward left, as no other stage waits for it."""
        g = self.group[s]
        alone = s == 0 and len(self.forwards[max(self.layout[g])]) == self.count
        if alone or len(self.backwards[s]) < self.count - self.rule.split:
            return B
        grows = self.work.half[s] - self.full[s]
        return I if self.held[g] + grows <= self.room[g] else B

    def take(self, g: int, code: int, at: float, arrived: float) -> None:
        """Does an action whose input has arrived, and tells the groups that wait for what it
        makes."""
        kept, took, least, kind, s, ends, free, other = self.effects[code]
        own, events = self.codes[g], self.events
        self.held[g] += kept
        end = at + took
        if kind == W:
            self.lags[s] -= 1
            if own[-1] == code:
                end = at + self.further[s]
        else:
            if kind == I:
                self.halves += 1
                self.lags[s] += 1
            ends.append(end)
            if free is not None:
                free[0] = arrived
            if other >= 0 and self.now[other] <= end:  # else it looks again when it is done
                heappush(events, (end, other))
        own.append(code)
        self.before[g].append(self.now[g])
        self.now[g] = end
        left = self.left[g] = self.left[g] - least
        if end + left > self.limit:
            events.clear()
        else:
            heappush(events, (end, g))


def _ready(need: Need, m: int, posted: float) -> float:
    """Returns when the input of a micro-batch arrives whose receive was `posted` by then; infinite
    until its source has begun."""
    _, made, wait, free = need
    if made is None:
        return 0.0
    if m >= len(made):
        return inf
    begins = made[m]
    if wait is None:
        return begins
    if posted > begins:
        begins = posted
    return (free[0] if free[0] > begins else begins) + wait


def _least_seconds(work: Work) -> tuple[list[float], list[float]]:
    """Returns by how many seconds each code brings its group nearer to its end, and what every
    group has to do at least."""
    weights = work.further or work.weights
    back = [min(b, i + w) for b, i, w in zip(work.whole, work.inputs, weights, strict=True)]
    by_stage = zip(work.forward, back, weights, strict=True)
    least = [each for f, b, w in by_stage for each in (f, b, b - w, w)]
    count = work.micro_batches
    return least, [count * sum(work.forward[s] + back[s] for s in held) for held in work.layout]
