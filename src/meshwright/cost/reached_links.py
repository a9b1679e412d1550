"""Gives the links of a cluster the bandwidth that they reach, which is less than what is stated."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from meshwright.cluster.link_rates import kind_between, kind_inside, link_rates
from meshwright.cluster.spec import Cluster, DirectLink, Link, LinkKind, Node, with_island_link
from meshwright.cost.constants import SystemConstants, system_constants
from meshwright.cost.links import messages_are_serialised, with_measured_links
from meshwright.cost.profile import Profile


def reached_links(cluster: Cluster, profile: Profile | None) -> Cluster:
    """Returns the cluster with the bandwidth that its links reach.

    Measured links replace those of the cluster. Of the others' stated bandwidth, the fitted share
    is reached, or else that which links of their kind reach: see `link_rates`. CPU processes,
    which a testbed's devices are too, reach what is stated.
    """
    constants = system_constants(profile.calibration if profile else None)
    reached = _reached(cluster, constants)
    return with_measured_links(reached, profile.links) if profile and profile.links else reached


def _reached(cluster: Cluster, constants: SystemConstants) -> Cluster:
    """Returns the cluster with every bandwidth multiplied by the share of it that is reached."""
    stated = 1.0 if messages_are_serialised(cluster) else None
    of_inside = constants.inside_efficiency or stated
    of_network = constants.network_efficiency or stated

    def inside(node: Node, link: Link, *, island: bool = False) -> Link:
        return _slower(link, kind_inside(link, set(node.devices), island=island), of_inside)

    def between(link: Link) -> Link:
        return _slower(link, kind_between(link), of_network)

    return replace(
        cluster,
        nodes=tuple(
            replace(
                node,
                inside=inside(node, node.inside),
                islands=with_island_link(node, partial(inside, node, island=True)),
                network=between(node.network),
            )
            for node in cluster.nodes
        ),
        sites=tuple(
            replace(site, uplink=between(site.uplink) if site.uplink else None)
            for site in cluster.sites
        ),
        direct=tuple(
            DirectLink(between=each.between, link=between(each.link)) for each in cluster.direct
        ),
    )


def _slower(link: Link, kind: LinkKind, fitted: float | None) -> Link:
    """Returns a link with the bandwidth that it reaches: the fitted share, if there is one, or that
    of its kind. A measured link, and one with a fitted share, have no kind that tells more."""
    if kind == "measured":
        return link
    share = link_rates()[kind].share if fitted is None else fitted
    flow = None if link.single_flow is None else link.single_flow * share
    reached = replace(link, bandwidth=link.bandwidth * share, single_flow=flow)
    return replace(reached, kind=kind if fitted is None else "measured")
