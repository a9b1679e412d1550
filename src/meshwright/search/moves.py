"""Small changes to a strategy: a layer, a row, a device, a share of the batch goes elsewhere.

Every move yields whole strategies that hold every layer and every row; whether they fit and whether
they are faster is for the contest to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

from meshwright.plan.spec import ScheduleName
from meshwright.search.contest import Strategy
from meshwright.search.costs import Costs, unit_kind
from meshwright.search.fitting import Stages, fit_line
from meshwright.search.lines import Line, Team, Unit
from meshwright.search.space import divisors, usable_devices

STEPS = (1, 2, 4)
"""Rows or layers moved at once."""


def neighbours(costs: Costs, strategy: Strategy) -> Iterator[Strategy]:
    """Strategies one change away, cheap changes first; lazily."""
    schedule, lines = strategy
    for change in _CHANGES:
        for index, line in enumerate(lines):
            for other in change(costs, line, schedule):
                yield schedule, (*lines[:index], other, *lines[index + 1 :])
    if any(len(line.teams) > 1 and line.micro_batches > 1 for line in lines):
        yield "gpipe" if schedule == "1f1b" else "1f1b", lines
    for changed in (*_shares(costs, lines, schedule), *_devices(costs, lines, schedule)):
        yield schedule, changed


def _layers(_costs: Costs, line: Line, _schedule: ScheduleName) -> Iterator[Line]:
    """A few layers across one cut."""
    for step in STEPS:
        for s in range(1, len(line.teams)):
            for by in (step, -step):
                bounds = (*line.bounds[:s], line.bounds[s] + by, *line.bounds[s + 1 :])
                if all(a < b for a, b in pairwise(bounds)):
                    yield replace(line, bounds=bounds)


def _rows(costs: Costs, line: Line, _schedule: ScheduleName) -> Iterator[Line]:
    """A few rows of every micro-batch from one kind of replica to another; equal replicas are not
    told apart."""
    for s, team in enumerate(line.teams):
        first: dict[object, int] = {}
        for u, unit in enumerate(team.units):
            first.setdefault((unit_kind(costs, unit), team.rows[u]), u)
        for step in STEPS:
            for giver in first.values():
                for taker in first.values():
                    if giver != taker and team.rows[giver] > step:
                        rows = list(team.rows)
                        rows[giver] -= step
                        rows[taker] += step
                        changed = Team(team.units, tuple(rows))
                        yield replace(line, teams=_with(line.teams, s, changed))


def _with(teams: tuple[Team, ...], s: int, team: Team) -> tuple[Team, ...]:
    return (*teams[:s], team, *teams[s + 1 :])


def _micro_batches(costs: Costs, line: Line, schedule: ScheduleName) -> Iterator[Line]:
    """The next larger and smaller micro-batches that share the line's rows out."""
    sizes = divisors(line.share)
    at = sizes.index(line.rows)
    for rows in (*sizes[max(0, at - 2) : at], *sizes[at + 1 : at + 3]):
        yield from _refitted(costs, stages_of(line), line.share, rows, schedule)


def stages_of(line: Line) -> Stages:
    """Its units alone."""
    return tuple(team.units for team in line.teams)


def _refitted(
    costs: Costs, stages: Stages, share: int, rows: int, schedule: ScheduleName
) -> Iterator[Line]:
    if share > 0 and stages and share % rows == 0:
        found = fit_line(costs, stages, rows, share // rows, schedule)
        if found is not None:
            yield found.line


_Change = Callable[[Costs, Line, ScheduleName], Iterator[Line]]
_CHANGES: tuple[_Change, ...] = (_layers, _rows, _micro_batches)


def _shares(
    costs: Costs, lines: tuple[Line, ...], schedule: ScheduleName
) -> Iterator[tuple[Line, ...]]:
    """Some of the batch from one line to another: a micro-batch of either, or a row or two."""
    for i, giver in enumerate(lines):
        for j, taker in enumerate(lines):
            if i == j:
                continue
            for rows in sorted({1, 2, giver.rows, taker.rows}):
                if giver.share <= rows:
                    continue
                for less in _resized(costs, giver, giver.share - rows, schedule):
                    for more in _resized(costs, taker, taker.share + rows, schedule):
                        changed = list(lines)
                        changed[i], changed[j] = less, more
                        yield tuple(changed)


def _resized(costs: Costs, line: Line, share: int, schedule: ScheduleName) -> Iterator[Line]:
    """The line with another share, in micro-batches of about the size it has."""
    widest = max(len(team.units) for team in line.teams)
    sizes = [rows for rows in divisors(share) if rows >= widest]
    for rows in sorted(sizes, key=lambda rows: (abs(rows - line.rows), rows))[:2]:
        yield from _refitted(costs, stages_of(line), share, rows, schedule)


def _devices(
    costs: Costs, lines: tuple[Line, ...], schedule: ScheduleName
) -> Iterator[tuple[Line, ...]]:
    """One unit to another stage, to a stage of its own, or out of use; an idle one into use."""
    every = [stages_of(line) for line in lines]
    places = [(i, s) for i, stages in enumerate(every) for s in range(len(stages))]
    for i, s in places:
        for unit in _distinct(costs, every[i][s]):
            taken = _without(every[i], s, unit)
            yield from _rebuilt(costs, lines, {i: taken}, schedule)
            for j, goal in places:
                if (i, s) != (j, goal):
                    yield from _moved(costs, lines, (i, s), (j, goal), unit, schedule)
    for unit in _idle(costs, lines):
        for i, s in places:
            if len(every[i][s][0]) == len(unit):
                yield from _rebuilt(costs, lines, {i: _joined(every[i], s, unit)}, schedule)
                for alone in (_inserted(every[i], s, unit), _inserted(every[i], s + 1, unit)):
                    yield from _rebuilt(costs, lines, {i: alone}, schedule)


def _moved(
    costs: Costs,
    lines: tuple[Line, ...],
    source: tuple[int, int],
    target: tuple[int, int],
    unit: Unit,
    schedule: ScheduleName,
) -> Iterator[tuple[Line, ...]]:
    """The unit in the target's stage, or in a new one before it."""
    (i, s), (j, goal) = source, target
    ends = stages_of(lines[i]), stages_of(lines[j])
    if len(unit) != len(ends[1][goal][0]):
        return
    for put in (_joined, _inserted):
        if i != j:
            changed = {i: _without(ends[0], s, unit), j: put(ends[1], goal, unit)}
        else:
            left = _without(ends[0], s, unit)
            at = goal - (len(left) < len(ends[0]) and goal > s)
            changed = {i: put(left, at, unit)}
        yield from _rebuilt(costs, lines, changed, schedule)


def _distinct(costs: Costs, units: tuple[Unit, ...]) -> list[Unit]:
    """One unit of every kind in every node."""
    found: dict[object, Unit] = {}
    for unit in units:
        found.setdefault((unit_kind(costs, unit), costs.devices[unit[0]].node), unit)
    return list(found.values())


def _without(stages: Stages, s: int, unit: Unit) -> Stages:
    left = tuple(u for u in stages[s] if u != unit)
    return (*stages[:s], *((left,) if left else ()), *stages[s + 1 :])


def _joined(stages: Stages, s: int, unit: Unit) -> Stages:
    return (*stages[:s], (*stages[s], unit), *stages[s + 1 :])


def _inserted(stages: Stages, s: int, unit: Unit) -> Stages:
    return (*stages[:s], (unit,), *stages[s:])


def _idle(costs: Costs, lines: tuple[Line, ...]) -> list[Unit]:
    """Unused devices of every class, as units of the width of the first stage."""
    used = {name for line in lines for team in line.teams for unit in team.units for name in unit}
    tensor = len(lines[0].teams[0].units[0])
    free: dict[tuple[str, str], list[str]] = {}
    for device in usable_devices(costs.cluster, costs.job):
        if device.name not in used:
            free.setdefault((device.node, device.type), []).append(device.name)
    return [tuple(names[:tensor]) for names in free.values() if len(names) >= tensor]


def _rebuilt(
    costs: Costs, lines: tuple[Line, ...], changed: dict[int, Stages], schedule: ScheduleName
) -> Iterator[tuple[Line, ...]]:
    """Lines with other stages, each with its share; a line that has lost all of them leaves its
    share to another."""
    found: list[Line] = []
    orphaned = 0
    for i, line in enumerate(lines):
        stages = changed.get(i, stages_of(line))
        if not stages:
            orphaned += line.share
        elif stages == stages_of(line):
            found.append(line)
        else:
            fitted = _like(costs, stages, line, line.share, schedule)
            if fitted is None:
                return
            found.append(fitted)
    if orphaned and found:
        heir = found[0]
        fitted = _like(costs, stages_of(heir), heir, heir.share + orphaned, schedule)
        if fitted is None:
            return
        found[0] = fitted
    if found:
        yield tuple(found)


def _like(
    costs: Costs, stages: Stages, line: Line, share: int, schedule: ScheduleName
) -> Line | None:
    """The stages with micro-batches as near as can be to those of a line."""
    widest = max(len(units) for units in stages)
    sizes = [rows for rows in divisors(share) if rows >= widest]
    for rows in sorted(sizes, key=lambda rows: (abs(rows - line.rows), rows)):
        found = fit_line(costs, stages, rows, share // rows, schedule)
        if found is not None:
            return found.line
    return None
