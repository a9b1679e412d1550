"""Metis's space: ordered groups of devices as stages.

"Metis: Fast Automatic Distributed Training on Heterogeneous GPUs", ATC 2024. Device types in every
order; the devices so ordered, all of them, are cut into groups of powers of two, none smaller than
half the average (or into equal groups); every group is a stage with its own data and tensor width.
A stage of several types shares out its rows by speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, chain, permutations, product

from rival_searches import Draft, Found, drafts_by_speed, search

from meshwright.search.costs import Costs, TensorGroup
from meshwright.search.layer_partition import Stages
from meshwright.search.space import legal_widths, usable_devices

SMALLEST_GROUP = 0.5
"""Of the average: Metis leaves out smaller groups. Its authors' default."""

PERMUTED = 4
"""Runs of equal groups that Metis puts in every order; longer sequences are merged to so many."""

GROUPED = 4_000
"""Ways to group the devices of Metis that are priced, at most: equal groups first, then those with
the fewest stages across types."""


def metis(costs: Costs) -> Found | None:
    """The best plan of Metis's space; None if nothing in it fits."""
    by_type: dict[str, list[str]] = {}
    for device in usable_devices(costs):
        by_type.setdefault(device.type, []).append(device.name)
    widths = list(product(legal_widths(costs), repeat=len(by_type)))
    orders = list(permutations(by_type))
    most = max(40, GROUPED // len(widths) // len(orders))
    number = sum(map(len, by_type.values()))
    sizes = list(dict.fromkeys(group_sizes(number, len(costs.model.layers))))
    known: set[Stages] = set()
    drafts: list[Draft] = []
    for order in orders:
        kinds = [kind for kind in order for _ in by_type[kind]]
        plainest = sorted(sizes, key=partial(_across_types, kinds))[:most]
        for groups, tensors in product(plainest, widths):
            stages = _grouped(costs, order, by_type, groups, dict(zip(order, tensors, strict=True)))
            if stages is not None and stages not in known:
                known.add(stages)
                drafts += drafts_by_speed(costs, stages)
    return search(costs, drafts)


def _across_types(kinds: Sequence[str], groups: tuple[int, ...]) -> tuple[bool, int]:
    """Whether groups are unequal, and how many of them hold devices of several types."""
    ends = list(accumulate(groups))
    spans = (len(set(kinds[end - size : end])) > 1 for size, end in zip(groups, ends, strict=True))
    return len(set(groups)) > 1, sum(spans)


def group_sizes(devices: int, most: int) -> Iterator[tuple[int, ...]]:
    """Devices of every stage, for all numbers of stages up to `most`: equal groups, and powers of
    two that are not less than SMALLEST_GROUP of the average."""
    for stages in range(1, min(devices, most) + 1):
        if devices % stages == 0:
            yield (devices // stages,) * stages
        least = max(1.0, devices / stages * SMALLEST_GROUP)
        powers = [1 << i for i in range(devices.bit_length()) if 1 << i >= least]
        for multiset in _multisets(devices, stages, powers):
            for order in sorted(set(permutations(_merged(multiset)))):
                yield tuple(chain.from_iterable(order))


def _multisets(total: int, count: int, powers: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Ascending sequences of `count` of the powers that add up to `total`."""
    if count == 0:
        if total == 0:
            yield ()
        return
    for i, power in enumerate(powers):
        if power * count > total:
            break
        for rest in _multisets(total - power, count - 1, powers[i:]):
            yield (power, *rest)


def _merged(groups: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Neighbours of equal size joined, the smallest first, until PERMUTED runs are left (or no two
    runs are equal)."""
    runs = [(size,) for size in groups]
    while len(runs) > PERMUTED:
        pair = next((i for i in range(len(runs) - 1) if runs[i] == runs[i + 1]), None)
        if pair is None:
            break
        runs[pair : pair + 2] = [runs[pair] + runs[pair + 1]]
        runs.sort(key=lambda run: (sum(run), run))
    return runs[:]


def _grouped(
    costs: Costs,
    order: Sequence[str],
    by_type: dict[str, list[str]],
    groups: tuple[int, ...],
    tensor_of: dict[str, int],
) -> Stages | None:
    """The devices in this order of types as stages; None where a tensor-parallel group would leave
    its node or its type, or is not whole."""
    names = [name for kind in order for name in by_type[kind]]
    stages, at = [], 0
    for size in groups:
        members = names[at : at + size]
        at += size
        tensor = min(tensor_of[costs.devices[name].type] for name in members)
        if size % tensor:
            return None
        units = tuple(tuple(members[i : i + tensor]) for i in range(0, size, tensor))
        if any(not _together(costs, unit) for unit in units):
            return None
        stages.append(units)
    return tuple(stages)


def _together(costs: Costs, unit: TensorGroup) -> bool:
    found = {(costs.devices[name].node, costs.devices[name].type) for name in unit}
    return len(found) == 1
