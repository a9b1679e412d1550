"""Computes a lower bound on the time of one pipeline, whatever else happens in the cluster.

Everything here is a chain of things that the simulator plays one after the other, with every
transfer and ring alone on its links; sharing links, other pipelines and other members of a ring
only add to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from meshwright.cost.collective import uncontended_seconds
from meshwright.cost.compute import optimizer_seconds
from meshwright.cost.weights import stage_parameters
from meshwright.plan.ranks import gradient_bytes
from meshwright.plan.spec import ScheduleName
from meshwright.program.compile import REDUCE_NORM_BYTES
from meshwright.search.candidate import CandidatePipeline, StageDevices, Unit, moves
from meshwright.search.costs import (
    Costs,
    distinct_units,
    own_parameters,
    pair,
    remembered,
    ring,
    scaled,
    seconds_per_byte,
    unit_prefix,
)

UNITS = 64
"""Units of a stage that are followed; leaving out the others only lowers the bound."""

NORM_RANKS = 512
"""Ranks up to which the ring of the norm is counted."""

Grid = list[list[float]]
"""Seconds by stage and unit."""


@dataclass(frozen=True, slots=True)
class _PipelineTables:
    forward: Grid
    backward: Grid
    ahead: list[list[tuple[int, int, float, float]]]
    """By cut: source unit, target unit, seconds of its activations, of its gradients."""
    returns: list[bool]
    """By cut: whether a backward before it waits for gradients; nothing frozen does."""
    tails: Grid
    """Seconds from the end of a unit's last backward to that of its reductions."""


def line_bound(costs: Costs, line: CandidatePipeline, schedule: ScheduleName) -> float:
    """Seconds before which no pipeline of these teams and cuts has reduced its gradients.

        the first micro-batch gets there + all micro-batches on one unit + the last one gets back

    and with 1F1B, where a unit may hold d micro-batches, the round trips of every further d.
    """
    facts = _chain(costs, line)
    starts = _starts(facts)
    tails = _ends(facts)
    trips = _trips(facts)
    worst, count, depth = 0.0, line.micro_batches, len(line.teams)
    for s in range(depth):
        rounds = (count - 1) // min(depth - s, count) + 1 if schedule == "1f1b" else 1
        for u, start in enumerate(starts[s]):
            busy = count * (facts.forward[s][u] + facts.backward[s][u])
            worst = max(worst, start + max(busy, rounds * trips[s][u]) + tails[s][u])
    return worst


def after_lines(costs: Costs, lines: Sequence[CandidatePipeline]) -> float:
    """Seconds of a step after the last pipeline is done: norm, slowest optimizer, overhead."""
    used = [name for line in lines for team in line.teams for unit in team.units for name in unit]
    norm = 0.0
    if len(used) <= NORM_RANKS:
        world = tuple(sorted(used, key=costs.links.order.__getitem__))
        norm = uncontended_seconds(costs.links, scaled(ring(costs, world), REDUCE_NORM_BYTES))
    overhead = costs.profile.step_overhead_seconds if costs.profile else 0.0
    return norm + slowest_optimizer(costs, lines) + overhead


def slowest_optimizer(costs: Costs, lines: Sequence[CandidatePipeline]) -> float:
    """Return the seconds of the longest optimizer step of any device."""
    return max(_optimizers(costs, lines))


def _optimizers(costs: Costs, lines: Sequence[CandidatePipeline]) -> Iterator[float]:
    for line in lines:
        for team, layers in zip(line.teams, pairwise(line.bounds), strict=True):
            tensor = len(team.units[0])
            units = distinct_units(costs, team.units)
            for kind in {costs.devices[name].type for unit in units for name in unit}:
                yield optimizer_of(costs, kind, layers, tensor)


def optimizer_of(costs: Costs, kind: str, layers: tuple[int, int], tensor: int) -> float:
    """Seconds of the optimizer on one device of a stage."""
    return remembered(
        costs,
        ("optimizer", kind, layers, tensor),
        lambda: optimizer_seconds(
            costs.cluster.types[kind],
            costs.job.optimizer,
            float(stage_parameters(costs.table.weights, layers, tensor)),
            costs.profile,
            costs.model.precision,
        ),
    )


def _chain(costs: Costs, line: CandidatePipeline) -> _PipelineTables:
    forward: Grid = []
    backward: Grid = []
    for team, (a, b) in zip(line.teams, pairwise(line.bounds), strict=True):
        some = zip(team.units[:UNITS], team.rows[:UNITS], strict=True)
        sums = [unit_prefix(costs, unit, rows) for unit, rows in some]
        forward.append([f[b] - f[a] for f, _ in sums])
        backward.append([g[b] - g[a] for _, g in sums])
    ahead = [
        _transfers(costs, here, there, cut)
        for (here, there), cut in zip(pairwise(line.teams), line.bounds[1:-1], strict=True)
    ]
    returns = [bool(costs.table.cut_returns[cut]) for cut in line.bounds[1:-1]]
    return _PipelineTables(forward, backward, ahead, returns, _tails(costs, line, backward))


def _transfers(
    costs: Costs, here: StageDevices, there: StageDevices, cut: int
) -> list[tuple[int, int, float, float]]:
    ahead, back = float(costs.table.cut[cut]), float(costs.table.cut_gradient[cut])
    return [
        (
            i,
            j,
            _transfer(costs, here.units[i], there.units[j], ahead * rows),
            _transfer(costs, there.units[j], here.units[i], back * rows),
        )
        for i, j, rows in islice(moves(here, there), UNITS)
    ]


def _transfer(costs: Costs, source: Unit, target: Unit, size: float) -> float:
    """The quickest of the transfers to a unit's tensor ranks; all of them are waited for."""
    if not size:
        return 0.0
    latency, slope = seconds_per_byte(costs, [pair(costs, source[0], target[0])])
    return latency + slope * (size - 0.5)  # messages are of whole bytes


def _starts(facts: _PipelineTables) -> Grid:
    """Returns when each unit's first forward can begin."""
    starts = [[0.0] * len(stage) for stage in facts.forward]
    for s, transfers in enumerate(facts.ahead):
        for i, j, ahead, _ in transfers:
            arrival = starts[s][i] + facts.forward[s][i] + ahead
            starts[s + 1][j] = max(starts[s + 1][j], arrival)
    return starts


def _ends(facts: _PipelineTables) -> Grid:
    """Seconds from the end of each unit's last backward to the end of all that follows from it."""
    ends = [list(stage) for stage in facts.tails]
    for s, transfers in enumerate(facts.ahead):
        for i, j, _, back in transfers if facts.returns[s] else ():
            ends[s + 1][j] = max(ends[s + 1][j], back + facts.backward[s][i] + ends[s][i])
    return ends


def _trips(facts: _PipelineTables) -> Grid:
    """Seconds from the begin of a forward to the end of its backward."""
    trips = [
        [f + b for f, b in zip(*both, strict=True)]
        for both in zip(facts.forward, facts.backward, strict=True)
    ]
    for s in reversed(range(len(facts.ahead))):
        own = list(trips[s])
        for i, j, ahead, back in facts.ahead[s] if facts.returns[s] else ():
            trips[s][i] = max(trips[s][i], own[i] + ahead + trips[s + 1][j] + back)
    return trips


def tail_seconds(costs: Costs, line: CandidatePipeline) -> float:
    """Least seconds from the end of the first stage's last backward to that of its reductions;
    teams may hold several stages."""
    (team, *_), last = line.teams, line.bounds[1]
    some = zip(team.units[:UNITS], team.rows[:UNITS], strict=True)
    backward = [unit_prefix(costs, unit, rows)[1][last] for unit, rows in some]
    others: Grid = [[] for _ in line.teams[1:]]
    return max(_tails(costs, line, [backward, *others])[0])


def _tails(costs: Costs, line: CandidatePipeline, backward: Grid) -> Grid:
    """Reductions between the units of each stage, and of tied parameters between stages.

    The last bucket holds at least the stage's first layer, and begins when that layer is done; all
    of them together begin inside the last backward at the earliest.
    """
    tails = [[0.0] * len(units) for units in backward]
    if costs.cluster.direct:
        return tails
    width = gradient_bytes(costs.job)
    for s, (team, (a, b)) in enumerate(zip(line.teams, pairwise(line.bounds), strict=True)):
        if len(team.units) > 1:
            latency, slope = _ring(costs, team.units)
            tensor = len(team.units[0])
            whole, last = (
                own_parameters(costs, (a, end), tensor) * width
                - (end - a)  # buckets are of whole bytes
                for end in (b, a + 1)
            )
            for u, seconds in enumerate(backward[s]):
                everything = latency + slope * whole - seconds if whole > 0 else 0.0
                closing = latency + slope * last if last > 0 else 0.0
                tails[s][u] = max(everything, closing, 0.0)
    for tied in costs.model.tied:
        stages = [
            s
            for s, (a, b) in enumerate(pairwise(line.bounds))
            if any(a <= layer < b for layer in tied.layers)
        ]
        units = tuple(dict.fromkeys(unit for s in stages for unit in line.teams[s].units))
        if len(units) > 1:
            latency, slope = _ring(costs, units)
            size = tied.parameters * width / (len(units[0]) if "tensor" in tied.divided else 1) - 1
            first = line.bounds[stages[0]] == tied.layers[0]
            for u, seconds in enumerate(backward[stages[0]]):
                begun = 0.0 if first else seconds
                tail = latency + slope * size - begun
                tails[stages[0]][u] = max(tails[stages[0]][u], tail)
    return tails


def _ring(costs: Costs, units: tuple[Unit, ...]) -> tuple[float, float]:
    """Latency and seconds per byte of the rings of these units' first tensor ranks."""
    return seconds_per_byte(costs, [ring(costs, tuple(unit[0] for unit in units))])
