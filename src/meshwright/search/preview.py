"""What a strategy takes, worked out in a hundredth of the simulator's time.

The same program is followed stage by stage instead of rank by rank: the replicas of a stage keep
step, transfers of one cut share links only with each other, and reductions queue at each resource.
Neighbours are compared by it; what the simulator says decides. Letters: S stages, M micro-batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from meshwright.plan.spec import ScheduleName
from meshwright.program.buckets import BUCKET_BYTES, gradient_bytes
from meshwright.program.instructions import Op
from meshwright.program.schedules import actions
from meshwright.search.costs import PROBE_BYTES, Costs, distinct_replicas, ring, unit_prefix
from meshwright.search.crossing import crossings
from meshwright.search.lines import Line, Unit
from meshwright.search.lower import after_lines

ROUNDS = 2.5
"""Micro-batches that are followed, for each stage; further ones come at the pace of the last."""

FOLLOWED = 24
"""At least so many are followed."""


def preview_seconds(
    costs: Costs, lines: Sequence[Line], schedule: ScheduleName, limit: float = float("inf")
) -> float:
    """Seconds of a step without contention between pipelines; where it must be `limit` or more,
    something in between."""
    pipes = [_pipe(costs, line) for line in lines]
    after = after_lines(costs, lines)
    least = max(_least(pipe, schedule) for pipe in pipes) + after
    if least >= limit:
        return least
    spans = [_last_backwards(pipe, schedule) for pipe in pipes]
    return _reduced(costs, lines, spans) + after


@dataclass(frozen=True, slots=True)
class _Pipe:
    """A pipeline in seconds of one micro-batch, by stage and by cut."""

    count: int
    forward: list[float]
    backward: list[float]
    ahead: list[float]
    back: list[float]
    busiest: float
    """Of the link that all cuts together load most."""


def _pipe(costs: Costs, line: Line) -> _Pipe:
    forward, backward = [], []
    for team, (a, b) in zip(line.teams, pairwise(line.bounds), strict=True):
        replicas = distinct_replicas(costs, team.units, team.rows)
        sums = [unit_prefix(costs, unit, rows) for unit, rows in replicas]
        forward.append(max(f[b] - f[a] for f, _ in sums))
        backward.append(max(g[b] - g[a] for _, g in sums))
    ahead: list[float] = []
    back: list[float] = []
    busy: dict[str, float] = {}
    for (here, there), cut in zip(pairwise(line.teams), line.bounds[1:-1], strict=True):
        ways = crossings(costs, here, there)
        for found, way, table in zip(
            (ahead, back), ways, (costs.table.cut, costs.table.cut_gradient), strict=True
        ):
            size = float(table[cut]) * line.rows
            found.append(way.seconds(size))
            for name, each in way.occupied:
                busy[name] = busy.get(name, 0.0) + each * size
    return _Pipe(
        line.micro_batches, forward, backward, ahead, back, max(busy.values(), default=0.0)
    )


def _least(pipe: _Pipe, schedule: ScheduleName) -> float:
    """Seconds of all micro-batches on one stage, with 1F1B in rounds of as many as it may hold, and
    of the first one on its way there and back."""
    depth, count = len(pipe.forward), pipe.count
    loads = [f + b for f, b in zip(pipe.forward, pipe.backward, strict=True)]
    cuts = [a + b for a, b in zip(pipe.ahead, pipe.back, strict=True)]
    trip = whole = sum(loads) + sum(cuts)
    worst = pipe.count * pipe.busiest
    for s, load in enumerate(loads):
        rounds = (count - 1) // min(depth - s, count) + 1 if schedule == "1f1b" else 1
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
    ends, pace = _follow(pipe, _orders(schedule, depth, some), some, gpipe=schedule == "gpipe")
    late = max((count - some) * pace, count * pipe.busiest - ends[0])
    return [(end + late - own, end + late) for end, own in zip(ends, pipe.backward, strict=True)]


def followed(depth: int, count: int) -> int:
    """Micro-batches that are followed one by one."""
    return min(count, max(FOLLOWED, int(ROUNDS * depth) + 2)) if depth > 1 else 0


@lru_cache(maxsize=1024)
def _orders(schedule: ScheduleName, depth: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Of every stage: m for the forward of micro-batch m, -1 - m for its backward."""
    return tuple(
        tuple(m if op is Op.FORWARD else ~m for op, m in actions(schedule, s, depth, count))
        for s in range(depth)
    )


def _follow(
    pipe: _Pipe, orders: tuple[tuple[int, ...], ...], count: int, *, gpipe: bool
) -> tuple[list[float], float]:
    """When each stage ends its last backward, and the seconds of every further micro-batch.

    A transfer begins when its tensor is there, the one before it in its channel is over and its
    receiver has posted it: two computations ahead of the one that reads it.
    """
    forward, backward, ahead, back = pipe.forward, pipe.backward, pipe.ahead, pipe.back
    depth = len(orders)
    last = depth - 1
    length = len(orders[0])
    at = [0] * depth
    clock, before = [0.0] * depth, [0.0] * depth
    ready_f: list[list[float]] = [[] for _ in orders]
    ready_b: list[list[float]] = [[] for _ in orders]
    free_f, free_b = [0.0] * depth, [0.0] * depth
    waiting = deque([0])
    while waiting:
        s = waiting.popleft()
        order, k, now, earlier = orders[s], at[s], clock[s], before[s]
        own_f, own_b, seconds_f, seconds_b = ready_f[s], ready_b[s], forward[s], backward[s]
        from_f = ready_f[s - 1] if s else None
        from_b = ready_b[s + 1] if s < last else None
        sent_f = sent_b = False
        while k < length:
            m = order[k]
            start = now
            if m >= 0:
                if from_f is not None:
                    if len(from_f) <= m:
                        break
                    start = from_f[m]
                    if earlier > start:
                        start = earlier
                    if free_f[s] > start:
                        start = free_f[s]
                    start += ahead[s - 1]
                    free_f[s] = start
                    if now > start:
                        start = now
                earlier, now = now, start + seconds_f
                own_f.append(now)
                sent_f = True
            else:
                if from_b is not None:
                    if len(from_b) <= ~m:
                        break
                    start = from_b[~m]
                    if earlier > start:
                        start = earlier
                    if free_b[s] > start:
                        start = free_b[s]
                    start += back[s]
                    free_b[s] = start
                    if now > start:
                        start = now
                earlier, now = now, start + seconds_b
                own_b.append(now)
                sent_b = True
            k += 1
        at[s], clock[s], before[s] = k, now, earlier
        if sent_f and s < last:
            waiting.append(s + 1)
        if sent_b and s:
            waiting.append(s - 1)
    middle = count // 2
    ends_b = ready_b[0]
    if gpipe:
        ends_f = ready_f[last]
        pace = (ends_f[-1] - ends_f[middle] + ends_b[-1] - ends_b[middle]) / max(
            1, count - 1 - middle
        )
    else:
        steady = count - depth - 1
        pace = (ends_b[steady] - ends_b[steady - depth]) / depth if steady >= depth else 0.0
    return clock, pace


def _reduced(costs: Costs, lines: Sequence[Line], spans: Sequence[list[Span]]) -> float:
    """When all gradients are summed."""
    end = max(span[0][1] for span in spans)
    free: dict[str, float] = {}
    for begin, complete, size, units in sorted(_sums(costs, lines, spans), key=lambda r: r[1]):
        latency, used = _rings(costs, units)
        closing = min(size, BUCKET_BYTES)
        slowest = 0.0
        for name, each in used:
            done = max(free.get(name, 0.0), begin) + each * size
            free[name] = done
            slowest = max(slowest, done, complete + each * closing)
        end = max(end, slowest + latency)
    return end


def _sums(
    costs: Costs, lines: Sequence[Line], spans: Sequence[list[Span]]
) -> Iterator[tuple[float, float, float, tuple[Unit, ...]]]:
    """Every sum of gradients: when the first are there, when the last are, bytes on each rank, and
    the units that hold them."""
    width = gradient_bytes(costs.job) * costs.system.gradient_width
    table, delay = costs.table, costs.system.reduction_delay
    cuts = sorted({cut for line in lines for cut in line.bounds})
    stage = [0] * len(lines)
    for a, b in pairwise(cuts):
        holders = []
        for i, line in enumerate(lines):
            while line.bounds[stage[i] + 1] <= a:
                stage[i] += 1
            holders.append((line, stage[i], spans[i][stage[i]]))
        units = tuple(u for line, s, _ in holders for u in line.teams[s].units)
        if len(units) < 2:
            continue
        tensor = len(units[0])
        held = (
            table.replicated[b] - table.replicated[a] + (table.split[b] - table.split[a]) / tensor
        )
        if held <= 0:
            continue
        begin = complete = 0.0
        for line, s, (start, end) in holders:
            team, first, last = line.teams[s], line.bounds[s], line.bounds[s + 1]
            _, prefix = unit_prefix(costs, team.units[0], team.rows[0])
            whole = (prefix[last] - prefix[first]) or 1.0
            opened = start + (end - start) * (
                delay + (1 - delay) * (prefix[last] - prefix[b]) / whole
            )
            closed = start + (end - start) * (
                delay + (1 - delay) * (prefix[last] - prefix[a]) / whole
            )
            begin, complete = max(begin, opened), max(complete, closed)
        yield begin, complete, float(held) * width, units
    for tied in costs.model.tied:
        units, ready, tensor = (), 0.0, 1
        for line, span in zip(lines, spans, strict=True):
            for s, (a, b) in enumerate(pairwise(line.bounds)):
                if any(a <= layer < b for layer in tied.layers):
                    units = (*units, *line.teams[s].units)
                    ready = max(ready, span[s][1])
        if len(units) > 1:
            share = len(units[0]) if tied.split else 1
            yield ready, ready, tied.parameters / share * width, units


def _rings(costs: Costs, units: tuple[Unit, ...]) -> tuple[float, tuple[tuple[str, float], ...]]:
    """The rings of all tensor ranks: latency, and seconds per byte on every resource."""
    found = costs.sums.get(units)
    if found is None:
        latency = 0.0
        used: dict[str, float] = {}
        for t in range(len(units[0])):
            traffic = ring(costs, tuple(unit[t] for unit in units))
            latency = max(latency, traffic.latency)
            for name, size in traffic.bytes_by_resource.items():
                each = size / PROBE_BYTES / costs.links.capacities[name]
                used[name] = used.get(name, 0.0) + each
        found = costs.sums[units] = latency, tuple(used.items())
    return found
