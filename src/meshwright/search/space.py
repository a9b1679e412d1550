"""Lists what strategies are made of: usable devices, tensor groups, and rows of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations, permutations, zip_longest
from math import isqrt

from meshwright.cluster.spec import Device
from meshwright.search.costs import Costs, TensorGroup, pace

MANY_DEVICES = 64
"""Above this number devices are counted by class, and no strategy is looked at device by device."""

MANY_CELLS = 1_500_000
"""Devices x layers x layers above which the same holds: layer cuts are found in tables so large."""

MOST_ROWS_OF_FEWER = 8
"""Numbers of slow nodes that are left out of a row, evenly spread."""

DeviceRow = tuple[TensorGroup, ...]
"""Tensor groups of one width, in the order in which stages are made of them."""


def is_large(costs: Costs) -> bool:
    """True if devices are counted by class, not looked at one by one."""
    devices = len(costs.devices)
    return devices > MANY_DEVICES or devices * len(costs.model.layers) ** 2 > MANY_CELLS


@lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    """Returns all divisors of a number, smallest first."""
    low = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    high = [number // d for d in reversed(low) if d * d != number]
    return (*low, *high)


def usable_devices(costs: Costs) -> tuple[Device, ...]:
    """Returns the devices whose type offers the job's precision, in cluster order."""
    offers = {k for k, kind in costs.cluster.types.items() if costs.job.precision in kind.peak}
    return tuple(device for device in costs.devices.values() if device.type in offers)


def by_island(devices: Sequence[Device], width: int = 1) -> list[Device]:
    """Returns devices of a node such that as many neighbours as can be, `width` at a time, are of
    one island; those that are left over come last."""
    islands: dict[str, list[Device]] = {}
    for device in devices:
        islands.setdefault(device.island or device.name, []).append(device)
    ends = [len(own) - len(own) % width for own in islands.values()]
    whole = [d for own, end in zip(islands.values(), ends, strict=True) for d in own[:end]]
    return whole + [d for own, end in zip(islands.values(), ends, strict=True) for d in own[end:]]


def tensor_groups(costs: Costs, names: Sequence[str], width: int) -> list[TensorGroup]:
    """Cuts devices of a node into tensor groups, inside islands as far as can be; what fills none
    is left out."""
    ordered = [d.name for d in by_island([costs.devices[name] for name in names], width)]
    return [tuple(ordered[i : i + width]) for i in range(0, len(ordered) - width + 1, width)]


def legal_widths(costs: Costs) -> tuple[int, ...]:
    """Returns the tensor widths that every layer allows and some node has."""
    widest = max((len(node.devices) for node in costs.cluster.nodes), default=1)
    units = {layer.along("tensor").units for layer in costs.model.layers}
    return tuple(t for t in range(1, widest + 1) if all(unit % t == 0 for unit in units))


def groups_by_node(costs: Costs, tensor: int) -> list[list[TensorGroup]]:
    """Returns the tensor groups of each type in each node, in cluster order."""
    names: dict[tuple[str, str], list[str]] = {}
    for device in usable_devices(costs):
        names.setdefault((device.node, device.type), []).append(device.name)
    found = [tensor_groups(costs, own, tensor) for own in names.values()]
    return [own for own in found if own]


def rows_by_type(costs: Costs) -> Iterator[DeviceRow]:
    """Yields the devices of every set of types, in every order of the types: the most devices
    first, and of every tensor width in turn."""
    turns = zip_longest(*(_rows_of_width(costs, tensor) for tensor in legal_widths(costs)))
    return (groups for turn in turns for groups in turn if groups is not None)


def _rows_of_width(costs: Costs, tensor: int) -> Iterator[DeviceRow]:
    by_type: dict[str, list[TensorGroup]] = {}
    for own in groups_by_node(costs, tensor):
        by_type.setdefault(costs.devices[own[0][0]].type, []).extend(own)
    kinds = sorted(by_type, key=lambda kind: pace(costs, by_type[kind][0]))
    for number in range(len(kinds), 0, -1):
        for chosen in combinations(kinds, number):
            for order in permutations(chosen):
                yield tuple(group for kind in order for group in by_type[kind])


def rows_in_order(costs: Costs) -> Iterator[DeviceRow]:
    """Yields the devices of every tensor width in cluster order: all, and all but the slowest
    nodes."""
    for tensor in legal_widths(costs):
        nodes = groups_by_node(costs, tensor)
        speeds = [sum(1 / pace(costs, group) for group in own) for own in nodes]
        slowest_first = sorted(range(len(nodes)), key=lambda i: (speeds[i], -i))
        step = max(1, -(-(len(nodes) - 1) // MOST_ROWS_OF_FEWER))
        for number in (0, *range(1, len(nodes), step)):
            lost = set(slowest_first[:number])
            kept = (own for i, own in enumerate(nodes) if i not in lost)
            yield tuple(group for own in kept for group in own)
