"""Which layers each stage of a chain takes: exact, by bottleneck and shortest path.

Letters: S stages, L layers, a stage's first layer, b one past its last. A `loads` array of shape
[S, L + 1, L + 1] holds the seconds that stage s needs per micro-batch for layers [a, b); infinity
forbids the range (empty, or too large for the stage's memory).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ROUNDING = 1e-13
"""Cuts whose objectives differ by less, relatively, are equal: the smaller bottleneck is kept."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A way to cut the chain."""

    bounds: tuple[int, ...]
    """S + 1 layer indices: stage s holds [bounds[s], bounds[s + 1])."""
    seconds: float
    """The objective of `assign`."""
    slowest: float
    """Seconds per micro-batch of the slowest stage."""


def chain_loads(times_SL: Array) -> Array:
    """Loads [S, L + 1, L + 1] from the seconds of every layer on every stage; empty ranges are
    forbidden."""
    stages, layers = times_SL.shape
    prefix = np.zeros((stages, layers + 1))
    np.cumsum(times_SL, axis=1, out=prefix[:, 1:])
    loads = prefix[:, None, :] - prefix[:, :, None]
    loads[:, np.tri(layers + 1, dtype=bool)] = np.inf
    return loads


def forbid_beyond(loads: Array, need: Array, capacity: Array) -> Array:
    """Loads in which every range whose need exceeds the stage's capacity (bytes, [S]) is
    forbidden."""
    return np.where(need <= capacity[:, None, None], loads, np.inf)


def least_worst(values: Array) -> tuple[tuple[int, ...], float] | None:
    """The cuts whose largest value over the stages is smallest, and that value; None if every way
    to cut meets a forbidden range."""
    stages, size, _ = values.shape
    best = np.full(size, np.inf)
    best[0] = -np.inf
    choice = np.zeros((stages, size), dtype=np.intp)
    for s in range(stages):
        worst = np.maximum(best[:, None], values[s])
        choice[s] = worst.argmin(axis=0)
        best = worst.min(axis=0)
    if not np.isfinite(best[-1]):
        return None
    return _trace(choice), float(best[-1])


def _trace(choice: NDArray[np.intp]) -> tuple[int, ...]:
    bounds = [choice.shape[1] - 1]
    for row in choice[::-1]:
        bounds.append(int(row[bounds[-1]]))
    return tuple(reversed(bounds))


def _shortest(loads: Array, cuts: Array, bottleneck: float) -> tuple[tuple[int, ...], float, float]:
    """Cuts with the least sum of loads and boundary seconds among those where no stage takes
    longer than `bottleneck`; that sum; and the slowest stage's seconds."""
    stages, size, _ = loads.shape
    allowed = np.where(loads <= bottleneck, loads, np.inf)
    cost = np.full(size, np.inf)
    cost[0] = 0.0
    choice = np.zeros((stages, size), dtype=np.intp)
    for s in range(stages):
        start = cost + cuts[s - 1] if s else cost
        total = start[:, None] + allowed[s]
        choice[s] = total.argmin(axis=0)
        cost = total[choice[s], np.arange(size)]
    bounds = _trace(choice)
    slowest = max(float(loads[s, bounds[s], bounds[s + 1]]) for s in range(stages))
    return bounds, float(cost[-1]), slowest


def assign(loads: Array, cuts: Array, micro_batches: int) -> Assignment | None:
    """The cuts that minimise

        (M - 1) * slowest stage + sum of the stages + boundary seconds at the cuts

    (AMP, equation of the pipeline's latency), where `cuts[s, l]` is what a cut before layer l costs
    between stages s and s + 1. None if nothing fits.

    Exact: the sum D(beta) under a bottleneck beta only falls as beta grows, so between two solved
    bottlenecks nothing can beat (M - 1) * smallest beta + D(largest); such an interval is dropped
    whole or halved.
    """
    tightest = least_worst(loads)
    if tightest is None:
        return None
    weight = micro_batches - 1
    bounds, total, slowest = _shortest(loads, cuts, tightest[1])
    best = Assignment(bounds=bounds, seconds=weight * slowest + total, slowest=slowest)
    bounds, free, slowest = _shortest(loads, cuts, np.inf)
    if weight * slowest + free < best.seconds * (1 - ROUNDING):
        best = Assignment(bounds=bounds, seconds=weight * slowest + free, slowest=slowest)
    ceiling = min(slowest, (best.seconds - free) / weight) if weight else 0.0
    between = loads[(loads > tightest[1]) & (loads < ceiling)]
    betas = np.unique(between)
    intervals = [(0, len(betas), free)]
    while intervals:
        low, high, floor = intervals.pop()
        if low >= high or weight * betas[low] + floor >= best.seconds:
            continue
        middle = (low + high) // 2
        bounds, total, slowest = _shortest(loads, cuts, float(betas[middle]))
        if weight * slowest + total < best.seconds * (1 - ROUNDING):
            best = Assignment(bounds=bounds, seconds=weight * slowest + total, slowest=slowest)
        intervals.append((middle + 1, high, floor))
        intervals.append((low, int(np.searchsorted(betas, slowest)), total))
    return best
