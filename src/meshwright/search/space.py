"""Enumerates AMP's strategy space: devices in use, dp x tp x pp grid, micro-batches, schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import isqrt

from meshwright.cluster.spec import Device
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Job, ScheduleName
from meshwright.records import record
from meshwright.search.costs import Costs, TensorGroup


@record
class Grid:
    """Describes a regular grid: data width x tensor width x stages."""

    data: int
    tensor: int
    stages: int


@record
class Shape:
    """Describes a strategy without its placement and its layer cuts."""

    grid: Grid
    rows: int
    """Rows of a micro-batch on each replica."""
    micro_batches: int
    schedule: ScheduleName


@record
class DeviceSet:
    """Lists the devices that a strategy uses, and names what it leaves out."""

    devices: tuple[Device, ...]
    """Devices in the order of the cluster."""
    without: str = ""
    """What is left out, in words for people; empty if nothing is."""


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


def device_sets(
    devices: Sequence[Device], speed: dict[str, float], *, most_counts: int = 8
) -> tuple[DeviceSet, ...]:
    """Returns sets of devices: all; all but whole types, slowest first; all but the slowest nodes.

    `speed` orders the types (rows per second of the whole model, or any other rate). Of the numbers
    of nodes that may be left out, at most `most_counts` are tried, evenly spread.
    """
    everything = tuple(devices)
    sets = [DeviceSet(devices=everything)]
    types = sorted({d.type for d in everything}, key=lambda t: (speed[t], t))
    for number in range(1, len(types)):
        gone = types[:number]
        kept = tuple(d for d in everything if d.type not in gone)
        sets.append(DeviceSet(devices=kept, without=" and ".join(gone)))
    sets += [
        DeviceSet(devices=tuple(d for d in everything if d.type == kind), without=f"all but {kind}")
        for kind in types[:-1]
    ]
    nodes = _nodes_slowest_first(everything, speed)
    step = max(1, -(-(len(nodes) - 1) // most_counts))
    for number in range(1, len(nodes), step):
        lost = set(nodes[:number])
        kept = tuple(d for d in everything if d.node not in lost)
        sets.append(DeviceSet(devices=kept, without=_node_list(nodes[:number])))
    unique = {s.devices: s for s in reversed(sets)}
    return tuple(s for s in sets if unique[s.devices] is s)


def fewer_devices(devices: Sequence[Device], speed: dict[str, float]) -> Iterator[DeviceSet]:
    """Yields the fastest n - 1 devices, n - 2 and so on: for jobs too small for whole nodes."""
    order = sorted(range(len(devices)), key=lambda i: (-speed[devices[i].type], i))
    for number in range(len(devices) - 1, 0, -1):
        kept = sorted(order[:number])
        lost = len(devices) - number
        yield DeviceSet(
            devices=tuple(devices[i] for i in kept),
            without=f"{lost} device{'s' if lost > 1 else ''}",
        )


def _nodes_slowest_first(devices: Sequence[Device], speed: dict[str, float]) -> list[str]:
    total: dict[str, float] = {}
    for device in devices:
        total[device.node] = total.get(device.node, 0.0) + speed[device.type]
    order = {node: -i for i, node in enumerate(total)}
    return sorted(total, key=lambda node: (total[node], order[node]))


def _node_list(nodes: Sequence[str]) -> str:
    return nodes[0] if len(nodes) == 1 else f"{nodes[0]} and {len(nodes) - 1} more nodes"


def grids(
    devices: Sequence[Device], model: LayerGraph, job: Job, pruned: Counter[str]
) -> tuple[Grid, ...]:
    """Returns every grid that uses all the devices; what is impossible is counted in `pruned`."""
    per_node = Counter(d.node for d in devices)
    units = {layer.along("tensor").units for layer in model.layers}
    found = []
    for tensor in divisors(len(devices)):
        if any(count % tensor for count in per_node.values()):
            pruned["tensor width does not divide a node's devices"] += 1
            continue
        if any(unit % tensor for unit in units):
            pruned["tensor width does not divide the layers"] += 1
            continue
        for data in divisors(len(devices) // tensor):
            stages = len(devices) // tensor // data
            if job.global_batch % data:
                pruned["data width does not divide the batch"] += 1
            elif stages > len(model.layers):
                pruned["more stages than layers"] += 1
            else:
                found.append(Grid(data=data, tensor=tensor, stages=stages))
    return tuple(found)


def shapes(grid: Grid, job: Job, schedules: Sequence[ScheduleName]) -> Iterator[Shape]:
    """Yields every micro-batch size and schedule of a grid. With one stage (gradient accumulation
    alone: 1F1B never holds more than one micro-batch) or one micro-batch there is nothing to
    choose."""
    share = job.global_batch // grid.data
    for rows in divisors(share):
        for schedule in schedules if grid.stages > 1 and rows < share else schedules[:1]:
            yield Shape(grid=grid, rows=rows, micro_batches=share // rows, schedule=schedule)


def legal_widths(costs: Costs) -> tuple[int, ...]:
    """Returns the tensor widths that every layer allows and some node has."""
    widest = max((len(node.devices) for node in costs.cluster.nodes), default=1)
    units = {layer.along("tensor").units for layer in costs.model.layers}
    return tuple(t for t in range(1, widest + 1) if all(unit % t == 0 for unit in units))
