"""Holds measured links between classes of device pairs, and gives the links of a cluster the
bandwidth that they reach.

The messages of one pair, in several sizes, give one line: seconds = latency + bytes / bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from meshwright.cluster.spec import (
    Cluster,
    Device,
    Link,
    Node,
    Site,
    devices_of,
    with_island_link,
)
from meshwright.cluster.topology import Topology, topology
from meshwright.cost.collective import all_reduce, uncontended_seconds
from meshwright.cost.constants import system_constants
from meshwright.cost.profile import LinkTimes, Profile
from meshwright.errors import Problem, ProfileError
from meshwright.records import (
    Bytes,
    BytesPerSecond,
    Name,
    PositiveSeconds,
    Ratio,
    Seconds,
    load,
    record,
)

Error = Annotated[float, Field(ge=-1, le=1e30)]
"""A relative error, (predicted - measured) / measured."""
BOTTLENECK_SHARE = 0.97
"""The share of the bandwidth that both nodes reach elsewhere below which a pair has a bottleneck
between them."""

APART = 0.8
"""Share of a link's bandwidth, as many messages reach it together, below which one alone is held to
be limited: above, the difference may be noise."""


@record
class MessageTime:
    """Holds the median seconds of messages of one size."""

    bytes: Bytes
    seconds: PositiveSeconds


@record
class PairTimes:
    """Holds the messages measured between two devices, which stand for all pairs of their class."""

    between: tuple[Name, Name]
    latency: Seconds
    bandwidth: BytesPerSecond
    residual: Ratio
    """The largest relative deviation of a point from latency + bytes / bandwidth."""
    points: tuple[MessageTime, ...]
    crowded: MessageTime | None = None
    """The largest message, sent while a second pair of the same two nodes sends one as large."""
    sharing: Ratio | None = None
    """The seconds of the crowded message over those of twice its bytes alone: 1 if the two pairs
    share one link fairly, 0.5 if each has a link of its own."""


@record
class CollectiveTimes:
    """Holds measured all-reduces over all devices."""

    points: tuple[MessageTime, ...]
    step_latency: Seconds
    """The fixed cost of one step of a ring: the least that any point leaves for it."""
    residuals: tuple[Error, ...]
    """The relative error of the fitted links at every point."""


@record
class LinkReport:
    """Holds all measured links of a cluster."""

    pairs: tuple[PairTimes, ...]
    all_reduce: CollectiveTimes | None = None


def load_links(path: Path, cluster: Cluster) -> LinkReport:
    """Loads a report on the links of a cluster from its file.

    Raises ProfileError with every mistake.
    """
    report = load(path, LinkReport, error=ProfileError)
    known = {device.name for device in devices_of(cluster)}
    problems = [
        Problem(
            str(path),
            f"pairs[{number}].between",
            device,
            f"a device of {cluster.name}",
            each=("device", device),
        )
        for number, pair in enumerate(report.pairs)
        for device in pair.between
        if device not in known
    ]
    whole = report.all_reduce
    if whole and len(whole.points) != len(whole.residuals):
        found, wanted = f"{len(whole.residuals)}", f"{len(whole.points)}, one for each point"
        problems.append(Problem(str(path), "all_reduce.residuals", found, wanted))
    ProfileError.check(problems)
    return report


def fit_line(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Fits seconds = latency + size / bandwidth by least relative squares; returns (latency,
    bandwidth)."""
    weights = 1 / np.asarray(seconds)
    columns = np.stack([np.ones(len(sizes)), np.asarray(sizes, dtype=float)], axis=1)
    latency, slope = np.linalg.lstsq(columns * weights[:, None], np.ones(len(sizes)), rcond=None)[0]
    if slope <= 0:
        slope = seconds[-1] / sizes[-1]
    return max(float(latency), 0.0), 1 / float(slope)


def pair_times(
    between: tuple[str, str], points: Sequence[MessageTime], crowded: MessageTime | None
) -> PairTimes:
    """Fits the line through the points of a pair: at least three, in ascending order of size."""
    small, *_, large, largest = points
    slope = (largest.seconds - large.seconds) / (largest.bytes - large.bytes)
    if slope <= 0:  # noise exceeds the difference: use the largest point alone
        slope = largest.seconds / largest.bytes
    bandwidth = 1 / slope
    latency = max(small.seconds - small.bytes * slope, 0.0)

    def line(size: float) -> float:
        return latency + size / bandwidth

    return PairTimes(
        between=between,
        latency=latency,
        bandwidth=bandwidth,
        residual=max(abs(line(p.bytes) / p.seconds - 1) for p in points),
        points=tuple(points),
        crowded=crowded,
        sharing=crowded.seconds / line(2 * crowded.bytes) if crowded else None,
    )


PairClass = tuple[object, ...]
"""The class of a pair: its level, then what the cluster file says of the links at that level."""


def pair_class(cluster: Cluster, one: Device, other: Device) -> PairClass:
    """Returns the class of a pair: equal for pairs that the cluster file does not tell apart."""
    nodes = {node.name: node for node in cluster.nodes}
    here, there = nodes[one.node], nodes[other.node]
    if here.islands and one.island and one.island == other.island:
        return "islands", here.islands.link
    if here is there:
        return "inside", here.inside
    direct = [d.link for d in cluster.direct if set(d.between) == {one.node, other.node}]
    if direct:
        return "direct", frozenset((one.node, other.node))
    ends = sorted((_node_kind(cluster, each) for each in (here, there)), key=str)
    return ("site" if one.site != other.site else "network", *ends)


def _node_kind(cluster: Cluster, node: Node) -> tuple[object, ...]:
    """Returns what the cluster file says of a node's way out: its network interface and its site's
    uplink."""
    uplink = next((site.uplink for site in cluster.sites if site.name == node.site), None)
    return node.network, uplink


def pair_classes(
    cluster: Cluster, devices: Sequence[Device]
) -> dict[PairClass, tuple[Device, Device]]:
    """Returns the first pair of devices of every class."""
    found: dict[PairClass, tuple[Device, Device]] = {}
    for i, one in enumerate(devices):
        for other in devices[i + 1 :]:
            found.setdefault(pair_class(cluster, one, other), (one, other))
    return found


def fitted_cluster(cluster: Cluster, report: LinkReport) -> Cluster:
    """Returns the cluster with the measured figures on every link that was measured."""
    devices = {device.name: device for device in devices_of(cluster)}
    measured: dict[PairClass, PairTimes] = {}
    for pair in report.pairs:
        one, other = (devices[name] for name in pair.between)
        measured[pair_class(cluster, one, other)] = pair
    nodes = tuple(_fitted_node(cluster, node, measured) for node in cluster.nodes)
    return replace(
        cluster,
        nodes=nodes,
        sites=tuple(
            replace(site, uplink=_fitted_uplink(cluster, nodes, site.name, report) or site.uplink)
            if site.uplink
            else site
            for site in cluster.sites
        ),
        direct=tuple(
            replace(each, link=_between(measured["direct", frozenset(each.between)]))
            if ("direct", frozenset(each.between)) in measured
            else each
            for each in cluster.direct
        ),
    )


def measured_link(
    latency: Seconds, alone: float, together: float | None = None, *, shared: bool = False
) -> Link:
    """Returns a measured link: `alone` and `together` are the bytes per second that one message and
    many at the same time reach. Where many reach more, the link limits single flows."""
    if together is None or alone >= APART * together:
        return Link(bandwidth=alone, latency=latency, shared=shared, kind="measured")
    return Link(
        bandwidth=together, latency=latency, shared=shared, kind="measured", single_flow=alone
    )


def _as_link(pair: PairTimes, *, shared: bool = False) -> Link:
    return measured_link(pair.latency, pair.bandwidth, shared=shared)


def _between(pair: PairTimes) -> Link:
    """Returns the link between two nodes: the crowded message says what two get together."""
    together = pair.bandwidth / pair.sharing if pair.sharing else None
    return measured_link(pair.latency, pair.bandwidth, together)


def _fitted_node(cluster: Cluster, node: Node, measured: dict[PairClass, PairTimes]) -> Node:
    """Returns a node with the links measured inside it and between it and other nodes."""
    inside = measured.get(("inside", node.inside))
    own = _node_kind(cluster, node)
    pairs = [pair for kind, pair in measured.items() if kind[0] == "network" and own in kind[1:]]
    if not pairs:
        pairs = [pair for kind, pair in measured.items() if kind[0] == "site" and own in kind[1:]]
    fitted = node
    if inside:
        fitted = replace(fitted, inside=_as_link(inside, shared=node.inside.shared))
    if node.islands and (joined := measured.get(("islands", node.islands.link))):
        fitted = replace(fitted, islands=replace(node.islands, link=_as_link(joined)))
    if pairs:
        best = max(map(_between, pairs), key=lambda link: link.bandwidth)
        latency = min(pair.latency for pair in pairs)
        network = replace(best, latency=latency, shared=node.network.shared)
        fitted = replace(fitted, network=network)
    return fitted


def _fitted_uplink(
    cluster: Cluster, nodes: Sequence[Node], name: str, report: LinkReport
) -> Link | None:
    """Returns the uplink of a site; None unless device pairs across it are slower than the network
    interfaces of their nodes."""
    by_name = {node.name: node for node in nodes}
    devices = {device.name: device for device in devices_of(cluster)}
    found = None
    for pair in report.pairs:
        one, other = (devices[each] for each in pair.between)
        if one.site == other.site or name not in (one.site, other.site):
            continue
        ends = [by_name[each.node].network for each in (one, other)]
        if pair.bandwidth < BOTTLENECK_SHARE * min(end.bandwidth for end in ends) and (
            found is None or pair.bandwidth > found.bandwidth
        ):
            latency = max(pair.latency - max(end.latency for end in ends), 0.0)
            found = Link(bandwidth=pair.bandwidth, latency=latency, kind="measured")
    return found


def collective_times(cluster: Cluster, points: Sequence[MessageTime]) -> CollectiveTimes:
    """Fits the fixed cost of a ring's step to all-reduces over all devices of a cluster with fitted
    links.

        step = min over sizes of (measured - seconds of the bytes) / 2(n - 1)

    The minimum counts, because noise only adds. The residuals say how far the ring's formula is
    off.
    """
    devices = [device.name for device in devices_of(cluster)]
    steps = 2 * (len(devices) - 1)
    links: Topology = topology(cluster)

    def moving(size: float) -> float:
        return uncontended_seconds(links, replace(all_reduce(links, devices, size), latency=0.0))

    step = max(min(p.seconds - moving(p.bytes) for p in points) / steps, 0.0)
    predicted = [
        uncontended_seconds(links, all_reduce(links, devices, p.bytes, step_latency=step))
        for p in points
    ]
    return CollectiveTimes(
        points=tuple(points),
        step_latency=step,
        residuals=tuple(
            found / point.seconds - 1 for found, point in zip(predicted, points, strict=True)
        ),
    )


def with_measured_links(cluster: Cluster, times: LinkTimes) -> Cluster:
    """Returns the cluster with measured links at every level that was measured; explicit links
    stay.

    A measured latency is end to end. Between sites it therefore contains that of the network, which
    a path across both levels adds anyway; it is subtracted here."""

    def node(each: Node) -> Node:
        return replace(
            each,
            inside=times.inside or each.inside,
            islands=with_island_link(each, lambda link: times.islands or link),
            network=times.network or each.network,
        )

    nodes = tuple(node(each) for each in cluster.nodes)
    if times.site is None:
        return replace(cluster, nodes=nodes)
    network = max(each.network.latency for each in nodes)
    uplink = replace(times.site, latency=max(times.site.latency - network, 0.0))
    sites: tuple[Site, ...] = tuple(replace(each, uplink=uplink) for each in cluster.sites)
    return replace(cluster, nodes=nodes, sites=sites)


def messages_are_serialised(cluster: Cluster) -> bool:
    """Returns True if messages of several devices over one link pass one after another.

    That is so with gloo, the backend wherever a device is a CPU: it hands whole messages to
    sockets, and the queue before the wire empties in their order. Devices of a node that send at
    the same time fall out of step, and the first need not wait for the last. The channels of NCCL
    share a link.
    """
    return any(kind.processor == "cpu" for kind in cluster.types.values())


def ring_step_seconds(profile: Profile | None) -> float:
    """Returns the fixed seconds of one step of a ring: measured, else fitted, else zero."""
    if profile is None:
        return 0.0
    links = profile.links
    measured = links.all_reduce_latency if links else None
    return system_constants(profile.calibration).ring_step if measured is None else measured


def overhead_seconds(profile: Profile | None) -> float:
    """Returns the fixed cost of a step outside all instructions: the measured one plus the fitted
    one."""
    if profile is None:
        return 0.0
    return profile.step_overhead_seconds + system_constants(profile.calibration).step
