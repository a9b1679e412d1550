"""List scheduling: whenever a group of devices is free, it takes the most urgent work at hand."""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

from meshwright.program.posting import AHEAD
from meshwright.program.work import B, Codes, F, I, W, Work
from meshwright.records import record


@record
class Rule:
    """What is urgent."""

    ahead: tuple[int, ...]
    """By stage: forwards that may be ahead of the backwards."""
    lag: tuple[int, ...]
    """By stage: weight parts that may be behind the input parts before they come first."""
    patience: float
    """A weight part is begun if what comes next waits at most so much of its length for it."""
    forward_first: bool
    """Of a forward and a backward that are both at hand, which goes first."""
    split: int
    """The last so many backwards of each stage are in two parts, where there is memory for what
    lies between them."""


def listed(work: Work, rule: Rule) -> tuple[float, list[Codes]] | None:
    """The order that a rule leads to, after its seconds; None if memory stops it."""
    state = _Listing(work, rule)
    state.run()
    total = sum(len(codes) for codes in state.codes)
    wanted = len(work.forward) * work.micro_batches * 2 + sum(state.weights)
    return (max(state.now), state.codes) if total == wanted else None


class _Listing:
    def __init__(self, work: Work, rule: Rule) -> None:
        self.work, self.rule = work, rule
        self.stages, self.count = len(work.forward), work.micro_batches
        self.group = work.group_of
        groups = len(work.layout)
        self.seconds = (work.forward, work.whole, work.inputs, work.weights)
        self.keeps = tuple(
            each
            for full, half in zip(work.full, work.half, strict=True)
            for each in (full, -full, half - full, -half)
        )
        self.codes: list[Codes] = [[] for _ in range(groups)]
        self.now = [0.0] * groups
        self.before = [deque([0.0] * AHEAD, AHEAD) for _ in range(groups)]
        """When the AHEAD actions before the last one ended: receives of the next are posted when
        the first of these did."""
        self.held = [0.0] * groups
        self.forwards: list[list[float]] = [[] for _ in range(self.stages)]
        self.backwards: list[list[float]] = [[] for _ in range(self.stages)]
        self.halves, self.weights = [0] * self.stages, [0] * self.stages
        self.free_f, self.free_b = [0.0] * self.stages, [0.0] * self.stages
        self.events: list[tuple[float, int]] = [(0.0, g) for g in range(groups)]

        self.back = I if rule.split else B
        self.hurry = 1 - rule.patience
        self.first = 0 if rule.forward_first else 2 * self.stages
        """Urgency of a forward on stage 0; that of a backward is the number of stages."""

    def run(self) -> None:
        """Let groups choose in the order of time until nobody has anything left."""
        while self.events:
            at, g = heappop(self.events)
            if at >= self.now[g]:
                self.choose(g, at)

    def choose(self, g: int, at: float) -> None:
        """The next action of a group that is free, or when to look again."""
        best, urgency, coming = -1, float("inf"), float("inf")
        behind, late = 0, -1
        for s in self.work.layout[g]:
            lag = self.halves[s] - self.weights[s]
            if lag > behind:
                behind, late = lag, s
            done, back = len(self.forwards[s]), len(self.backwards[s])
            if done > back:
                ready = self.ready(s, self.back, g)
                if ready > at:
                    coming = min(coming, ready)
                elif self.stages - s < urgency:
                    best, urgency = 4 * s + self.backward(s), self.stages - s
            if done < self.count and done - back < self.rule.ahead[s]:
                ready = self.ready(s, F, g)
                if ready > at:
                    coming = min(coming, ready)
                elif (
                    self.first - s < urgency
                    and self.held[g] + self.work.full[s] <= self.work.room[g]
                ):
                    best, urgency = 4 * s + F, self.first - s
        if late >= 0 and self.is_time(late, behind, at, coming if best < 0 else at):
            best = 4 * late + W
        if best >= 0:
            self.take(g, best, at)
        elif coming < float("inf"):
            heappush(self.events, (coming, g))

    def is_time(self, s: int, behind: int, at: float, coming: float) -> bool:
        """Whether a weight part goes first: it is far behind, or is done before what is coming."""
        done = at + self.work.weights[s] * self.hurry
        return behind > self.rule.lag[s] or (at < coming and done <= coming)

    def backward(self, s: int) -> int:
        """In two parts, if that is the rule and there is room; whole on the first stage once its
        group has no forward left, as nobody waits for it then."""
        g = self.group[s]
        alone = s == 0 and len(self.forwards[max(self.work.layout[g])]) == self.count
        if alone or len(self.backwards[s]) < self.count - self.rule.split:
            return B
        grows = self.work.half[s] - self.work.full[s]
        return I if self.held[g] + grows <= self.work.room[g] else B

    def ready(self, s: int, kind: int, g: int) -> float:
        """When what the work needs is there; infinite while nobody has begun to make it."""
        if kind == F:
            done, made = self.forwards[s], self.forwards[s - 1] if s else None
            source, free = s - 1, self.free_f[s]
        else:
            last = s == self.stages - 1
            done, made = self.backwards[s], None if last else self.backwards[s + 1]
            source, free = s + 1, self.free_b[s]
        if made is None:
            return 0.0
        m = len(done)
        if m >= len(made):
            return float("inf")
        if self.group[source] == g:
            return made[m]
        wait = self.work.onward[s - 1] if kind == F else self.work.back[s]
        return max(made[m], self.before[g][0], free) + wait

    def take(self, g: int, code: int, at: float) -> None:
        """Do an action, and tell the groups that wait for what it makes."""
        kind, s = code & 3, code >> 2
        self.held[g] += self.keeps[code]
        self.halves[s] += kind == I
        took = self.seconds[kind][s]
        end = at + took
        if kind == W:
            self.weights[s] += 1
        else:
            source = s - 1 if kind == F else s + 1
            if 0 <= source < self.stages and self.group[source] != g:
                (self.free_f if kind == F else self.free_b)[s] = self.ready(s, kind, g)
            (self.forwards if kind == F else self.backwards)[s].append(end)
            target = s + 1 if kind == F else s - 1
            if 0 <= target < self.stages and self.group[target] != g:
                other = self.group[target]
                heappush(self.events, (max(end, self.now[other]), other))
        self.codes[g].append(code)
        self.before[g].append(self.now[g])
        self.now[g] = end
        heappush(self.events, (end, g))
