"""Tries plans with fewer, larger pieces of work than the best one, where predictions are uncertain.

A search compares strategies by their predicted seconds and drops those that are a little slower. A
user who has measured nothing may be better off with one of these (see `chosen`): the few that
promise most are brought into their fastest orders, too.
"""

from __future__ import annotations

from operator import attrgetter, itemgetter

from meshwright.plan.spec import Plan
from meshwright.search.finishing import PlanOption, Proposals, Pruned
from meshwright.search.incumbent import Incumbent, Strategy, pieces, sturdy_seconds, work_of
from meshwright.search.options.other_schedules import (
    GLANCED,
    MOST_ACTIONS,
    SPREAD,
    OrderedPlan,
    has_order,
    in_listed_order,
    in_named_orders,
    proposal_of,
    rated_strategies,
    unordered_plan,
)
from meshwright.search.quick_clock import pipeline_works

TRIED = 4
"""Plans that are tried, each with another number of pieces of work."""


def propose(incumbent: Incumbent) -> Proposals:
    """Proposes plans that may be within the margin of the best one, with fewer pieces of work."""
    if not incumbent.margin or incumbent.best is None:
        return
    limit = incumbent.best.seconds * (1 + incumbent.margin)
    for plan in coarser(incumbent, limit * (1 + SPREAD)):
        if work_of(incumbent.costs, plan) > MOST_ACTIONS:
            yield Pruned("too large to try")
            continue
        ordered = _in_fastest_order(incumbent, plan)
        if ordered is None:
            yield Pruned("impossible for this plan")
        elif ordered.seconds - ordered.exposed > limit:
            yield Pruned("slower by the quick clock")
        else:
            yield proposal_of(ordered)


def coarser(incumbent: Incumbent, limit: float) -> list[Plan]:
    """Returns the plans that promise most in less than `limit` seconds where those with more pieces
    of work count as slower: one for each number of pieces below that of the best plan."""
    rated, plans = rated_strategies(incumbent)
    assert incumbent.best is not None
    most = pieces(incumbent.best.plan.pipelines)
    fastest: dict[int, tuple[float, Strategy]] = {}
    for strategy in sorted(rated, key=rated.__getitem__):
        number, seconds = pieces(strategy[1]), rated[strategy]
        if has_order(strategy) and number < most and seconds < limit:
            sturdy = sturdy_seconds(seconds, strategy[1], incumbent.margin)
            fastest.setdefault(number, (sturdy, strategy))
    ranked = sorted(fastest.values(), key=itemgetter(0))
    return [plans.get(each) or unordered_plan(incumbent, each) for _, each in ranked[:TRIED]]


def _in_fastest_order(incumbent: Incumbent, plan: Plan) -> OrderedPlan | None:
    """Returns a plan in the fastest of the schedules with a rule and of an order made for it; None
    if none of them fits."""
    works = pipeline_works(plan, incumbent.costs)
    named = in_named_orders(incumbent.costs, plan, works)
    known = named[0].orders if named else ()
    listed = in_listed_order(incumbent.costs, plan, works, GLANCED, known=known)
    every = [*named, *([listed] if listed else [])]
    return min(every, key=attrgetter("seconds"), default=None)


OPTION = PlanOption("coarser-plans", propose)
