"""Simulates one of every set of identical replicas, with the same result as a simulation of all.

A slice is a part of a pipeline that exchanges only gradients with the rest: an equal share of the
replicas of every stage, on one tensor rank. Slices behave identically if their devices and nodes
are alike and all slices on a node have the same of their devices there. Such a set is an orbit, of
which one slice is simulated. Its transfers carry, on every resource that they pass, the bytes of
all slices of the orbit as that number of streams. Rings are priced with all their members. Where
tensor ranks are slices of one orbit, their rings are simulated as one with the bytes of all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd

from meshwright.cluster.spec import Cluster, Node, node_of
from meshwright.cluster.topology import Resource, Topology
from meshwright.cost.collective import Traffic
from meshwright.cost.links import messages_are_serialised
from meshwright.cost.priced_plan import PricedPlan
from meshwright.cost.pricing import Prices
from meshwright.cost.pricing_context import Price
from meshwright.cost.profile import Profile
from meshwright.model.spec import LayerGraph
from meshwright.plan.mesh import mesh_of
from meshwright.plan.spec import Pipeline, Plan
from meshwright.program.instructions import Program
from meshwright.program.operations import Op
from meshwright.simulate.simulated_step import SimulatedStep
from meshwright.simulate.simulator import simulated_step
from meshwright.stopping import raise_if_stopped

ReplicaSlice = tuple[str, ...]
"""The devices of one slice, by stage and then by replica."""


@dataclass(frozen=True, slots=True)
class Symmetry:
    """Says which ranks are simulated, and how many slices each of them stands for."""

    ranks: frozenset[int]
    slices_by_node: dict[str, int]
    """For each node of a simulated slice, the number of slices of its pipeline that use the node's
    bus and network interface."""
    slices_by_uplink: dict[tuple[str, int], int]
    """For each site and pipeline, the number of slices that use the site's uplink."""
    pipeline_of: dict[int, int]
    """The pipeline of every simulated rank."""
    rings: dict[int, int]
    """For each pipeline, the number of rings of one bucket that are simulated as one: one ring for
    each tensor rank."""


def find_symmetry(plan: Plan, cluster: Cluster) -> Symmetry:
    """Finds the fewest ranks that have to be simulated: all ranks if no two slices are
    identical."""
    pipelines = tuple(replace(pipeline, actions=None) for pipeline in plan.pipelines)
    queued, direct = messages_are_serialised(cluster), bool(cluster.direct)
    return _fold(plan.devices, pipelines, cluster.nodes, queued, direct)


@lru_cache(maxsize=8)  # a search folds few sets of pipelines, each of them many times
def _fold(
    devices: tuple[str, ...],
    pipelines: tuple[Pipeline, ...],
    of_cluster: tuple[Node, ...],
    queued: bool,
    direct: bool,
) -> Symmetry:
    nodes = {node.name: node for node in of_cluster}
    users = _users(pipelines)
    # Queued messages delay slices unequally.
    whole = [direct or (queued and len(each.stages) > 1) for each in pipelines]
    found = [
        [] if alone else _largest_orbit(each, nodes, users, across=True)
        for each, alone in zip(pipelines, whole, strict=True)
    ]
    # With unlike tensor widths, ranks reduce different tiles: one cannot stand for the others.
    across = all(found) and len({_tensor_width(pipeline) for pipeline in pipelines}) == 1
    if not across:
        found = [
            (not alone and _largest_orbit(each, nodes, users, across=False)) or _whole(each)
            for each, alone in zip(pipelines, whole, strict=True)
        ]
    rank_of = {device: rank for rank, device in enumerate(devices)}
    pipeline_of: dict[int, int] = {}
    sharing: dict[str, int] = {}
    crossing: dict[tuple[str, int], int] = {}
    for p, copies in enumerate(found):
        pipeline_of.update((rank_of[device], p) for device in copies[0])
        passing = Counter(node for copy in copies for node in {node_of(d) for d in copy})
        sharing.update({node: passing[node] for node in {node_of(d) for d in copies[0]}})
        for site in {nodes[node_of(device)].site for device in copies[0]}:
            crossing[site, p] = len(copies)
    rings = {p: _tensor_width(pipeline) if across else 1 for p, pipeline in enumerate(pipelines)}
    return Symmetry(frozenset(pipeline_of), sharing, crossing, pipeline_of, rings)


def _largest_orbit(
    pipeline: Pipeline, nodes: dict[str, Node], users: dict[str, set[int]], *, across: bool
) -> list[ReplicaSlice]:
    """Returns the largest orbit of a pipeline; empty if it has none.

    A pipeline that shares a node with another one has none.
    """
    mine = {node_of(device) for device in _devices(pipeline)}
    # A broadcast or a gather joins ranks of several slices.
    met = any(stage.boundary not in (None, "direct") for stage in pipeline.stages)
    if met or any(len(users[node]) > 1 for node in mine):
        return []
    return next(_divisions(pipeline, nodes, across=across), [])


def _tensor_width(pipeline: Pipeline) -> int:
    """Returns the tensor width of a pipeline's first stage."""
    return mesh_of(pipeline.stages[0]).widths("tensor")[0]


def _devices(pipeline: Pipeline) -> Iterator[str]:
    """Yields the devices of all stages of a pipeline."""
    return (device for stage in pipeline.stages for device in mesh_of(stage).members)


def _users(pipelines: tuple[Pipeline, ...]) -> dict[str, set[int]]:
    """Returns the pipelines that use each node."""
    users: dict[str, set[int]] = defaultdict(set)
    for p, pipeline in enumerate(pipelines):
        for device in _devices(pipeline):
            users[node_of(device)].add(p)
    return users


def _whole(pipeline: Pipeline) -> list[ReplicaSlice]:
    """Returns the whole pipeline as a single slice."""
    return [tuple(_devices(pipeline))]


def _divisions(
    pipeline: Pipeline, nodes: dict[str, Node], *, across: bool
) -> Iterator[list[ReplicaSlice]]:
    """Yields the ways to divide a pipeline into identical slices, most slices first.

    With `across`, the tensor ranks of a replica become slices too; each replica must then be inside
    one node.
    """
    even = all(stage.rows is None or len(set(stage.rows)) == 1 for stage in pipeline.stages)
    meshes = [mesh_of(stage) for stage in pipeline.stages]
    tensor = {width for mesh in meshes for width in mesh.widths("tensor")}
    if not even or len(tensor) > 1:
        return
    units = [mesh.groups("tensor") for mesh in meshes]
    if across and any(len(set(map(node_of, unit))) > 1 for own in units for unit in own):
        return
    width = gcd(*(mesh.width("data") for mesh in meshes))
    for number in (n for n in range(width, 0, -1) if width % n == 0):
        raise_if_stopped()
        parts = [[unit for own in units for unit in _part(own, c, number)] for c in range(number)]
        if across:
            copies = [tuple(unit[t] for unit in part) for part in parts for t in range(min(tensor))]
        else:
            copies = [tuple(device for unit in part for device in unit) for part in parts]
        ranks = min(tensor) if across else 1
        if _behave_alike(copies, nodes) and _keep_islands(copies, nodes, ranks):
            yield copies


def _part(
    units: tuple[tuple[str, ...], ...], index: int, parts: int
) -> tuple[tuple[str, ...], ...]:
    """Returns part `index` of `parts` equal parts of the replicas of a stage."""
    size = len(units) // parts
    return units[index * size : (index + 1) * size]


def _behave_alike(copies: list[ReplicaSlice], nodes: dict[str, Node]) -> bool:
    """Returns True if all slices behave identically.

    Devices at the same position of two slices must be alike, in like nodes; all slices on a node
    must have the same positions there, and all nodes with a position as many slices.
    """
    first = copies[0]
    places: dict[str, frozenset[int]] = {}
    passing: Counter[str] = Counter()
    for copy in copies:
        standing: dict[str, set[int]] = defaultdict(set)
        for place, device in enumerate(copy):
            standing[node_of(device)].add(place)
            if _kind(device, nodes) != _kind(first[place], nodes):
                return False
        for node, here in standing.items():
            if places.setdefault(node, frozenset(here)) != here:
                return False
            passing[node] += 1
    own = {place: node_of(device) for place, device in enumerate(first)}
    return all(
        here == places[own[place]] and passing[node] == passing[own[place]]
        for node, here in places.items()
        for place in here
    )


def _keep_islands(copies: list[ReplicaSlice], nodes: dict[str, Node], tensor: int) -> bool:
    """Returns True if all slices have their devices in islands alike, and nothing that slices
    exchange stays inside an island.

    Rings that go from slice to slice then have like hops for every slice. Slices that are tensor
    ranks of one replica (`tensor` of them) share no ring, and may share an island.
    """
    if not any(node.islands for node in nodes.values()):
        return True
    held = [[_island(device, nodes) for device in copy] for copy in copies]
    ranks: dict[str, set[int]] = defaultdict(set)
    for number, own in enumerate(held):
        for island in set(own):
            if number % tensor in ranks[island]:
                return False
            ranks[island].add(number % tensor)
    return len({tuple(map(own.index, own)) for own in held}) == 1


def _island(device: str, nodes: dict[str, Node]) -> str:
    """Returns a name for a device's island; the device itself if it is in none."""
    name, _, index = device.rpartition(":")
    islands = nodes[name].islands
    for group in islands.groups if islands else ():
        if int(index) in group:
            return f"{name}:{min(group)}"
    return device


def _kind(device: str, nodes: dict[str, Node]) -> tuple[object, ...]:
    """Returns what makes two devices alike: type, links and site of the node."""
    name, _, index = device.rpartition(":")
    node = nodes[name]
    joined = node.islands and node.islands.link
    return node.devices[int(index)], node.inside, joined, node.network, node.site


def simulate_by_symmetry(
    plan: Plan,
    model: LayerGraph,
    cluster: Cluster,
    profile: Profile | None = None,
    *,
    folded: Symmetry | None = None,
    links: Topology | None = None,
) -> SimulatedStep:
    """Simulates one step of a valid plan; only as many ranks as needed are simulated.

    `links` is the topology of the cluster with the links of the profile, if the caller has it.
    """
    folded = folded or find_symmetry(plan, cluster)
    priced = PricedPlan(plan, model, cluster, profile, ranks=folded.ranks, links=links)
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
            tuple(replace(i, ranks=met(i.ranks)) if i.ranks else i for i in instructions)
            for instructions in program.ranks
        )
    )


def priced_for_all(program: Program, prices: Prices, folded: Symmetry) -> Prices:
    """Returns the prices of the simulated ranks with the traffic of the whole orbit.

    Transfers carry the bytes of all slices; rings keep only the resources of simulated ranks.
    """
    devices = {prices.devices[rank] for rank in folded.ranks}
    rings: dict[tuple[int, int], Traffic] = {}

    def changed(rank: int, op: Op, price: Price) -> Price:
        traffic = price.traffic
        if op.kind == "send":
            return replace(price, traffic=_many(traffic, folded, folded.pipeline_of[rank]))
        if op.kind == "collective" and not op.reads and traffic.bytes_by_resource:
            number = folded.rings[folded.pipeline_of[rank]] if op.meets else 1
            key = (id(traffic), number)
            if key not in rings:
                rings[key] = _ring(traffic, folded, devices, number)
            return replace(price, traffic=rings[key])
        return price

    ranks = []
    for rank, own in enumerate(prices.ranks):
        known: dict[int, Price] = {}  # instructions that are alike share a price
        for i, price in zip(program.ranks[rank], own, strict=True):
            if id(price) not in known:
                known[id(price)] = changed(rank, i.op, price)
        ranks.append(tuple(known[id(price)] for price in own))
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
    uses.

    An explicit link is used by one: a cluster with explicit links is simulated whole."""
    match resource.kind:
        case "bus" | "network":
            return folded.slices_by_node.get(resource.owner, 1)
        case "uplink":
            return folded.slices_by_uplink.get((resource.owner, pipeline), 1)
        case "port" | "island" | "link":
            return 1


def _ring(traffic: Traffic, folded: Symmetry, devices: set[str], number: int) -> Traffic:
    """Returns the traffic of `number` rings on the resources of simulated ranks.

    Each ring has the ports of its own devices; the rings share all other resources.
    """
    sizes = traffic.bytes_by_resource
    return Traffic(
        bytes_by_resource={
            resource: size * (1 if resource.kind in ("port", "island") else number)
            for resource, size in sizes.items()
            if _is_played(resource, folded, devices)
        },
        latency=traffic.latency,
        stream=min(sizes.values()),
    )


def _is_played(resource: Resource, folded: Symmetry, devices: set[str]) -> bool:
    """Returns True if a resource belongs to a simulated device or node, or is an uplink, which all
    share."""
    match resource.kind:
        case "port" | "island":
            return resource.owner in devices
        case "bus" | "network":
            return resource.owner in folded.slices_by_node
        case "link":
            return (
                resource.owner in folded.slices_by_node and resource.peer in folded.slices_by_node
            )
        case "uplink":
            return True
