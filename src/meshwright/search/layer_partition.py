"""Divides layers among given stages, exactly or nearly so, and rows among the replicas of a stage.

Letters: S stages, L layers, M micro-batches, a stage's first layer, b one past its last. `loads`
hold, for each stage an array [L + 1, L + 1], the seconds that it needs per micro-batch for layers
[a, b); infinity forbids the range (empty, or too large for the stage's memory).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from heapq import heapify, heapreplace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from meshwright.plan.spec import ScheduleName
from meshwright.program.schedules import in_flight
from meshwright.search.boundary_prices import boundary_prices
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.costs import (
    Array,
    Costs,
    TensorGroup,
    distinct_groups,
    distinct_replicas,
    group_capacity,
    group_kind,
    group_prefix,
    group_times,
    pace,
    remembered,
    stage_bytes,
)
from meshwright.search.stage_devices import StageDevices
from meshwright.techniques.activation_checkpointing.price import repeated_seconds

Loads = Sequence[Array]
"""Seconds [L + 1, L + 1] of every stage; stages that are alike may share one array."""

PRECISE = 1e-3
"""Relative excess of a bottleneck over the least possible that is not worth a closer look."""

ROOMY = 1.1
"""Times the least bottleneck within which cuts are looked at."""

_MOST = 1e300
"""Seconds that every range takes that is not forbidden, at most."""


def chain_loads(times_SL: Array) -> Array:
    """Returns loads [S, L + 1, L + 1] from each layer's seconds; empty ranges are forbidden."""
    stages, layers = times_SL.shape
    prefix = np.zeros((stages, layers + 1))
    np.cumsum(times_SL, axis=1, out=prefix[:, 1:])
    loads = prefix[:, None, :] - prefix[:, :, None]
    loads[:, _empty(layers + 1)] = np.inf
    return loads


@lru_cache(maxsize=4)
def _empty(size: int) -> NDArray[np.bool_]:
    return np.tri(size, dtype=bool)


def least_worst(values: Loads) -> tuple[tuple[int, ...], float] | None:
    """Returns the cuts whose largest value over the stages is smallest, and that value; None if
    every way to cut meets a forbidden range."""
    size = len(values[0])
    best = np.full(size, np.inf)
    best[0] = -np.inf
    choice = np.zeros((len(values), size), dtype=np.intp)
    for s, own in enumerate(values):
        worst = np.maximum(best[:, None], own)
        choice[s] = worst.argmin(axis=0)
        best = worst.min(axis=0)
    if not np.isfinite(best[-1]):
        return None
    return _trace(choice), float(best[-1])


def _trace(choice: NDArray[np.intp]) -> tuple[int, ...]:
    bounds = [choice.shape[1] - 1]
    for row in choice[::-1]:
        bounds.append(int(row[bounds[-1]]))
    return tuple(reversed(bounds))


Cut = tuple[tuple[int, ...], float, float]
"""Cuts, the sum of loads and boundary seconds, and the slowest stage's seconds."""


def _shortest(loads: Loads, cuts: Array, bottlenecks: Sequence[float]) -> list[Cut]:
    """Returns, for each of some bottlenecks, the cuts with the least sum of loads and boundary
    seconds among those where no stage takes longer than it."""
    size = len(loads[0])
    most = np.array(bottlenecks)[:, None, None]
    allowed = {id(own): np.where(own <= most, own, np.inf) for own in distinct(loads)}
    costs = np.full((len(bottlenecks), size), np.inf)
    costs[:, 0] = 0.0
    starts = []
    for s, own in enumerate(loads):
        starts.append(costs + cuts[s - 1] if s else costs)
        costs = np.minimum.reduce(starts[s][:, :, None] + allowed[id(own)], axis=1)
    found = []
    for n, cost in enumerate(costs[:, -1].tolist()):
        bounds = [size - 1]
        for start, own in zip(reversed(starts), reversed(loads), strict=True):
            bounds.append(int((start[n] + allowed[id(own)][n, :, bounds[-1]]).argmin()))
        bounds.reverse()
        slowest = max(float(own[at]) for own, at in zip(loads, pairwise(bounds), strict=True))
        found.append((tuple(bounds), cost, slowest))
    return found


def distinct(loads: Loads) -> list[Array]:
    """Returns every array once that stages share."""
    return list({id(own): own for own in loads}.values())


Stages = tuple[tuple[TensorGroup, ...], ...]
"""The tensor groups of every stage of a pipeline."""
Replicas = Sequence[tuple[TensorGroup, int]]
"""Tensor groups with the rows that each has."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """Describes a pipeline with its best cuts, and its seconds without reductions."""

    pipeline: CandidatePipeline
    once: float
    """Seconds of the first micro-batch, forward and backward through all stages."""
    slowest: float
    """Seconds that every further micro-batch adds."""


def apportioned(costs: Costs, groups: tuple[TensorGroup, ...], rows: int) -> StageDevices:
    """Returns a stage of these tensor groups with `rows` rows, as `apportion` gives them out."""
    key = ("apportioned", groups, rows)
    return remembered(costs, key, lambda: StageDevices(groups, apportion(costs, groups, rows)))


def apportion(costs: Costs, groups: tuple[TensorGroup, ...], rows: int) -> tuple[int, ...]:
    """Gives whole rows to every tensor group, at least one each, such that the slowest is done
    soonest; times are taken to be proportional to rows."""
    each = max(1, rows // len(groups))
    known = {group_kind(costs, u): pace(costs, u, each) for u in distinct_groups(costs, groups)}
    if len(set(known.values())) == 1:
        share, left = divmod(rows, len(groups))
        return (share + 1,) * left + (share,) * (len(groups) - left)
    paces = [known[group_kind(costs, group)] for group in groups]
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


def fit_pipeline(
    costs: Costs,
    stages: Stages,
    rows: int,
    micro_batches: int,
    schedule: ScheduleName,
    limit: float = float("inf"),
) -> Fitted | None:
    """Returns the cuts that make the pipeline about fastest among those that fit (see `recut`);
    None if none does, if there are fewer rows than replicas or fewer layers than stages, or if not
    even layers that could be cut anywhere would take less than `limit` seconds."""
    layers = len(costs.model.layers)
    if len(stages) > layers or rows < max(len(groups) for groups in stages):
        return None
    devices = tuple(apportioned(costs, groups, rows) for groups in stages)
    if limit < float("inf") and micro_batches / fluid_rate(costs, devices) >= limit:
        return None
    key = ("fitted", devices, micro_batches, schedule)
    return remembered(costs, key, lambda: recut(costs, devices, micro_batches, schedule))


def fluid_rate(costs: Costs, stages: tuple[StageDevices, ...]) -> float:
    """Returns the micro-batches a second of stages that are never idle."""
    return sum(remembered(costs, ("rate", s), partial(_rate, costs, s)) for s in stages)


def _rate(costs: Costs, stage: StageDevices) -> float:
    slowest = 0.0
    for group, rows in distinct_replicas(costs, stage.groups, stage.rows):
        forward, backward = group_prefix(costs, group, rows)
        slowest = max(slowest, forward[-1] + backward[-1])
    return 1 / slowest


def recut(
    costs: Costs, stages: tuple[StageDevices, ...], micro_batches: int, schedule: ScheduleName
) -> Fitted | None:
    """Does what `fit_pipeline` does, with the rows given as well.

    Of many micro-batches the slowest stage decides: nothing is looked at but cuts that make it as
    fast as it can be, and `ROOMY` times that.
    """
    loads = [
        stage_loads(costs, stage, _held(s, stages, micro_batches, schedule))
        for s, stage in enumerate(stages)
    ]
    least = least_bottleneck(loads)
    if least is None:
        return None
    cuts = np.zeros((max(len(stages) - 1, 0), len(loads[0])))
    for s, (here, there) in enumerate(pairwise(stages)):
        cuts[s] = cut_seconds(costs, here, there)
    weight = micro_batches - 1
    found = _shortest(loads, cuts, (least, least * ROOMY))
    bounds, total, slowest = min(found, key=lambda each: weight * each[2] + each[1])
    return Fitted(CandidatePipeline(stages, bounds, micro_batches), total, slowest)


def least_excess(
    costs: Costs, stages: tuple[StageDevices, ...], micro_batches: int, schedule: ScheduleName
) -> CandidatePipeline:
    """Returns the cuts that exceed memory least on the stage that exceeds it most; none of the
    stages is left empty, so there are at least as many layers as stages."""
    excess = [
        _stage_excess(costs, stage, _held(s, stages, micro_batches, schedule))
        for s, stage in enumerate(stages)
    ]
    least = least_worst(excess)
    assert least is not None, "there are no more stages than layers"
    return CandidatePipeline(stages, least[0], micro_batches)


def _stage_excess(costs: Costs, stage: StageDevices, held: int) -> Array:
    """Returns the bytes [L + 1, L + 1] by which the fullest replica exceeds its memory, recomputing
    if that may be; infinite where a stage would be empty."""
    replicas = distinct_replicas(costs, stage.groups, stage.rows)
    kinds = frozenset((group_kind(costs, group), rows) for group, rows in replicas)
    recompute = costs.recomputed is not None
    key = ("stage excess", kinds, held, recompute)
    make = partial(_replicas_excess, costs, replicas, held, recompute=recompute)
    return remembered(costs, key, make)


def _replicas_excess(costs: Costs, replicas: Replicas, held: int, *, recompute: bool) -> Array:
    every = []
    for group, rows in replicas:
        always, each = stage_bytes(costs, len(group), rows, recompute=recompute)
        every.append(always + each * held - group_capacity(costs, group))
    found: Array = np.max(every, axis=0)
    found[np.tri(len(found), dtype=bool)] = np.inf
    return found


def least_bottleneck(loads: Loads) -> float | None:
    """Returns the seconds of the slowest stage, `PRECISE` of the least possible, of loads that grow
    with every layer; None if no cuts avoid forbidden ranges."""
    high = _bottleneck_within(loads, _MOST)
    if high is None:
        return None
    low = max(float(np.minimum.reduce(table.diagonal(1))) for table in distinct(loads))
    while high > low * (1 + PRECISE):
        middle = 0.5 * (low + high)
        found = _bottleneck_within(loads, middle)
        if found is None:
            low = middle
        else:
            high = found
    return high


def _bottleneck_within(loads: Loads, most: float) -> float | None:
    """Returns the slowest stage where each, from the first on, takes as many layers as it can in
    `most` seconds; None if some are left over."""
    last = len(loads[0]) - 1
    at, slowest = 0, 0.0
    for s, table in enumerate(loads):
        row = table[at]
        end = bisect_right(row, most, at + 1, last + 2 - len(loads) + s) - 1
        if end <= at:
            return None
        slowest = max(slowest, float(row[end]))
        at = end
    return slowest if at == last else None


def _held(
    s: int, stages: tuple[StageDevices, ...], micro_batches: int, schedule: ScheduleName
) -> int:
    return in_flight(schedule, s, len(stages), micro_batches)


def stage_loads(costs: Costs, stage: StageDevices, held: int) -> Array:
    """Returns the seconds [L + 1, L + 1] of the slowest replica, recomputing where one of them does
    not fit otherwise; infinite where one does not fit even then. Stages that are alike share the
    array."""
    replicas = distinct_replicas(costs, stage.groups, stage.rows)
    kinds = frozenset((group_kind(costs, group), rows) for group, rows in replicas)
    key = ("stage loads", kinds, held)
    return remembered(costs, key, lambda: _stage_loads(costs, replicas, held))


def _stage_loads(costs: Costs, replicas: Replicas, held: int) -> Array:
    plain = _slowest(costs, replicas, held, recompute=False)
    size = len(plain)
    if costs.recomputed is None or np.isfinite(plain).sum() == size * (size - 1) // 2:
        return plain
    return np.where(np.isfinite(plain), plain, _slowest(costs, replicas, held, recompute=True))


def _slowest(costs: Costs, replicas: Replicas, held: int, *, recompute: bool) -> Array:
    every = []
    for group, rows in replicas:
        key = ("loads", group_kind(costs, group), rows, held, recompute)
        make = partial(_replica_loads, costs, group, rows, held, recompute=recompute)
        every.append(remembered(costs, key, make))
    if len(every) == 1:
        return every[0]
    found: Array = np.max(every, axis=0)
    return found


def _replica_loads(
    costs: Costs, group: TensorGroup, rows: int, held: int, *, recompute: bool
) -> Array:
    key = ("roomy loads", group_kind(costs, group), rows, recompute)
    make = partial(_roomy_loads, costs, group, rows, recompute=recompute)
    roomy: Array = remembered(costs, key, make)
    always, each = stage_bytes(costs, len(group), rows, recompute=recompute)
    return np.where(always + each * held > group_capacity(costs, group), np.inf, roomy)


def _roomy_loads(costs: Costs, group: TensorGroup, rows: int, *, recompute: bool) -> Array:
    """Returns the seconds of a replica on devices that hold everything."""
    forward, backward = group_times(costs, group, rows)
    if recompute:
        backward = backward + repeated_seconds(costs.model, (0, len(forward)), forward)
    loads: Array = chain_loads((forward + backward)[None])[0]
    return loads


def cut_seconds(costs: Costs, here: StageDevices, there: StageDevices) -> Array:
    """Returns the seconds [L + 1] of activations and gradients across a cut before each layer."""
    key = ("cut seconds", here, there)
    return remembered(costs, key, lambda: _cut_seconds(costs, here, there))


def _cut_seconds(costs: Costs, here: StageDevices, there: StageDevices) -> Array:
    rows = sum(here.rows)
    seconds = np.zeros(len(costs.table.cut))
    sizes = costs.table.cut, costs.table.cut_gradient
    for way, bytes_L in zip(boundary_prices(costs, here, there), sizes, strict=True):
        seconds += way.seconds(rows * bytes_L)
    return seconds
