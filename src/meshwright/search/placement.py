"""Places devices in a grid, in a few orders that respect the link hierarchy."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.cluster.spec import Device
from meshwright.records import record
from meshwright.search.space import Grid

Unit = tuple[Device, ...]
"""Devices that share every layer by tensor parallelism: one node."""


@record
class Placement:
    """Devices of every stage: stage, then replica, then tensor index."""

    name: str
    stages: tuple[tuple[tuple[str, ...], ...], ...]
    types: tuple[tuple[str, ...], ...]
    """Device types of every stage, each once, sorted."""


def units_of(devices: Sequence[Device], tensor: int, speed: dict[str, float]) -> tuple[Unit, ...]:
    """Groups of `tensor` devices, node by node, like with like inside a node."""
    nodes: dict[str, list[Device]] = {}
    for device in devices:
        nodes.setdefault(device.node, []).append(device)
    found: list[Unit] = []
    for members in nodes.values():
        ordered = sorted(members, key=lambda d: -speed[d.type])
        found += [tuple(ordered[i : i + tensor]) for i in range(0, len(ordered), tensor)]
    return tuple(found)


def default_placement(devices: Sequence[Device], grid: Grid) -> Placement:
    """What launchers do: rank = tensor index + tp * (replica + dp * stage), devices in order."""
    units = [tuple(devices[i : i + grid.tensor]) for i in range(0, len(devices), grid.tensor)]
    return _placement("in order", _data_adjacent(units, grid))


def placements(
    devices: Sequence[Device], grid: Grid, speed: dict[str, float]
) -> tuple[Placement, ...]:
    """Returns at most seven different placements, the default first.

    Units come in cluster order, fastest first, or slowest first. For each order either the replicas
    of a stage stand next to each other (data parallelism inside nodes, stages across them) or the
    stages of a replica do (the reverse). Nodes stay together in all of them.
    """
    units = units_of(devices, grid.tensor, speed)
    pace = {unit: min(speed[d.type] for d in unit) for unit in units}
    orders = {
        "in order": units,
        "fastest first": tuple(sorted(units, key=lambda u: -pace[u])),
        "fastest last": tuple(sorted(units, key=lambda u: pace[u])),
    }
    found = [default_placement(devices, grid)]
    for name, order in orders.items():
        found.append(_placement(name, _data_adjacent(order, grid)))
        found.append(
            _placement(f"{name}, stages inside nodes", _stages_adjacent(order, grid, pace))
        )
    unique = {p.stages: p for p in reversed(found)}
    return tuple(p for p in found if unique[p.stages] is p)


def _data_adjacent(units: Sequence[Unit], grid: Grid) -> list[list[Unit]]:
    return [list(units[s * grid.data : (s + 1) * grid.data]) for s in range(grid.stages)]


def _stages_adjacent(
    units: Sequence[Unit], grid: Grid, pace: dict[Unit, float]
) -> list[list[Unit]]:
    """Runs of equally fast units become runs of stages where their number allows it, so that no
    stage mixes speeds; inside a run, one replica's stages are neighbours."""
    runs: list[list[Unit]] = []
    for unit in units:
        if runs and pace[runs[-1][0]] == pace[unit]:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    if any(len(run) % grid.data for run in runs):
        runs = [list(units)]
    stages = []
    for run in runs:
        depth = len(run) // grid.data
        stages += [[run[r * depth + s] for r in range(grid.data)] for s in range(depth)]
    return stages


def _placement(name: str, stages: list[list[Unit]]) -> Placement:
    return Placement(
        name=name,
        stages=tuple(tuple(tuple(d.name for d in unit) for unit in stage) for stage in stages),
        types=tuple(tuple(sorted({d.type for unit in stage for d in unit})) for stage in stages),
    )
