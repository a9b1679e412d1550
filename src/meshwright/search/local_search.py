"""Improves on the best regular grid: exhaustively on small inputs, by hill climbs on large ones.

A hill climb compares strategies by a simulation of their stages. The full simulator judges the
local optima and the neighbours of the best of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random

from meshwright.plan.spec import Plan, ScheduleName
from meshwright.search import neighbourhood
from meshwright.search.candidate import candidate_of, fits, tensor_widths_agree
from meshwright.search.chain_partition import Chains, chains
from meshwright.search.exact import LIMIT, prospects, space_size
from meshwright.search.explore import Progress, is_large
from meshwright.search.incumbent import WORK, Incumbent, Strategy, try_candidate
from meshwright.search.neighbourhood import Move
from meshwright.search.pool_pipelines import single_pipelines
from meshwright.search.stage_simulation import followed, stage_level_seconds
from meshwright.search.template_search import template_strategies
from meshwright.stopping import raise_if_stopped

STEPS = (640_000, 20_000, 3_000_000)
"""Steps of a search (about a microsecond each): at least, for each device, and at most."""

TEMPLATE_STRATEGIES = 12
"""Strategies over whole classes of nodes that are simulated."""

FEW = 16
"""Devices up to which rows of them are cut into stages instead of whole classes of nodes."""

SINGLE, CHAINS, CLIMBS, NEAR = 0.1, 0.2, 0.6, 0.05
"""Shares of the steps: strategies of one pipeline of whole pools, of devices in a row, their
climbs, and what lies near the best in the end."""

HOPEFUL = 1.8
"""Times the best stage-level simulation beyond which a strategy is not climbed from."""

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
"""Steps that a composed pipeline costs which does not fit."""

SAME_BUILD = 1
"""Strategies of one build that are climbed from."""

PLAYED = 6
"""Local optima that the simulator judges."""

SLACK = 0.02
"""Relative excess of a stage-level simulation over the best one's within which the simulator may
see it differently."""


def improve(incumbent: Incumbent, schedules: Sequence[ScheduleName], tell: Progress) -> bool:
    """Look for better plans than the incumbent; return True if all of the space was covered."""
    if space_size(incumbent.costs) <= LIMIT:
        return _exhaust(incumbent, schedules, tell)
    if is_large(incumbent.costs):
        _try_templates(incumbent, schedules, tell)
        return False
    least, each, most = STEPS
    steps = min(most, least + each * len(incumbent.costs.devices))
    search = LocalSearch(incumbent, schedules)
    drawn = chains(incumbent.costs, Random(0))
    starts = _starts(search, drawn, steps, tell)
    for optimum in _local_optima(search, starts, drawn, round(CLIMBS * steps), tell):
        try_candidate(incumbent, optimum)
    search.left = round(NEAR * steps)
    _polish(search)
    return False


def _try_templates(incumbent: Incumbent, schedules: Sequence[ScheduleName], tell: Progress) -> None:
    """Play the best strategies made of templates on whole device classes."""
    found = template_strategies(
        incumbent.costs, schedules, incumbent.pruned, lambda: incumbent.out_of_time
    )
    for done, strategy in enumerate(found):
        tell("composing", done, TEMPLATE_STRATEGIES)
        spent = incumbent.out_of_time or incumbent.work < WORK // 2
        if done >= TEMPLATE_STRATEGIES or (incumbent.best and spent):
            break
        try_candidate(incumbent, strategy)
    tell("composing", TEMPLATE_STRATEGIES, TEMPLATE_STRATEGIES)


def _next(search: LocalSearch, drawn: Chains) -> list[Strategy]:
    """More strategies of the schedules asked for from rows of devices, against the allowance."""
    spent, strategies = next(drawn)
    search.left -= spent
    return [strategy for strategy in strategies if strategy[0] in search.schedules]


def _starts(search: LocalSearch, drawn: Chains, steps: int, tell: Progress) -> list[Strategy]:
    """The best strategies of different builds, by the stage-level simulation: those played already,
    those made of whole pools, and those cut from rows of devices."""
    tell("composing", 0, 2)
    costs, incumbent = search.incumbent.costs, search.incumbent
    known = [_strategy_of(each.plan) for each in incumbent.others]
    if len(costs.devices) > FEW:
        device_classes = template_strategies(
            costs, search.schedules, incumbent.pruned, lambda: incumbent.out_of_time
        )
        known += islice(device_classes, TEMPLATE_STRATEGIES)
    found = {strategy: rate(search, strategy) for strategy in known}
    best = [min(found.values(), default=float("inf"))]
    search.left = round(SINGLE * steps)
    for pipelines in single_pipelines(costs, lambda: best[0]):
        if pipelines:
            strategy: Strategy = ("1f1b", pipelines)
            found[strategy] = rate(search, strategy, HOPEFUL * best[0])
            best[0] = min(best[0], found[strategy])
        else:
            search.left -= FAILED
        if search.out_of_budget:
            break
    tell("composing", 1, 2)
    search.left = round(CHAINS * steps)
    while not search.out_of_budget:
        for strategy in _next(search, drawn):
            found[strategy] = rate(search, strategy, HOPEFUL * best[0])
            best[0] = min(best[0], found[strategy])
    tell("composing", 2, 2)
    hopeful = [s for s in sorted(found, key=found.__getitem__) if found[s] <= HOPEFUL * best[0]]
    return _by_turns(hopeful)


def _by_turns(ordered: Sequence[Strategy]) -> list[Strategy]:
    """The first of every build, then the second of each."""
    turns: dict[object, list[Strategy]] = {}
    for strategy in ordered:
        own = turns.setdefault(_build(strategy), [])
        if len(own) < SAME_BUILD:
            own.append(strategy)
    return [own[i] for i in range(SAME_BUILD) for own in turns.values() if i < len(own)]


def _build(strategy: Strategy) -> object:
    """Numbers of stages, and the tensor widths in the order in which they stand."""
    return tuple(
        (len(each.stages), tuple(dict.fromkeys(len(stage.groups[0]) for stage in each.stages)))
        for each in strategy[1]
    )


def _strategy_of(plan: Plan) -> Strategy:
    return plan.schedule, tuple(candidate_of(pipeline) for pipeline in plan.pipelines)


def _local_optima(
    search: LocalSearch, starts: Sequence[Strategy], drawn: Chains, steps: int, tell: Progress
) -> list[Strategy]:
    """Return local optima, best first.

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
    """Climb from all starts a few steps, then from the better half of the strategies reached, and
    so on; return the number of steps taken of those allowed."""
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
        racing = _ordered(further)[: max(1, len(racing) // STAY)]
    return allowed - left


def _ordered(reached: dict[Strategy, float]) -> list[Strategy]:
    return sorted(reached, key=reached.__getitem__)


def _polish(search: LocalSearch) -> None:
    """Play what lies next to the best plan for as long as that helps and the work lasts."""
    incumbent = search.incumbent
    better = incumbent.best is not None
    while better and incumbent.best and not incumbent.out_of_budget and not search.out_of_budget:
        best = _strategy_of(incumbent.best.plan)
        near = around(search, best, rate(search, best) * (1 + SLACK))
        better = any(try_candidate(incumbent, s) for s in near if not incumbent.out_of_budget)


def _exhaust(incumbent: Incumbent, schedules: Sequence[ScheduleName], tell: Progress) -> bool:
    """Play every strategy of the space that is not bounded away, most promising first."""
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
    return True


MOVES: tuple[Move, ...] = (
    neighbourhood.micro_batches,
    neighbourhood.schedules,
    neighbourhood.order,
    neighbourhood.recast,
    neighbourhood.stages,
    neighbourhood.devices,
    neighbourhood.shares,
    neighbourhood.layers,
    neighbourhood.rows,
    neighbourhood.exchanged,
)

GAIN = 1e-6
"""Relative gain below which a change is not worth a step."""

FITTING = 250
FITTING_STAGE = 30
"""Steps (about a microsecond each) that fitting a pipeline costs, and each of its stages."""


@dataclass(slots=True)
class LocalSearch:
    """What has been simulated stage by stage, and how many steps may still be spent."""

    incumbent: Incumbent
    schedules: Sequence[ScheduleName]
    left: int = 0
    known: dict[Strategy, tuple[float, bool]] = field(default_factory=dict)
    """Seconds, and whether they are more than a bound."""

    @property
    def out_of_budget(self) -> bool:
        """True if the allowance or the budget is spent."""
        return self.left <= 0 or self.incumbent.out_of_time


def rate(search: LocalSearch, strategy: Strategy, limit: float = float("inf")) -> float:
    """Seconds by the stage-level simulation, infinite where it does not fit; where they are not
    below the limit, perhaps only a bound."""
    raise_if_stopped()
    seconds, final = search.known.get(strategy, (0.0, False))
    if not final and seconds < limit:
        search.left -= _steps(strategy)
        seconds = _rated(search, strategy, limit)
        search.known[strategy] = seconds, seconds < limit or limit == float("inf")
    return seconds


def _steps(strategy: Strategy) -> int:
    steps = 0
    for pipeline in strategy[1]:
        depth = len(pipeline.stages)
        groups = sum(len(stage.groups) for stage in pipeline.stages)
        steps += (
            FITTING + depth * (FITTING_STAGE + followed(depth, pipeline.micro_batches)) + groups
        )
    return steps


def _rated(search: LocalSearch, strategy: Strategy, limit: float) -> float:
    schedule, pipelines = strategy
    costs, pruned = search.incumbent.costs, search.incumbent.pruned
    if schedule not in search.schedules:
        return float("inf")
    if not tensor_widths_agree(costs, pipelines):
        pruned["tensor widths of a layer's holders do not divide each other"] += 1
        return float("inf")
    if not all(fits(costs, pipeline, schedule) for pipeline in pipelines):
        pruned["does not fit in memory"] += 1
        return float("inf")
    pruned["slower in preview"] += 1
    return stage_level_seconds(costs, pipelines, schedule, limit)


def climb(search: LocalSearch, start: Strategy) -> Strategy:
    """Returns the start, or what becomes of it by changes that each make it faster."""
    best, seconds = start, rate(search, start)
    idle = turn = 0
    while idle < len(MOVES) and not search.out_of_budget:
        limit = seconds * (1 - GAIN)
        better = next(_better(search, MOVES[turn], best, limit), None)
        if better is None:
            idle, turn = idle + 1, (turn + 1) % len(MOVES)
        else:
            idle, best, seconds = 0, better, rate(search, better)
    return best


def _better(
    search: LocalSearch, move: Move, strategy: Strategy, limit: float
) -> Iterator[Strategy]:
    for other in move(search.incumbent.costs, strategy, limit):
        if rate(search, other, limit) < limit:
            yield other
        if search.out_of_budget:
            return


def around(search: LocalSearch, strategy: Strategy, limit: float) -> list[Strategy]:
    """All that one change makes of a strategy and that is not slower than the limit; best first."""
    found: list[tuple[float, int, Strategy]] = []
    for move in MOVES:
        found += (
            (rate(search, other), len(found), other)
            for other in _better(search, move, strategy, limit)
        )
    return [other for _, _, other in sorted(found, key=lambda entry: entry[:2])]
