"""Measured links in the place of those that a cluster file states."""

from __future__ import annotations

from dataclasses import replace

from meshwright.cluster.spec import Cluster, Node, Site
from meshwright.cost.profile import LinkTimes


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
