"""Plays one of every set of identical replicas, exactly as all of them would have been played.

A copy is a part of a pipeline that exchanges nothing with the rest but gradients: the same share of
the replicas of every stage, on one tensor rank. Copies that stand on like devices, in like nodes,
and share nodes only with copies that stand there in the same places, do the same at the same time.
So one is played; its transfers carry, on every resource, the bytes of all copies that pass there,
as so many streams. Rings are priced with all their members, and count once for every tensor rank
where these are copies of each other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from meshwright.cluster.spec import Cluster, Node, node_of
from meshwright.cluster.topology import Resource
from meshwright.cost.collective import Traffic
from meshwright.cost.instructions import Price, Prices, price
from meshwright.cost.links import messages_queue
from meshwright.cost.profile import Profile
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Pipeline, Plan
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import SENDS, Op, Program
from meshwright.program.timeline import Timeline
from meshwright.simulate.engine import simulate
from meshwright.stopping import look

Copy = tuple[str, ...]
"""Devices of one copy, by place: stage, then replica."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Which ranks are played, and how many copies each of them stands for."""

    ranks: frozenset[int]
    sharing: dict[str, int]
    """By node of a copy that is played: the copies of its pipeline that pass the node's bus and its
    network interface."""
    crossing: dict[tuple[str, int], int]
    """By site and pipeline: copies that pass the site's uplink."""
    pipeline_of: dict[int, int]
    rings: dict[int, int]
    """By pipeline: rings of one bucket, each of its own tensor ranks, that are one here."""


def fold(plan: Plan, cluster: Cluster) -> Fold:
    """The least that has to be played; all ranks where no two copies are alike."""
    nodes = {node.name: node for node in cluster.nodes}
    users = _users(plan)
    found = [
        _folded(plan, p, nodes, users, cluster, across=True) for p in range(len(plan.pipelines))
    ]
    # Tensor ranks of unlike widths meet in sums of tiles: one of them does not stand for all.
    across = all(found) and len({_tensor_width(pipeline) for pipeline in plan.pipelines}) == 1
    if not across:
        found = [
            _folded(plan, p, nodes, users, cluster, across=False) or _whole(pipeline)
            for p, pipeline in enumerate(plan.pipelines)
        ]
    rank_of = {device: rank for rank, device in enumerate(plan.devices)}
    pipeline_of: dict[int, int] = {}
    sharing: dict[str, int] = {}
    crossing: dict[tuple[str, int], int] = {}
    for p, copies in enumerate(found):
        pipeline_of.update((rank_of[device], p) for device in copies[0])
        passing = Counter(node for copy in copies for node in {node_of(d) for d in copy})
        sharing.update({node: passing[node] for node in {node_of(d) for d in copies[0]}})
        for site in {nodes[node_of(device)].site for device in copies[0]}:
            crossing[site, p] = len(copies)
    rings = {
        p: _tensor_width(pipeline) if across else 1 for p, pipeline in enumerate(plan.pipelines)
    }
    return Fold(frozenset(pipeline_of), sharing, crossing, pipeline_of, rings)


def _folded(
    plan: Plan,
    p: int,
    nodes: dict[str, Node],
    users: dict[str, set[int]],
    cluster: Cluster,
    *,
    across: bool,
) -> list[Copy]:
    """The most like copies of a pipeline that has its nodes for itself; empty: there are none."""
    pipeline = plan.pipelines[p]
    mine = {node_of(d) for stage in pipeline.stages for unit in stage.devices for d in unit}
    # Broadcasts and gathers meet ranks that would be copies of each other; messages that pass one
    # after another make copies unlike.
    met = any(stage.boundary not in (None, "direct") for stage in pipeline.stages)
    turns = len(pipeline.stages) > 1 and messages_queue(cluster)
    if turns or met or cluster.direct or any(len(users[node]) > 1 for node in mine):
        return []
    return next(_foldings(pipeline, nodes, across=across), [])


def _tensor_width(pipeline: Pipeline) -> int:
    return len(pipeline.stages[0].devices[0])


def _users(plan: Plan) -> dict[str, set[int]]:
    users: dict[str, set[int]] = defaultdict(set)
    for p, pipeline in enumerate(plan.pipelines):
        for stage in pipeline.stages:
            for unit in stage.devices:
                for device in unit:
                    users[node_of(device)].add(p)
    return users


def _whole(pipeline: Pipeline) -> list[Copy]:
    return [tuple(d for stage in pipeline.stages for unit in stage.devices for d in unit)]


def _foldings(pipeline: Pipeline, nodes: dict[str, Node], *, across: bool) -> Iterator[list[Copy]]:
    """Ways to cut a pipeline into like copies, most copies first. `across`: also between the tensor
    ranks of units, each of which must be in one node."""
    stages = pipeline.stages
    even = all(stage.rows is None or len(set(stage.rows)) == 1 for stage in stages)
    units = [unit for stage in stages for unit in stage.devices]
    tensor = {len(unit) for unit in units}
    if not even or len(tensor) > 1:
        return
    if across and any(len({node_of(device) for device in unit}) > 1 for unit in units):
        return
    width = gcd(*(len(stage.devices) for stage in stages))
    for number in (n for n in range(width, 0, -1) if width % n == 0):
        look()
        parts = [
            [unit for stage in stages for unit in _part(stage.devices, c, number)]
            for c in range(number)
        ]
        if across:
            copies = [tuple(unit[t] for unit in part) for part in parts for t in range(min(tensor))]
        else:
            copies = [tuple(device for unit in part for device in unit) for part in parts]
        if _alike(copies, nodes):
            yield copies


def _part(
    units: tuple[tuple[str, ...], ...], index: int, parts: int
) -> tuple[tuple[str, ...], ...]:
    size = len(units) // parts
    return units[index * size : (index + 1) * size]


def _alike(copies: list[Copy], nodes: dict[str, Node]) -> bool:
    """Whether all copies stand on like devices in like nodes, and whoever shares a node with them
    stands there in the same places; then every node of a place has as many copies on it."""
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


def _kind(device: str, nodes: dict[str, Node]) -> tuple[object, ...]:
    name, _, index = device.rpartition(":")
    node = nodes[name]
    return node.devices[int(index)], node.inside, node.network, node.site


def simulate_folded(
    plan: Plan,
    model: LayerGraph,
    cluster: Cluster,
    profile: Profile | None = None,
    *,
    folded: Fold | None = None,
) -> Timeline:
    """The step that a valid plan takes, with the intervals of the ranks that were played."""
    folded = folded or fold(plan, cluster)
    program = compile_plan(plan, model, only=folded.ranks)
    prices = price(program, plan, model, cluster, profile)
    if len(folded.ranks) == len(plan.devices):
        return simulate(program, prices)
    shared = priced_for_all(program, prices, folded)
    return simulate(_among_themselves(program, folded), shared)


def _among_themselves(program: Program, folded: Fold) -> Program:
    """Collectives meet when those have come that are played."""
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


def priced_for_all(program: Program, prices: Prices, folded: Fold) -> Prices:
    """Prices of the ranks that are played, among all the others: transfers carry the bytes of all
    copies; rings keep to the resources of those played."""
    devices = {prices.devices[rank] for rank in folded.ranks}
    rings: dict[tuple[int, int], Traffic] = {}

    def changed(rank: int, op: Op, price: Price) -> Price:
        traffic = price.traffic
        if op in SENDS:
            return replace(price, traffic=_many(traffic, folded, folded.pipeline_of[rank]))
        if op in (Op.REDUCE_GRAD, Op.REDUCE_NORM) and traffic.bytes_by_resource:
            number = folded.rings[folded.pipeline_of[rank]] if op is Op.REDUCE_GRAD else 1
            key = (id(traffic), number)
            if key not in rings:
                rings[key] = _ring(traffic, folded, devices, number)
            return replace(price, traffic=rings[key])
        return price

    ranks = tuple(
        tuple(changed(rank, i.op, p) for i, p in zip(program.ranks[rank], own, strict=True))
        for rank, own in enumerate(prices.ranks)
    )
    return replace(prices, ranks=ranks)


def _many(traffic: Traffic, folded: Fold, pipeline: int) -> Traffic:
    """A transfer with those of all copies that pass the same resources."""
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


def _copies(resource: Resource, folded: Fold, pipeline: int) -> int:
    """How many copies of a pipeline pass a resource that the played one passes. Explicit links are
    passed by one: where there are any, every rank is played."""
    match resource.kind:
        case "bus" | "network":
            return folded.sharing.get(resource.owner, 1)
        case "uplink":
            return folded.crossing.get((resource.owner, pipeline), 1)
        case "port" | "link":
            return 1


def _ring(traffic: Traffic, folded: Fold, devices: set[str], number: int) -> Traffic:
    """What `number` rings ask of the resources of the ranks that are played; each has its own
    devices' ports."""
    sizes = traffic.bytes_by_resource
    return Traffic(
        bytes_by_resource={
            resource: size * (1 if resource.kind == "port" else number)
            for resource, size in sizes.items()
            if _is_played(resource, folded, devices)
        },
        latency=traffic.latency,
        stream=min(sizes.values()),
    )


def _is_played(resource: Resource, folded: Fold, devices: set[str]) -> bool:
    """Whether a resource belongs to devices or nodes that are played; uplinks are everybody's."""
    match resource.kind:
        case "port":
            return resource.owner in devices
        case "bus" | "network":
            return resource.owner in folded.sharing
        case "link":
            return resource.owner in folded.sharing and resource.other in folded.sharing
        case "uplink":
            return True
