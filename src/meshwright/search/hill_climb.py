"""Climbs from a strategy to a faster one by small changes, as long as there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from meshwright.plan.spec import ScheduleName
from meshwright.search import neighbourhood
from meshwright.search.candidate import fits, tensor_widths_agree
from meshwright.search.candidate_estimate import candidate_seconds
from meshwright.search.incumbent import Incumbent, Strategy
from meshwright.search.neighbourhood import Move
from meshwright.search.pipeline_seconds import Order
from meshwright.stopping import raise_if_stopped

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
    """Keeps what has been estimated, and how many steps may still be spent."""

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
    """Returns the seconds in closed form, infinite where it does not fit; where they are not below
    the limit, perhaps only a bound."""
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
        steps += FITTING + depth * FITTING_STAGE + groups
    return steps


def _rated(search: LocalSearch, strategy: Strategy, limit: float) -> float:
    schedule, pipelines = strategy
    costs, pruned = search.incumbent.costs, search.incumbent.pruned
    if schedule not in search.schedules or (search.incumbent.any_order and schedule != "1f1b"):
        return float("inf")
    if not tensor_widths_agree(costs, pipelines):
        pruned["tensor widths of a layer's holders do not divide each other"] += 1
        return float("inf")
    if not all(fits(costs, pipeline, schedule) for pipeline in pipelines):
        pruned["does not fit in memory"] += 1
        return float("inf")
    pruned["slower in the best order of work"] += 1
    order: Order = "best" if search.incumbent.any_order else cast("Order", schedule)
    return candidate_seconds(costs, pipelines, order, limit)


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
    """Returns what one change makes of a strategy and is not slower than the limit; best first."""
    found: list[tuple[float, int, Strategy]] = []
    for move in MOVES:
        found += (
            (rate(search, other), len(found), other)
            for other in _better(search, move, strategy, limit)
        )
    return [other for _, _, other in sorted(found, key=lambda entry: entry[:2])]
