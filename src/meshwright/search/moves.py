"""Small changes to a strategy: a layer, a row, a share of the batch or a stage goes elsewhere.

Every move yields whole strategies that hold every layer and every row; whether they fit and whether
they are faster is for the search to say. Moves of single devices are in regroup.py.
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
from meshwright.search.space import divisors

STEPS = (1, 2, 4)
"""Rows or layers moved at once."""

Move = Callable[[Costs, Strategy, float], Iterator[Strategy]]
"""Strategies that a move makes of one; those that surely take the given seconds may be missing."""


def stages_of(line: Line) -> Stages:
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


def _cut(strategy: Strategy, i: int, line: Line, cuts: range, by: int) -> Iterator[Strategy]:
    """With these cuts moved by some layers."""
    bounds = tuple(cut + by if s in cuts else cut for s, cut in enumerate(line.bounds))
    if all(a < b for a, b in pairwise(bounds)):
        yield _with(strategy, i, replace(line, bounds=bounds))


def _with(strategy: Strategy, i: int, line: Line) -> Strategy:
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


def _shifted(costs: Costs, team: Team) -> Iterator[Team]:
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
                    yield Team(team.units, tuple(moved))


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
    for i, giver in enumerate(lines):
        for j, taker in enumerate(lines):
            if i == j:
                continue
            for moved in sorted({1, 2, giver.rows, taker.rows}):
                if giver.share <= moved:
                    continue
                for less in _resized(costs, giver, giver.share - moved, schedule, limit):
                    for more in _resized(costs, taker, taker.share + moved, schedule, limit):
                        changed = list(lines)
                        changed[i], changed[j] = less, more
                        yield schedule, tuple(changed)


def _resized(
    costs: Costs, line: Line, share: int, schedule: ScheduleName, limit: float
) -> Iterator[Line]:
    """The line with another share, in micro-batches of about the size it has."""
    widest = max(len(team.units) for team in line.teams)
    sizes = [size for size in divisors(share) if size >= widest]
    for size in sorted(sizes, key=lambda size: (abs(size - line.rows), size))[:2]:
        found = fit_line(costs, stages_of(line), size, share // size, schedule, limit)
        if found is not None:
            yield found.line


def alike(
    costs: Costs, stages: Stages, rows: int, share: int, schedule: ScheduleName, limit: float
) -> Line | None:
    """The stages with a share of the batch, in micro-batches as near as can be to so many rows."""
    if not stages or len(stages) > len(costs.model.layers):
        return None
    widest = max(len(units) for units in stages)
    sizes = [size for size in divisors(share) if size >= widest]
    for size in sorted(sizes, key=lambda size: (abs(size - rows), size))[:2]:
        found = fit_line(costs, stages, size, share // size, schedule, limit)
        if found is not None:
            return found.line
    return None
