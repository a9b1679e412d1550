"""Divides pipelines into slices that behave identically; one of them is simulated for all.

A slice is a part of a pipeline that exchanges only gradients with the rest: an equal share of the
replicas of every stage, on one tensor rank. Slices behave identically if their devices and nodes
are alike and all slices on a node have the same of their devices there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import gcd

from meshwright.cluster.spec import Node
from meshwright.plan.mesh import mesh_of
from meshwright.plan.spec import Pipeline
from meshwright.simulate.explicit_links import ExplicitLinks
from meshwright.stopping import raise_if_stopped

ReplicaSlice = tuple[str, ...]
"""The devices of one slice, by stage and then by replica."""


@dataclass(frozen=True, slots=True)
class Homes:
    """Holds the nodes of a cluster as slices see them."""

    nodes: dict[str, Node]
    node_of: dict[str, str]
    """The node of every device."""
    kind_of: dict[str, int]
    """A number for what makes two devices alike: type, links and site of the node."""


def homes_of(nodes: Iterable[Node]) -> Homes:
    """Looks up the devices of nodes."""
    numbers: dict[object, int] = {}
    homes = Homes({node.name: node for node in nodes}, {}, {})
    for node in homes.nodes.values():
        joined = node.islands and node.islands.link
        shared = numbers.setdefault((node.inside, joined, node.network, node.site), len(numbers))
        for index, kind in enumerate(node.devices):
            device = f"{node.name}:{index}"
            homes.node_of[device] = node.name
            homes.kind_of[device] = numbers.setdefault((kind, shared), len(numbers))
    return homes


def devices_of(pipeline: Pipeline) -> Iterator[str]:
    """Yields the devices of all stages of a pipeline."""
    return (device for stage in pipeline.stages for device in mesh_of(stage).members)


def whole(pipeline: Pipeline) -> list[ReplicaSlice]:
    """Returns the whole pipeline as a single slice."""
    return [tuple(devices_of(pipeline))]


def largest_orbit(
    pipeline: Pipeline, homes: Homes, links: ExplicitLinks | None, *, across: bool
) -> list[ReplicaSlice]:
    """Returns the largest set of identical slices of a pipeline; empty if it has none."""
    # A broadcast or a gather joins the tensor ranks of a replica.
    if across and any(stage.boundary not in (None, "direct") for stage in pipeline.stages):
        return []
    return next(_divisions(pipeline, homes, links, across=across), [])


def _divisions(
    pipeline: Pipeline, homes: Homes, links: ExplicitLinks | None, *, across: bool
) -> Iterator[list[ReplicaSlice]]:
    """Yields the ways to divide a pipeline into identical slices, most slices first.

    With `across`, the tensor ranks of a replica become slices too; each replica must then be inside
    one node, and all stages of one tensor width.
    """
    even = all(stage.rows is None or len(set(stage.rows)) == 1 for stage in pipeline.stages)
    meshes = [mesh_of(stage) for stage in pipeline.stages]
    widths = [set(mesh.widths("tensor")) for mesh in meshes]
    tensor = set[int]().union(*widths)
    if not even or any(len(own) > 1 for own in (widths if not across else [tensor])):
        return
    ranks = min(tensor) if across else 1
    units = [mesh.groups("tensor") for mesh in meshes]
    node_of = homes.node_of
    if ranks > 1 and any(
        node_of[unit[0]] != node_of[device] for own in units for unit in own for device in unit
    ):
        return
    width = gcd(*(mesh.width("data") for mesh in meshes))
    # Explicit links may join nodes in pairs: then a slice has one place on either of them.
    steps = {1} if links is None else {1, *(_neighbours(own, node_of) for own in units)}
    for number in (n for n in range(width, 0, -1) if width % n == 0):
        for step in sorted(step for step in steps if number % step == 0):
            raise_if_stopped()
            parts = [_part(units, width, c, number, step) for c in range(number)]
            if across:
                copies = [tuple(unit[t] for unit in part) for part in parts for t in range(ranks)]
            else:
                copies = [tuple(device for unit in part for device in unit) for part in parts]
            alike = _behave_alike(copies, homes) and _keep_islands(copies, homes.nodes, ranks)
            if alike and (links is None or links.are_alike(copies, node_of)):
                yield copies


def _neighbours(units: Sequence[tuple[str, ...]], node_of: dict[str, str]) -> int:
    """Returns the number of replicas next to each other on the first node of a stage."""
    return len(list(next(groupby(node_of[unit[0]] for unit in units))[1]))


def _part(
    units: Sequence[Sequence[tuple[str, ...]]], width: int, index: int, parts: int, step: int
) -> list[tuple[str, ...]]:
    """Returns the replicas of all stages in part `index` of `parts` equal parts, which have every
    `step`-th of `width` shares of a stage."""
    size = width // parts
    first = index // step * step * size + index % step
    shares = range(first, first + size * step, step)
    found = []
    for own in units:
        each = len(own) // width
        found += [unit for share in shares for unit in own[share * each : (share + 1) * each]]
    return found


def _behave_alike(copies: list[ReplicaSlice], homes: Homes) -> bool:
    """Returns True if all slices behave identically.

    Devices at the same position of two slices must be alike, in like nodes; all slices on a node
    must have the same positions there, and all nodes with a position as many slices.
    """
    kind_of, node_of = homes.kind_of, homes.node_of
    kinds = [kind_of[device] for device in copies[0]]
    places: dict[str, frozenset[int]] = {}
    passing: Counter[str] = Counter()
    for copy in copies:
        if [kind_of[device] for device in copy] != kinds:
            return False
        standing: dict[str, set[int]] = defaultdict(set)
        for place, device in enumerate(copy):
            standing[node_of[device]].add(place)
        for node, here in standing.items():
            if places.setdefault(node, frozenset(here)) != here:
                return False
            passing[node] += 1
    own = {place: node_of[device] for place, device in enumerate(copies[0])}
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
