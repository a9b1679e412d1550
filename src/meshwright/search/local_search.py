"""Improves on the first plan: exhaustively on small inputs, by hill climbs on large ones.

A hill climb compares strategies in closed form, in the best order of work that memory allows. The
simulator judges the local optima and the neighbours of the best of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from random import Random

from meshwright.plan.spec import Plan, ScheduleName
from meshwright.search.candidate import candidate_of, micro_batch_sizes, plan_of
from meshwright.search.candidate_estimate import candidate_seconds
from meshwright.search.chain_partition import Chains, chains
from meshwright.search.costs import Costs
from meshwright.search.exact import LIMIT, in_best_order, prospects, space_size
from meshwright.search.hill_climb import LocalSearch, around, climb, rate
from meshwright.search.incumbent import (
    WORK,
    Incumbent,
    Progress,
    Strategy,
    try_candidate,
    work_of,
)
from meshwright.search.pipeline_seconds import Order
from meshwright.search.space import is_large
from meshwright.search.template_search import template_strategies

STEPS = (640_000, 20_000, 3_000_000)
"""Steps of a search (about a microsecond each): at least, for each device, and at most."""

TEMPLATE_STRATEGIES, TEMPLATES_PLAYED = 16, 2
"""Strategies over whole classes of nodes that are written down, and that are simulated where there
are too many devices to climb from them."""

ALIKE, WRITTEN = 4, 64
"""Strategies over whole classes that are alike in their micro-batches and tensor widths, and those
that are written down to find others."""

REGULAR, CHAINS, CLIMBS, NEAR = 0.1, 0.1, 0.6, 0.05
"""Shares of the steps: regular pipelines, strategies cut from devices in a row, the climbs from all
of them, and what lies near the best in the end."""

MOST_WORK = 12_000
"""Micro-batches of simulated ranks of a strategy on a large cluster beyond which others are
simulated instead: plans whose replicas are unlike have many ranks that differ."""

HOPEFUL = 1.8
"""Climbs start from strategies that take at most this many times the seconds of the best one, in
closed form."""

ROUND_SHARE, LAST = 0.4, 50
"""Share of the remaining steps that a race of climbs gets; races end at 1/50 of all steps."""

STAY = 2
"""Each round of successive halving keeps one climb out of this many."""

DRAWN = 8
"""Starts of a race, at least."""

NEARBY = 1.6
"""Largest ratio of a neighbour's seconds to those of its local optimum at which it is a start."""

SURROUNDING = 16
"""Neighbours of a local optimum that are climbed from, at most."""

FAILED = 400
"""Steps that a race costs at least, so that races end."""

SAME_BUILD = 1
"""Strategies of one build that are climbed from."""

PLAYED = 6
"""Local optima that the simulator judges."""

PROMISING = 400
"""Strategies, the fastest in the best order of work, from which finalists are chosen."""

SLACK = 0.02
"""Relative excess over the best strategy, in closed form, within which the simulator may see it
differently."""


def regular_steps(costs: Costs) -> int:
    """Returns the steps in which regular pipelines are compared."""
    return round(REGULAR * _steps(costs))


def _steps(costs: Costs) -> int:
    least, each, most = STEPS
    return min(most, least + each * len(costs.devices))


def improve(search: LocalSearch, tell: Progress) -> bool:
    """Looks for better plans than the incumbent; returns True if all of the space was covered."""
    incumbent = search.incumbent
    if space_size(incumbent.costs) <= LIMIT:
        return _exhaust(incumbent, search.schedules, tell)
    if is_large(incumbent.costs):
        _try_templates(search, tell)
        return False
    steps = _steps(incumbent.costs)
    drawn = chains(incumbent.costs, Random(0))
    starts = _starts(search, drawn, steps, tell)
    optima = _local_optima(search, starts, drawn, round(CLIMBS * steps), tell)
    for optimum in optima:
        try_candidate(incumbent, optimum)
    _promise(search)
    search.left = round(NEAR * steps)
    _polish(search)
    return False


def _try_templates(search: LocalSearch, tell: Progress) -> None:
    """Plays the best strategies made of templates on whole device classes."""
    tell("composing", 0, TEMPLATE_STRATEGIES)
    incumbent = search.incumbent
    found = islice(_varied(_templates(search)), TEMPLATE_STRATEGIES)
    ordered = sorted(
        (rate(search, strategy), number, strategy) for number, strategy in enumerate(found)
    )
    _promise(search)
    quick = _quick_to_simulate(incumbent, [strategy for _, _, strategy in ordered])
    for done, strategy in enumerate(quick):
        tell("composing", done, TEMPLATES_PLAYED)
        if incumbent.best and (incumbent.out_of_time or incumbent.work < WORK // 2):
            break
        try_candidate(incumbent, strategy)
    tell("composing", 1, 1)


def _quick_to_simulate(incumbent: Incumbent, ordered: Sequence[Strategy]) -> list[Strategy]:
    """Returns the first few strategies that are not much work to simulate; if all are, the one that
    is the least."""
    quick: list[Strategy] = []
    works = []
    for number, (schedule, pipelines) in enumerate(ordered):
        plan = plan_of(incumbent.costs, pipelines, schedule)
        works.append((work_of(incumbent.costs, plan), number))
        if works[-1][0] <= MOST_WORK:
            quick.append(ordered[number])
        if len(quick) == TEMPLATES_PLAYED:
            break
    return quick or [ordered[number] for _, number in sorted(works)[:1]]


def _promise(search: LocalSearch) -> None:
    """Tells the incumbent which strategies are fast in the best order of work."""
    if search.incumbent.any_order:
        final = {s: seconds for s, (seconds, sure) in search.known.items() if sure}
        search.incumbent.promising |= {s: final[s] for s in _ordered(final)[:PROMISING]}


def _order_of(incumbent: Incumbent, schedules: Sequence[ScheduleName]) -> Order:
    """Returns the order of work in which strategies are compared."""
    if incumbent.any_order:
        return "best"
    return "1f1b" if "1f1b" in schedules else "gpipe"


def _templates(search: LocalSearch) -> Iterator[Strategy]:
    incumbent = search.incumbent
    return template_strategies(
        incumbent.costs,
        _order_of(incumbent, search.schedules),
        incumbent.pruned,
        lambda: incumbent.out_of_time,
    )


def _next(search: LocalSearch, drawn: Chains) -> list[Strategy]:
    """Returns more strategies from rows of devices; what they cost in steps is counted."""
    spent, strategies = next(drawn)
    search.left -= spent
    return [strategy for strategy in strategies if strategy[0] in search.schedules]


def _starts(search: LocalSearch, drawn: Chains, steps: int, tell: Progress) -> list[Strategy]:
    """Returns the best strategies of different builds, in closed form: those played already, those
    made of templates, and those cut from rows of devices."""
    tell("composing", 0, 2)
    incumbent = search.incumbent
    known = [_strategy_of(each.plan) for each in incumbent.others]
    known += islice(_varied(_templates(search)), TEMPLATE_STRATEGIES)
    found = {strategy: rate(search, strategy) for strategy in known}
    best = min(found.values(), default=float("inf"))
    tell("composing", 1, 2)
    search.left = round(CHAINS * steps)
    while not search.out_of_budget:
        for strategy in _next(search, drawn):
            found[strategy] = rate(search, strategy, HOPEFUL * best)
            best = min(best, found[strategy])
    tell("composing", 2, 2)
    hopeful = [s for s in sorted(found, key=found.__getitem__) if found[s] <= HOPEFUL * best]
    return _by_turns(hopeful)


def _varied(strategies: Iterable[Strategy]) -> Iterator[Strategy]:
    """Yields few strategies with micro-batches of the same size and the same tensor widths: those
    differ in little that a climb does not change by itself."""
    found: Counter[object] = Counter()
    for strategy in islice(strategies, WRITTEN):
        alike = tuple(
            (each.rows, frozenset(len(stage.groups[0]) for stage in each.stages))
            for each in strategy[1]
        )
        found[alike] += 1
        if found[alike] <= ALIKE:
            yield strategy


def _by_turns(ordered: Sequence[Strategy]) -> list[Strategy]:
    """Returns the first of every build, then the second of each."""
    turns: dict[object, list[Strategy]] = {}
    for strategy in ordered:
        own = turns.setdefault(_build(strategy), [])
        if len(own) < SAME_BUILD:
            own.append(strategy)
    return [own[i] for i in range(SAME_BUILD) for own in turns.values() if i < len(own)]


def _build(strategy: Strategy) -> object:
    """Returns the numbers of stages, and the tensor widths in the order in which they stand."""
    return tuple(
        (len(each.stages), tuple(dict.fromkeys(len(stage.groups[0]) for stage in each.stages)))
        for each in strategy[1]
    )


def _strategy_of(plan: Plan) -> Strategy:
    return plan.schedule, tuple(candidate_of(pipeline) for pipeline in plan.pipelines)


def _local_optima(
    search: LocalSearch, starts: Sequence[Strategy], drawn: Chains, steps: int, tell: Progress
) -> list[Strategy]:
    """Returns local optima, best first.

    Hill climbs start from the given strategies, then from the neighbours of the best local optimum
    or, once those have been tried, from rows of devices drawn at random, as long as steps are left.
    """
    reached: dict[Strategy, float] = {}
    left = steps
    surrounded: set[Strategy] = set()
    waiting = list(starts)
    while left > steps // LAST and not search.incumbent.out_of_time:
        tell("improving", steps - left, steps)
        given = left if left < steps // 4 else round(left * ROUND_SHARE)
        search.left = given
        best = next(iter(_ordered(reached)), None)
        if not waiting and best is not None and best not in surrounded:
            surrounded.add(best)
            waiting = around(search, best, reached[best] * NEARBY)[:SURROUNDING]
        while len(waiting) < DRAWN and not search.out_of_budget:
            waiting += _next(search, drawn)
        left -= given - search.left
        left -= max(FAILED, _successive_halving(search, waiting, reached))
        waiting = []
    tell("improving", steps, steps)
    return _ordered(reached)[:PLAYED]


def _successive_halving(
    search: LocalSearch, starts: Sequence[Strategy], reached: dict[Strategy, float]
) -> int:
    """Climbs from all starts a few steps, then from the better half of the strategies reached and
    the best of every size of micro-batches, and so on; returns the number of steps taken of those
    allowed."""
    allowed = left = max(search.left, 0)
    racing = list(dict.fromkeys(starts))
    rounds = 1
    while len(racing) > STAY**rounds:
        rounds += 1
    while racing and left > 0 and not search.incumbent.out_of_time:
        share, rounds = left / max(1, rounds), rounds - 1
        further: dict[Strategy, float] = {}
        for number, start in enumerate(racing):
            search.left = given = round(share / (len(racing) - number))
            optimum = climb(search, start)
            spent = given - search.left
            share, left = share - spent, left - spent
            reached[optimum] = rate(search, optimum)
            if search.left <= 0:
                further[optimum] = reached[optimum]
        ordered = _ordered(further)
        half = max(1, len(racing) // STAY)
        racing = ordered[:half]
        if rounds:
            racing += _best_of_other_sizes(racing, ordered[half:])
    return allowed - left


def _best_of_other_sizes(
    racing: Sequence[Strategy], ordered: Sequence[Strategy]
) -> Iterator[Strategy]:
    """Yields the first strategy of every size of micro-batches that no racing one has: a climb
    rarely leads from one size to another."""
    seen = {micro_batch_sizes(strategy[1]) for strategy in racing}
    for strategy in ordered:
        sizes = micro_batch_sizes(strategy[1])
        if sizes not in seen:
            seen.add(sizes)
            yield strategy


def _ordered(reached: dict[Strategy, float]) -> list[Strategy]:
    return sorted(reached, key=reached.__getitem__)


def _polish(search: LocalSearch) -> None:
    """Plays what lies next to the best plan for as long as that helps and the work lasts."""
    incumbent = search.incumbent
    better = incumbent.best is not None
    while better and incumbent.best and not incumbent.out_of_budget and not search.out_of_budget:
        best = _strategy_of(incumbent.best.plan)
        near = around(search, best, rate(search, best) * (1 + SLACK))
        better = any(try_candidate(incumbent, s) for s in near if not incumbent.out_of_budget)


def _exhaust(incumbent: Incumbent, schedules: Sequence[ScheduleName], tell: Progress) -> bool:
    """Plays every strategy of the space that is not bounded away, most promising first."""
    incumbent.work = 1 << 62  # the size of the space is the limit here
    found = prospects(
        incumbent.costs, schedules, incumbent.limit, incumbent.pruned, lambda: incumbent.out_of_time
    )
    if found is None:
        incumbent.pruned["beyond the budget"] += 1
        return False
    for done, prospect in enumerate(found):
        tell("simulating", done, len(found))
        if prospect.seconds >= incumbent.limit:
            incumbent.pruned["lower bound above the best"] += len(found) - done
            break
        if incumbent.out_of_budget:
            return False
        try_candidate(incumbent, (prospect.schedule, prospect.pipelines))
    tell("simulating", len(found), len(found))
    _promise_all(incumbent)
    return True


def _promise_all(incumbent: Incumbent) -> None:
    """Tells the incumbent which strategies of a small space may win in the best order of work."""
    if incumbent.any_order:
        costs, limit = incumbent.costs, incumbent.limit
        found = prospects(costs, ("1f1b",), limit, Counter(), seconds_of=in_best_order) or []
        for each in found[:PROMISING]:
            seconds = candidate_seconds(costs, each.pipelines, "best")
            incumbent.promising["1f1b", each.pipelines] = seconds
