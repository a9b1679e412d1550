"""Transfers and collectives: the bytes that each resource carries, and the seconds that takes.

Collectives are rings in site, node and device order, so that a ring leaves and enters each node
and each site once (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", 2009). With n members and S bytes, in each of its steps every member sends S/n to
the next:

    all-reduce                    2(n - 1) steps
    all-gather, reduce-scatter     (n - 1) steps, S the size of the whole
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from meshwright.cluster.topology import Resource, Topology, path
from meshwright.records import Seconds, record


@record
class Traffic:
    """What one communication asks of the cluster."""

    bytes_by_resource: dict[Resource, float]
    latency: Seconds = 0.0
    """Seconds in which no byte moves."""
    stream: float | None = None
    """Bytes of one of the equal streams it is made of, where that is not the least of the above: it
    stands for several like it, whose bytes are added up."""
    sender: str | None = None
    """The device it comes from, where those of other devices that came before it on one of its
    resources go first."""


def transfer(topology: Topology, source: str, target: str, size: float) -> Traffic:
    """`size` bytes from one device to another; nothing if they are one."""
    way = path(topology, source, target)
    return Traffic(bytes_by_resource=dict.fromkeys(way.resources, size), latency=way.latency)


def boundary_transfer(
    topology: Topology, source: str, target: str, size: float, fixed: Seconds
) -> Traffic:
    """A transfer between two stages, with its fixed cost; nothing on one device."""
    moved = transfer(topology, source, target, size)
    return replace(moved, latency=moved.latency + fixed) if source != target else moved


def all_reduce(
    topology: Topology, devices: Sequence[str], size: float, *, step_latency: Seconds = 0.0
) -> Traffic:
    """Ring all-reduce of `size` bytes per member.

        every member sends 2(n-1)/n * size; latency = 2(n-1) * slowest hop

    `step_latency`: fixed seconds of one step as measured on collectives; it counts where the
    slowest hop is quicker than that.
    """
    return _ring(topology, devices, size, 2 * (len(devices) - 1), step_latency)


def all_gather(
    topology: Topology, devices: Sequence[str], size: float, *, step_latency: Seconds = 0.0
) -> Traffic:
    """Ring all-gather to `size` bytes in all, of which each member holds an equal part.

    every member sends (n-1)/n * size; latency = (n-1) * slowest hop
    """
    return _ring(topology, devices, size, len(devices) - 1, step_latency)


def reduce_scatter(
    topology: Topology, devices: Sequence[str], size: float, *, step_latency: Seconds = 0.0
) -> Traffic:
    """Ring reduce-scatter of `size` bytes per member: an all-gather run backwards."""
    return _ring(topology, devices, size, len(devices) - 1, step_latency)


def broadcast(
    topology: Topology, devices: Sequence[str], size: float, *, step_latency: Seconds = 0.0
) -> Traffic:
    """Pipelined chain from the first device through all others, `size` bytes over every hop.

    latency = (n-1) * slowest hop
    """
    if len(devices) < 2:
        return Traffic(bytes_by_resource={})
    source = topology.devices[devices[0]]

    def nearness(device: str) -> tuple[bool, bool, bool, int]:
        other = topology.devices[device]
        return (
            other.name != source.name,
            other.node != source.node,
            other.site != source.site,
            topology.order[device],
        )

    chain = sorted(devices, key=nearness)
    hops = [*pairwise(chain)]
    return _hops(topology, hops, size, len(hops), step_latency)


def _ring(
    topology: Topology, devices: Sequence[str], size: float, steps: int, step_latency: Seconds
) -> Traffic:
    count = len(devices)
    if count < 2:
        return Traffic(bytes_by_resource={})
    ring = sorted(devices, key=topology.order.__getitem__)
    hops = zip(ring, [*ring[1:], ring[0]], strict=True)
    return _hops(topology, hops, steps * size / count, steps, step_latency)


def _hops(
    topology: Topology,
    hops: Iterable[tuple[str, str]],
    size: float,
    steps: int,
    step_latency: Seconds,
) -> Traffic:
    """`size` bytes over each hop, in `steps` steps that each wait for the slowest hop."""
    carried: dict[Resource, float] = {}
    slowest = step_latency
    for source, target in hops:
        way = path(topology, source, target)
        slowest = max(slowest, way.latency)
        for resource in way.resources:
            carried[resource] = carried.get(resource, 0.0) + size
    return Traffic(bytes_by_resource=carried, latency=steps * slowest)


def together(traffics: Iterable[Traffic]) -> Traffic:
    """Communications that begin at the same moment: bytes add up, latencies pass side by side."""
    carried: dict[Resource, float] = {}
    latency = 0.0
    for traffic in traffics:
        latency = max(latency, traffic.latency)
        for resource, size in traffic.bytes_by_resource.items():
            carried[resource] = carried.get(resource, 0.0) + size
    return Traffic(bytes_by_resource=carried, latency=latency)


def alone_seconds(topology: Topology, traffic: Traffic) -> Seconds:
    """Time on an otherwise idle cluster: latency + the busiest resource's bytes / capacity."""
    busiest = max(
        (size / topology.capacities[name] for name, size in traffic.bytes_by_resource.items()),
        default=0.0,
    )
    return traffic.latency + busiest
