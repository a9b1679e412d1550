"""Computes a lower bound on the time of one pipeline, whatever else happens in the cluster.

Everything here is a chain of things that the simulator plays one after the other, with every
transfer and ring alone on its links; sharing links, other pipelines and other members of a ring
only add to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from math import lcm

from meshwright.cost.collective import uncontended_seconds
from meshwright.cost.compute import optimizer_seconds
from meshwright.cost.weights import stage_parameters
from meshwright.plan.ranks import gradient_bytes
from meshwright.plan.spec import ScheduleName
from meshwright.program.compile import REDUCE_NORM_BYTES
from meshwright.search.boundary_prices import boundary_kind
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.costs import (
    Costs,
    TensorGroup,
    distinct_groups,
    group_prefix,
    own_parameters,
    pair,
    remembered,
    ring,
    scaled,
    seconds_per_byte,
)
from meshwright.search.stage_devices import StageDevices, moves

MOST_GROUPS = 64
"""Tensor groups of a stage that are followed; leaving out the others only lowers the bound."""

NORM_RANKS = 512
"""Ranks up to which the ring of the norm is counted."""

Grid = list[list[float]]
"""Seconds by stage and tensor group."""


@dataclass(frozen=True, slots=True)
class _PipelineTables:
    """Holds seconds by stage and tensor group, from which a bound follows."""

    forward: Grid
    backward: Grid
    ahead: list[list[tuple[int, int, float, float]]]
    """Source group, target group, seconds of activations and of gradients, for each cut."""
    returns: list[bool]
    """True for cuts over which gradients come back; none do if all before it is frozen."""
    exposed: Grid
    """Seconds from the end of a tensor group's last backward to that of its reductions."""


def pipeline_bound(costs: Costs, pipeline: CandidatePipeline, schedule: ScheduleName) -> float:
    """Returns seconds before which no pipeline of these stages and cuts has reduced its gradients.

        first micro-batch arrives + all micro-batches on one tensor group + last one gets back

    and with 1F1B, where a tensor group may hold d micro-batches, the round trips of every further
    d."""
    facts = _chain(costs, pipeline)
    starts = _starts(facts)
    exposed = _ends(facts)
    trips = _trips(facts)
    worst, count, depth = 0.0, pipeline.micro_batches, len(pipeline.stages)
    for s in range(depth):
        rounds = (count - 1) // min(depth - s, count) + 1 if schedule == "1f1b" else 1
        for u, start in enumerate(starts[s]):
            busy = count * (facts.forward[s][u] + facts.backward[s][u])
            worst = max(worst, start + max(busy, rounds * trips[s][u]) + exposed[s][u])
    return worst


def after_pipelines(costs: Costs, pipelines: Sequence[CandidatePipeline]) -> float:
    """Returns the seconds of a step after the last pipeline: norm, slowest optimizer, overhead."""
    key = ("norm", *(pipeline.stages for pipeline in pipelines))
    norm = remembered(costs, key, lambda: _norm(costs, pipelines))
    overhead = costs.profile.step_overhead_seconds if costs.profile else 0.0
    return norm + slowest_optimizer(costs, pipelines) + overhead


def _norm(costs: Costs, pipelines: Sequence[CandidatePipeline]) -> float:
    used = [name for pipeline in pipelines for name in pipeline.devices]
    if len(used) > NORM_RANKS:
        return 0.0
    world = tuple(sorted(used, key=costs.links.order.__getitem__))
    return uncontended_seconds(costs.links, scaled(ring(costs, world), REDUCE_NORM_BYTES))


def slowest_optimizer(costs: Costs, pipelines: Sequence[CandidatePipeline]) -> float:
    """Returns the seconds of the longest optimizer step of any device."""
    return max(_optimizers(costs, pipelines))


def _optimizers(costs: Costs, pipelines: Sequence[CandidatePipeline]) -> Iterator[float]:
    for pipeline in pipelines:
        for stage, layers in zip(pipeline.stages, pairwise(pipeline.bounds), strict=True):
            key = ("slowest optimizer", stage, layers)
            yield remembered(costs, key, partial(_slowest_of_stage, costs, stage, layers))


def _slowest_of_stage(costs: Costs, stage: StageDevices, layers: tuple[int, int]) -> float:
    tensor = len(stage.groups[0])
    groups = distinct_groups(costs, stage.groups)
    kinds = {costs.devices[name].type for group in groups for name in group}
    return max(optimizer_of(costs, kind, layers, tensor) for kind in kinds)


def optimizer_of(costs: Costs, kind: str, layers: tuple[int, int], tensor: int) -> float:
    """Returns the seconds of the optimizer on one device of a stage."""
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


def _chain(costs: Costs, pipeline: CandidatePipeline) -> _PipelineTables:
    forward: Grid = []
    backward: Grid = []
    for stage, (a, b) in zip(pipeline.stages, pairwise(pipeline.bounds), strict=True):
        some = zip(stage.groups[:MOST_GROUPS], stage.rows[:MOST_GROUPS], strict=True)
        sums = [group_prefix(costs, group, rows) for group, rows in some]
        forward.append([f[b] - f[a] for f, _ in sums])
        backward.append([g[b] - g[a] for _, g in sums])
    ahead = [
        _transfers(costs, here, there, cut)
        for (here, there), cut in zip(pairwise(pipeline.stages), pipeline.bounds[1:-1], strict=True)
    ]
    returns = [bool(costs.table.cut_returns[cut]) for cut in pipeline.bounds[1:-1]]
    return _PipelineTables(
        forward, backward, ahead, returns, _exposed_reductions(costs, pipeline, backward)
    )


def _transfers(
    costs: Costs, here: StageDevices, there: StageDevices, cut: int
) -> list[tuple[int, int, float, float]]:
    ahead, back = float(costs.table.cut[cut]), float(costs.table.cut_gradient[cut])
    if boundary_kind(costs, here, there) == "scatter_gather":
        parts = lcm(len(here.groups[0]), len(there.groups[0]))
        ahead, back = ahead / parts, back / parts
    return [
        (
            i,
            j,
            _transfer(costs, here.groups[i], there.groups[j], ahead * rows),
            _transfer(costs, there.groups[j], here.groups[i], back * rows),
        )
        for i, j, rows in islice(moves(here, there), MOST_GROUPS)
    ]


def _transfer(costs: Costs, source: TensorGroup, target: TensorGroup, size: float) -> float:
    """Returns the quickest of the transfers to a group's tensor ranks; all of them are waited
    for."""
    if not size:
        return 0.0
    latency, slope = seconds_per_byte(costs, [pair(costs, source[0], target[0])])
    return latency + slope * (size - 0.5)  # messages are of whole bytes


def _starts(facts: _PipelineTables) -> Grid:
    """Returns when each tensor group's first forward can begin."""
    starts = [[0.0] * len(stage) for stage in facts.forward]
    for s, transfers in enumerate(facts.ahead):
        for i, j, ahead, _ in transfers:
            arrival = starts[s][i] + facts.forward[s][i] + ahead
            starts[s + 1][j] = max(starts[s + 1][j], arrival)
    return starts


def _ends(facts: _PipelineTables) -> Grid:
    """Returns the seconds from the end of each group's last backward to the end of all that follows
    from it."""
    ends = [list(stage) for stage in facts.exposed]
    for s, transfers in enumerate(facts.ahead):
        for i, j, _, back in transfers if facts.returns[s] else ():
            ends[s + 1][j] = max(ends[s + 1][j], back + facts.backward[s][i] + ends[s][i])
    return ends


def _trips(facts: _PipelineTables) -> Grid:
    """Returns the seconds from the begin of a forward to the end of its backward."""
    trips = [
        [f + b for f, b in zip(*both, strict=True)]
        for both in zip(facts.forward, facts.backward, strict=True)
    ]
    for s in reversed(range(len(facts.ahead))):
        own = list(trips[s])
        for i, j, ahead, back in facts.ahead[s] if facts.returns[s] else ():
            trips[s][i] = max(trips[s][i], own[i] + ahead + trips[s + 1][j] + back)
    return trips


def _exposed_reductions(costs: Costs, pipeline: CandidatePipeline, backward: Grid) -> Grid:
    """Returns the seconds of the reductions between the tensor groups of each stage, and of tied
    parameters between stages.

    The last bucket holds at least the stage's first layer, and begins when that layer is done; all
    of them together begin inside the last backward at the earliest."""
    exposed = [[0.0] * len(groups) for groups in backward]
    if costs.cluster.direct:
        return exposed
    width = gradient_bytes(costs.job)
    for s, (stage, (a, b)) in enumerate(
        zip(pipeline.stages, pairwise(pipeline.bounds), strict=True)
    ):
        if len(stage.groups) > 1:
            latency, slope = _ring(costs, stage.groups)
            tensor = len(stage.groups[0])
            whole, last = (
                own_parameters(costs, (a, end), tensor) * width
                - (end - a)  # buckets are of whole bytes
                for end in (b, a + 1)
            )
            for u, seconds in enumerate(backward[s]):
                everything = latency + slope * whole - seconds if whole > 0 else 0.0
                closing = latency + slope * last if last > 0 else 0.0
                exposed[s][u] = max(everything, closing, 0.0)
    for tied in costs.model.tied:
        stages = [
            s
            for s, (a, b) in enumerate(pairwise(pipeline.bounds))
            if any(a <= layer < b for layer in tied.layers)
        ]
        groups = tuple(dict.fromkeys(group for s in stages for group in pipeline.stages[s].groups))
        if len(groups) > 1:
            latency, slope = _ring(costs, groups)
            # Interfaces carry the shares of all ranks of a node, ports those of one.
            apart = len({costs.devices[group[0]].node for group in groups}) == len(groups)
            least = len(groups[0]) if apart else max(map(len, groups))
            size = tied.parameters * width / (least if "tensor" in tied.divided else 1) - 1
            first = pipeline.bounds[stages[0]] == tied.layers[0]
            for u, seconds in enumerate(backward[stages[0]]):
                begun = 0.0 if first else seconds
                tail = latency + slope * size - begun
                exposed[stages[0]][u] = max(exposed[stages[0]][u], tail)
    return exposed


def _ring(costs: Costs, groups: tuple[TensorGroup, ...]) -> tuple[float, float]:
    """Returns the latency and seconds per byte of the rings of these tensor groups' first tensor
    ranks."""
    return seconds_per_byte(costs, [ring(costs, tuple(group[0] for group in groups))])
