"""From the best regular grid to the best plan: everything on small inputs, moves on large ones."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.plan.spec import ScheduleName
from meshwright.search.contest import WORK, Contest, Played, Strategy, challenge
from meshwright.search.exact import LIMIT, prospects, space_size
from meshwright.search.explore import Progress, is_large
from meshwright.search.fleetwide import fleet_strategies
from meshwright.search.lines import line_of
from meshwright.search.mix import mixed_strategies
from meshwright.search.moves import neighbours

COMPOSED = 40
"""Strategies of whole pools that are bounded and, where that does not settle it, simulated."""

FLEETWIDE = 12
"""Strategies over whole fleets of nodes that are, in the same way."""

STARTS = 8
"""Strategies of different builds whose surroundings are searched."""


def improve(contest: Contest, schedules: Sequence[ScheduleName], tell: Progress) -> bool:
    """Look for better plans than the contest has seen; whether all of the space was covered."""
    if space_size(contest.costs) <= LIMIT:
        return _exhaust(contest, schedules, tell)
    _fleetwide(contest, schedules, tell)
    if not is_large(contest.costs):
        _compose(contest, tell)
        _climb(contest, schedules, tell)
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


def _compose(contest: Contest, tell: Progress) -> None:
    """Play the best strategies made of whole pools of devices."""
    found = mixed_strategies(contest.costs, COMPOSED)
    for done, mixed in enumerate(found):
        tell("composing", done, len(found))
        if contest.over or (contest.best and contest.work < WORK // 2):
            contest.dropped["beyond the budget"] += len(found) - done
            break
        challenge(contest, ("1f1b", mixed.lines))
    tell("composing", len(found), len(found))


def _climb(contest: Contest, schedules: Sequence[ScheduleName], tell: Progress) -> None:
    """Change the best strategy a little for as long as that helps and the budget lasts; then the
    runners-up that were nearest, for they may have another summit."""
    tried: set[Strategy] = set()
    while not contest.over:
        start = _highest(contest, tried)
        if start is None:
            break
        tried.add(start)
        for strategy in neighbours(contest.costs, start):
            tell("improving", WORK - contest.work, WORK)
            if contest.over:
                break
            if strategy[0] in schedules and challenge(contest, strategy):
                break
    tell("improving", WORK, WORK)


def _highest(contest: Contest, tried: set[Strategy]) -> Strategy | None:
    """The best strategy that has not been a start yet: the best of all, then the best of each
    build."""
    played = sorted(contest.others, key=lambda p: p.seconds)
    builds: dict[str, Played] = {}
    for each in played:
        builds.setdefault(each.plan.name, each)
    for each in [*played[:2], *list(builds.values())[:STARTS]]:
        lines = tuple(line_of(pipeline) for pipeline in each.plan.pipelines)
        strategy = (each.plan.schedule, lines)
        if strategy not in tried:
            return strategy
    return None


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
