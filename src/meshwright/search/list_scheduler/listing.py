"""Finds an order for a pipeline's own times and memory, at least as good as any schedule with a
rule."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from math import inf
from operator import itemgetter
from typing import get_args

from meshwright.plan.ranks import EXPLICIT_SCHEDULES, needed_layout
from meshwright.plan.spec import ScheduleName
from meshwright.program.schedules import schedule_orders
from meshwright.program.work import Codes, Work, fits, seconds, to_codes
from meshwright.search.list_scheduler.greedy import Rule, listed
from meshwright.search.list_scheduler.refine import refined
from meshwright.search.list_scheduler.steady import lengthened, shortened
from meshwright.stopping import raise_if_stopped

LOOKED_AT = 1_000_000
"""Actions that are placed or timed in the search for one order: the end of the search, the same on
every machine (a long pipeline has its first few orders looked at all the same)."""

TRIES = 12_000
"""Changes that are tried on the best order, at most."""

FEWEST = 12
"""If fewer orders than this could be looked at, one for fewer micro-batches is made."""

FEWEST_RULES = 6
"""Rules that are tried on long pipelines too: among them those that leave backwards whole."""

WORTH = 20
"""If the budget allows fewer changes than this, none is tried."""

NAMES: tuple[ScheduleName, ...] = tuple(
    name
    for name in get_args(ScheduleName)
    if name not in EXPLICIT_SCHEDULES and not name.endswith("-batched")
)
"""Schedules with a rule; a batched weight part takes as long as several single ones."""

_SHORT: tuple[ScheduleName, ...] = ("eager-1f1b", "zb-h1")
"""The schedules that are tried on long pipelines too."""


def best_order(work: Work, looked_at: int = LOOKED_AT) -> list[Codes] | None:
    """Returns the fastest order found that fits; None if none does.

    Of many micro-batches, an order for few is made, with more rounds of its steady state: how many
    orders are looked at does not depend on the number of micro-batches.
    """
    short = shortened(work)
    length = 3 * work.micro_batches * len(work.forward)
    if short.micro_batches < work.micro_batches and length * FEWEST > looked_at:
        codes = _best_order(short, looked_at)
        long = lengthened(work, short, codes) if codes is not None else None
        if long is not None:
            named = min(_named(work, list(_SHORT)), key=itemgetter(0), default=(inf, long))
            return long if seconds(work, long) <= named[0] else named[1]
    return _best_order(work, looked_at)


def _best_order(work: Work, looked_at: int) -> list[Codes] | None:
    """Returns the fastest order found that fits, without repeated rounds; None if none does.

    Candidates are every schedule with a rule and list schedules after many rules; the best of them
    is then annealed. Long pipelines have fewer candidates.
    """
    length = 3 * work.micro_batches * len(work.forward)
    names, rules = list(NAMES), list(_rules(work))
    if length * (len(names) + len(rules)) > looked_at:
        names, rules = list(_SHORT), rules[: max(looked_at // length - len(_SHORT), FEWEST_RULES)]
    listings = filter(None, (_listed(work, rule) for rule in rules))
    best = min(chain(_named(work, names), listings), key=itemgetter(0), default=None)
    if best is None:
        return None
    tries = min(TRIES, looked_at // length)
    return refined(work, best[1], tries)[1] if tries >= WORTH else best[1]


def _listed(work: Work, rule: Rule) -> tuple[float, list[Codes]] | None:
    raise_if_stopped()
    return listed(work, rule)


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
