"""From the best regular grid to the best plan: everything on small inputs, climbs on large ones.

A climb compares strategies by their preview; the simulator judges its summits and what lies next to
the best of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from meshwright.plan.spec import Plan, ScheduleName
from meshwright.search.climb import Scout, around, climb, rate
from meshwright.search.contest import WORK, Contest, Strategy, challenge
from meshwright.search.exact import LIMIT, prospects, space_size
from meshwright.search.explore import Progress, is_large
from meshwright.search.fleetwide import fleet_strategies
from meshwright.search.lines import line_of
from meshwright.search.mix import several_lines, single_lines

STEPS = (400_000, 20_000, 3_000_000)
"""Steps of a search (about a microsecond each) whatever it is for, more for each device, and at
most."""

FLEETWIDE = 12
"""Strategies over whole fleets of nodes that are played."""

SINGLE, SEVERAL, CLIMBS, NEAR = 0.2, 0.1, 0.5, 0.2
"""Shares of the steps: strategies of one line, of several, their climbs, and what lies near the
best in the end."""

HOPEFUL = 1.8
"""Times the best preview beyond which a strategy is not climbed from."""

SHARE, LAST = 4, 50
"""Parts of the remaining steps of which a climb gets one; part of all steps with which it ends."""

NEARBY = 1.6
"""Times the preview of a summit up to which its surroundings are climbed from."""

SURROUNDING = 16
"""Strategies around a summit that are climbed from."""

FAILED = 400
"""Steps that a composed line costs which does not fit."""

SAME_BUILD = 3
"""Strategies of one build that are climbed from."""

PLAYED = 6
"""Summits that the simulator judges."""

SLACK = 0.02
"""Relative excess of a preview over the best one's within which the simulator may see it
differently."""


def improve(contest: Contest, schedules: Sequence[ScheduleName], tell: Progress) -> bool:
    """Look for better plans than the contest has seen; whether all of the space was covered."""
    if space_size(contest.costs) <= LIMIT:
        return _exhaust(contest, schedules, tell)
    if is_large(contest.costs):
        _fleetwide(contest, schedules, tell)
        return False
    least, each, most = STEPS
    steps = min(most, least + each * len(contest.costs.devices))
    scout = Scout(contest, schedules)
    starts = _starts(scout, steps, tell)
    for summit in _summits(scout, starts, round(CLIMBS * steps), tell):
        challenge(contest, summit)
    scout.left = round(NEAR * steps)
    _polish(scout)
    return False


def _fleetwide(contest: Contest, schedules: Sequence[ScheduleName], tell: Progress) -> None:
    """Play the best strategies made of templates on whole fleets."""
    found = fleet_strategies(contest.costs, schedules, contest.dropped, lambda: contest.late)
    for done, strategy in enumerate(found):
        tell("composing", done, FLEETWIDE)
        spent = contest.late or contest.work < WORK // 2
        if done >= FLEETWIDE or (contest.best and spent):
            break
        challenge(contest, strategy)
    tell("composing", FLEETWIDE, FLEETWIDE)


def _starts(scout: Scout, steps: int, tell: Progress) -> list[Strategy]:
    """The best strategies of different builds, by preview: those played already and those made of
    whole pools."""
    tell("composing", 0, 2)
    costs, contest = scout.contest.costs, scout.contest
    known = [_played(each.plan) for each in contest.others]
    fleets = fleet_strategies(costs, scout.schedules, contest.dropped, lambda: contest.late)
    known += islice(fleets, FLEETWIDE)
    found = {strategy: rate(scout, strategy) for strategy in known}
    best = [min(found.values(), default=float("inf"))]
    sources = single_lines(costs, lambda: best[0]), several_lines(costs)
    for number, (source, share) in enumerate(zip(sources, (SINGLE, SEVERAL), strict=True)):
        scout.left = round(share * steps)
        for lines in source:
            if lines:
                strategy: Strategy = ("1f1b", lines)
                found[strategy] = rate(scout, strategy, HOPEFUL * best[0])
                best[0] = min(best[0], found[strategy])
            else:
                scout.left -= FAILED
            if scout.over:
                break
        tell("composing", number + 1, 2)
    hopeful = [s for s in sorted(found, key=found.__getitem__) if found[s] <= HOPEFUL * best[0]]
    return _by_turns(scout, hopeful)


def _by_turns(scout: Scout, ordered: Sequence[Strategy]) -> list[Strategy]:
    """The first of every build, then the second of each."""
    turns: dict[object, list[Strategy]] = {}
    for strategy in ordered:
        own = turns.setdefault(_build(scout, strategy), [])
        if len(own) < SAME_BUILD:
            own.append(strategy)
    return [own[i] for i in range(SAME_BUILD) for own in turns.values() if i < len(own)]


def _build(scout: Scout, strategy: Strategy) -> object:
    """Types of devices and tensor widths, in the order in which they stand."""
    devices = scout.contest.costs.devices
    return tuple(
        tuple(dict.fromkeys((devices[t.units[0][0]].type, len(t.units[0])) for t in line.teams))
        for line in strategy[1]
    )


def _played(plan: Plan) -> Strategy:
    return plan.schedule, tuple(line_of(pipeline) for pipeline in plan.pipelines)


def _summits(
    scout: Scout, starts: Sequence[Strategy], steps: int, tell: Progress
) -> list[Strategy]:
    """Where climbs end, best first: from the starts, then from the surroundings of the best summit
    for as long as the steps last. No climb takes more than a share of the steps that are left."""
    reached: dict[Strategy, float] = {}
    left = steps
    waiting = list(starts)
    surrounded: set[Strategy] = set()
    while left > steps // LAST and not scout.contest.late:
        tell("improving", steps - left, steps)
        scout.left = given = left // SHARE
        if waiting:
            summit = climb(scout, waiting.pop(0))
            reached[summit] = rate(scout, summit)
            if scout.left <= 0 and summit == _ordered(reached)[0]:
                waiting.insert(0, summit)
        else:
            best = next((s for s in _ordered(reached) if s not in surrounded), None)
            if best is None:
                break
            surrounded.add(best)
            waiting = around(scout, best, reached[best] * NEARBY)[:SURROUNDING]
        left -= max(given - scout.left, FAILED)
    tell("improving", steps, steps)
    return _ordered(reached)[:PLAYED]


def _ordered(reached: dict[Strategy, float]) -> list[Strategy]:
    return sorted(reached, key=reached.__getitem__)


def _polish(scout: Scout) -> None:
    """Play what lies next to the best plan for as long as that helps and the work lasts."""
    contest = scout.contest
    better = contest.best is not None
    while better and contest.best and not contest.over and not scout.over:
        best = _played(contest.best.plan)
        near = around(scout, best, rate(scout, best) * (1 + SLACK))
        better = any(challenge(contest, strategy) for strategy in near if not contest.over)


def _exhaust(contest: Contest, schedules: Sequence[ScheduleName], tell: Progress) -> bool:
    """Play every strategy of the space that is not bounded away, most promising first."""
    contest.work = 1 << 62  # the size of the space is the limit here
    found = prospects(
        contest.costs, schedules, contest.limit, contest.dropped, lambda: contest.late
    )
    if found is None:
        contest.dropped["beyond the budget"] += 1
        return False
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
