"""Simulates a step stage by stage, in a hundredth of the time of the simulator of ranks.

The replicas of a stage keep step, transfers of one cut share links only with each other, and
reductions queue at each resource. Hill climbs compare neighbours by it; in the end the simulator of
ranks decides. Letters: S stages, M micro-batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
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
from meshwright.search.candidate import CandidatePipeline, StageDevices
from meshwright.search.costs import (
    PROBE_BYTES,
    Costs,
    TensorGroup,
    distinct_replicas,
    group_prefix,
    reduced_bytes,
    reduced_width,
    remembered,
    ring,
)

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
    return _reduced(costs, pipelines, spans) + after


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


Span = tuple[float, float]
"""Begin and end of a stage's last backward."""


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


def _reduced(
    costs: Costs, pipelines: Sequence[CandidatePipeline], spans: Sequence[list[Span]]
) -> float:
    """Returns when all gradients are summed."""
    end = max(last for span in spans for _, last in span)
    free: dict[Resource, float] = {}
    for begin, complete, size, closing, groups in sorted(
        _sums(costs, pipelines, spans), key=lambda found: found[1]
    ):
        latency, used = _rings(costs, groups)
        slowest = 0.0
        for name, each in used:
            done = max(free.get(name, 0.0), begin) + each * size
            free[name] = done
            slowest = max(slowest, done, complete + each * closing)
        end = max(end, slowest + latency)
    return end


Sum = tuple[float, float, float, float, tuple[TensorGroup, ...]]
"""The time when the first gradients are there, when the last are, bytes on each rank, those that
are sent last, and the tensor groups."""

Holder = tuple[StageDevices, tuple[int, int], Span]
"""A stage with its layers and its last backward."""


def _sums(
    costs: Costs, pipelines: Sequence[CandidatePipeline], spans: Sequence[list[Span]]
) -> Iterator[Sum]:
    """Every sum of gradients: those of layers with the same holders, and of tied parameters."""
    stages: list[Holder] = [
        (stage, layers, span)
        for pipeline, own in zip(pipelines, spans, strict=True)
        for stage, layers, span in zip(pipeline.stages, pairwise(pipeline.bounds), own, strict=True)
    ]
    for a, b in pairwise(sorted({cut for pipeline in pipelines for cut in pipeline.bounds})):
        holders = [stage for stage in stages if stage[1][0] <= a and b <= stage[1][1]]
        groups = tuple(group for stage, _, _ in holders for group in stage.groups)
        if len(groups) < 2:
            continue
        size, last = reduced_bytes(costs, (a, b), max(map(len, groups)))
        if size > 0:
            begin = max(_passed(costs, holder, b) for holder in holders)
            complete = max(_passed(costs, holder, a) for holder in holders)
            yield begin, complete, size, last, groups
    for tied in costs.model.tied:
        holders = [
            stage for stage in stages if any(stage[1][0] <= x < stage[1][1] for x in tied.layers)
        ]
        groups = tuple(group for stage, _, _ in holders for group in stage.groups)
        if len(groups) > 1:
            ready = max(end for _, _, (_, end) in holders)
            share = max(map(len, groups)) if "tensor" in tied.divided else 1
            size = tied.parameters / share * reduced_width(costs)
            yield ready, ready, size, size, groups


def _passed(costs: Costs, holder: Holder, layer: int) -> float:
    """Returns when a stage's last backward, from its last layer to its first, has come to a layer
    and its gradients may be sent."""
    stage, (first, last), (begin, end) = holder
    _, prefix = group_prefix(costs, stage.groups[0], stage.rows[0])
    whole = prefix[last] - prefix[first]
    done = (prefix[last] - prefix[layer]) / whole if whole else 1.0
    delay = costs.system.reduction_delay
    return begin + (end - begin) * (delay + (1 - delay) * done)


Rings = tuple[float, tuple[tuple[Resource, float], ...]]
"""Latency, and seconds per byte on every resource."""


def _rings(costs: Costs, groups: tuple[TensorGroup, ...]) -> Rings:
    """Return what the rings of all tensor ranks of some tensor groups ask of the links. Where these
    differ in width, a rank of a narrow one is in the rings of all shares that it holds."""
    return remembered(costs, ("rings", groups), lambda: _priced_rings(costs, groups))


def _priced_rings(costs: Costs, groups: tuple[TensorGroup, ...]) -> Rings:
    latency = 0.0
    used: dict[Resource, float] = {}
    widest = max(map(len, groups))
    for t in range(widest):
        traffic = ring(costs, tuple(group[t * len(group) // widest] for group in groups))
        latency = max(latency, traffic.latency)
        for name, size in traffic.bytes_by_resource.items():
            each = size / PROBE_BYTES / costs.links.capacities[name]
            used[name] = used.get(name, 0.0) + each
    return latency, tuple(used.items())
