"""What a strategy takes, worked out in a hundredth of the simulator's time.

The same program is followed stage by stage instead of rank by rank: the replicas of a stage keep
step, transfers of one cut share links only with each other, and reductions queue at each resource.
Neighbours are compared by it; what the simulator says decides. Letters: S stages, M micro-batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

from meshwright.cluster.topology import path
from meshwright.plan.spec import ScheduleName
from meshwright.program.buckets import BUCKET_BYTES, gradient_bytes
from meshwright.program.instructions import Op
from meshwright.program.schedules import actions
from meshwright.search.costs import PROBE_BYTES, Costs, distinct_replicas, ring, unit_prefix
from meshwright.search.lines import Line, Team, Unit, moves
from meshwright.search.lower import after_lines

ROUNDS = 3
"""Micro-batches that are followed, for each stage; further ones come at the pace of the last."""

FOLLOWED = 24
"""At least so many are followed."""

Crossing = tuple[float, tuple[tuple[str, float], ...]]
"""Seconds before the first byte, and for every resource the seconds that each byte of a
micro-batch's tensor takes of it."""


def preview_seconds(costs: Costs, lines: Sequence[Line], schedule: ScheduleName) -> float:
    """Seconds of a step without contention between cuts and between pipelines."""
    spans = [_last_backwards(costs, line, schedule) for line in lines]
    return _reduced(costs, lines, spans) + after_lines(costs, lines)


Span = tuple[float, float]
"""Begin and end of a stage's last backward."""


def _last_backwards(costs: Costs, line: Line, schedule: ScheduleName) -> list[Span]:
    forward, backward = [], []
    for team, (a, b) in zip(line.teams, pairwise(line.bounds), strict=True):
        sums = [unit_prefix(costs, u, rows) for u, rows in distinct_replicas(costs, team.units, team.rows)]
        forward.append(max(f[b] - f[a] for f, _ in sums))
        backward.append(max(g[b] - g[a] for _, g in sums))
    depth, count = len(line.teams), line.micro_batches
    if depth == 1:
        end = count * (forward[0] + backward[0])
        return [(end - backward[0], end)]
    ahead, back = [], []
    busy: dict[str, float] = {}
    for (here, there), cut in zip(pairwise(line.teams), line.bounds[1:-1], strict=True):
        for found, sizes, (latency, used) in zip(
            (ahead, back), (costs.table.cut, costs.table.cut_gradient), _crossings(costs, here, there)
        , strict=True):
            size = float(sizes[cut]) * line.rows
            slowest = 0.0
            for name, each in used:
                slowest = max(slowest, each * size)
                busy[name] = busy.get(name, 0.0) + each * size
            found.append(latency + slowest if size else 0.0)
    some = min(count, max(FOLLOWED, ROUNDS * depth))
    orders = _orders(schedule, depth, some)
    ends, pace = _follow(orders, some, forward, backward, ahead, back, gpipe=schedule == "gpipe")
    further = (count - some) * pace
    least = count * max(busy.values(), default=0.0)
    late = max(further, least - ends[0])
    return [(end + late - own, end + late) for end, own in zip(ends, backward, strict=True)]


@lru_cache(maxsize=1024)
def _orders(schedule: ScheduleName, depth: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Of every stage: m for the forward of micro-batch m, -1 - m for its backward."""
    return tuple(
        tuple(m if op is Op.FORWARD else ~m for op, m in actions(schedule, s, depth, count))
        for s in range(depth)
    )


def _follow(
    orders: tuple[tuple[int, ...], ...],
    count: int,
    forward: list[float],
    backward: list[float],
    ahead: list[float],
    back: list[float],
    *,
    gpipe: bool,
) -> tuple[list[float], float]:
    """When each stage ends its last backward, and the seconds of every further micro-batch.

    A transfer begins when its tensor is there, the one before it in its channel is over and its
    receiver has posted it: two computations ahead of the one that reads it.
    """
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
        pace = (ends_f[-1] - ends_f[middle] + ends_b[-1] - ends_b[middle]) / max(1, count - 1 - middle)
    else:
        first, end = min(depth, count - 1) , max(count - depth, 1)
        pace = (ends_b[end-1] - ends_b[end - 1- depth]) / depth if end - 1 - depth >= 0 else 0.0
    return clock, pace


def _crossings(costs: Costs, here: Team, there: Team) -> tuple[Crossing, Crossing]:
    """Of activations and of gradients between two stages, all replicas at once."""
    even = len(set(here.rows)) == len(set(there.rows)) == 1
    key = (here.units, there.units) if even else (here, there)
    found = costs.ways.get(key)
    if found is None:
        found = costs.ways[key] = _crossing(costs, here, there)
    return found


def _crossing(costs: Costs, here: Team, there: Team) -> tuple[Crossing, Crossing]:
    rows = sum(here.rows)
    latency = [0.0, 0.0]
    used: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for i, j, moved in moves(here, there):
        ends = here.units[i], there.units[j]
        for way, (source, target) in enumerate((ends, ends[::-1])):
            for t, name in enumerate(target):
                taken = path(costs.links, source[t % len(source)], name)
                if taken.resources:
                    latency[way] = max(latency[way], taken.latency + costs.system.boundary)
                for resource in taken.resources:
                    each = moved / rows / costs.links.capacities[resource]
                    used[way][resource] = used[way].get(resource, 0.0) + each
    return (latency[0], tuple(used[0].items())), (latency[1], tuple(used[1].items()))


def _reduced(costs: Costs, lines: Sequence[Line], spans: Sequence[list[Span]]) -> float:
    """When all gradients are summed."""
    end = max(span[0][1] for span in spans)
    if costs.cluster.direct:
        pass
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
        held = table.replicated[b] - table.replicated[a] + (table.split[b] - table.split[a]) / tensor
        if held <= 0:
            continue
        begin = complete = 0.0
        for line, s, (start, end) in holders:
            team, first, last = line.teams[s], line.bounds[s], line.bounds[s + 1]
            _, prefix = unit_prefix(costs, team.units[0], team.rows[0])
            whole = (prefix[last] - prefix[first]) or 1.0
            opened = start + (end - start) * (delay + (1 - delay) * (prefix[last] - prefix[b]) / whole)
            closed = start + (end - start) * (delay + (1 - delay) * (prefix[last] - prefix[a]) / whole)
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


def _rings(costs: Costs, units: tuple[Unit, ...]) -> Crossing:
    """The rings of all tensor ranks."""
    found = costs.sums.get(units)
    if found is None:
        latency, used = 0.0, {}
        for t in range(len(units[0])):
            traffic = ring(costs, tuple(unit[t] for unit in units))
            latency = max(latency, traffic.latency)
            for name, size in traffic.bytes_by_resource.items():
                each = size / PROBE_BYTES / costs.links.capacities[name]
                used[name] = used.get(name, 0.0) + each
        found = costs.sums[units] = latency, tuple(used.items())
    return found
