"""Finds an order for a pipeline's own times and memory, at least as good as any schedule with a
rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from operator import itemgetter
from typing import get_args

from meshwright.plan.ranks import EXPLICIT_SCHEDULES, needed_layout
from meshwright.plan.spec import ScheduleName
from meshwright.program.schedules import schedule_orders
from meshwright.program.work import Codes, Work, fits, seconds, to_codes
from meshwright.search.list_scheduler.greedy import Rule, listed
from meshwright.search.list_scheduler.refine import refined
from meshwright.stopping import raise_if_stopped

LOOKED_AT = 1_000_000
"""Actions that are placed or timed in the search for one order: the end of the search, the same on
every machine (a long pipeline has its first few orders looked at all the same)."""

TRIES = 12_000
"""Changes that are tried on the best order, at most."""

ROUNDS, LEAST = 3, 24
"""Micro-batches in which a pipeline comes to run evenly: so many times its stages, and at least so
many."""

KEPT = 2
"""Schedules with a rule, and rules, that are fast on few micro-batches and are tried on all."""

FEWEST_RULES = 6
"""Rules that are tried on long pipelines too: among them those that leave backwards whole."""

WORTH = 20
"""If the budget allows fewer changes than this, none is tried."""

NAMES: tuple[ScheduleName, ...] = tuple(
    name
    for name in get_args(ScheduleName)
    if name not in EXPLICIT_SCHEDULES and not name.endswith("-batched")
)
"""Schedules with a rule; a batched weight part is, for its timing, several."""


def best_order(work: Work, looked_at: int = LOOKED_AT) -> list[Codes] | None:
    """Returns the fastest order found that fits; None if none does.

    Candidates are every schedule with a rule and list schedules after many rules; the best of them
    is then annealed. Long pipelines have fewer candidates, and rules are compared on few of many
    micro-batches.
    """
    length = 3 * work.micro_batches * len(work.forward)
    names, rules = list(NAMES), list(_rules(work))
    if length * (len(names) + len(rules)) > looked_at:
        names, rules = _fastest(work, looked_at)
    best = min(_named(work, names), key=itemgetter(0), default=None)
    for rule in rules:
        found = _listed(work, rule, best[0] if best else inf)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    if best is None:
        return None
    tries = min(TRIES, looked_at // length)
    return refined(work, best[1], tries)[1] if tries >= WORTH else best[1]


def _fastest(work: Work, looked_at: int) -> tuple[list[ScheduleName], list[Rule]]:
    """Returns the few schedules with a rule, and rules of list schedules, that are fastest for as
    many micro-batches as a pipeline needs to run evenly."""
    few = min(work.micro_batches, max(LEAST, ROUNDS * len(work.forward)))
    short = replace(work, micro_batches=few)
    number = max(looked_at // (3 * few * len(work.forward)) - len(NAMES), FEWEST_RULES)
    rules = [*zip(_rules(work), _rules(short), strict=True)][:number]
    named = [(took, name) for name in NAMES for took, _ in _named(short, [name])]
    fastest: list[tuple[float, int]] = []
    for k, (_, rule) in enumerate(rules):
        found = _listed(short, rule, fastest[-1][0] if len(fastest) == KEPT else inf)
        if found is not None:
            fastest = sorted([*fastest, (found[0], k)])[:KEPT]
    return (
        [name for _, name in sorted(named, key=itemgetter(0))[:KEPT]],
        [rules[k][0] for _, k in fastest],
    )


def _listed(work: Work, rule: Rule, limit: float = inf) -> tuple[float, list[Codes]] | None:
    raise_if_stopped()
    return listed(work, rule, limit)


def _named(work: Work, names: list[ScheduleName]) -> Iterator[tuple[float, list[Codes]]]:
    for name in names:
        raise_if_stopped()
        if not needed_layout(name, work.layout):
            codes = to_codes(schedule_orders(name, work.layout, work.micro_batches))
            if fits(work, codes):
                yield seconds(work, codes), codes


def _rules(work: Work) -> Iterator[Rule]:
    """Yields the combinations of settings that have won, those that most often did first."""
    stages, count = len(work.forward), work.micro_batches
    every = (count,) * stages
    eager = tuple(2 * (stages - s) - 1 for s in range(stages))
    soon = tuple(range(stages))
    for ahead, lag, patience, forward_first, split in (
        (every, every, 1.0, False, count),
        (eager, every, 1.0, True, count),
        # Two parts cost more than one: while the pipeline drains, the later one fills gaps.
        (eager, every, 1.0, True, stages),
        (eager, every, 0.5, True, count),
        (every, every, 0.5, False, count),
        (eager, every, 0.0, False, 0),
        (eager, soon, 0.5, True, count),
        (every, soon, 0.5, False, count),
        (eager, every, 1.0, False, count),
        (eager, every, 0.0, True, 0),
        (eager, every, 0.0, True, stages),
        (eager, soon, 0.5, False, count),
        (eager, soon, 1.0, True, count),
        (every, every, 0.0, False, count),
        (eager, soon, 0.0, True, count),
        (eager, every, 0.5, False, count),
    ):
        yield Rule(
            ahead=ahead, lag=lag, patience=patience, forward_first=forward_first, split=split
        )
