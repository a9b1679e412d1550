"""Improves an order by simulated annealing (Kirkpatrick et al. 1983): small random changes, of
which those that make it slower are kept now and then, ever more rarely."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf
from random import Random

from meshwright.program.codes import B, Codes, F, I, W
from meshwright.program.work import Work, group_ends, most_held, play
from meshwright.stopping import raise_if_stopped

REACH = 4
"""Places by which an action is moved at most."""

WARMTH = 0.02
"""A change that adds this share of the best order's seconds is kept with probability 1 / e at
first. The probability falls to zero at the end."""

LEVEL = 0.2
"""Weight of the mean of the groups' ends beside the last end: an order that ends earlier on most
groups may lead to a faster one."""

Score = tuple[float, float]
"""End of the last group, and the mean of the groups' ends."""


def refined(work: Work, codes: Sequence[Codes], tries: int) -> tuple[float, list[Codes]]:
    """Changes an order that fits `steps` times at random. Returns the seconds of the best order met
    on the way, and that order: the same every time."""
    random = Random(0)
    now = [list(own) for own in codes]
    best, score = now, _score(work, now)
    least = score
    for turn in range(tries):
        raise_if_stopped()
        g = random.randrange(len(now))
        own = _changed(now[g], random)
        if own is None or most_held(work, own) > work.room[g] or not _in_order(own):
            continue
        changed = [own if k == g else other for k, other in enumerate(now)]
        other_score = _score(work, changed)
        warmth = WARMTH * least[0] * (1 - turn / tries)
        if other_score <= score or random.random() < exp(_worse(score, other_score) / -warmth):
            now, score = changed, other_score
            if score < least:
                best, least = now, score
    return least[0], best


def _worse(one: Score, other: Score) -> float:
    """Returns the seconds by which the second order is worse than the first."""
    return max(other[0] - one[0] + LEVEL * (other[1] - one[1]), 0.0)


def _score(work: Work, codes: Sequence[Codes]) -> Score:
    ends = play(work, codes)
    if ends is None:
        return inf, inf
    last = group_ends(work, ends)
    return max(last), sum(last) / len(last)


def _changed(own: Codes, random: Random) -> Codes | None:
    """Moves an action, cuts a backward in two, or joins two parts of one."""
    k = random.randrange(len(own))
    code, kind = own[k], own[k] & 3
    if kind == B and random.random() < 0.5:
        return [*own[:k], code - B + I, code - B + W, *own[k + 1 :]]
    if kind == I and random.random() < 0.2:
        return _joined(own, k)
    to = k + random.randint(-REACH, REACH)
    if to == k or not 0 <= to < len(own) or own[to] == code:
        return None
    rest = own[:k] + own[k + 1 :]
    return [*rest[:to], code, *rest[to:]]


def _joined(own: Codes, k: int) -> Codes | None:
    """Joins the input part of a backward at `k` with the weight part of its micro-batch: one B, at
    `k`."""
    i, w = own[k], own[k] - I + W
    turn = own[:k].count(i)
    at, seen = k, -1
    for at in range(k + 1, len(own)):
        seen += own[at] == w
        if seen + own[:k].count(w) == turn:
            break
    return [*own[:k], i - I + B, *own[k + 1 : at], *own[at + 1 :]]


def _in_order(own: Codes) -> bool:
    """True if every backward follows its forward, and every weight part its input part."""
    stages = max(own) // 4 + 1
    ahead, lag = [0] * stages, [0] * stages
    for code in own:
        kind, s = code & 3, code >> 2
        if kind == F:
            ahead[s] += 1
        elif kind == W:
            lag[s] -= 1
            if lag[s] < 0:
                return False
        else:
            ahead[s] -= 1
            lag[s] += kind == I
            if ahead[s] < 0:
                return False
    return True
