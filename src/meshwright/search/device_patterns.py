"""Enumerates device patterns: which classes of devices each replica has, before cuts and rows.

A node type is a node, an island and a device type there; a group is written as its devices' node
types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations_with_replacement, permutations, product

from meshwright.cluster.spec import Node
from meshwright.search.costs import Costs, TensorGroup
from meshwright.search.space import usable_devices

NodeType = tuple[int, str, str]
"""Index of the node, name of the island (empty for devices in none), type of the device."""
DevicePattern = tuple[tuple[tuple[NodeType, ...], ...], ...]
"""A pipeline: stage, then replica, then the classes of its devices."""


def node_types(costs: Costs) -> dict[NodeType, tuple[str, ...]]:
    """Returns the names of the usable devices of every class, in cluster order."""
    index = {node.name: i for i, node in enumerate(costs.cluster.nodes)}
    found: dict[NodeType, tuple[str, ...]] = {}
    for device in usable_devices(costs):
        key = (index[device.node], device.island or "", device.type)
        found[key] = (*found.get(key, ()), device.name)
    return found


def device_patterns(costs: Costs) -> Iterator[DevicePattern]:
    """Yields every pipeline that the devices allow, each once, that is not longer than the
    model."""
    counts = Counter({key: len(names) for key, names in node_types(costs).items()})
    widths = _widths(costs)
    yield from _pipelines(counts, widths, len(costs.model.layers), costs.job.global_batch)


def _widths(costs: Costs) -> tuple[int, ...]:
    """Returns the tensor widths that at least one layer allows."""
    most = max((len(node.devices) for node in costs.cluster.nodes), default=1)
    units = {layer.along("tensor").units for layer in costs.model.layers}
    return tuple(t for t in range(1, most + 1) if any(unit % t == 0 for unit in units))


def _pipelines(
    counts: Counter[NodeType], widths: tuple[int, ...], depth: int, data: int
) -> Iterator[DevicePattern]:
    if depth == 0:
        return
    for stage in _stages(counts, widths, data):
        left = counts - Counter(key for group in stage for key in group)
        yield (stage,)
        for rest in _pipelines(left, widths, depth - 1, data):
            yield (stage, *rest)


def _stages(
    counts: Counter[NodeType], widths: tuple[int, ...], data: int
) -> Iterator[tuple[tuple[NodeType, ...], ...]]:
    for width in widths:
        yield from _replicas(counts, width, data)


def _replicas(
    counts: Counter[NodeType], width: int, data: int
) -> Iterator[tuple[tuple[NodeType, ...], ...]]:
    if data == 0:
        return
    for group in _groups(counts, width):
        left = counts - Counter(group)
        yield (group,)
        for rest in _replicas(left, width, data - 1):
            yield (group, *rest)


def _groups(counts: Counter[NodeType], width: int) -> Iterator[tuple[NodeType, ...]]:
    for node in sorted({node for node, _, _ in counts}):
        own = sorted(key for key in counts if key[0] == node)
        for group in combinations_with_replacement(own, width):
            if all(counts[key] >= number for key, number in Counter(group).items()):
                yield group


def strategies(costs: Costs) -> Iterator[tuple[DevicePattern, ...]]:
    """Yields every set of pipelines that can stand beside each other; of sets that differ only by
    an exchange of like nodes, only one."""
    every = list(device_patterns(costs))
    used = [_use(pattern) for pattern in every]
    counts = Counter({key: len(names) for key, names in node_types(costs).items()})
    swaps = _exchanges(costs)

    def extend(start: int, left: Counter[NodeType], most: int) -> Iterator[tuple[int, ...]]:
        for i in range(start, len(every)):
            if all(left[key] >= number for key, number in used[i].items()):
                yield (i,)
                if most > 1:
                    for rest in extend(i, left - used[i], most - 1):
                        yield (i, *rest)

    seen = set()
    for chosen in extend(0, counts, costs.job.global_batch):
        strategy = tuple(every[i] for i in chosen)
        least = min(_renamed(strategy, swap) for swap in swaps)
        if least not in seen:
            seen.add(least)
            yield strategy


def _use(pattern: DevicePattern) -> Counter[NodeType]:
    return Counter(key for stage in pattern for group in stage for key in group)


Exchange = dict[tuple[int, str], tuple[int, str]]
"""Another node and island, with the same devices and links, for each node and island."""


def _exchanges(costs: Costs) -> list[Exchange]:
    """Returns every renumbering of the nodes, and of the islands inside each, that leaves the
    cluster as it is."""
    nodes = costs.cluster.nodes
    kinds: dict[object, list[int]] = {}
    for i, node in enumerate(nodes):
        kind = (node.devices, node.inside, node.islands, node.network, node.site)
        kinds.setdefault(i if costs.cluster.direct else kind, []).append(i)
    orders = [list(permutations(group)) for group in kinds.values()]
    inside = [list(_orders_inside(node)) for node in nodes]
    return [
        {
            (old, island): (new, f"{nodes[new].name}:{place}" if island else "")
            for group, order in zip(kinds.values(), chosen, strict=True)
            for old, new in zip(group, order, strict=True)
            for island, place in within[old].items()
        }
        for chosen in product(*orders)
        for within in product(*inside)
    ]


def _orders_inside(node: Node) -> Iterator[dict[str, int]]:
    """Yields for each island of a node, by name, the first device of the one in its place; islands
    with like devices change places. Devices in none stay."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for group in node.islands.groups if node.islands else ():
        types = tuple(sorted(node.devices[index] for index in group))
        alike.setdefault(types, []).append(min(group))
    every = [own for same in alike.values() for own in same]
    for chosen in product(*(permutations(same) for same in alike.values())):
        places = [place for order in chosen for place in order]
        pairs = zip(every, places, strict=True)
        yield {"": 0} | {f"{node.name}:{own}": place for own, place in pairs}


def _renamed(strategy: tuple[DevicePattern, ...], swap: Exchange) -> tuple[DevicePattern, ...]:
    return tuple(
        sorted(
            tuple(
                tuple(
                    tuple(sorted((*swap[node, island], kind) for node, island, kind in group))
                    for group in stage
                )
                for stage in pipeline
            )
            for pipeline in strategy
        )
    )


def concrete(
    costs: Costs, strategy: tuple[DevicePattern, ...]
) -> tuple[tuple[tuple[TensorGroup, ...], ...], ...]:
    """Returns the devices for every place of a strategy, the first of each class first."""
    free = {key: iter(names) for key, names in node_types(costs).items()}
    return tuple(
        tuple(
            tuple(tuple(next(free[key]) for key in group) for group in stage) for stage in pipeline
        )
        for pipeline in strategy
    )
