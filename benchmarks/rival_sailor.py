"""Sailor's space: one data width, stages of one type in one zone, or runs across types and zones.

"Sailor: Automating Distributed Training over Dynamic, Heterogeneous, and Geo-distributed Clusters",
SOSP 2025. One tensor width for each type, one data width for all stages, equal rows; stages of one
type in one zone each, or runs of devices across types and zones; any devices may be left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, permutations, product
from math import prod

from rival_searches import Block, Draft, Found, drafted, ring_slope, search
from rival_zones import zones

from meshwright.search.costs import Costs, TensorGroup, distinct_groups, pace
from meshwright.search.layer_partition import Stages
from meshwright.search.space import divisors, legal_widths, usable_devices

DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Stages of a zone that are tried where there are too many ways to try all."""

DEPTH_VECTORS = 400
"""Up to so many ways to give every zone of Sailor its number of stages, all are tried; else only
those of DEPTHS and the deepest."""


def sailor(costs: Costs) -> Found | None:
    """The best plan of Sailor's space; None if nothing in it fits."""
    kinds = sorted({device.type for device in usable_devices(costs)})
    drafts: list[Draft] = []
    seen: set[object] = set()
    for tensors in product(legal_widths(costs), repeat=len(kinds)):
        own = zones_of(costs, dict(zip(kinds, tensors, strict=True)))
        for number in range(1, len(own) + 1):
            for order in permutations(own, number):
                if order not in seen:
                    seen.add(order)
                    drafts += sailor_drafts(costs, order)
    return search(costs, drafts)


Zone = tuple[TensorGroup, ...]
"""All units of one type at one site."""


def zones_of(costs: Costs, tensor_of: dict[str, int]) -> list[Zone]:
    found = {
        zone: units
        for tensor in set(tensor_of.values())
        for zone, units in zones(costs, tensor).items()
        if tensor_of[zone[0]] == tensor
    }
    return [units for _, units in sorted(found.items())]


def sailor_drafts(costs: Costs, order: tuple[Zone, ...]) -> Iterator[Draft]:
    """Every data width, and every number of stages on each of these zones, in this order."""
    batch, layers = costs.job.global_batch, len(costs.model.layers)
    units = tuple(chain.from_iterable(order))
    alike = len(order) > 1 and len({len(unit) for unit in units}) == 1
    for data in divisors(batch):
        if alike:
            for depth in range(1, min(len(units) // data, layers) + 1):
                yield from _run_drafts(costs, units, depth, data)
        most = [min(len(zone) // data, layers) for zone in order]
        if min(most) == 0:
            continue
        slopes = [ring_slope(costs, zone[:data]) for zone in order]
        for depths in (d for d in _depths(most) if sum(d) <= layers):
            ways = {False, data > 1 and max(depths) > 1}
            for rows, across in product(divisors(batch // data), sorted(ways)):
                blocks = [
                    Block(zone[0], rows, depth, slope)
                    for zone, depth, slope in zip(order, depths, slopes, strict=True)
                ]
                stages = partial(_runs, order, depths, data, across=across)
                yield drafted(costs, blocks, rows * data, stages, by_speed=False)


def _depths(most: Sequence[int]) -> Iterator[tuple[int, ...]]:
    options = [range(1, depth + 1) for depth in most]
    if prod(most) > DEPTH_VECTORS:
        few = [sorted({*(d for d in DEPTHS if d <= depth), depth}) for depth in most]
        return product(*few)
    return product(*options)


def _run_drafts(costs: Costs, units: Zone, depth: int, data: int) -> Iterator[Draft]:
    """Stages of `data` consecutive units each, of whatever types and zones."""
    stages = tuple(units[s * data : (s + 1) * data] for s in range(depth))
    slopes = [ring_slope(costs, stage) for stage in stages]
    slowest = [max(distinct_groups(costs, s), key=partial(pace, costs)) for s in stages]
    for rows in divisors(costs.job.global_batch // data):
        blocks = [Block(u, rows, 1, slope) for u, slope in zip(slowest, slopes, strict=True)]
        yield drafted(costs, blocks, rows * data, lambda: stages, by_speed=False)


def _runs(order: tuple[Zone, ...], depths: tuple[int, ...], data: int, *, across: bool) -> Stages:
    """Replicas of a stage side by side, or (`across`) stages of a replica."""
    found = []
    for zone, depth in zip(order, depths, strict=True):
        for s in range(depth):
            units = zone[s : depth * data : depth] if across else zone[s * data : (s + 1) * data]
            found.append(units)
    return tuple(found)
