"""Computes the bytes and the seconds of transfers and collectives on the resources of a cluster.

Collectives are rings in the order of sites, nodes and devices, so that a ring enters and leaves
each node and each site once (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for
clusters of workstations", 2009). With n members and S bytes, every member sends S / n bytes to the
next one in each step:

    all-reduce                    2(n - 1) steps
    all-gather, reduce-scatter     (n - 1) steps, S the size of the whole

Where the kinds of all links are known, steps cost what NCCL's do (`link_rates.toml`): of two
protocols, the one that is done first; between m nodes an all-reduce is a tree, in 2 log2(m) steps.
Elsewhere every step lasts as long as the slowest hop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, chain, pairwise, repeat
from math import ceil, log2

from meshwright.cluster.link_rates import BETWEEN, LinkRate, rate_of
from meshwright.cluster.spec import Link, node_of
from meshwright.cluster.topology import Hops, Path, Resource, Topology, Waits, path
from meshwright.records import Seconds, record

MOST_SUMMED = 2
"""The largest number of nodes over which an all-reduce gains by switches that sum: of two, each
sends the other its sum once, where a ring sends it almost twice."""


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
    count = len(devices)
    if count < 2:
        return Traffic(bytes_by_resource={})
    hops, steps = _ring(topology, devices), 2 * (count - 1)
    if hops.waits is None:
        return _moved(hops, steps * size / count, steps * max(step_latency, hops.slowest))
    sent, waits = steps * size / count * hops.waits.sum_share, hops.waits
    latency = _waited(waits, 2 * (waits.local - 1), 2 * ceil(log2(waits.nodes)), sent)
    return _moved(hops, sent, max(latency, steps * step_latency))


def all_gather(
    topology: Topology, devices: Sequence[str], size: float, *, step_latency: Seconds = 0.0
) -> Traffic:
    """Returns the traffic of a ring all-gather; each member holds an equal part of `size` bytes.

    every member sends (n - 1) / n * size; latency = (n - 1) * slowest hop
    """
    steps, count = len(devices) - 1, len(devices)
    if count < 2:
        return Traffic(bytes_by_resource={})
    hops, sent = _ring(topology, devices), steps * size / count
    if hops.waits is None:
        return _moved(hops, sent, steps * max(step_latency, hops.slowest))
    nodes = hops.waits.nodes
    latency = _waited(hops.waits, count - nodes, nodes - 1, sent)
    return _moved(hops, sent, max(latency, steps * step_latency))


def reduce_scatter(
    topology: Topology, devices: Sequence[str], size: float, *, step_latency: Seconds = 0.0
) -> Traffic:
    """Returns the traffic of a ring reduce-scatter of `size` bytes on every member: an all-gather
    run backwards."""
    return all_gather(topology, devices, size, step_latency=step_latency)


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

    pairs = [*pairwise(sorted(devices, key=nearness))]
    hops = _hops(topology, pairs)
    if hops.waits is None:
        return _moved(hops, size, len(pairs) * max(step_latency, hops.slowest))
    across = sum(node_of(one) != node_of(other) for one, other in pairs)
    latency = _waited(hops.waits, len(pairs) - across, across, size)
    return _moved(hops, size, max(latency, len(pairs) * step_latency))


def _ring(topology: Topology, devices: Sequence[str]) -> Hops:
    """Returns the hops of the ring through some devices, two or more."""
    members = tuple(devices)
    if members not in topology.rings:
        ring = sorted(members, key=topology.order.__getitem__)
        topology.rings[members] = _hops(topology, [*pairwise([*ring, ring[0]])])
    return topology.rings[members]


def _hops(topology: Topology, hops: Sequence[tuple[str, str]]) -> Hops:
    """Returns how many of the hops use each resource, and what their steps cost."""
    uses: dict[Resource, int] = {}
    ways = [path(topology, source, target) for source, target in hops]
    for way in ways:
        for resource in way.resources:
            uses[resource] = uses.get(resource, 0) + 1
    slowest = max(way.latency for way in ways)
    rates = [(way, rate_of(way.kind)) for way in ways]
    known = [(way, rate) for way, rate in rates if rate]
    waits = _waits(topology, hops, known, uses) if len(known) == len(ways) else None
    return Hops(uses=uses, slowest=slowest, waits=waits)


def _waits(
    topology: Topology,
    hops: Sequence[tuple[str, str]],
    ways: Sequence[tuple[Path, LinkRate]],
    uses: dict[Resource, int],
) -> Waits:
    members = Counter(node_of(device) for device in dict.fromkeys(chain.from_iterable(hops)))
    is_inside = [node_of(a) == node_of(b) for a, b in hops]
    own = [each for each, within in zip(ways, is_inside, strict=True) if within]
    between = [each for each, within in zip(ways, is_inside, strict=True) if not within]
    seconds = {name: count / topology.capacities[name] for name, count in uses.items()}
    ports = max((seconds[name] for way, _ in own for name in way.resources), default=0.0)
    slow = max((rate.quick_bytes for _, rate in own), default=1.0) * ports
    sums = len(members) <= MOST_SUMMED and max(members.values()) > 2
    return Waits(
        nodes=len(members),
        local=max(members.values()),
        inside=(
            max((rate.step * way.latency for way, rate in own), default=0.0),
            max((rate.quick_step * way.latency for way, rate in own), default=0.0),
        ),
        between=(
            max((way.latency + rate.software for way, rate in between), default=0.0),
            max((way.latency + rate.quick_software for way, rate in between), default=0.0),
        ),
        slope=max(slow - max(seconds.values()), 0.0),
        sum_share=max(rate.sum_share for _, rate in own) if sums else 1.0,
    )


def _waited(waits: Waits, inside: int, between: int, sent: float) -> Seconds:
    """Returns the latency of steps inside and between nodes in which every member sends `sent`
    bytes: that of the protocol which is done first."""
    large, small = (
        inside * step + between * across
        for step, across in zip(waits.inside, waits.between, strict=True)
    )
    return min(large, small + sent * waits.slope)


def _moved(hops: Hops, size: float, latency: Seconds) -> Traffic:
    """Returns the traffic of `size` bytes over each hop."""
    sums = [0.0, *accumulate(repeat(size, max(hops.uses.values(), default=0)))]
    return Traffic(
        bytes_by_resource={resource: sums[number] for resource, number in hops.uses.items()},
        latency=latency,
    )


def step_seconds(link: Link) -> Seconds:
    """Returns the seconds of one step of a collective over a link, in the protocol of large
    messages."""
    rate = rate_of(link.kind)
    return rate.step * link.latency + rate.software if rate else link.latency


def least_step_seconds(link: Link) -> Seconds:
    """Returns the seconds of one step of a collective over a link in the quicker protocol."""
    rate = rate_of(link.kind)
    quick = rate.quick_step * link.latency + rate.quick_software if rate else link.latency
    return min(quick, step_seconds(link))


def least_sum_steps(link: Link, members: int) -> int:
    """Returns the number of steps of an all-reduce among `members`: on different nodes those of a
    tree, where the kind of their network is known, elsewhere those of a ring."""
    if link.kind in BETWEEN:
        return 2 * ceil(log2(members))
    return 2 * (members - 1)


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
