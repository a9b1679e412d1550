"""Rows for the replicas of a stage and layers for the stages of a line, when the devices are given.

Letters: S stages, L layers, M micro-batches, a stage's first layer, b one past its last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from heapq import heapify, heapreplace
from itertools import pairwise

import numpy as np

from meshwright.cost.times import repeated_seconds
from meshwright.plan.spec import ScheduleName
from meshwright.program.schedules import in_flight
from meshwright.search.costs import (
    Costs,
    distinct_replicas,
    distinct_units,
    remembered,
    stage_bytes,
    unit_capacity,
    unit_kind,
    unit_prefix,
    unit_times,
)
from meshwright.search.crossing import crossings
from meshwright.search.lines import Line, Team, Unit
from meshwright.search.partition import Array, assign, chain_loads

Stages = tuple[tuple[Unit, ...], ...]
"""The units of every stage of a line."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A line with its best cuts, and its seconds without reductions."""

    line: Line
    once: float
    """Of the first micro-batch, there and back."""
    slowest: float
    """Of every further one."""


def pace(costs: Costs, unit: Unit, rows: int = 1) -> float:
    """Seconds per row of the whole model on a unit, at so many rows a micro-batch."""
    forward, backward = unit_prefix(costs, unit, rows)
    return (forward[-1] + backward[-1]) / rows


def apportion(costs: Costs, units: tuple[Unit, ...], rows: int) -> tuple[int, ...]:
    """Whole rows for every unit, at least one each, such that the slowest is done soonest; times
    are taken to be proportional to rows."""
    each = max(1, rows // len(units))
    known = {unit_kind(costs, u): pace(costs, u, each) for u in distinct_units(costs, units)}
    if len(set(known.values())) == 1:
        share, left = divmod(rows, len(units))
        return (share + 1,) * left + (share,) * (len(units) - left)
    paces = [known[unit_kind(costs, unit)] for unit in units]
    ideal = rows / sum(1 / p for p in paces)
    shares = [max(1, int(ideal / p)) for p in paces]
    while sum(shares) > rows:
        worst = max(
            (i for i, share in enumerate(shares) if share > 1), key=lambda i: shares[i] * paces[i]
        )
        shares[worst] -= 1
    queue = [((share + 1) * p, i) for i, (share, p) in enumerate(zip(shares, paces, strict=True))]
    heapify(queue)
    for _ in range(rows - sum(shares)):
        _, i = queue[0]
        shares[i] += 1
        heapreplace(queue, ((shares[i] + 1) * paces[i], i))
    return tuple(shares)


def fit_line(
    costs: Costs,
    stages: Stages,
    rows: int,
    micro_batches: int,
    schedule: ScheduleName,
    limit: float = float("inf"),
) -> Fitted | None:
    """The cuts that make the line fastest among those that fit; None if none does, if there are
    fewer rows than replicas or fewer layers than stages, or if not even layers that could be cut
    anywhere would take less than `limit` seconds."""
    layers = len(costs.model.layers)
    if len(stages) > layers or rows < max(len(units) for units in stages):
        return None
    teams = tuple(Team(units, apportion(costs, units, rows)) for units in stages)
    if limit < float("inf") and micro_batches / fluid_rate(costs, teams) >= limit:
        return None
    key = ("fitted", teams, micro_batches, schedule)
    return remembered(costs, key, lambda: recut(costs, teams, micro_batches, schedule))


def fluid_rate(costs: Costs, teams: tuple[Team, ...]) -> float:
    """Micro-batches a second of stages that are never idle."""
    speed = 0.0
    for team in teams:
        slowest = 0.0
        for unit, rows in distinct_replicas(costs, team.units, team.rows):
            forward, backward = unit_prefix(costs, unit, rows)
            slowest = max(slowest, forward[-1] + backward[-1])
        speed += 1 / slowest
    return speed


def recut(
    costs: Costs, teams: tuple[Team, ...], micro_batches: int, schedule: ScheduleName
) -> Fitted | None:
    """The same with the rows given as well."""
    loads = np.array(
        [
            team_loads(costs, team, _held(s, teams, micro_batches, schedule))
            for s, team in enumerate(teams)
        ]
    )
    size = loads.shape[1]
    cuts = np.zeros((max(len(teams) - 1, 0), size))
    for s, (here, there) in enumerate(pairwise(teams)):
        cuts[s] = cut_seconds(costs, here, there)
    found = assign(loads, cuts, micro_batches)
    if found is None:
        return None
    line = Line(teams, found.bounds, micro_batches)
    return Fitted(line, found.seconds - (micro_batches - 1) * found.slowest, found.slowest)


def _held(s: int, teams: tuple[Team, ...], micro_batches: int, schedule: ScheduleName) -> int:
    return in_flight(schedule, s, len(teams), micro_batches)


def team_loads(costs: Costs, team: Team, held: int) -> Array:
    """Seconds [L + 1, L + 1] of the slowest replica, recomputing where one of them does not fit
    otherwise; infinite where one does not fit even then."""
    plain = _slowest(costs, team, held, again=False)
    size = len(plain)
    if costs.again is None or np.isfinite(plain).sum() == size * (size - 1) // 2:
        return plain
    return np.where(np.isfinite(plain), plain, _slowest(costs, team, held, again=True))


def _slowest(costs: Costs, team: Team, held: int, *, again: bool) -> Array:
    worst: Array | None = None
    for unit, rows in distinct_replicas(costs, team.units, team.rows):
        key = ("loads", unit_kind(costs, unit), rows, held, again)
        make = partial(_replica_loads, costs, unit, rows, held, again=again)
        loads = remembered(costs, key, make)
        worst = loads if worst is None else np.maximum(worst, loads)
    assert worst is not None, "a stage has units"
    return worst


def _replica_loads(costs: Costs, unit: Unit, rows: int, held: int, *, again: bool) -> Array:
    forward, backward = unit_times(costs, unit, rows)
    if again:
        backward = backward + repeated_seconds(costs.model, (0, len(forward)), forward)
    loads: Array = chain_loads((forward + backward)[None])[0]
    always, each = stage_bytes(costs, len(unit), rows, again=again)
    loads[always + each * held > unit_capacity(costs, unit)] = np.inf
    return loads


def cut_seconds(costs: Costs, here: Team, there: Team) -> Array:
    """Seconds [L + 1] of activations and gradients across a cut before each layer."""
    rows = sum(here.rows)
    seconds = np.zeros(len(costs.table.cut))
    sizes = costs.table.cut, costs.table.cut_gradient
    for way, bytes_L in zip(crossings(costs, here, there), sizes, strict=True):
        seconds += np.where(bytes_L > 0, way.latency + way.slowest * rows * bytes_L, 0.0)
    return seconds
