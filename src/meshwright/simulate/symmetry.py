"""Simulates one of every set of identical slices, with the same result as a simulation of all.

A set of identical slices is an orbit, of which one slice is simulated. Its transfers carry, on
every resource that they pass, the bytes of all slices of the orbit as that number of streams. Rings
are priced with all their members. Where tensor ranks are slices of one orbit, their rings are
simulated as one with the bytes of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Generic, TypeVar

from meshwright.cluster.spec import Cluster
from meshwright.cluster.topology import Resource
from meshwright.cost.collective import Traffic
from meshwright.cost.links import messages_are_serialised
from meshwright.cost.priced_plan import PricedPlan
from meshwright.cost.pricing import Prices
from meshwright.cost.pricing_context import Price
from meshwright.cost.profile import Profile
from meshwright.cost.times import LayerTimeCache
from meshwright.model.spec import LayerGraph
from meshwright.plan.mesh import mesh_of
from meshwright.plan.spec import Pipeline, Plan
from meshwright.program.instructions import Program
from meshwright.program.operations import Op
from meshwright.simulate.explicit_links import ExplicitLinks, explicit_links, slices_by_link
from meshwright.simulate.replica_slices import (
    Homes,
    ReplicaSlice,
    devices_of,
    homes_of,
    largest_orbit,
    whole,
)
from meshwright.simulate.simulated_step import SimulatedStep
from meshwright.simulate.simulator import simulated_step

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Symmetry:
    """Says which ranks are simulated, and how many slices each of them stands for."""

    ranks: frozenset[int]
    slices_by_node: dict[str, int]
    """For each node of a simulated slice, the number of slices of its pipeline that use the node's
    bus and network interface."""
    slices_by_uplink: dict[tuple[str, int], int]
    """For each site and pipeline, the number of slices that use the site's uplink."""
    slices_by_link: dict[tuple[str, str], int]
    """For every two nodes with an explicit link, the number of slices that use it."""
    pipeline_of: dict[int, int]
    """The pipeline of every simulated rank."""
    rings: dict[int, int]
    """For each pipeline, the number of rings of one bucket that are simulated as one: one ring for
    each tensor rank."""


def find_symmetry(plan: Plan, cluster: Cluster, model: LayerGraph) -> Symmetry:
    """Finds the fewest ranks that have to be simulated: all ranks if no two slices are
    identical."""
    pipelines = tuple(replace(pipeline, actions=None) for pipeline in plan.pipelines)
    return _fold(plan.devices, pipelines, _Same(cluster), _Same(model))


class _Same(Generic[T]):
    """Makes a large record the key of a cache: it is equal to itself alone."""

    def __init__(self, record: T) -> None:
        self.record = record

    def __hash__(self) -> int:
        return id(self.record)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.record is self.record


@lru_cache(maxsize=8)  # a search folds few sets of pipelines, each of them many times
def _fold(
    devices: tuple[str, ...],
    pipelines: tuple[Pipeline, ...],
    of_cluster: _Same[Cluster],
    of_model: _Same[LayerGraph],
) -> Symmetry:
    cluster, homes = of_cluster.record, _homes(of_cluster)
    tied = [each.layers for each in of_model.record.tied]
    links = explicit_links(cluster, pipelines, tied) if cluster.direct else None
    queued = messages_are_serialised(cluster)
    found, across = _orbits(pipelines, homes, links, queued=queued)
    rank_of = {device: rank for rank, device in enumerate(devices)}
    pipeline_of: dict[int, int] = {}
    sharing: dict[str, int] = {}
    crossing: dict[tuple[str, int], int] = {}
    joining: dict[tuple[str, str], int] = {}
    for p, copies in enumerate(found):
        pipeline_of.update((rank_of[device], p) for device in copies[0])
        used = [{homes.node_of[device] for device in copy} for copy in copies]
        passing = Counter(chain.from_iterable(used))
        sharing.update({node: passing[node] for node in used[0]})
        for site in {homes.nodes[node].site for node in used[0]}:
            crossing[site, p] = len(copies)
        if links is not None:
            joining |= slices_by_link(used, links.links)
    rings = {p: _tensor_width(pipeline) if across else 1 for p, pipeline in enumerate(pipelines)}
    return Symmetry(frozenset(pipeline_of), sharing, crossing, joining, pipeline_of, rings)


@lru_cache(maxsize=4)
def _homes(of_cluster: _Same[Cluster]) -> Homes:
    return homes_of(of_cluster.record.nodes)


def _orbits(
    pipelines: Sequence[Pipeline], homes: Homes, links: ExplicitLinks | None, *, queued: bool
) -> tuple[list[list[ReplicaSlice]], bool]:
    """Returns the identical slices of every pipeline, and whether its tensor ranks are slices
    too."""
    # A pipeline that shares a node with another one has no two slices alike.
    users = Counter(
        node for each in pipelines for node in {homes.node_of[d] for d in devices_of(each)}
    )
    # Queued messages delay slices unequally.
    alone = [
        (queued and len(each.stages) > 1)
        or any(users[homes.node_of[device]] > 1 for device in devices_of(each))
        for each in pipelines
    ]
    widths = {w for each in pipelines for s in each.stages for w in mesh_of(s).widths("tensor")}
    # With unlike tensor widths, ranks reduce different tiles: one cannot stand for the others.
    if len(widths) == 1 and not any(alone):
        found = [largest_orbit(each, homes, links, across=True) for each in pipelines]
        if all(found):
            return found, True
    if links is not None and len(widths) > 1:
        return list(map(whole, pipelines)), False
    return [
        (not single and largest_orbit(each, homes, links, across=False)) or whole(each)
        for each, single in zip(pipelines, alone, strict=True)
    ], False


def _tensor_width(pipeline: Pipeline) -> int:
    """Returns the tensor width of a pipeline's first stage."""
    return mesh_of(pipeline.stages[0]).widths("tensor")[0]


def simulate_by_symmetry(
    plan: Plan,
    model: LayerGraph,
    cluster: Cluster,
    profile: Profile | None = None,
    *,
    folded: Symmetry | None = None,
    times: LayerTimeCache | None = None,
) -> SimulatedStep:
    """Simulates one step of a valid plan; only as many ranks as needed are simulated.

    `times` are the layer times of the model, the cluster and the profile, if the caller has them.
    """
    folded = folded or find_symmetry(plan, cluster, model)
    priced = PricedPlan(plan, model, cluster, profile, ranks=folded.ranks, times=times)
    if len(folded.ranks) == len(plan.devices):
        return simulated_step(priced.program, priced.prices)
    shared = priced_for_all(priced.program, priced.prices, folded)
    return simulated_step(_among_themselves(priced.program, folded), shared)


def _among_themselves(program: Program, folded: Symmetry) -> Program:
    """Removes from every collective the ranks that are not simulated."""
    known: dict[int, tuple[int, ...]] = {}

    def met(ranks: tuple[int, ...]) -> tuple[int, ...]:
        if id(ranks) not in known:
            known[id(ranks)] = tuple(rank for rank in ranks if rank in folded.ranks)
        return known[id(ranks)]

    return Program(
        ranks=tuple(
            tuple(i._replace(ranks=met(i.ranks)) if i.ranks else i for i in instructions)
            for instructions in program.ranks
        )
    )


def priced_for_all(program: Program, prices: Prices, folded: Symmetry) -> Prices:
    """Returns the prices of the simulated ranks with the traffic of the whole orbit.

    Transfers, and gathers inside a slice, carry the bytes of all slices; rings keep only the
    resources of simulated ranks.
    """
    devices = {prices.devices[rank] for rank in folded.ranks}
    rings: dict[tuple[int, int], Traffic] = {}

    def changed(rank: int, op: Op, price: Price) -> Price:
        traffic = price.traffic
        if op.kind == "send" or (op.kind == "collective" and op.reads):
            return replace(price, traffic=_many(traffic, folded, folded.pipeline_of[rank]))
        if op.kind == "collective" and traffic.bytes_by_resource:
            number = folded.rings[folded.pipeline_of[rank]] if op.meets else 1
            key = (id(traffic), number)
            if key not in rings:
                alone = op is Op.REDUCE_NORM and bool(folded.slices_by_link)
                kept = _busiest(traffic, prices) if alone else ()
                rings[key] = _ring(traffic, folded, devices, number, kept)
            return replace(price, traffic=rings[key])
        return price

    ranks = list(prices.ranks)
    for rank in folded.ranks:
        known: dict[int, Price] = {}  # instructions that are alike share a price
        for i, price in zip(program.ranks[rank], prices.ranks[rank], strict=True):
            if id(price) not in known:
                known[id(price)] = changed(rank, i.op, price)
        ranks[rank] = tuple(known[id(price)] for price in prices.ranks[rank])
    return replace(prices, ranks=tuple(ranks))


def _many(traffic: Traffic, folded: Symmetry, pipeline: int) -> Traffic:
    """Returns a transfer together with those of all other slices on the same resources."""
    if not traffic.bytes_by_resource:
        return traffic
    return Traffic(
        bytes_by_resource={
            resource: size * _copies(resource, folded, pipeline)
            for resource, size in traffic.bytes_by_resource.items()
        },
        latency=traffic.latency,
        stream=min(traffic.bytes_by_resource.values()),
    )


def _copies(resource: Resource, folded: Symmetry, pipeline: int) -> int:
    """Returns the number of slices of a pipeline that use a resource which the simulated slice
    uses."""
    match resource.kind:
        case "bus" | "network":
            return folded.slices_by_node.get(resource.owner, 1)
        case "uplink":
            return folded.slices_by_uplink.get((resource.owner, pipeline), 1)
        case "link":
            return folded.slices_by_link.get((resource.owner, resource.peer), 1)
        case "port" | "island" | "flow":
            return 1


def _ring(
    traffic: Traffic, folded: Symmetry, devices: set[str], number: int, kept: Collection[Resource]
) -> Traffic:
    """Returns the traffic of `number` rings on the resources of simulated ranks, and those that are
    kept beside them.

    Each ring has the ports of its own devices; the rings share all other resources.
    """
    sizes = traffic.bytes_by_resource
    return Traffic(
        bytes_by_resource={
            resource: size * (1 if resource.kind in ("port", "island", "flow") else number)
            for resource, size in sizes.items()
            if _is_played(resource, folded, devices) or resource in kept
        },
        latency=traffic.latency,
        stream=min(sizes.values()),
    )


def _busiest(traffic: Traffic, prices: Prices) -> set[Resource]:
    """Returns the slowest resource of each kind that a collective passes.

    With explicit links a ring over all pipelines need not treat all slices alike. Nothing else is
    on the links then: its slowest hop is all that matters."""
    slowest: dict[str, tuple[float, Resource]] = {}
    for resource, size in traffic.bytes_by_resource.items():
        each = size / prices.bandwidth[resource], resource
        slowest[resource.kind] = max(slowest.get(resource.kind, each), each)
    return {resource for _, resource in slowest.values()}


def _is_played(resource: Resource, folded: Symmetry, devices: set[str]) -> bool:
    """Returns True if a resource belongs to a simulated device or node, or is an uplink or an
    explicit link, which all share."""
    match resource.kind:
        case "port" | "island" | "flow":
            return resource.owner in devices
        case "bus" | "network":
            return resource.owner in folded.slices_by_node
        case "link" | "uplink":
            return True
