"""Tells whether explicit links between nodes join slices of a pipeline alike.

Two nodes with an explicit link exchange everything over it, and nothing over the network between
them. Slices behave identically only if the same of their nodes are joined by the same links, and if
the rings that sum gradients over all slices leave and enter like nodes over the same kind of way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from meshwright.cluster.spec import Cluster, Link, node_of
from meshwright.plan.mesh import mesh_of
from meshwright.plan.spec import Pipeline, Stage

Joined = tuple[str, str]
"""Two nodes, in the order of their names."""


@dataclass(frozen=True, slots=True)
class ExplicitLinks:
    """Holds the explicit links of a cluster, and the rings of a plan that pass them."""

    links: dict[str, dict[str, Link]]
    """Links to other nodes, for each node."""
    rings: tuple[dict[str, tuple[str, str]], ...]
    """Nodes before and after each node of a ring, for every ring."""

    def are_alike(self, copies: Sequence[Sequence[str]], homes: dict[str, str]) -> bool:
        """Returns True if explicit links do not tell slices apart; `homes` are the nodes of
        devices."""
        placed = [_places(copy, homes) for copy in copies]
        shared = slices_by_link(placed, self.links)
        found = (self._signature(places, shared) for places in placed)
        first = next(found)
        return all(other == first for other in found)

    def _signature(
        self, places: dict[str, int], shared: Counter[Joined]
    ) -> tuple[dict[object, object], dict[object, object]]:
        """Returns what a slice sees of links, in terms of its own positions."""
        inside: dict[object, object] = {
            (places[a], places[b]): (link, shared[a, b])
            for a, b, link in _links_among(places, self.links)
        }
        passed: dict[object, object] = {}
        for number, ring in enumerate(self.rings):
            for node in places.keys() & ring.keys():
                ways = (
                    (other in self.links.get(node, ()), places.get(other)) for other in ring[node]
                )
                passed[number, places[node]] = tuple(ways)
        return inside, passed


def _places(copy: Sequence[str], homes: dict[str, str]) -> dict[str, int]:
    """Returns the nodes of a slice, each with the first of its positions there."""
    return {homes[device]: place for place, device in reversed(list(enumerate(copy)))}


def _links_among(
    nodes: Iterable[str], links: dict[str, dict[str, Link]]
) -> Iterator[tuple[str, str, Link]]:
    known = set(nodes)
    for a in known:
        for b in known & links.get(a, {}).keys():
            yield a, b, links[a][b]


def slices_by_link(
    placed: Iterable[Iterable[str]], links: dict[str, dict[str, Link]]
) -> Counter[Joined]:
    """Counts for every two joined nodes the slices on both, given the nodes of each slice."""
    return Counter((a, b) for nodes in placed for a, b, _ in _links_among(nodes, links))


def explicit_links(
    cluster: Cluster, pipelines: Sequence[Pipeline], tied: Sequence[tuple[int, ...]]
) -> ExplicitLinks:
    """Collects the explicit links of a cluster and the rings of a plan. `tied` are the layers of
    each parameter that several layers share."""
    links: dict[str, dict[str, Link]] = {}
    for each in cluster.direct:
        for a, b in (each.between, each.between[::-1]):
            links.setdefault(a, {})[b] = each.link
    sites = {site.name: index for index, site in enumerate(cluster.sites)}
    ordered = sorted(cluster.nodes, key=lambda node: sites[node.site])
    order = {node.name: index for index, node in enumerate(ordered)}
    stages = [stage for pipeline in pipelines for stage in pipeline.stages]
    found = dict.fromkeys(nodes for held in _held_together(stages, tied) for nodes in _nodes(held))
    rings = []
    for nodes in found:
        ring = sorted(nodes, key=order.__getitem__)
        if len(ring) > 1:
            pairs = list(pairwise([*ring, *ring[:2]]))
            rings.append({node: (a, b) for (a, node), (_, b) in pairwise(pairs)})
    return ExplicitLinks(links, tuple(rings))


def _held_together(
    stages: Sequence[Stage], tied: Sequence[tuple[int, ...]]
) -> Iterator[list[Stage]]:
    """Yields the stages that sum the gradients of the same parameters."""
    cuts = sorted({cut for stage in stages for cut in stage.layers})
    for layers in [*((first,) for first in cuts[:-1]), *tied]:
        yield [s for s in stages if any(s.layers[0] <= n < s.layers[1] for n in layers)]


def _nodes(stages: Sequence[Stage]) -> Iterator[frozenset[str]]:
    """Yields the nodes of every ring over stages: one for each tensor rank."""
    groups = [group for stage in stages for group in mesh_of(stage).groups("tensor")]
    for members in zip(*groups, strict=False):
        yield frozenset(map(node_of, members))
