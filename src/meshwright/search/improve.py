"""From the best regular grid to the best plan: everything on small inputs, moves on large ones."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.plan.spec import ScheduleName
from meshwright.search.contest import Contest, challenge
from meshwright.search.exact import LIMIT, prospects, space_size
from meshwright.search.explore import Progress


def improve(contest: Contest, schedules: Sequence[ScheduleName], tell: Progress) -> bool:
    """Look for better plans than the contest has seen; whether all of the space was covered."""
    if space_size(contest.costs) <= LIMIT:
        return _exhaust(contest, schedules, tell)
    return False


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
