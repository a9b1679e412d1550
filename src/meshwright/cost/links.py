"""Links as they are: measured, or what is reached of what a cluster file states."""

from __future__ import annotations

from dataclasses import replace

from meshwright.cluster.spec import Cluster, DirectLink, Link, Node, Site
from meshwright.cost.constants import SystemConstants, system_constants
from meshwright.cost.profile import LinkTimes, Profile


def with_measured_links(cluster: Cluster, times: LinkTimes) -> Cluster:
    """The cluster with the links of every level that was measured; explicit pairs stay.

    A measured latency is end to end. That between sites includes the network's, which a path
    over both levels adds, so it is taken off here.
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
    """Whether messages of several devices over one link pass one after another.

    gloo, which serves wherever a device is a CPU, hands whole messages to sockets, and the queue
    before the wire empties in their order: devices of a node that send at the same time fall out
    of step, and the first need not wait for the last. The channels of NCCL share a link.
    """
    return any(kind.processor == "cpu" for kind in cluster.types.values())


def reached_links(cluster: Cluster, profile: Profile | None) -> Cluster:
    """The cluster with its links as a profile knows them: measured ones as they are, the others at
    the share of their stated bandwidth that was fitted."""
    if profile is None:
        return cluster
    constants = system_constants(profile.calibration)
    reached = _scaled(cluster, constants)
    return with_measured_links(reached, profile.links) if profile.links else reached


def _scaled(cluster: Cluster, constants: SystemConstants) -> Cluster:
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
    """Fixed seconds of one step of a ring: measured, else fitted, else none."""
    if profile is None:
        return 0.0
    links = profile.links
    measured = links.all_reduce_latency if links else None
    return system_constants(profile.calibration).ring_step if measured is None else measured


def overhead_seconds(profile: Profile | None) -> float:
    """Fixed cost of a step outside all instructions: measured, and fitted."""
    if profile is None:
        return 0.0
    return profile.step_overhead_seconds + system_constants(profile.calibration).step
