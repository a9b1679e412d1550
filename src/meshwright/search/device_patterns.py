"""Enumerates device patterns: which classes of devices each replica has, before cuts and rows.

A class is all devices of one type in one node; a unit is written as the classes of its devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations_with_replacement, permutations, product

from meshwright.search.candidate import Unit
from meshwright.search.costs import Costs
from meshwright.search.space import usable_devices

Class = tuple[int, str]
"""Index of the node, type of the device."""
DevicePattern = tuple[tuple[tuple[Class, ...], ...], ...]
"""A pipeline: stage, then replica, then the classes of its devices."""


def classes(costs: Costs) -> dict[Class, tuple[str, ...]]:
    """Names of the usable devices of every class, in cluster order."""
    index = {node.name: i for i, node in enumerate(costs.cluster.nodes)}
    found: dict[Class, tuple[str, ...]] = {}
    for device in usable_devices(costs.cluster, costs.job):
        key = (index[device.node], device.type)
        found[key] = (*found.get(key, ()), device.name)
    return found


def skeletons(costs: Costs) -> Iterator[DevicePattern]:
    """Every pipeline that the devices allow, each once, that is not longer than the model."""
    counts = Counter({key: len(names) for key, names in classes(costs).items()})
    widths = _widths(costs)
    yield from _pipelines(counts, widths, len(costs.model.layers), costs.job.global_batch)


def _widths(costs: Costs) -> tuple[int, ...]:
    """Tensor widths that at least one layer allows."""
    most = max((len(node.devices) for node in costs.cluster.nodes), default=1)
    units = {layer.along("tensor").units for layer in costs.model.layers}
    return tuple(t for t in range(1, most + 1) if any(unit % t == 0 for unit in units))


def _pipelines(
    counts: Counter[Class], widths: tuple[int, ...], depth: int, data: int
) -> Iterator[DevicePattern]:
    if depth == 0:
        return
    for team in _teams(counts, widths, data):
        left = counts - Counter(key for unit in team for key in unit)
        yield (team,)
        for rest in _pipelines(left, widths, depth - 1, data):
            yield (team, *rest)


def _teams(
    counts: Counter[Class], widths: tuple[int, ...], data: int
) -> Iterator[tuple[tuple[Class, ...], ...]]:
    for width in widths:
        yield from _replicas(counts, width, data)


def _replicas(
    counts: Counter[Class], width: int, data: int
) -> Iterator[tuple[tuple[Class, ...], ...]]:
    if data == 0:
        return
    for unit in _units(counts, width):
        left = counts - Counter(unit)
        yield (unit,)
        for rest in _replicas(left, width, data - 1):
            yield (unit, *rest)


def _units(counts: Counter[Class], width: int) -> Iterator[tuple[Class, ...]]:
    for node in sorted({node for node, _ in counts}):
        own = sorted(key for key in counts if key[0] == node)
        for unit in combinations_with_replacement(own, width):
            if all(counts[key] >= number for key, number in Counter(unit).items()):
                yield unit


def strategies(costs: Costs) -> Iterator[tuple[DevicePattern, ...]]:
    """Every set of pipelines that can stand beside each other, nodes of one kind exchanged for one
    another only once."""
    every = list(skeletons(costs))
    used = [_use(skeleton) for skeleton in every]
    counts = Counter({key: len(names) for key, names in classes(costs).items()})
    swaps = _exchanges(costs)

    def extend(start: int, left: Counter[Class], most: int) -> Iterator[tuple[int, ...]]:
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


def _use(skeleton: DevicePattern) -> Counter[Class]:
    return Counter(key for team in skeleton for unit in team for key in unit)


def _exchanges(costs: Costs) -> list[dict[int, int]]:
    """Every renumbering of the nodes that the cluster would not notice."""
    nodes = costs.cluster.nodes
    kinds: dict[object, list[int]] = {}
    for i, node in enumerate(nodes):
        kind = (node.devices, node.inside, node.network, node.site)
        kinds.setdefault(i if costs.cluster.direct else kind, []).append(i)
    orders = [list(permutations(group)) for group in kinds.values()]
    return [
        {
            old: new
            for group, order in zip(kinds.values(), chosen, strict=True)
            for old, new in zip(group, order, strict=True)
        }
        for chosen in product(*orders)
    ]


def _renamed(
    strategy: tuple[DevicePattern, ...], swap: dict[int, int]
) -> tuple[DevicePattern, ...]:
    return tuple(
        sorted(
            tuple(
                tuple(tuple(sorted((swap[n], kind) for n, kind in unit)) for unit in team)
                for team in line
            )
            for line in strategy
        )
    )


def concrete(
    costs: Costs, strategy: tuple[DevicePattern, ...]
) -> tuple[tuple[tuple[Unit, ...], ...], ...]:
    """Devices for every place of a strategy, the first of each class first."""
    free = {key: iter(names) for key, names in classes(costs).items()}
    return tuple(
        tuple(tuple(tuple(next(free[key]) for key in unit) for unit in team) for team in line)
        for line in strategy
    )
