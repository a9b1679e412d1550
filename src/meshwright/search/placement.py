"""Places devices in a grid, in a few orders that respect the link hierarchy."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.cluster.spec import Device
from meshwright.records import record
from meshwright.search.space import Grid, by_island

DeviceGroup = tuple[Device, ...]
"""Devices that share every layer by tensor parallelism: one node."""


@record
class Placement:
    """Lists the devices of every stage: by stage, then replica, then tensor index."""

    name: str
    stages: tuple[tuple[tuple[str, ...], ...], ...]
    types: tuple[tuple[str, ...], ...]
    """Device types of every stage, each once, sorted."""


def groups_of(
    devices: Sequence[Device], tensor: int, speed: dict[str, float]
) -> tuple[DeviceGroup, ...]:
    """Returns groups of `tensor` devices, node by node, like with like inside a node, and inside
    islands as far as can be."""
    nodes: dict[str, list[Device]] = {}
    for device in devices:
        nodes.setdefault(device.node, []).append(device)
    found: list[DeviceGroup] = []
    for members in nodes.values():
        ordered = by_island(sorted(members, key=lambda d: -speed[d.type]), tensor)
        found += [tuple(ordered[i : i + tensor]) for i in range(0, len(ordered), tensor)]
    return tuple(found)


def default_placement(devices: Sequence[Device], grid: Grid) -> Placement:
    """Places ranks as launchers do: rank = tensor index + tp * (replica + dp * stage), devices in
    order."""
    groups = [tuple(devices[i : i + grid.tensor]) for i in range(0, len(devices), grid.tensor)]
    return _placement("in order", _data_adjacent(groups, grid))


def placements(
    devices: Sequence[Device], grid: Grid, speed: dict[str, float]
) -> tuple[Placement, ...]:
    """Returns at most seven different placements, the default first.

    Tensor groups come in cluster order, fastest first, or slowest first. For each order either the
    replicas of a stage stand next to each other (data parallelism inside nodes, stages across them)
    or the stages of a replica do (the reverse). Nodes stay together in all of them."""
    groups = groups_of(devices, grid.tensor, speed)
    pace = {group: min(speed[d.type] for d in group) for group in groups}
    orders = {
        "in order": groups,
        "fastest first": tuple(sorted(groups, key=lambda u: -pace[u])),
        "fastest last": tuple(sorted(groups, key=lambda u: pace[u])),
    }
    found = [default_placement(devices, grid)]
    for name, order in orders.items():
        found.append(_placement(name, _data_adjacent(order, grid)))
        found.append(
            _placement(f"{name}, stages inside nodes", _stages_adjacent(order, grid, pace))
        )
    unique = {p.stages: p for p in reversed(found)}
    return tuple(p for p in found if unique[p.stages] is p)


def _data_adjacent(groups: Sequence[DeviceGroup], grid: Grid) -> list[list[DeviceGroup]]:
    return [list(groups[s * grid.data : (s + 1) * grid.data]) for s in range(grid.stages)]


def _stages_adjacent(
    groups: Sequence[DeviceGroup], grid: Grid, pace: dict[DeviceGroup, float]
) -> list[list[DeviceGroup]]:
    """Places runs of equally fast tensor groups as runs of stages where their number allows it, so
    that no stage mixes speeds; inside a run, one replica's stages are neighbours."""
    runs: list[list[DeviceGroup]] = []
    for group in groups:
        if runs and pace[runs[-1][0]] == pace[group]:
            runs[-1].append(group)
        else:
            runs.append([group])
    if any(len(run) % grid.data for run in runs):
        runs = [list(groups)]
    stages = []
    for run in runs:
        depth = len(run) // grid.data
        stages += [[run[r * depth + s] for r in range(grid.data)] for s in range(depth)]
    return stages


def _placement(name: str, stages: list[list[DeviceGroup]]) -> Placement:
    return Placement(
        name=name,
        stages=tuple(tuple(tuple(d.name for d in group) for group in stage) for stage in stages),
        types=tuple(tuple(sorted({d.type for group in stage for d in group})) for stage in stages),
    )
