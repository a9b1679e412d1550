"""Climbs from strategy to strategy by preview, within an allowance that is counted, not timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from meshwright.plan.spec import ScheduleName
from meshwright.search import moves, regroup
from meshwright.search.contest import Contest, Strategy
from meshwright.search.lines import fits, tensor_widths_agree
from meshwright.search.moves import Move
from meshwright.search.preview import followed, preview_seconds
from meshwright.stopping import look

MOVES: tuple[Move, ...] = (
    moves.micro_batches,
    moves.schedules,
    moves.order,
    regroup.recast,
    regroup.stages,
    regroup.devices,
    moves.shares,
    moves.layers,
    moves.rows,
    regroup.exchanged,
)

GAIN = 1e-6
"""Relative gain below which a change is not worth a step."""

FITTING = 250
FITTING_STAGE = 30
"""Steps (about a microsecond each) that fitting a line costs, and each of its stages."""


@dataclass(slots=True)
class Scout:
    """What has been previewed, and how many steps may still be spent."""

    contest: Contest
    schedules: Sequence[ScheduleName]
    left: int = 0
    known: dict[Strategy, tuple[float, bool]] = field(default_factory=dict)
    """Seconds, and whether they are more than a bound."""

    @property
    def over(self) -> bool:
        """Whether the allowance or the budget is spent."""
        return self.left <= 0 or self.contest.late


def rate(scout: Scout, strategy: Strategy, limit: float = float("inf")) -> float:
    """Seconds by preview, infinite where it does not fit; where they are not below the limit,
    perhaps only a bound."""
    look()
    seconds, final = scout.known.get(strategy, (0.0, False))
    if not final and seconds < limit:
        scout.left -= _steps(strategy)
        seconds = _rated(scout, strategy, limit)
        scout.known[strategy] = seconds, seconds < limit or limit == float("inf")
    return seconds


def _steps(strategy: Strategy) -> int:
    steps = 0
    for line in strategy[1]:
        depth = len(line.teams)
        units = sum(len(team.units) for team in line.teams)
        steps += FITTING + depth * (FITTING_STAGE + followed(depth, line.micro_batches)) + units
    return steps


def _rated(scout: Scout, strategy: Strategy, limit: float) -> float:
    schedule, lines = strategy
    costs, dropped = scout.contest.costs, scout.contest.dropped
    if schedule not in scout.schedules:
        return float("inf")
    if not tensor_widths_agree(costs, lines):
        dropped["holders of a layer differ in tensor width"] += 1
        return float("inf")
    if not all(fits(costs, line, schedule) for line in lines):
        dropped["does not fit in memory"] += 1
        return float("inf")
    dropped["slower in preview"] += 1
    return preview_seconds(costs, lines, schedule, limit)


def climb(scout: Scout, start: Strategy) -> Strategy:
    """The start, or what becomes of it by changes that each make it faster; the kinds of changes
    take turns."""
    best, seconds = start, rate(scout, start)
    idle = turn = 0
    while idle < len(MOVES) and not scout.over:
        limit = seconds * (1 - GAIN)
        better = next(_better(scout, MOVES[turn], best, limit), None)
        if better is None:
            idle, turn = idle + 1, (turn + 1) % len(MOVES)
        else:
            idle, best, seconds = 0, better, rate(scout, better)
    return best


def _better(scout: Scout, move: Move, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    for other in move(scout.contest.costs, strategy, limit):
        if rate(scout, other, limit) < limit:
            yield other
        if scout.over:
            return


def around(scout: Scout, strategy: Strategy, limit: float) -> list[Strategy]:
    """All that one change makes of a strategy and that is not slower than the limit; best first."""
    found: list[tuple[float, int, Strategy]] = []
    for move in MOVES:
        found += (
            (rate(scout, other), len(found), other)
            for other in _better(scout, move, strategy, limit)
        )
    return [other for _, _, other in sorted(found, key=lambda entry: entry[:2])]
