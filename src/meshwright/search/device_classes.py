"""Groups nodes into fleets of interchangeable ones, and describes pipelines as templates on fleets.

A fleet is all nodes of one kind at one site, a stage run is a number of equal stages on such nodes,
and a template is a chain of stage runs. Its replicas are copies of one narrow pipeline, so the cost
of estimating it depends on the number of kinds and stages, not of devices. Letters: S stages, L
layers, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from meshwright.cluster.spec import Link
from meshwright.plan.spec import ScheduleName
from meshwright.search.candidate import Unit
from meshwright.search.costs import Costs
from meshwright.search.layer_partition import Stages
from meshwright.search.space import divisors, usable_devices

FEW_FLEETS = 4
"""Fleets up to which every way to group them is tried."""

MOST_FLEETS = 6
"""Fleets that are told apart; with more kinds of nodes than these, those that differ in their links
alone count as one."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Interchangeable nodes, each with equally many devices of a type."""

    kind: str
    site: str
    nodes: tuple[tuple[str, ...], ...]
    """Names of the devices of this type, by node."""
    inside: Link
    network: Link

    @property
    def each(self) -> int:
        """Devices of a node."""
        return len(self.nodes[0])


@dataclass(frozen=True, slots=True)
class RatedFleet:
    """A fleet by its number, with its speed."""

    number: int
    site: str
    speed: float


Grouping = tuple[tuple[RatedFleet, ...], ...]
"""Blocks of fleets: the fleets of a block work in one pipeline."""


@dataclass(frozen=True, slots=True)
class StageRun:
    """Equal stages on one fleet. On each of its nodes stand `block` replicas of one stage beside
    each other, then as many of the next stage, until the node is full."""

    fleet: int
    """Its number."""
    depth: int
    """Stages."""
    width: int
    """Replicas of each stage."""
    block: int


@dataclass(frozen=True, slots=True)
class PipelineTemplate:
    """A pipeline with everything decided but its cuts and the number of its micro-batches."""

    tensor: int
    segments: tuple[StageRun, ...]
    rows: int
    """Of a micro-batch, over all replicas."""
    schedule: ScheduleName

    @property
    def depth(self) -> int:
        """Stages."""
        return sum(segment.depth for segment in self.segments)

    @property
    def devices(self) -> int:
        """Devices in use."""
        return self.tensor * sum(s.depth * s.width for s in self.segments)


def fleets(costs: Costs) -> tuple[Fleet, ...]:
    """The usable devices of the cluster, by type, site and kind of node."""
    exact = _fleets(costs, links=True)
    return exact if len(exact) <= MOST_FLEETS else _fleets(costs, links=False)


def _fleets(costs: Costs, *, links: bool) -> tuple[Fleet, ...]:
    nodes = {node.name: node for node in costs.cluster.nodes}
    own: dict[tuple[str, str], list[str]] = {}
    for device in usable_devices(costs.cluster, costs.job):
        own.setdefault((device.node, device.type), []).append(device.name)
    found: dict[object, list[tuple[str, tuple[str, ...]]]] = {}
    for (name, kind), names in own.items():
        node = nodes[name]
        key = (kind, node.site, len(names))
        exact = (*key, node.inside, node.network, len(node.devices))
        found.setdefault(exact if links else key, []).append((name, tuple(names)))
    every = []
    for members in found.values():
        name, first = members[0]
        device = costs.devices[first[0]]
        slowest = [nodes[each] for each, _ in members]
        every.append(
            Fleet(
                kind=device.type,
                site=device.site,
                nodes=tuple(names for _, names in members),
                inside=min((n.inside for n in slowest), key=lambda link: link.bandwidth),
                network=min((n.network for n in slowest), key=lambda link: link.bandwidth),
            )
        )
    return tuple(every)


def groupings(chosen: Sequence[RatedFleet]) -> Iterator[Grouping]:
    """Yield sets of blocks of fleets; the fleets in no block are left out.

    Up to FEW_FLEETS fleets, these are the partitions of every set of them. Of more, only all in one
    block, a block for each site, the blocks of single sites, and the fastest fleets together, apart
    and alone.
    """
    if len(chosen) <= FEW_FLEETS:
        for number in range(1, len(chosen) + 1):
            for some in combinations(chosen, number):
                yield from _partitions(some)
        return
    sites = dict.fromkeys(fleet.site for fleet in chosen)
    by_site = tuple(tuple(f for f in chosen if f.site == site) for site in sites)
    found: list[Grouping] = [(tuple(chosen),), by_site, *((block,) for block in by_site)]
    for number in range(1, len(chosen) + 1):
        found.append(tuple((fleet,) for fleet in chosen[:number]))
        found.append((tuple(chosen[:number]),))
    found += [((fleet,),) for fleet in chosen]
    yield from dict.fromkeys(found)


def _partitions(chosen: tuple[RatedFleet, ...]) -> Iterator[Grouping]:
    if not chosen:
        yield ()
        return
    first, rest = chosen[0], chosen[1:]
    for size in range(len(rest) + 1):
        for others in combinations(range(len(rest)), size):
            block = (first, *(rest[i] for i in others))
            left = tuple(fleet for i, fleet in enumerate(rest) if i not in others)
            for blocks in _partitions(left):
                yield (block, *blocks)


def blocks_for(units: int, width: int) -> tuple[int, ...]:
    """Replicas of one stage that may stand beside each other on a node with so many units."""
    return tuple(block for block in divisors(units) if width % block == 0)


def nodes_for(units: int, depth: int, width: int, block: int) -> int:
    """Nodes that a segment occupies."""
    return -(-depth // (units // block)) * (width // block)


def written(every: Sequence[Fleet], template: PipelineTemplate, taken: dict[int, int]) -> Stages:
    """The units of every stage. `taken`: nodes of each fleet that are in use; grows."""
    found: list[tuple[Unit, ...]] = []
    for segment in template.segments:
        fleet = every[segment.fleet]
        units = fleet.each // template.tensor
        first = taken.get(segment.fleet, 0)
        needed = nodes_for(units, segment.depth, segment.width, segment.block)
        taken[segment.fleet] = first + needed
        found += _stages(fleet.nodes[first : first + needed], segment, units, template.tensor)
    return tuple(found)


def _stages(
    nodes: Sequence[tuple[str, ...]], segment: StageRun, units: int, tensor: int
) -> list[tuple[Unit, ...]]:
    run, wide = units // segment.block, segment.width // segment.block
    stages = []
    for s in range(segment.depth):
        group, place = divmod(s, run)
        stages.append(
            tuple(
                names[(place * segment.block + q) * tensor :][:tensor]
                for names in nodes[group * wide : (group + 1) * wide]
                for q in range(segment.block)
            )
        )
    return stages
