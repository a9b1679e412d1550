"""Models which transfers share bandwidth: the directed capacities of a cluster, and the path from
device to device.

A resource is one direction of one thing that bytes pass through: a device's port, its port to the
others of its island, the bus of a node, a node's network interface, a site's uplink, an explicit
link. A shared link has one capacity for both directions. Transfers that have a resource in common
share its bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from itertools import chain
from typing import Literal, NamedTuple

from meshwright.cluster.spec import (
    Cluster,
    Device,
    Link,
    LinkKind,
    Node,
    devices_of,
)
from meshwright.records import BytesPerSecond, Seconds, record

Direction = Literal["in", "out", "both"]


class Resource(NamedTuple):
    """Identifies something that bytes pass through in one direction, such as a device's port or a
    site's uplink; transfers that pass through the same resource share its bandwidth.

    A tuple, because searches look resources up millions of times. The order of resources, by owner
    first, decides which of two equally loaded ones a simulation fills first.
    """

    owner: str
    """Device, node or site that it belongs to; for an explicit link, the node that sends."""
    kind: Literal["port", "island", "flow", "bus", "network", "uplink", "link"]
    """Kind of the thing: a port belongs to one device, and so does the one to its island; a bus
    belongs to all devices of a node, a network interface to a node, an uplink to a site, and a link
    joins two nodes explicitly. A flow is what one device gets of a link where that is less than
    many get together."""
    direction: Direction
    """Direction seen from the owner; `both` if they share one capacity."""
    peer: str = ""
    """Node at the other end of an explicit link; of a shared one, the later of the two names. Of a
    flow, its link: `inside`, `network`, `uplink`, or the node at the other end."""


@record
class Path:
    """Describes the resources that a transfer between two devices occupies."""

    resources: tuple[Resource, ...]
    latency: Seconds
    """Seconds before the first byte arrives."""
    kind: LinkKind | None = None
    """Kind of the link that is passed; between nodes, of the slower end. None: measured."""


@record
class Waits:
    """Holds what the steps of a collective cost on links whose kind is known, in NCCL's protocols
    of large and of small messages."""

    nodes: int
    """Number of nodes that the members are on."""
    local: int
    """Largest number of members on one node."""
    inside: tuple[Seconds, Seconds]
    """Seconds of a step inside a node in the two protocols."""
    between: tuple[Seconds, Seconds]
    """Seconds of a step between nodes in the two protocols."""
    slope: float
    """Seconds by which a byte that a member sends takes longer in that of small messages."""
    sum_share: float
    """Share of an all-reduce's bytes that links carry: below 1 where a switch sums."""


@record
class Hops:
    """Describes the hops of a collective."""

    uses: dict[Resource, int]
    """Number of hops that use each resource."""
    slowest: Seconds
    """Latency of the slowest hop."""
    waits: Waits | None = None
    """What their steps cost by the kinds of the links; None where one of them is measured."""


@record
class Topology:
    """Holds a cluster as tables that are looked up by device, node and site."""

    capacities: dict[Resource, BytesPerSecond]
    """Bytes per second of each resource."""
    devices: dict[str, Device]
    order: dict[str, int]
    """Index of each device in the order of sites, nodes, islands and devices: neighbours in it are
    close."""
    nodes: dict[str, Node]
    uplinks: dict[str, Link | None]
    """Uplink of each site."""
    direct: dict[tuple[str, str], Link]
    """Explicit links by pair of nodes, in both orders."""
    has_flows: bool = False
    """True if devices alone get less of some link between nodes than many get together."""
    paths: dict[tuple[str, str], Path] = field(default_factory=dict)
    """Paths computed so far: by pair of nodes, or by pair of devices, of one node or where single
    flows are limited."""
    rings: dict[tuple[str, ...], Hops] = field(default_factory=dict)
    """Hops of the rings computed so far, by their members."""


DIRECTIONS: tuple[Direction, ...] = ("out", "in")
"""The two directions of a link that is not shared."""

_Resources = tuple[Resource, ...]
_HERE = Path(resources=(), latency=0.0)


def topology(cluster: Cluster) -> Topology:
    """Computes the resources of a cluster and their capacities."""
    direct: dict[tuple[str, str], Link] = {}
    for each in cluster.direct:
        direct[each.between] = direct[each.between[::-1]] = each.link
    sites = {site.name: index for index, site in enumerate(cluster.sites)}
    devices = devices_of(cluster)
    place = {device.name: index for index, device in enumerate(devices)}
    ordered = sorted(devices, key=lambda d: (sites[d.site], place[d.island or d.name]))
    capacities = _capacities(cluster, direct)
    flows = dict(_flows(cluster, direct))
    return Topology(
        capacities=capacities | flows,
        devices={device.name: device for device in devices},
        order={device.name: index for index, device in enumerate(ordered)},
        nodes={node.name: node for node in cluster.nodes},
        uplinks={site.name: site.uplink for site in cluster.sites},
        direct=direct,
        has_flows=any(flow.peer != "inside" for flow in flows),
    )


def _flows(
    cluster: Cluster, direct: dict[tuple[str, str], Link]
) -> Iterator[tuple[Resource, BytesPerSecond]]:
    """Yields what each device alone gets of the links that limit single flows."""
    uplinks = {site.name: site.uplink for site in cluster.sites}
    for node in cluster.nodes:
        links = {"inside": node.inside, "network": node.network, "uplink": uplinks[node.site]}
        links |= {there: link for (here, there), link in direct.items() if here == node.name}
        limits = {name: link.single_flow for name, link in links.items() if link}
        for name, limit in limits.items():
            for index in range(len(node.devices) if limit is not None else 0):
                for way in DIRECTIONS:
                    yield Resource(f"{node.name}:{index}", "flow", way, name), limit or 0.0


def _capacities(
    cluster: Cluster, direct: dict[tuple[str, str], Link]
) -> dict[Resource, BytesPerSecond]:
    capacities: dict[Resource, BytesPerSecond] = {}
    for node in cluster.nodes:
        for way in DIRECTIONS:
            capacities[_network(node, way)] = node.network.bandwidth
            for index in range(len(node.devices)):
                capacities[_inside(node, f"{node.name}:{index}", way)] = node.inside.bandwidth
            if node.islands:
                for index in chain(*node.islands.groups):
                    port = Resource(f"{node.name}:{index}", "island", way)
                    capacities[port] = node.islands.link.bandwidth
    for site in cluster.sites:
        if site.uplink:
            for way in DIRECTIONS:
                capacities[_uplink(site.name, site.uplink, way)] = site.uplink.bandwidth
    for (source, target), link in direct.items():
        capacities[_direct(source, target, link)] = link.bandwidth
    return capacities


def _inside(node: Node, device: str, way: Direction) -> Resource:
    if node.inside.shared:
        return Resource(node.name, "bus", "both")
    return Resource(device, "port", way)


def _network(node: Node, way: Direction) -> Resource:
    return Resource(node.name, "network", "both" if node.network.shared else way)


def _uplink(site: str, link: Link, way: Direction) -> Resource:
    return Resource(site, "uplink", "both" if link.shared else way)


def _direct(source: str, target: str, link: Link) -> Resource:
    if link.shared:
        source, target = sorted((source, target))
        return Resource(source, "link", "both", target)
    return Resource(source, "link", "out", target)


def path(topology: Topology, source: str, target: str) -> Path:
    """Returns the path from device `source` to device `target`; it is empty if they are one.

    Latencies add up over the levels that are crossed (network, then sites); within a level the
    slower of the two ends counts, since a link's latency is that between two such ends.
    """
    if source == target:
        return _HERE
    here, there = topology.devices[source].node, topology.devices[target].node
    key = (source, target) if here == there or topology.has_flows else (here, there)
    known = topology.paths.get(key)
    if known is None:
        make = _path_inside if here == there else _path_between
        known = topology.paths[key] = make(topology, source, target)
    return known


def _flow(topology: Topology, source: str, target: str, *names: tuple[str, str]) -> _Resources:
    """Returns the flows of two devices on links that are named at each end, where they are
    limited."""
    ends = [
        flow
        for out, into in names
        for flow in (Resource(source, "flow", "out", out), Resource(target, "flow", "in", into))
    ]
    return tuple(flow for flow in ends if flow in topology.capacities)


def _path_inside(topology: Topology, source: str, target: str) -> Path:
    node = topology.nodes[topology.devices[source].node]
    island = topology.devices[source].island
    if node.islands and island and island == topology.devices[target].island:
        ports = (Resource(source, "island", "out"), Resource(target, "island", "in"))
        link = node.islands.link
        return Path(resources=ports, latency=link.latency, kind=link.kind)
    resources: _Resources = (_inside(node, source, "out"), _inside(node, target, "in"))
    resources = (*_distinct(resources), *_flow(topology, source, target, ("inside", "inside")))
    return Path(resources=resources, latency=node.inside.latency, kind=node.inside.kind)


def _path_between(topology: Topology, source: str, target: str) -> Path:
    here, there = (topology.nodes[topology.devices[each].node] for each in (source, target))
    # A bus also carries the traffic to the network; NVLink ports do not.
    leave = (_inside(here, "", "out"),) if here.inside.shared else ()
    enter = (_inside(there, "", "in"),) if there.inside.shared else ()
    link = topology.direct.get((here.name, there.name))
    if link:
        middle: _Resources = (_direct(here.name, there.name, link),)
        flows = _flow(topology, source, target, (there.name, here.name))
        resources = (*leave, *middle, *enter, *flows)
        return Path(resources=resources, latency=link.latency, kind=link.kind)
    middle = (_network(here, "out"), _network(there, "in"))
    flows = _flow(topology, source, target, ("network", "network"))
    latency = max(here.network.latency, there.network.latency)
    if here.site != there.site:
        across, slowest = _across(topology, here.site, there.site)
        middle, latency = (middle[0], *across, middle[1]), latency + slowest
        flows += _flow(topology, source, target, ("uplink", "uplink"))
    slower = max(here.network, there.network, key=lambda link: link.latency)
    return Path(resources=(*leave, *middle, *enter, *flows), latency=latency, kind=slower.kind)


def _across(topology: Topology, here: str, there: str) -> tuple[tuple[Resource, ...], Seconds]:
    ends = [
        (_uplink(site, link, way), link.latency)
        for site, way in zip((here, there), DIRECTIONS, strict=True)
        if (link := topology.uplinks[site])
    ]
    return tuple(uplink for uplink, _ in ends), max((wait for _, wait in ends), default=0.0)


def _distinct(resources: tuple[Resource, ...]) -> tuple[Resource, ...]:
    return tuple(dict.fromkeys(resources))
