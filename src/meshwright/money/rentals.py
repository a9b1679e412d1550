"""Enumerates which devices of a cluster could be rented: counts of interchangeable nodes.

Two nodes are interchangeable if they have the same devices, site, links and prices, and the same
explicit links to all others. Rentals that are the same up to the names of such nodes are one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from meshwright.cluster.edit import without_devices
from meshwright.cluster.spec import Cluster, Link, Node, Precision, reached_shares_in
from meshwright.money.outcomes import ClusterPrices, hourly_price

MOST_RENTALS = 64
"""Largest number of combinations that are tried; of more, some numbers of nodes are left out."""

ALONE_GROWTH = 4
"""Factor between two numbers of nodes of a class that is rented alone."""

MOST_CLASSES_IN_ORDER = 32
"""Classes up to which every number of them, in order of speed or of price, is tried."""

Counts = tuple[int, ...]
"""A rental: how many devices of each class of nodes are rented."""


@dataclass(frozen=True, slots=True)
class NodeClass:
    """Groups interchangeable nodes; a rental only says how many of them it has."""

    nodes: tuple[Node, ...]
    """The nodes, in the order of the cluster, which is the order in which they are rented."""
    divisible: bool
    """True if a part of a node can be rented: its devices are alike, and priced one by one."""
    speed: float
    """FLOP/s of one node by its datasheets."""

    @property
    def each(self) -> int:
        """Returns the number of devices of each node."""
        return len(self.nodes[0].devices)


def node_classes(
    cluster: Cluster, prices: ClusterPrices, precision: Precision
) -> tuple[NodeClass, ...]:
    """Returns the classes of the nodes that have a device which offers the precision."""
    offers = {
        name: kind.peak[precision] * reached_shares_in(kind, precision).backward
        for name, kind in cluster.types.items()
        if precision in kind.peak
    }
    links = _explicit_links(cluster)
    found: dict[object, list[list[Node]]] = {}
    for node in cluster.nodes:
        if not offers.keys().isdisjoint(node.devices):
            whole = prices.nodes.get(node.name)
            key = (node.site, node.devices, node.inside, node.network, whole)
            _add(found.setdefault(key, []), node, links)
    return tuple(
        NodeClass(
            nodes=tuple(nodes),
            divisible=nodes[0].name not in prices.nodes and len(set(nodes[0].devices)) == 1,
            speed=sum(offers.get(kind, 0.0) for kind in nodes[0].devices),
        )
        for groups in found.values()
        for nodes in groups
    )


def _explicit_links(cluster: Cluster) -> dict[str, dict[str, Link]]:
    links: dict[str, dict[str, Link]] = {}
    for direct in cluster.direct:
        for one, other in (direct.between, direct.between[::-1]):
            links.setdefault(one, {})[other] = direct.link
    return links


def _add(groups: list[list[Node]], node: Node, links: dict[str, dict[str, Link]]) -> None:
    """Adds a node to the group whose nodes have the same explicit links to all others."""
    own = links.get(node.name, {})
    for group in groups:
        first = group[0].name
        other = links.get(first, {})
        mine = {end: link for end, link in own.items() if end != first}
        if mine == {end: link for end, link in other.items() if end != node.name}:
            group.append(node)
            return
    groups.append([node])


def every_choice(classes: Sequence[NodeClass]) -> int:
    """Returns the number of ways to choose nodes, if interchangeable ones are not told apart."""
    return prod(len(each.nodes) + 1 for each in classes) - 1


def rentals(classes: Sequence[NodeClass], prices: ClusterPrices) -> tuple[Counts, ...]:
    """Returns the rentals that are considered, the whole cluster first.

    * All combinations of numbers of nodes of each class, if they are at most MOST_RENTALS. If they
      are more, the numbers are thinned out to powers of two, then to fewer, but always 0 and all.
      If there are too many classes even for all or none of each: every class alone, all classes but
      one, and the first few in order of speed, and of price for speed.
    * 1, 4, 16 ... nodes of each class alone.
    * 1, 2, 4 ... devices of a single node, if its devices are priced one by one.
    """
    whole = tuple(each.each * len(each.nodes) for each in classes)
    counts = _counts(classes)
    chosen = _combinations(classes, counts) if counts else _of_many(classes, prices)
    alone = (
        _alone(classes, index, each.each * nodes)
        for index, each in enumerate(classes)
        for nodes in _geometric(len(each.nodes), ALONE_GROWTH)
    )
    parts = (
        _alone(classes, index, count)
        for index, each in enumerate(classes)
        if each.divisible
        for count in _geometric(each.each, 2)[:-1]
    )
    return tuple(dict.fromkeys((whole, *chosen, *alone, *parts)))


def _counts(classes: Sequence[NodeClass]) -> list[list[int]] | None:
    """Returns the numbers of nodes of each class that are combined; None if there are too many
    classes."""
    every = [list(range(len(each.nodes) + 1)) for each in classes]
    powers = [_geometric(len(each.nodes), 2) for each in classes]
    fewer = ([[0, *_thinned(each, most)] for each in powers] for most in range(MOST_RENTALS, 0, -1))
    for counts in (every, *fewer):
        if prod(map(len, counts)) <= MOST_RENTALS:
            return counts
    return None


def _thinned(numbers: list[int], most: int) -> list[int]:
    """Returns at most `most` of the numbers, evenly chosen; the last one is among them."""
    if len(numbers) <= most:
        return numbers
    last = len(numbers) - 1
    return [numbers[last * index // max(most - 1, 1)] for index in range(most - 1)] + numbers[-1:]


def _geometric(most: int, factor: int) -> list[int]:
    """Returns 1, factor, factor squared and so on, below a number, and that number."""
    found = [1]
    while found[-1] * factor < most:
        found.append(found[-1] * factor)
    return found if found[-1] == most else [*found, most]


def _combinations(classes: Sequence[NodeClass], counts: list[list[int]]) -> Iterator[Counts]:
    for nodes in product(*counts):
        if any(nodes):
            yield tuple(each.each * n for each, n in zip(classes, nodes, strict=True))


def _alone(classes: Sequence[NodeClass], index: int, count: int) -> Counts:
    return tuple(count if number == index else 0 for number in range(len(classes)))


def _of_many(classes: Sequence[NodeClass], prices: ClusterPrices) -> Iterator[Counts]:
    """Yields rentals that take whole classes or nothing of them, if there are too many classes to
    combine."""
    number = len(classes)
    for index in range(number):
        yield _of(classes, {index})
        yield _of(classes, {*range(number)} - {index})
    lengths = [*range(1, number)] if number <= MOST_CLASSES_IN_ORDER else _geometric(number, 2)
    costs = [hourly_price(prices, _names(each.nodes[0], each.each)) for each in classes]
    by_speed = sorted(range(number), key=lambda index: -classes[index].speed)
    by_price = sorted(range(number), key=lambda index: costs[index] / classes[index].speed)
    for order in (by_speed, by_price):
        for length in lengths:
            yield _of(classes, {*order[:length]})


def _of(classes: Sequence[NodeClass], chosen: Collection[int]) -> Counts:
    return tuple(
        each.each * len(each.nodes) if index in chosen else 0 for index, each in enumerate(classes)
    )


def _names(node: Node, count: int) -> list[str]:
    return [f"{node.name}:{index}" for index in range(count)]


def rented_devices(classes: Sequence[NodeClass], counts: Counts) -> tuple[str, ...]:
    """Returns the devices of a rental: the first nodes of each class, or the first devices of its
    first node."""
    found: list[str] = []
    for each, count in zip(classes, counts, strict=True):
        for node in each.nodes[: -(-count // each.each)]:
            found += _names(node, min(each.each, count))
    return tuple(found)


def rented_cluster(cluster: Cluster, devices: Collection[str]) -> Cluster:
    """Returns the cluster without all other devices, whose names stay as they are."""
    kept = frozenset(devices)
    gone = {
        name
        for node in cluster.nodes
        for name in _names(node, len(node.devices))
        if name not in kept
    }
    return without_devices(cluster, gone) if gone else cluster


def used_counts(classes: Sequence[NodeClass], devices: Collection[str]) -> Counts:
    """Returns the smallest rental, up to the names of interchangeable nodes, that has the nodes of
    these devices; a part of a node is a rental only if nothing else of its class is in use."""
    used = frozenset(devices)
    found = []
    for each in classes:
        nodes = [
            number
            for node in each.nodes
            if (number := len(used.intersection(_names(node, each.each))))
        ]
        part = len(nodes) == 1 and each.divisible
        found.append(nodes[0] if part else each.each * len(nodes))
    return tuple(found)


def within(one: Counts, other: Counts) -> bool:
    """True if a rental has no more of any class than another one."""
    return all(mine <= theirs for mine, theirs in zip(one, other, strict=True))
