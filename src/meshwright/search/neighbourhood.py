"""Changes strategies a little: layers, rows, shares of the batch, stages and devices move.

Every move yields whole strategies that hold every layer and every row; whether they fit and whether
they are faster is for the search to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

from meshwright.plan.spec import ScheduleName
from meshwright.search.candidate import CandidatePipeline, StageDevices, Unit
from meshwright.search.costs import Costs, unit_kind
from meshwright.search.incumbent import Strategy
from meshwright.search.layer_partition import Stages, fit_line
from meshwright.search.space import divisors, legal_widths, usable_devices

STEPS = (1, 2, 4)
"""Rows or layers moved at once."""

Move = Callable[[Costs, Strategy, float], Iterator[Strategy]]
"""Strategies that a move makes of one; those that surely take the given seconds may be missing."""


def stages_of(line: CandidatePipeline) -> Stages:
    """Its units alone."""
    return tuple(team.units for team in line.teams)


def schedules(_costs: Costs, strategy: Strategy, _limit: float) -> Iterator[Strategy]:
    """The other schedule, where it makes a difference."""
    schedule, lines = strategy
    if any(len(line.teams) > 1 and line.micro_batches > 1 for line in lines):
        yield "gpipe" if schedule == "1f1b" else "1f1b", lines


def layers(_costs: Costs, strategy: Strategy, _limit: float) -> Iterator[Strategy]:
    """A layer or a few across one cut; or one from each of a run of stages to the next."""
    for i, line in enumerate(strategy[1]):
        inner = range(1, len(line.teams))
        for step in STEPS:
            for s in inner:
                for by in (step, -step):
                    yield from _cut(strategy, i, line, range(s, s + 1), by)
        for first in inner:
            for last in range(first + 2, len(line.teams) + 1):
                for by in (1, -1):
                    yield from _cut(strategy, i, line, range(first, last), by)


def _cut(
    strategy: Strategy, i: int, line: CandidatePipeline, cuts: range, by: int
) -> Iterator[Strategy]:
    """Returns the stages with these cuts moved by some layers."""
    bounds = tuple(cut + by if s in cuts else cut for s, cut in enumerate(line.bounds))
    if all(a < b for a, b in pairwise(bounds)):
        yield _with(strategy, i, replace(line, bounds=bounds))


def _with(strategy: Strategy, i: int, line: CandidatePipeline) -> Strategy:
    schedule, lines = strategy
    return schedule, (*lines[:i], line, *lines[i + 1 :])


def rows(costs: Costs, strategy: Strategy, _limit: float) -> Iterator[Strategy]:
    """A few rows of every micro-batch from one kind of replica to another; equal replicas are not
    told apart."""
    for i, line in enumerate(strategy[1]):
        for s, team in enumerate(line.teams):
            for changed in _shifted(costs, team):
                teams = (*line.teams[:s], changed, *line.teams[s + 1 :])
                yield _with(strategy, i, replace(line, teams=teams))


def _shifted(costs: Costs, team: StageDevices) -> Iterator[StageDevices]:
    first: dict[object, int] = {}
    for u, unit in enumerate(team.units):
        first.setdefault((unit_kind(costs, unit), team.rows[u]), u)
    for step in STEPS:
        for giver in first.values():
            for taker in first.values():
                if giver != taker and team.rows[giver] > step:
                    moved = list(team.rows)
                    moved[giver] -= step
                    moved[taker] += step
                    yield StageDevices(team.units, tuple(moved))


def micro_batches(costs: Costs, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    """The next larger and smaller micro-batches that share a line's rows out."""
    schedule, lines = strategy
    for i, line in enumerate(lines):
        sizes = divisors(line.share)
        at = sizes.index(line.rows)
        for size in (*sizes[max(0, at - 2) : at], *sizes[at + 1 : at + 3]):
            found = fit_line(costs, stages_of(line), size, line.share // size, schedule, limit)
            if found is not None:
                yield _with(strategy, i, found.line)


def order(costs: Costs, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    """Two stages change places; a run of like stages goes elsewhere; the line is turned round."""
    schedule, lines = strategy
    for i, line in enumerate(lines):
        stages = stages_of(line)
        for other in _orders(costs, stages):
            if other != stages:
                found = fit_line(costs, other, line.rows, line.micro_batches, schedule, limit)
                if found is not None:
                    yield _with(strategy, i, found.line)


def _orders(costs: Costs, stages: Stages) -> Iterator[Stages]:
    runs = runs_of(costs, stages)
    for i, run in enumerate(runs):
        rest = [*runs[:i], *runs[i + 1 :]]
        for place in range(len(runs)):
            yield tuple(stage for part in (*rest[:place], run, *rest[place:]) for stage in part)
    yield stages[::-1]
    for s in range(1, len(stages)):
        yield (*stages[: s - 1], stages[s], stages[s - 1], *stages[s + 1 :])
    for i, run in enumerate(runs):
        yield tuple(s for part in (*runs[:i], run[::-1], *runs[i + 1 :]) for s in part)


def runs_of(costs: Costs, stages: Stages) -> list[Stages]:
    """Neighbouring stages of the same types of devices."""
    runs: list[list[tuple[Unit, ...]]] = []
    before: object = None
    for stage in stages:
        kind = frozenset(costs.devices[name].type for unit in stage for name in unit)
        if kind != before:
            runs.append([])
        runs[-1].append(stage)
        before = kind
    return [tuple(run) for run in runs]


def shares(costs: Costs, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    """Some of the batch from one line to another: a micro-batch of either, or a row or two."""
    schedule, lines = strategy

    def resized(line: CandidatePipeline, share: int) -> Iterator[CandidatePipeline]:
        return with_share(costs, stages_of(line), line.rows, share, schedule, limit)

    for i, giver in enumerate(lines):
        for j, taker in enumerate(lines):
            if i == j:
                continue
            for moved in sorted({1, 2, giver.rows, taker.rows}):
                if giver.share <= moved:
                    continue
                for less in resized(giver, giver.share - moved):
                    for more in resized(taker, taker.share + moved):
                        changed = list(lines)
                        changed[i], changed[j] = less, more
                        yield schedule, tuple(changed)


def with_share(
    costs: Costs, stages: Stages, rows: int, share: int, schedule: ScheduleName, limit: float
) -> Iterator[CandidatePipeline]:
    """Yield the stages with a share of the batch, in the two sizes of micro-batches that are
    nearest to a number of rows."""
    widest = max((len(units) for units in stages), default=share + 1)
    sizes = [size for size in divisors(share) if size >= widest]
    for size in sorted(sizes, key=lambda size: (abs(size - rows), size))[:2]:
        found = fit_line(costs, stages, size, share // size, schedule, limit)
        if found is not None:
            yield found.line


def recast(costs: Costs, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    """A run of like stages, or all of a line, with another depth, width or tensor width."""
    widths = legal_widths(costs)
    for i, line in enumerate(strategy[1]):
        runs = runs_of(costs, stages_of(line))
        for r, run in enumerate(runs):
            for other in _recasts(costs, run, widths):
                stages = tuple(s for part in (*runs[:r], other, *runs[r + 1 :]) for s in part)
                yield from rebuilt(costs, strategy, limit, {i: stages})
        if len(runs) > 1:
            ways = [list(_recasts(costs, run, widths)) for run in runs]
            for together in zip(*ways, strict=False):
                yield from rebuilt(
                    costs, strategy, limit, {i: tuple(s for part in together for s in part)}
                )


def _recasts(costs: Costs, run: Stages, widths: tuple[int, ...]) -> Iterator[Stages]:
    """Yields for every run, in the same order, tensor widths by depths around its own."""
    depth, tensor = len(run), len(run[0][0])
    names = [name for stage in run for unit in stage for name in unit]
    place = {name: i for i, name in enumerate(costs.devices)}
    at = widths.index(tensor) if tensor in widths else 0
    for other in dict.fromkeys((tensor, *widths[max(0, at - 1) : at + 2])):
        by_node: dict[tuple[str, str], list[str]] = {}
        for name in sorted(names, key=place.__getitem__):
            device = costs.devices[name]
            by_node.setdefault((device.node, device.type), []).append(name)
        units = [
            tuple(own[i : i + other])
            for own in by_node.values()
            for i in range(0, len(own) - other + 1, other)
        ]
        around = {depth * tensor // other, depth, depth - 1, depth + 1, depth * 2, depth // 2}
        for number in sorted(d for d in around if 0 < d <= len(units)):
            width = len(units) // number
            yield tuple(tuple(units[s * width : (s + 1) * width]) for s in range(number))
            if width > 1 and number > 1:
                yield tuple(tuple(units[s : number * width : number]) for s in range(number))


def stages(costs: Costs, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    """Two neighbouring stages become one, one becomes two; units of two stages are exchanged."""
    for i, line in enumerate(strategy[1]):
        own = stages_of(line)
        for s, units in enumerate(own):
            if s and len(own[s - 1][0]) == len(units[0]):
                merged = (*own[: s - 1], (*own[s - 1], *units), *own[s + 1 :])
                yield from rebuilt(costs, strategy, limit, {i: merged})
            half = len(units) // 2
            for cut in sorted({half, len(units) - half} - {0, len(units)}):
                split = (*own[:s], units[:cut], units[cut:], *own[s + 1 :])
                yield from rebuilt(costs, strategy, limit, {i: split})
        for s, here in enumerate(own):
            for t in range(s + 1, len(own)):
                for one in _distinct(costs, here):
                    for other in _distinct(costs, own[t]):
                        alike = unit_kind(costs, one) == unit_kind(costs, other)
                        if not alike and len(one) == len(other):
                            swap = {one: other, other: one}
                            changed = tuple(tuple(swap.get(u, u) for u in st) for st in own)
                            yield from rebuilt(costs, strategy, limit, {i: changed})


def devices(costs: Costs, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    """One unit to another stage, to a stage of its own, or out of use; an idle one into use."""
    every = [stages_of(line) for line in strategy[1]]
    places = [(i, s) for i, own in enumerate(every) for s in range(len(own))]
    for unit in _idle(costs, strategy[1]):
        for i, s in places:
            if len(every[i][s][0]) == len(unit):
                yield from rebuilt(costs, strategy, limit, {i: _joined(every[i], s, unit)})
                for alone in (_inserted(every[i], s, unit), _inserted(every[i], s + 1, unit)):
                    yield from rebuilt(costs, strategy, limit, {i: alone})
    for i, s in places:
        for unit in _distinct(costs, every[i][s]):
            yield from rebuilt(costs, strategy, limit, {i: _without(every[i], s, unit)})
            for j, goal in places:
                if (i, s) != (j, goal):
                    yield from _moved(costs, strategy, every, (i, s), (j, goal), unit, limit)


def exchanged(costs: Costs, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    """A unit out of use, an idle one of another kind in its place."""
    every = [stages_of(line) for line in strategy[1]]
    for idle in _idle(costs, strategy[1]):
        for i, own in enumerate(every):
            for s, units in enumerate(own):
                for unit in _distinct(costs, units):
                    alike = unit_kind(costs, unit) == unit_kind(costs, idle)
                    if len(unit) == len(idle) and not alike:
                        left = tuple(idle if u == unit else u for u in units)
                        changed = {i: (*own[:s], left, *own[s + 1 :])}
                        yield from rebuilt(costs, strategy, limit, changed)


def _moved(
    costs: Costs,
    strategy: Strategy,
    every: list[Stages],
    source: tuple[int, int],
    target: tuple[int, int],
    unit: Unit,
    limit: float,
) -> Iterator[Strategy]:
    """The unit in the target's stage, or in a new one before it."""
    (i, s), (j, goal) = source, target
    if len(unit) != len(every[j][goal][0]):
        return
    for put in (_joined, _inserted):
        if i != j:
            changed = {i: _without(every[i], s, unit), j: put(every[j], goal, unit)}
        else:
            left = _without(every[i], s, unit)
            at = goal - (len(left) < len(every[i]) and goal > s)
            changed = {i: put(left, at, unit)}
        yield from rebuilt(costs, strategy, limit, changed)


def _distinct(costs: Costs, units: tuple[Unit, ...]) -> list[Unit]:
    """One unit of every kind in every node."""
    found: dict[object, Unit] = {}
    for unit in units:
        found.setdefault((unit_kind(costs, unit), costs.devices[unit[0]].node), unit)
    return list(found.values())


def _without(own: Stages, s: int, unit: Unit) -> Stages:
    left = tuple(u for u in own[s] if u != unit)
    return (*own[:s], *((left,) if left else ()), *own[s + 1 :])


def _joined(own: Stages, s: int, unit: Unit) -> Stages:
    return (*own[:s], (*own[s], unit), *own[s + 1 :])


def _inserted(own: Stages, s: int, unit: Unit) -> Stages:
    return (*own[:s], (unit,), *own[s:])


def _idle(costs: Costs, lines: tuple[CandidatePipeline, ...]) -> list[Unit]:
    """Unused devices of every class, as units of every width in use."""
    used = {name for line in lines for team in line.teams for unit in team.units for name in unit}
    tensors = sorted({len(team.units[0]) for line in lines for team in line.teams})
    free: dict[tuple[str, str], list[str]] = {}
    for device in usable_devices(costs.cluster, costs.job):
        if device.name not in used:
            free.setdefault((device.node, device.type), []).append(device.name)
    return [
        tuple(names[:tensor])
        for names in free.values()
        for tensor in tensors
        if len(names) >= tensor
    ]


def rebuilt(
    costs: Costs, strategy: Strategy, limit: float, changed: dict[int, Stages]
) -> Iterator[Strategy]:
    """The strategy with other stages for some of its lines; a line that has none left leaves its
    share to the first of the others."""
    schedule, lines = strategy
    left = [i for i in range(len(lines)) if changed.get(i, True)]
    orphaned = sum(line.share for i, line in enumerate(lines) if i not in left)
    found = []
    for i in left:
        line, own = lines[i], stages_of(lines[i])
        share = line.share + (orphaned if i == left[0] else 0)
        if share == line.share and changed.get(i, own) == own:
            found.append(line)
            continue
        fitted = next(
            with_share(costs, changed.get(i, own), line.rows, share, schedule, limit), None
        )
        if fitted is None:
            return
        found.append(fitted)
    if found:
        yield schedule, tuple(found)
