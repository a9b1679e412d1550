"""Links as they were measured between classes of devices, and the cluster that fits them.

A pair's messages of several sizes give one line, seconds = latency + bytes / bandwidth: the two
largest its slope, for in small ones a burst that the link lets through passes for speed; the
smallest its latency. A node is
as fast as its fastest pair; what a pair between sites, or over an explicit link, adds to its nodes
belongs to the uplink or to that link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from meshwright.cluster.spec import Cluster, Device, Link, Node, devices_of
from meshwright.cluster.topology import Topology, topology
from meshwright.cost.collective import all_reduce, alone_seconds
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
"""(predicted - measured) / measured."""
SLOWER = 0.97
"""Of the bandwidth that both nodes showed elsewhere: a pair below it has a bottleneck between."""


@record
class Point:
    """Median seconds of one size."""

    bytes: Bytes
    seconds: PositiveSeconds


@record
class PairTimes:
    """Messages between two devices that stand for all pairs like them."""

    between: tuple[Name, Name]
    latency: Seconds
    bandwidth: BytesPerSecond
    residual: Ratio
    """Largest relative distance of a point from latency + bytes / bandwidth."""
    points: tuple[Point, ...]
    crowded: Point | None = None
    """The largest message while a second pair of the same two nodes sends as much."""
    sharing: Ratio | None = None
    """Of the line's seconds for twice the bytes, what the crowded message took: 1 for a fair
    half of the link each; 0.5 if the two pairs have links of their own."""


@record
class CollectiveTimes:
    """All-reduces over all devices."""

    points: tuple[Point, ...]
    step_latency: Seconds
    """Fixed cost of one step of a ring, by the point that leaves least room for one."""
    residuals: tuple[Error, ...]
    """(predicted - measured) / measured of every point, from the fitted links."""


@record
class LinkReport:
    """All measured links of a cluster."""

    pairs: tuple[PairTimes, ...]
    all_reduce: CollectiveTimes | None = None


def load_links(path: Path, cluster: Cluster) -> LinkReport:
    """A report on the links of a cluster from its file. Raises ProfileError with every mistake."""
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
    """(latency, bandwidth) of seconds = latency + size / bandwidth, by least relative squares."""
    weights = 1 / np.asarray(seconds)
    columns = np.stack([np.ones(len(sizes)), np.asarray(sizes, dtype=float)], axis=1)
    latency, slope = np.linalg.lstsq(columns * weights[:, None], np.ones(len(sizes)), rcond=None)[0]
    if slope <= 0:
        slope = seconds[-1] / sizes[-1]
    return max(float(latency), 0.0), 1 / float(slope)


def pair_times(
    between: tuple[str, str], points: Sequence[Point], crowded: Point | None
) -> PairTimes:
    """The line through a pair's points, of which there are at least three, in ascending order."""
    small, *_, large, largest = points
    slope = (largest.seconds - large.seconds) / (largest.bytes - large.bytes)
    if slope <= 0:  # noise beyond all else: one point is better than none
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


Kind = tuple[object, ...]


def pair_kind(cluster: Cluster, one: Device, other: Device) -> Kind:
    """Equal for pairs between which the cluster file makes no difference."""
    nodes = {node.name: node for node in cluster.nodes}
    here, there = nodes[one.node], nodes[other.node]
    if here is there:
        return "inside", here.inside
    direct = [d.link for d in cluster.direct if set(d.between) == {one.node, other.node}]
    if direct:
        return "direct", frozenset((one.node, other.node))
    ends = sorted((_node_kind(cluster, each) for each in (here, there)), key=str)
    return ("site" if one.site != other.site else "network", *ends)


def _node_kind(cluster: Cluster, node: Node) -> tuple[object, ...]:
    uplink = next((site.uplink for site in cluster.sites if site.name == node.site), None)
    return node.network, uplink


def classes(cluster: Cluster, devices: Sequence[Device]) -> dict[Kind, tuple[Device, Device]]:
    """The first pair of every class that these devices have."""
    found: dict[Kind, tuple[Device, Device]] = {}
    for i, one in enumerate(devices):
        for other in devices[i + 1 :]:
            found.setdefault(pair_kind(cluster, one, other), (one, other))
    return found


def fitted_cluster(cluster: Cluster, report: LinkReport) -> Cluster:
    """The cluster with every link that was measured as it was measured."""
    devices = {device.name: device for device in devices_of(cluster)}
    measured: dict[Kind, PairTimes] = {}
    for pair in report.pairs:
        one, other = (devices[name] for name in pair.between)
        measured[pair_kind(cluster, one, other)] = pair
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
            replace(each, link=_as_link(measured["direct", frozenset(each.between)]))
            if ("direct", frozenset(each.between)) in measured
            else each
            for each in cluster.direct
        ),
    )


def _as_link(pair: PairTimes, *, shared: bool = False) -> Link:
    return Link(bandwidth=pair.bandwidth, latency=pair.latency, shared=shared)


def _fitted_node(cluster: Cluster, node: Node, measured: dict[Kind, PairTimes]) -> Node:
    inside = measured.get(("inside", node.inside))
    own = _node_kind(cluster, node)
    pairs = [pair for kind, pair in measured.items() if kind[0] == "network" and own in kind[1:]]
    if not pairs:
        pairs = [pair for kind, pair in measured.items() if kind[0] == "site" and own in kind[1:]]
    fitted = node
    if inside:
        fitted = replace(fitted, inside=_as_link(inside, shared=node.inside.shared))
    if pairs:
        bandwidth = max(pair.bandwidth for pair in pairs)
        latency = min(pair.latency for pair in pairs)
        fitted = replace(fitted, network=replace(node.network, bandwidth=bandwidth,
                                                 latency=latency))  # fmt: skip
    return fitted


def _fitted_uplink(
    cluster: Cluster, nodes: Sequence[Node], name: str, report: LinkReport
) -> Link | None:
    """Of a site, where pairs across it are slower than their nodes; None if they are not."""
    by_name = {node.name: node for node in nodes}
    devices = {device.name: device for device in devices_of(cluster)}
    found = None
    for pair in report.pairs:
        one, other = (devices[each] for each in pair.between)
        if one.site == other.site or name not in (one.site, other.site):
            continue
        ends = [by_name[each.node].network for each in (one, other)]
        if pair.bandwidth < SLOWER * min(end.bandwidth for end in ends) and (
            found is None or pair.bandwidth > found.bandwidth
        ):
            latency = max(pair.latency - max(end.latency for end in ends), 0.0)
            found = Link(bandwidth=pair.bandwidth, latency=latency)
    return found


def collective_times(cluster: Cluster, points: Sequence[Point]) -> CollectiveTimes:
    """All-reduces over all devices of a cluster whose links are fitted: the fixed cost of a step,
    and how far the ring's formula is off.

        step = min over sizes of (measured - bytes' time) / 2(n - 1)

    The least, because noise only adds.
    """
    devices = [device.name for device in devices_of(cluster)]
    steps = 2 * (len(devices) - 1)
    links: Topology = topology(cluster)

    def moving(size: float) -> float:
        return alone_seconds(links, replace(all_reduce(links, devices, size), latency=0.0))

    step = max(min(p.seconds - moving(p.bytes) for p in points) / steps, 0.0)
    predicted = [
        alone_seconds(links, all_reduce(links, devices, p.bytes, step_latency=step)) for p in points
    ]
    return CollectiveTimes(
        points=tuple(points),
        step_latency=step,
        residuals=tuple(
            found / point.seconds - 1 for found, point in zip(predicted, points, strict=True)
        ),
    )
