"""Prices a cut between two stages: what all its transfers together ask of the links, and how much
longer they take where other cuts use the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from meshwright.cluster.topology import Resource, path
from meshwright.search.candidate import StageDevices, moves
from meshwright.search.costs import Costs, remembered

TRANSFERS = 64
"""Largest number of transfers of one cut that are looked at one by one."""


@dataclass(frozen=True, slots=True)
class BoundaryPrice:
    """Describes what it costs to pass a cut in one direction."""

    latency: float
    """Seconds before the first byte arrives."""
    slowest: float
    """Seconds for each byte of a micro-batch, on the busiest resource."""
    occupied: tuple[tuple[Resource, float], ...]
    """The same for every resource."""

    def seconds(self, size: float) -> float:
        """Returns the seconds that a micro-batch of a number of bytes takes."""
        return self.latency + self.slowest * size if size else 0.0


@dataclass(frozen=True, slots=True)
class Crossing:
    """Describes what passes a cut in one direction, once for every micro-batch."""

    latency: float
    """Seconds in which no byte moves."""
    occupied: Sequence[tuple[Resource, float]]
    """Seconds on every resource, if nothing else uses it."""
    period: float
    """Seconds from one such message to the next (`mean_period`)."""


def mean_period(slowest: float, depth: int, micro_batches: int) -> float:
    """Returns the seconds between the messages that may meet, over all of a pipeline's work, if its
    slowest stage takes `slowest` seconds and the others as long; a micro-batch that is alone meets
    none."""
    others = micro_batches - 1
    return slowest * (others + depth) / others if others else float("inf")


def crowded_seconds(messages: Sequence[Crossing]) -> list[float]:
    """Returns how long each message takes on links that others use too.

    One that finds a link in use shares it with the other, so that it takes longer by the share of
    the time in which others use it:

        latency + max over resources of seconds x (1 + share of the others)

    That is no reason for micro-batches to follow each other more slowly than before.
    """
    shares: dict[Resource, float] = {}
    for each in messages:
        period = each.period
        for resource, seconds in each.occupied:
            shares[resource] = shares.get(resource, 0.0) + seconds / period
    most = max(1.0, max(shares.values(), default=0.0))

    def crowded(each: Crossing) -> float:
        alone = stretched = 0.0
        period = each.period
        for resource, seconds in each.occupied:
            others = shares[resource] - seconds / period
            if seconds > alone:
                alone = seconds
            longer = seconds * (1.0 + others / most) if others > 0.0 else seconds
            if longer > stretched:
                stretched = longer
        return each.latency + min(stretched, max(alone, period - each.latency))

    return [crowded(each) for each in messages]


def boundary_prices(
    costs: Costs, here: StageDevices, there: StageDevices
) -> tuple[BoundaryPrice, BoundaryPrice]:
    """Returns the crossings of activations and of gradients.

    Of very many transfers the first ones are added up: nodes are alike. What all share, the sites'
    uplinks, is scaled to all of them.
    """

    def priced() -> tuple[BoundaryPrice, BoundaryPrice]:
        if not len(set(here.rows)) == len(set(there.rows)) == 1:
            return _boundary_prices(costs, here, there)
        key = ("even crossings", here.groups, there.groups)
        return remembered(costs, key, lambda: _boundary_prices(costs, here, there))

    return remembered(costs, ("crossings", here, there), priced)


@dataclass(slots=True)
class _Way:
    """Counts the rows that cross each resource in one direction of a cut."""

    rows: dict[Resource, int] = field(default_factory=dict)
    """Rows that cross each resource."""
    latency: float = 0.0

    def add(self, costs: Costs, source: str, target: str, rows: int) -> None:
        way = path(costs.links, source, target)
        if source != target:
            self.latency = max(self.latency, way.latency + costs.system.boundary)
        for resource in way.resources:
            self.rows[resource] = self.rows.get(resource, 0) + rows


def _boundary_prices(
    costs: Costs, here: StageDevices, there: StageDevices
) -> tuple[BoundaryPrice, BoundaryPrice]:
    ahead, back = _Way(), _Way()
    counted, rows = 0, sum(here.rows)
    for i, j, moved in islice(moves(here, there), TRANSFERS):
        source, target = here.groups[i], there.groups[j]
        counted += moved
        for t, name in enumerate(target):
            ahead.add(costs, source[t % len(source)], name, moved)
        for t, name in enumerate(source):
            back.add(costs, target[t % len(target)], name, moved)
    latency = max(ahead.latency, back.latency)
    return _priced(costs, ahead, latency, rows, counted), _priced(
        costs, back, latency, rows, counted
    )


def _priced(costs: Costs, way: _Way, latency: float, rows: int, counted: int) -> BoundaryPrice:
    capacity = costs.links.capacities
    occupied = tuple(
        (resource, moved / rows / capacity[resource] * scale)
        for resource, moved in way.rows.items()
        for scale in (rows / counted if resource.kind == "uplink" else 1.0,)
    )
    return BoundaryPrice(latency, max((each for _, each in occupied), default=0.0), occupied)
