"""Estimates how long a pipeline works, in closed form: in a given schedule, or in the best order of
work that memory allows.

No order beats these sums, and an order made for a pipeline comes within a few percent of them:
strategies are compared by what they can do, not by one order that may not suit them. Letters: S
stages, M micro-batches, F, B, I, W seconds of a forward, a whole backward and its two parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from meshwright.cluster.topology import Resource
from meshwright.program.schedules import in_flight

Order = Literal["1f1b", "gpipe", "best"]
"""A schedule, or the best order of work that memory allows."""

LEVEL = 0.02
"""Weight of the mean over the stages beside the slowest one: of two strategies with the same
slowest stage, the one whose other stages have more time to spare is nearer to a faster one."""

Span = tuple[float, float]
"""Begin and end of a stage's last backward."""


@dataclass(slots=True)
class PipelinePrices:
    """Holds the seconds of one micro-batch in a pipeline, by stage and by cut."""

    forward: list[float]
    backward: list[float]
    inputs: list[float]
    """The part of a backward that computes the gradients of the inputs."""
    weights: list[float]
    """The part that computes those of the weights."""
    held: Sequence[int]
    """Micro-batches that each stage has memory for."""
    ahead: list[float]
    back: list[float]
    busiest: float
    """Seconds that a micro-batch occupies the busiest link, over all cuts."""
    busy: dict[Resource, tuple[int, float]] = field(default_factory=dict)
    """The same of every link, after the number of messages of a micro-batch on it."""


def add_host(prices: PipelinePrices, host: float) -> PipelinePrices:
    """Adds the host's seconds of an instruction to the work of every stage. One that trains nothing
    has no backward for the host to issue."""
    prices.forward[:] = [each + host for each in prices.forward]
    for work in (prices.backward, prices.inputs, prices.weights):
        work[:] = [each + host if each else 0.0 for each in work]
    return prices


def let_senders_wait(prices: PipelinePrices, exposure: float) -> PipelinePrices:
    """Adds to the work of every stage the part of its messages for which it waits: what is left of
    a message is on its way while the sender goes on."""
    if exposure:
        for cut, (ahead, back) in enumerate(zip(prices.ahead, prices.back, strict=True)):
            prices.forward[cut] += exposure * ahead
            prices.backward[cut + 1] += exposure * back
            prices.inputs[cut + 1] += exposure * back
        prices.ahead = [each * (1 - exposure) for each in prices.ahead]
        prices.back = [each * (1 - exposure) for each in prices.back]
    return prices


def pipeline_seconds(prices: PipelinePrices, micro_batches: int, order: Order) -> float:
    """Returns the seconds from the first forward to the end of the last backward."""
    return _fastest(prices, micro_batches, order)[0]


def last_backwards(prices: PipelinePrices, micro_batches: int, order: Order) -> list[Span]:
    """Returns when the last backward of every stage begins and ends."""
    end, backward = _fastest(prices, micro_batches, order)
    spans = []
    for s, seconds in enumerate(backward):
        spans.append((end - seconds, end))
        end -= seconds + (prices.back[s] if s < len(prices.back) else 0.0)
    return spans


def _fastest(
    prices: PipelinePrices, micro_batches: int, order: Order
) -> tuple[float, Sequence[float]]:
    """Returns the least seconds of three ways to do the backwards: whole; the last one in two
    parts; all of them in two parts; and those of the part that the stage before waits for."""
    depth = len(prices.forward)
    none = [0.0] * depth
    if order != "best":
        held = [in_flight(order, s, depth, micro_batches) for s in range(depth)]
        end = _seconds(prices, micro_batches, held, prices.backward, none, 0)
        if order == "gpipe":
            end = max(end, _in_phases(prices, micro_batches))
        return end, prices.backward
    held = [min(each, micro_batches) for each in prices.held]
    whole = _seconds(prices, micro_batches, held, prices.backward, none, 0)
    parted = min(
        _seconds(prices, micro_batches, held, prices.inputs, prices.weights, number)
        for number in {1, micro_batches}
    )
    return (whole, prices.backward) if whole <= parted else (parted, prices.inputs)


def _in_phases(p: PipelinePrices, count: int) -> float:
    """Returns the seconds of GPipe, where the slowest forward sets the pace until the last stage
    has done them all, and then the slowest backward does:

    all stages and cuts, both ways + (M - 1) x (slowest forward or cut + slowest backward or cut)
    """
    onward, returned = (*p.forward, *p.ahead), (*p.backward, *p.back)
    return sum(onward) + sum(returned) + (count - 1) * (max(onward) + max(returned))


def _seconds(
    p: PipelinePrices,
    count: int,
    held: Sequence[int],
    back: Sequence[float],
    later: Sequence[float],
    parted: int,
) -> float:
    """Returns the seconds from the first forward to the last backward, the last `parted` backwards
    in two parts.

        first forward arrives + its work + its waits + last gradient gets back

    It waits for the first gradient, if it cannot fill the time with the forwards that its memory
    holds, and again whenever it has had as many micro-batches as that, if they have not all come
    back in the time that it works on them. Weight gradients that its memory can keep for the end
    are computed while the last gradient is on its way.
    """
    depth = len(p.forward)
    usual = back if parted == count else p.backward
    trips = [0.0] * depth
    trip = 0.0
    for s in range(depth - 1, -1, -1):
        trip += p.forward[s] + usual[s]
        trips[s] = trip
        if s:
            trip += p.ahead[s - 1] + p.back[s - 1]
    worst, total, start, end = count * p.busiest, 0.0, 0.0, later[0]
    for s in range(depth):
        forward, number = p.forward[s], held[s]
        work = count * (forward + p.backward[s]) + parted * (back[s] + later[s] - p.backward[s])
        wait = max(0.0, trips[s] - usual[s] - number * forward)
        kept = later[s] if parted == count else 0.0
        idle = trips[s] + kept - number * work / count
        if not usual[s]:
            wait = 0.0  # nothing before this stage is trained: no gradient comes back to it
        elif idle > 0.0:
            wait += (count - 1) // number * idle
        seconds = start + wait + max(work, work - min(parted, number) * later[s] + end)
        total += seconds
        worst = max(worst, seconds)
        if s < depth - 1:
            start += forward + p.ahead[s]
            end += back[s] + p.back[s]
            worst = max(worst, trips[0] + (count - 1) * max(p.ahead[s], p.back[s]))
    return worst + LEVEL * (total / depth - worst)
