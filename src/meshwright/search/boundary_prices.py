"""Prices a cut between two stages: what all its transfers together ask of the links, and how much
longer they take where other cuts use the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import lcm

import numpy as np

from meshwright.cluster.topology import Resource, path
from meshwright.plan.spec import BoundaryKind
from meshwright.search.costs import (
    Array,
    Costs,
    TensorGroup,
    remembered,
    ring,
    seconds_per_byte,
    usual_cut_bytes,
)
from meshwright.search.stage_devices import StageDevices, moves

TRANSFERS = 64
"""Largest number of transfers of one cut that are looked at one by one."""

BLOCKING = 2.0
"""Times its seconds that a gather counts where the kind of a cut is chosen: devices wait for it,
while they work during transfers."""


@dataclass(frozen=True, slots=True)
class BoundaryPrice:
    """Describes what it costs to pass a cut in one direction."""

    latency: float
    """Seconds before the first byte arrives."""
    slowest: float
    """Seconds for each byte of a micro-batch, on the busiest resource."""
    occupied: tuple[tuple[Resource, float], ...]
    """The same for every resource."""
    kind: BoundaryKind | None = None
    """None: direct."""
    gather: tuple[float, float] = (0.0, 0.0)
    """Latency, and seconds for each byte of a micro-batch, of the gather of parts in the replica
    that receives them longest."""

    def gather_seconds(self, size: float) -> float:
        """Returns the seconds in which the parts of a micro-batch of a number of bytes are put
        together: the receiving devices do nothing else meanwhile."""
        latency, each = self.gather
        return latency + each * size if size else 0.0

    def seconds(self, size_L: Array) -> Array:
        """Returns the seconds [L] that micro-batches of these numbers of bytes take."""
        latency, slowest = self.latency + self.gather[0], self.slowest + self.gather[1]
        return np.where(size_L > 0, latency + slowest * size_L, 0.0)


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


def boundary_kind(costs: Costs, here: StageDevices, there: StageDevices) -> BoundaryKind | None:
    """Returns the kind of a cut between two stages; None where all kinds are alike, or direct
    transfers are the quickest."""
    if not _is_wide(costs, here, there):
        return None
    return boundary_prices(costs, here, there)[0].kind


def copies(costs: Costs, tensor: int) -> int:
    """Returns how often a row crosses a network between stages of a tensor width."""
    return 1 if costs.scatters else tensor


def _is_wide(costs: Costs, here: StageDevices, there: StageDevices) -> bool:
    """True if the kind of a cut makes a difference and may be chosen."""
    return costs.scatters and max(len(here.groups[0]), len(there.groups[0])) > 1


@dataclass(slots=True)
class _Way:
    """Counts the rows that cross each resource in one direction of a cut."""

    rows: dict[Resource, float] = field(default_factory=dict)
    """Rows that cross each resource."""
    latency: float = 0.0
    gathered: dict[TensorGroup, tuple[int, int]] = field(default_factory=dict)
    """The gathers of each replica, and their rows."""

    def send(self, costs: Costs, source: str, target: str, rows: float) -> None:
        """Counts the rows that go from one device to another."""
        way = path(costs.links, source, target)
        if source != target:
            self.latency = max(self.latency, way.latency + costs.system.boundary)
        for resource in way.resources:
            self.rows[resource] = self.rows.get(resource, 0) + rows

    def direct(self, costs: Costs, source: TensorGroup, target: TensorGroup, rows: int) -> None:
        """Counts rows of which every device of the target receives all."""
        for t, name in enumerate(target):
            self.send(costs, source[t % len(source)], name, rows)

    def scatter(self, costs: Costs, source: TensorGroup, target: TensorGroup, rows: int) -> None:
        """Counts rows of which every device of both sides sends or receives an equal part."""
        of = lcm(len(source), len(target))
        for k in range(of):
            sender, receiver = source[k * len(source) // of], target[k * len(target) // of]
            self.send(costs, sender, receiver, rows / of)
        number, before = self.gathered.get(target, (0, 0))
        self.gathered[target] = number + 1, before + rows

    def gather(self, costs: Costs, rows: int) -> tuple[float, float]:
        """Returns the longest gather, given the rows of a micro-batch."""
        found = [(0.0, 0.0)]
        for group, (number, own) in self.gathered.items():
            if len(group) > 1:  # half of an all-reduce, which gathers what it has summed
                latency, each = seconds_per_byte(costs, [ring(costs, group)])
                found.append((number * latency / 2, each / 2 * own / rows))
        return max(found, key=lambda pair: pair[1])


def _boundary_prices(
    costs: Costs, here: StageDevices, there: StageDevices
) -> tuple[BoundaryPrice, BoundaryPrice]:
    direct = _of_kind(costs, here, there, None)
    if not _is_wide(costs, here, there):
        return direct
    parts = _of_kind(costs, here, there, "scatter_gather")
    size = usual_cut_bytes(costs) * sum(here.rows)

    def taken(ways: tuple[BoundaryPrice, BoundaryPrice]) -> float:
        moved = sum(way.latency + way.slowest * size for way in ways)
        return moved + BLOCKING * sum(way.gather_seconds(size) for way in ways)

    return parts if taken(parts) < taken(direct) else direct


def _of_kind(
    costs: Costs, here: StageDevices, there: StageDevices, kind: BoundaryKind | None
) -> tuple[BoundaryPrice, BoundaryPrice]:
    """Returns the crossings of activations and of gradients over a cut of a kind."""
    ahead, back = _Way(), _Way()
    counted, rows = 0, sum(here.rows)
    add = _Way.scatter if kind else _Way.direct
    for i, j, moved in islice(moves(here, there), TRANSFERS):
        counted += moved
        add(ahead, costs, here.groups[i], there.groups[j], moved)
        add(back, costs, there.groups[j], here.groups[i], moved)
    latency = max(ahead.latency, back.latency)
    capacity = costs.links.capacities

    def priced(way: _Way) -> BoundaryPrice:
        occupied = tuple(
            (resource, moved / rows / capacity[resource] * scale)
            for resource, moved in way.rows.items()
            for scale in (rows / counted if resource.kind == "uplink" else 1.0,)
        )
        slowest = max((each for _, each in occupied), default=0.0)
        return BoundaryPrice(latency, slowest, occupied, kind, way.gather(costs, rows))

    return priced(ahead), priced(back)
