"""Models which transfers share bandwidth: the directed capacities of a cluster, and the path from
device to device.

A resource is one direction of one thing that bytes pass through: a device's port, its port to the
others of its island, the bus of a node, a node's network interface, a site's uplink, an explicit
link. A shared link has one capacity for both directions. Transfers that have a resource in common
share its bandwidth.
"""

from __future__ import annotations

from dataclasses import field
from itertools import chain
from typing import Literal, NamedTuple

from meshwright.cluster.spec import Cluster, Device, Link, Node, devices_of
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
    kind: Literal["port", "island", "bus", "network", "uplink", "link"]
    """Kind of the thing: a port belongs to one device, and so does the one to its island; a bus
    belongs to all devices of a node, a network interface to a node, an uplink to a site, and a link
    joins two nodes explicitly."""
    direction: Direction
    """Direction seen from the owner; `both` if they share one capacity."""
    peer: str = ""
    """Node at the other end of an explicit link; of a shared one, the later of the two names."""


@record
class Path:
    """Describes the resources that a transfer between two devices occupies."""

    resources: tuple[Resource, ...]
    latency: Seconds
    """Seconds before the first byte arrives."""


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
    paths: dict[tuple[str, str], Path] = field(default_factory=dict)
    """Paths computed so far: by pair of nodes, or by pair of devices of one node."""
    rings: dict[tuple[str, ...], tuple[dict[Resource, int], Seconds]] = field(default_factory=dict)
    """For rings computed so far, by their members: how many hops use each resource, and the latency
    of the slowest hop."""


DIRECTIONS: tuple[Direction, ...] = ("out", "in")
"""The two directions of a link that is not shared."""

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
    return Topology(
        capacities=_capacities(cluster, direct),
        devices={device.name: device for device in devices},
        order={device.name: index for index, device in enumerate(ordered)},
        nodes={node.name: node for node in cluster.nodes},
        uplinks={site.name: site.uplink for site in cluster.sites},
        direct=direct,
    )


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
    key = (source, target) if here == there else (here, there)
    known = topology.paths.get(key)
    if known is None:
        make = _path_inside if here == there else _path_between
        known = topology.paths[key] = make(topology, *key)
    return known


def _path_inside(topology: Topology, source: str, target: str) -> Path:
    node = topology.nodes[topology.devices[source].node]
    island = topology.devices[source].island
    if node.islands and island and island == topology.devices[target].island:
        ports = (Resource(source, "island", "out"), Resource(target, "island", "in"))
        return Path(resources=ports, latency=node.islands.link.latency)
    resources = (_inside(node, source, "out"), _inside(node, target, "in"))
    return Path(resources=_distinct(resources), latency=node.inside.latency)


def _path_between(topology: Topology, source: str, target: str) -> Path:
    here, there = topology.nodes[source], topology.nodes[target]
    # A bus also carries the traffic to the network; NVLink ports do not.
    leave = (_inside(here, "", "out"),) if here.inside.shared else ()
    enter = (_inside(there, "", "in"),) if there.inside.shared else ()
    link = topology.direct.get((source, target))
    if link:
        middle: tuple[Resource, ...] = (_direct(source, target, link),)
        return Path(resources=(*leave, *middle, *enter), latency=link.latency)
    middle = (_network(here, "out"), _network(there, "in"))
    latency = max(here.network.latency, there.network.latency)
    if here.site != there.site:
        across, slowest = _across(topology, here.site, there.site)
        middle, latency = (middle[0], *across, middle[1]), latency + slowest
    return Path(resources=(*leave, *middle, *enter), latency=latency)


def _across(topology: Topology, here: str, there: str) -> tuple[tuple[Resource, ...], Seconds]:
    ends = [
        (_uplink(site, link, way), link.latency)
        for site, way in zip((here, there), DIRECTIONS, strict=True)
        if (link := topology.uplinks[site])
    ]
    return tuple(uplink for uplink, _ in ends), max((wait for _, wait in ends), default=0.0)


def _distinct(resources: tuple[Resource, ...]) -> tuple[Resource, ...]:
    return tuple(dict.fromkeys(resources))
