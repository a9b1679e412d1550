"""Finds an order for a pipeline's own times and memory, at least as good as any schedule with a
rule."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, product
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

WORTH = 20
"""If the budget allows fewer changes than this, none is tried."""

NAMES: tuple[ScheduleName, ...] = tuple(
    name
    for name in get_args(ScheduleName)
    if name not in EXPLICIT_SCHEDULES and not name.endswith("-batched")
)
"""Schedules with a rule; a batched weight part is, for its timing, several."""

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
    """Returns the fastest order found that fits, looking at every action of it; None if none does.

    Candidates are every schedule with a rule and list schedules after many rules; the best of them
    is then annealed. Long pipelines have fewer candidates.
    """
    length = 3 * work.micro_batches * len(work.forward)
    names, rules = list(NAMES), list(_rules(work))
    if length * (len(names) + len(rules)) > looked_at:
        # Gradients in two parts cost more in all: whether that pays is not for the rule to say.
        few = max((looked_at // length - 2 * len(_SHORT)) // 3, 1)
        kinds = {rule.split: [r for r in rules if r.split == rule.split][:few] for rule in rules}
        names, rules = list(_SHORT), list(chain.from_iterable(kinds.values()))
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
    """Yields all combinations of a few settings, those that most often win first."""
    stages, count = len(work.forward), work.micro_batches
    every = (count,) * stages
    just = tuple(stages - s for s in range(stages))
    eager = tuple(2 * (stages - s) - 1 for s in range(stages))
    for split, ahead, lag, patience, forward_first in product(
        (count, 0),
        (eager, every, just),
        (every, tuple(range(stages)), (0,) * stages),
        (0.0, 0.5, 1.0),
        (False, True),
    ):
        if split or (lag is every and patience == 0.0):
            yield Rule(
                ahead=ahead, lag=lag, patience=patience, forward_first=forward_first, split=split
            )
    # Two parts cost more than one: while the pipeline drains, the later one fills gaps.
    for patience, ahead in product((0.0, 1.0), (eager, just)):
        yield Rule(ahead=ahead, lag=every, patience=patience, forward_first=True, split=stages)
