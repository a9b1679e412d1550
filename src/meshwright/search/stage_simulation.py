"""Simulates a step stage by stage, in a hundredth of the time of the simulator of ranks.

The replicas of a stage keep step, transfers of one cut share links only with each other, and
reductions queue at each resource. Hill climbs compare neighbours by it; in the end the simulator of
ranks decides. Letters: S stages, M micro-batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

from meshwright.cluster.topology import Resource
from meshwright.plan.spec import ScheduleName
from meshwright.program.compile import RECEIVES_AHEAD
from meshwright.program.operations import Op
from meshwright.program.schedules import schedule_orders
from meshwright.search.boundary_prices import boundary_prices
from meshwright.search.bounds import after_pipelines
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.costs import Costs, distinct_replicas, group_prefix
from meshwright.search.reduction_estimate import Span, reduced

ROUNDS = 2.5
"""Micro-batches that are followed, for each stage; further ones come at the pace of the last."""

FOLLOWED = 24
"""Micro-batches that are followed at least."""


def stage_level_seconds(
    costs: Costs,
    pipelines: Sequence[CandidatePipeline],
    schedule: ScheduleName,
    limit: float = float("inf"),
) -> float:
    """Seconds of a step without contention between pipelines; where it must be `limit` or more,
    something in between."""
    pipes = [_pipe(costs, pipeline) for pipeline in pipelines]
    after = after_pipelines(costs, pipelines)
    least = max(_least(pipe, schedule) for pipe in pipes) + after
    if least >= limit:
        return least
    spans = [_last_backwards(pipe, schedule) for pipe in pipes]
    return reduced(costs, pipelines, spans) + after


@dataclass(frozen=True, slots=True)
class _Pipe:
    """A pipeline in seconds of one micro-batch, by stage and by cut."""

    count: int
    forward: list[float]
    backward: list[float]
    ahead: list[float]
    back: list[float]
    returns: list[bool]
    """True for cuts over which gradients come back; none do if all before it is frozen."""
    busiest: float
    """Seconds that a micro-batch occupies the busiest link, over all cuts."""


def _pipe(costs: Costs, pipeline: CandidatePipeline) -> _Pipe:
    forward, backward = [], []
    for stage, (a, b) in zip(pipeline.stages, pairwise(pipeline.bounds), strict=True):
        replicas = distinct_replicas(costs, stage.groups, stage.rows)
        sums = [group_prefix(costs, group, rows) for group, rows in replicas]
        forward.append(max(f[b] - f[a] for f, _ in sums))
        backward.append(max(g[b] - g[a] for _, g in sums))
    ahead: list[float] = []
    back: list[float] = []
    busy: dict[Resource, float] = {}
    for (here, there), cut in zip(pairwise(pipeline.stages), pipeline.bounds[1:-1], strict=True):
        ways = boundary_prices(costs, here, there)
        for found, way, table in zip(
            (ahead, back), ways, (costs.table.cut, costs.table.cut_gradient), strict=True
        ):
            size = float(table[cut]) * pipeline.rows
            found.append(way.seconds(size))
            for name, each in way.occupied:
                busy[name] = busy.get(name, 0.0) + each * size
    returns = [bool(costs.table.cut_returns[cut]) for cut in pipeline.bounds[1:-1]]
    busiest = max(busy.values(), default=0.0)
    return _Pipe(pipeline.micro_batches, forward, backward, ahead, back, returns, busiest)


def _least(pipe: _Pipe, schedule: ScheduleName) -> float:
    """Seconds of all micro-batches on one stage, with 1F1B in rounds of as many as it may hold, and
    of the first one on its way there and back."""
    depth, count = len(pipe.forward), pipe.count
    loads = [f + b for f, b in zip(pipe.forward, pipe.backward, strict=True)]
    cuts = [a + b for a, b in zip(pipe.ahead, pipe.back, strict=True)]
    trip = whole = sum(loads) + sum(cuts)
    worst = pipe.count * pipe.busiest
    # Before a cut that nothing comes back over nobody waits for the end.
    waits = max((s + 1 for s, returns in enumerate(pipe.returns) if not returns), default=0)
    for s, load in enumerate(loads):
        held = min(depth - s, count)
        rounds = (count - 1) // held + 1 if schedule == "1f1b" and s >= waits else 1
        worst = max(worst, whole - trip + max(count * load, rounds * trip))
        trip -= load + (cuts[s] if s < depth - 1 else 0.0)
    return worst


def _last_backwards(pipe: _Pipe, schedule: ScheduleName) -> list[Span]:
    depth, count = len(pipe.forward), pipe.count
    if depth == 1:
        end = count * (pipe.forward[0] + pipe.backward[0])
        return [(end - pipe.backward[0], end)]
    some = followed(depth, count)
    ends, pace = _follow(pipe, schedule, some)
    out_of_time = max((count - some) * pace, count * pipe.busiest - max(ends))
    return [
        (end + out_of_time - own, end + out_of_time)
        for end, own in zip(ends, pipe.backward, strict=True)
    ]


def followed(depth: int, count: int) -> int:
    """Micro-batches that are followed one by one."""
    return min(count, max(FOLLOWED, int(ROUNDS * depth) + 2)) if depth > 1 else 0


@lru_cache(maxsize=1024)
def _orders(
    schedule: ScheduleName, depth: int, count: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Returns for every stage: 0 for a forward or 1 for a backward, and its micro-batch."""
    layout = tuple((s,) for s in range(depth))
    return tuple(
        tuple((int(action.op is Op.BACKWARD), action.first) for action in order)
        for order in schedule_orders(schedule, layout, count)
    )


@dataclass(slots=True)
class _FollowedStage:
    """A stage that is being followed; of every pair, the first is for forwards."""

    order: tuple[tuple[int, int], ...]
    seconds: tuple[float, float]
    delays: tuple[float, float]
    """Seconds of the transfers that come in."""
    sources: tuple[list[float] | None, list[float] | None]
    """The `ends` that they follow; None: nothing comes in."""
    ends: tuple[list[float], list[float]]
    """End times of its computations so far, by micro-batch."""
    free: list[float]
    """The time when the last transfer was over."""
    at: int = 0
    now: float = 0.0
    earlier: deque[float] = field(
        default_factory=lambda: deque([0.0] * RECEIVES_AHEAD, RECEIVES_AHEAD)
    )
    """The time when the computations before the last one ended."""


def _advance(stage: _FollowedStage) -> bool:
    """Follow a stage up to the first transfer that has not begun; whether it got any further.

    A transfer begins when its tensor is there, the one before it in its channel is over and its
    receiver has posted it: when all but AHEAD computations before the one that reads it are done.
    """
    begun, order = stage.at, stage.order
    while stage.at < len(order):
        way, number = order[stage.at]
        source, start = stage.sources[way], stage.now
        if source is not None:
            if len(source) <= number:
                break
            arrival = max(source[number], stage.earlier[0], stage.free[way]) + stage.delays[way]
            stage.free[way] = arrival
            start = max(start, arrival)
        stage.earlier.append(stage.now)
        stage.now = start + stage.seconds[way]
        stage.ends[way].append(stage.now)
        stage.at += 1
    return stage.at > begun


def _follow(pipe: _Pipe, schedule: ScheduleName, count: int) -> tuple[list[float], float]:
    """Returns when each stage ends its last backward, and the seconds of every further
    micro-batch."""
    depth = len(pipe.forward)
    ends: list[tuple[list[float], list[float]]] = [([], []) for _ in range(depth)]
    stages = [
        _FollowedStage(
            order=order,
            seconds=(pipe.forward[s], pipe.backward[s]),
            delays=(pipe.ahead[s - 1] if s else 0.0, pipe.back[s] if s < depth - 1 else 0.0),
            sources=(
                ends[s - 1][0] if s else None,
                ends[s + 1][1] if s < depth - 1 and pipe.returns[s] else None,
            ),
            ends=ends[s],
            free=[0.0, 0.0],
        )
        for s, order in enumerate(_orders(schedule, depth, count))
    ]
    waiting = deque([0])
    while waiting:
        s = waiting.popleft()
        if _advance(stages[s]):
            waiting.extend(other for other in (s + 1, s - 1) if 0 <= other < depth)
    if all(pipe.returns):
        return [stage.now for stage in stages], _pace(ends, schedule, count)
    last = max(s + 1 for s, returns in enumerate(pipe.returns) if not returns)
    loads = [f + b for f, b in zip(pipe.forward, pipe.backward, strict=True)]
    pace = max(_pace(ends[last:], schedule, count), *loads[:last], *pipe.ahead[:last])
    return [stage.now for stage in stages], pace


def _pace(ends: list[tuple[list[float], list[float]]], schedule: ScheduleName, count: int) -> float:
    """Seconds between micro-batches where the pipeline runs evenly."""
    depth, first, last = len(ends), ends[0][1], ends[-1][0]
    if schedule == "gpipe":
        some = count - 1 - count // 2
        return (last[-1] - last[-1 - some] + first[-1] - first[-1 - some]) / max(1, some)
    steady = count - depth - 1
    return (first[steady] - first[steady - depth]) / depth if steady >= depth else 0.0
