"""Gives the links of a cluster the bandwidth that they reach: measured, or a fitted share of the
stated one."""

from __future__ import annotations

from dataclasses import replace

from meshwright.cluster.spec import Cluster, DirectLink, Link, Node, Site
from meshwright.cost.constants import SystemConstants, system_constants
from meshwright.cost.profile import LinkTimes, Profile


def with_measured_links(cluster: Cluster, times: LinkTimes) -> Cluster:
    """Return the cluster with measured links at every level that was measured; explicit links stay.

    A measured latency is end to end. Between sites it therefore contains that of the network, which
    a path across both levels adds anyway; it is subtracted here.
    """

    def node(each: Node) -> Node:
        return replace(
            each, inside=times.inside or each.inside, network=times.network or each.network
        )

    nodes = tuple(node(each) for each in cluster.nodes)
    if times.site is None:
        return replace(cluster, nodes=nodes)
    network = max(each.network.latency for each in nodes)
    uplink = replace(times.site, latency=max(times.site.latency - network, 0.0))
    sites: tuple[Site, ...] = tuple(replace(each, uplink=uplink) for each in cluster.sites)
    return replace(cluster, nodes=nodes, sites=sites)


def messages_queue(cluster: Cluster) -> bool:
    """Return True if messages of several devices over one link pass one after another.

    That is so with gloo, the backend wherever a device is a CPU: it hands whole messages to
    sockets, and the queue before the wire empties in their order. Devices of a node that send at
    the same time fall out of step, and the first need not wait for the last. The channels of NCCL
    share a link.
    """
    return any(kind.processor == "cpu" for kind in cluster.types.values())


def reached_links(cluster: Cluster, profile: Profile | None) -> Cluster:
    """Return the cluster with the links of a profile.

    Measured links replace those of the cluster; the others get the fitted share of their stated
    bandwidth.
    """
    if profile is None:
        return cluster
    constants = system_constants(profile.calibration)
    reached = _scaled(cluster, constants)
    return with_measured_links(reached, profile.links) if profile.links else reached


def _scaled(cluster: Cluster, constants: SystemConstants) -> Cluster:
    """Return the cluster with every bandwidth multiplied by its fitted efficiency."""
    inside, network = constants.inside_efficiency, constants.network_efficiency
    if inside == network == 1.0:
        return cluster

    def slower(link: Link, share: float) -> Link:
        return replace(link, bandwidth=link.bandwidth * share)

    return replace(
        cluster,
        nodes=tuple(
            replace(node, inside=slower(node.inside, inside), network=slower(node.network, network))
            for node in cluster.nodes
        ),
        sites=tuple(
            replace(site, uplink=slower(site.uplink, network) if site.uplink else None)
            for site in cluster.sites
        ),
        direct=tuple(
            DirectLink(between=each.between, link=slower(each.link, network))
            for each in cluster.direct
        ),
    )


def ring_step(profile: Profile | None) -> float:
    """Return the fixed seconds of one step of a ring: measured, else fitted, else zero."""
    if profile is None:
        return 0.0
    links = profile.links
    measured = links.all_reduce_latency if links else None
    return system_constants(profile.calibration).ring_step if measured is None else measured


def overhead_seconds(profile: Profile | None) -> float:
    """Return the fixed cost of a step outside all instructions: the measured one plus the fitted
    one."""
    if profile is None:
        return 0.0
    return profile.step_overhead_seconds + system_constants(profile.calibration).step
