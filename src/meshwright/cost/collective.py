"""Computes the bytes and the seconds of transfers and collectives on the resources of a cluster.

Collectives are rings in the order of sites, nodes and devices, so that a ring enters and leaves
each node and each site once (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for
clusters of workstations", 2009). With n members and S bytes, every member sends S / n bytes to the
next one in each step:

    all-reduce                    2(n - 1) steps
    all-gather, reduce-scatter     (n - 1) steps, S the size of the whole
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise, repeat

from meshwright.cluster.topology import Resource, Topology, path
from meshwright.records import Seconds, record


@record
class Traffic:
    """Describes the load that one communication puts on the cluster."""

    bytes_by_resource: dict[Resource, float]
    """The bytes that each resource carries."""
    latency: Seconds = 0.0
    """The seconds in which no byte moves, before the bytes do."""
    stream: float | None = None
    """The bytes of one of the equal streams that share bandwidth fairly with others. None stands
    for the least of `bytes_by_resource`; a number is needed where the traffic of several equal
    communications has been added up."""
    sender: str | None = None
    """The sending device, where messages queue: it waits for messages of other devices that came
    before it on one of its resources. None: messages share the bandwidth."""


def transfer(topology: Topology, source: str, target: str, size: float) -> Traffic:
    """Returns the traffic of `size` bytes from one device to another; none within one device."""
    way = path(topology, source, target)
    return Traffic(bytes_by_resource=dict.fromkeys(way.resources, size), latency=way.latency)


def boundary_transfer(
    topology: Topology, source: str, target: str, size: float, fixed: Seconds
) -> Traffic:
    """Returns the traffic of a transfer between two stages, `fixed` seconds of latency included;
    none within one device."""
    moved = transfer(topology, source, target, size)
    return replace(moved, latency=moved.latency + fixed) if source != target else moved


def all_reduce(
    topology: Topology, devices: Sequence[str], size: float, *, step_latency: Seconds = 0.0
) -> Traffic:
    """Returns the traffic of a ring all-reduce of `size` bytes on every member.

        every member sends 2(n - 1) / n * size; latency = 2(n - 1) * slowest hop

    `step_latency` is the measured fixed cost of one step, in seconds; it replaces the latency of
    the slowest hop where that is smaller.
    """
    return _ring(topology, devices, size, 2 * (len(devices) - 1), step_latency)


def all_gather(
    topology: Topology, devices: Sequence[str], size: float, *, step_latency: Seconds = 0.0
) -> Traffic:
    """Returns the traffic of a ring all-gather; each member holds an equal part of `size` bytes.

    every member sends (n - 1) / n * size; latency = (n - 1) * slowest hop
    """
    return _ring(topology, devices, size, len(devices) - 1, step_latency)


def reduce_scatter(
    topology: Topology, devices: Sequence[str], size: float, *, step_latency: Seconds = 0.0
) -> Traffic:
    """Returns the traffic of a ring reduce-scatter of `size` bytes on every member: an all-gather
    run backwards."""
    return _ring(topology, devices, size, len(devices) - 1, step_latency)


def broadcast(
    topology: Topology, devices: Sequence[str], size: float, *, step_latency: Seconds = 0.0
) -> Traffic:
    """Returns the traffic of a pipelined chain from the first device through all others.

    Every hop carries `size` bytes; latency = (n - 1) * slowest hop. The chain visits the nearest
    devices first: those of the source's node, then of its site.
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
    return _hops(_uses(topology, hops), size, len(hops), step_latency)


def _ring(
    topology: Topology, devices: Sequence[str], size: float, steps: int, step_latency: Seconds
) -> Traffic:
    """Returns the traffic of `steps` ring steps, in each of which every member sends `size` / n
    bytes."""
    count = len(devices)
    if count < 2:
        return Traffic(bytes_by_resource={})
    members = tuple(devices)
    if members not in topology.rings:
        ring = sorted(members, key=topology.order.__getitem__)
        topology.rings[members] = _uses(topology, zip(ring, [*ring[1:], ring[0]], strict=True))
    return _hops(topology.rings[members], steps * size / count, steps, step_latency)


def _uses(
    topology: Topology, hops: Iterable[tuple[str, str]]
) -> tuple[dict[Resource, int], Seconds]:
    """Returns how many of the hops use each resource, and the latency of the slowest one."""
    uses: dict[Resource, int] = {}
    slowest = 0.0
    for source, target in hops:
        way = path(topology, source, target)
        slowest = max(slowest, way.latency)
        for resource in way.resources:
            uses[resource] = uses.get(resource, 0) + 1
    return uses, slowest


def _hops(
    used: tuple[dict[Resource, int], Seconds], size: float, steps: int, step_latency: Seconds
) -> Traffic:
    """Returns the traffic of `size` bytes over each hop, in `steps` steps that each last as long as
    the slowest hop."""
    uses, slowest = used
    sums = [0.0, *accumulate(repeat(size, max(uses.values(), default=0)))]
    return Traffic(
        bytes_by_resource={resource: sums[number] for resource, number in uses.items()},
        latency=steps * max(step_latency, slowest),
    )


def concurrent(traffics: Iterable[Traffic]) -> Traffic:
    """Adds up communications that begin at the same moment: their bytes add up, and the longest
    latency covers the others."""
    carried: dict[Resource, float] = {}
    latency = 0.0
    for traffic in traffics:
        latency = max(latency, traffic.latency)
        for resource, size in traffic.bytes_by_resource.items():
            carried[resource] = carried.get(resource, 0.0) + size
    return Traffic(bytes_by_resource=carried, latency=latency)


def uncontended_seconds(topology: Topology, traffic: Traffic) -> Seconds:
    """Returns the time on an otherwise idle cluster: latency + max over resources of bytes /
    capacity."""
    busiest = max(
        (size / topology.capacities[name] for name, size in traffic.bytes_by_resource.items()),
        default=0.0,
    )
    return traffic.latency + busiest
