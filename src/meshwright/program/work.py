"""Describes a pipeline's work in seconds and bytes, and computes how long any order of it takes:
quickly enough to try thousands of orders.

Timing follows the rules of program/instructions.py on links that nothing else uses, so that the
simulator comes to the same seconds there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, pairwise

from meshwright.plan.ranks import StageLayout
from meshwright.program.codes import B, Codes, W, peak
from meshwright.program.compile import RECEIVES_AHEAD
from meshwright.records import record

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


def fits(work: Work, codes: Sequence[Codes]) -> bool:
    """True if no group holds more than it has room for."""
    return all(most_held(work, own) <= work.room[g] for g, own in enumerate(codes))


def most_held(work: Work, own: Codes) -> float:
    """Returns the most bytes of activations that an order holds at once."""
    changes = [0.0] * (4 * len(work.full))
    for s, (full, half) in enumerate(zip(work.full, work.half, strict=True)):
        changes[4 * s : 4 * s + 4] = (full, -full, half - full, -half)
    return max(peak(own, changes), 0.0)


def play(work: Work, codes: Sequence[Codes]) -> list[list[float]] | None:
    """Returns when every action ends, by group; None if some wait for ever.

    A receive is posted AHEAD actions before its reader, when the action before these ends; messages
    of one cut and direction go one after the other.
    """
    steps = _steps(work)
    every: list[list[float]] = [[] for _ in codes]
    groups = list(zip(codes, every, strict=True))
    moved = True
    while moved:
        moved = False
        for own, ends in groups:  # each until it has to wait for another
            began = k = len(ends)
            now = ends[-1] if ends else 0.0
            while k < len(own):
                code = own[k]
                made, done, wait, free, took, again = steps[code]
                if made is not None:
                    m = len(done)
                    if m >= len(made):
                        break
                    ready = made[m]
                    if wait is not None:
                        posted = ends[k - RECEIVES_AHEAD - 1] if k > RECEIVES_AHEAD else 0.0
                        if posted > ready:
                            ready = posted
                        if free[0] > ready:
                            ready = free[0]
                        ready += wait
                        free[0] = ready
                    if ready > now:
                        now = ready
                now += again if k and own[k - 1] == code else took
                ends.append(now)
                done.append(now)
                k += 1
            moved = moved or k > began
        groups.reverse()
    whole = all(len(ends) == len(own) for own, ends in groups)
    return every if whole else None


Step = tuple[list[float] | None, list[float], float | None, list[float], float, float]
"""It holds when its source has made what each micro-batch waits for (None if there is no source),
its own ends, the seconds of the message (None if none is sent), when the link is free again, its
own seconds, and those where it follows one of its code."""


def _steps(work: Work) -> list[Step]:
    """Returns what it takes to play each code."""
    stages = len(work.forward)
    took, (wait_f, wait_b) = _durations(work)
    again = work.further or work.weights
    forwards: list[list[float]] = [[] for _ in range(stages)]
    backwards: list[list[float]] = [[] for _ in range(stages)]
    steps: list[Step] = []
    for s in range(stages):
        forward, whole, inputs, weights = took[4 * s : 4 * s + 4]
        free = [0.0]
        before = forwards[s - 1] if s else None
        after = backwards[s + 1] if s < stages - 1 else None
        steps += (
            (before, forwards[s], wait_f[s], [0.0], forward, forward),
            (after, backwards[s], wait_b[s], free, whole, whole),
            (after, backwards[s], wait_b[s], free, inputs, inputs),
            (None, [], None, [], weights, again[s]),
        )
    return steps


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
    durations, _ = _durations(work)
    spans = [(0.0, 0.0)] * len(work.forward)
    for own, ended in zip(codes, ends, strict=True):
        for code, end in zip(own, ended, strict=True):
            if code & 3 in (B, W):
                spans[code >> 2] = end - durations[code], end
    return spans


@lru_cache(maxsize=1)
def _durations(work: Work) -> tuple[list[float], tuple[Waits, Waits]]:
    """Returns the seconds of every action, by its code, and what each stage waits for; they are the
    same for thousands of orders."""
    each = zip(work.forward, work.whole, work.inputs, work.weights, strict=True)
    return list(chain.from_iterable(each)), work.waits
