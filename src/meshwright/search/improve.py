"""From the best regular grid to the best plan: everything on small inputs, climbs on large ones.

A climb compares strategies by their preview; the simulator judges its summits and what lies next to
the best of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from meshwright.plan.spec import ScheduleName
from meshwright.search import moves, regroup
from meshwright.search.contest import Contest, Strategy, challenge
from meshwright.search.exact import LIMIT, prospects, space_size
from meshwright.search.explore import Progress
from meshwright.search.lines import Line, fits, line_of, tensor_widths_agree
from meshwright.search.mix import several_lines, single_lines
from meshwright.search.preview import preview_seconds

MOVES: tuple[moves.Move, ...] = (
    moves.micro_batches,
    moves.schedules,
    moves.order,
    regroup.recast,
    regroup.stages,
    regroup.devices,
    moves.shares,
    moves.layers,
    moves.rows,
)

COMPOSED = 500
CLIMBED = 900
STARTS = 8
POLISHED = 12

Rated = tuple[float, int, Strategy]


@dataclass(slots=True)
class Scout:
    """Strategies previewed so far."""

    contest: Contest
    schedules: Sequence[ScheduleName]
    known: dict[Strategy, float] = field(default_factory=dict)
    left: int = 0

    def rate(self, strategy: Strategy) -> float:
        """Seconds by preview; infinite where it does not fit."""
        seconds = self.known.get(strategy)
        if seconds is None:
            self.left -= 1
            seconds = self.known[strategy] = self._rated(strategy)
        return seconds

    def _rated(self, strategy: Strategy) -> float:
        schedule, lines = strategy
        costs, dropped = self.contest.costs, self.contest.dropped
        if schedule not in self.schedules:
            return float("inf")
        if not tensor_widths_agree(costs, lines):
            dropped["holders of a layer differ in tensor width"] += 1
            return float("inf")
        if not all(fits(costs, line, schedule) for line in lines):
            dropped["does not fit in memory"] += 1
            return float("inf")
        dropped["slower in preview"] += 1
        return preview_seconds(costs, lines, schedule)


def improve(contest: Contest, schedules: Sequence[ScheduleName], tell: Progress) -> bool:
    """Look for better plans than the contest has seen; whether all of the space was covered."""
    if space_size(contest.costs) <= LIMIT:
        return _exhaust(contest, schedules, tell)
    scout = Scout(contest, schedules)
    starts = _compose(scout, tell)
    summits = _climb(scout, starts, tell)
    for summit in summits:
        challenge(contest, summit)
    _polish(scout, tell)
    return False


def _compose(scout: Scout, tell: Progress) -> list[Strategy]:
    found: list[Rated] = []
    for played in scout.contest.others:
        lines = tuple(line_of(pipeline) for pipeline in played.plan.pipelines)
        strategy = (played.plan.schedule, lines)
        found.append((scout.rate(strategy), len(found), strategy))
    best = min((r[0] for r in found), default=float("inf"))

    def limit() -> float:
        return best

    for source, allowance in ((single_lines(scout.contest.costs, limit), COMPOSED), (several_lines(scout.contest.costs), COMPOSED)):
        scout.left = allowance
        for lines in source:
            if scout.left <= 0:
                break
            if not lines:
                scout.left -= 1
                continue
            strategy = ("1f1b", lines)
            seconds = scout.rate(strategy)
            best = min(best, seconds)
            found.append((seconds, len(found), strategy))
    found.sort(key=lambda r: r[:2])
    builds = {}
    for seconds, _, strategy in found:
        build = tuple(
            tuple(dict.fromkeys((scout.contest.costs.devices[t.units[0][0]].type, len(t.units[0])) for t in line.teams)) for line in strategy[1]
        )
        builds.setdefault(build, []).append((seconds, strategy))
    turns = sorted((i, s, n, st) for n, own in enumerate(builds.values()) for i, (s, st) in enumerate(own[:3]))
    return [st for _, s, _, st in turns if s < best * 1.3][:STARTS]


def _climb(scout: Scout, starts: list[Strategy], tell: Progress) -> list[Strategy]:
    found = []
    for number, start in enumerate(starts):
        scout.left = CLIMBED
        summit = climb(scout, start)
        found.append((scout.rate(summit), number, summit))
    found.sort(key=lambda r: r[:2])
    return [s for _, _, s in found][:4]


def climb(scout: Scout, start: Strategy) -> Strategy:
    """Change a strategy a little for as long as that helps; kinds of changes take turns."""
    costs, best, seconds = scout.contest.costs, start, scout.rate(start)
    idle, turn = 0, 0
    while idle < len(MOVES) and scout.left > 0:
        better = None
        for strategy in MOVES[turn](costs, best):
            if scout.rate(strategy) < seconds * (1 - 1e-6):
                better = strategy
                break
            if scout.left <= 0:
                break
        if better is None:
            idle, turn = idle + 1, (turn + 1) % len(MOVES)
        else:
            idle, best, seconds = 0, better, scout.rate(better)
    return best


def _polish(scout: Scout, tell: Progress) -> None:
    contest = scout.contest
    plays = POLISHED
    while plays > 0 and contest.best:
        lines = tuple(line_of(pipeline) for pipeline in contest.best.plan.pipelines)
        best = (contest.best.plan.schedule, lines)
        own = scout.rate(best)
        near = []
        scout.left = CLIMBED
        for move in MOVES:
            for strategy in move(contest.costs, best):
                if strategy not in contest.seen:
                    near.append((scout.rate(strategy), len(near), strategy))
                if scout.left <= 0:
                    break
        better = False
        for seconds, _, strategy in sorted(near, key=lambda r: r[:2]):
            if seconds > own * 1.02 or plays <= 0:
                break
            if strategy in contest.seen:
                continue
            plays -= 1
            if challenge(contest, strategy):
                better = True
                break
        if not better:
            break


def _exhaust(contest: Contest, schedules: Sequence[ScheduleName], tell: Progress) -> bool:
    """Play every strategy of the space that is not bounded away, most promising first."""
    contest.work = 1 << 62  # the size of the space is the limit here
    found = prospects(contest.costs, schedules, contest.limit, contest.dropped)
    for done, prospect in enumerate(found):
        tell("simulating", done, len(found))
        if prospect.seconds >= contest.limit:
            contest.dropped["lower bound above the best"] += len(found) - done
            break
        if contest.over:
            return False
        challenge(contest, (prospect.schedule, prospect.lines))
    tell("simulating", len(found), len(found))
    return True
