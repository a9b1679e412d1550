"""Finds an order for a pipeline's own times and memory, at least as good as any schedule with a
rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from operator import itemgetter
from typing import Literal, get_args

from meshwright.plan.ranks import EXPLICIT_SCHEDULES, needed_layout
from meshwright.plan.spec import ScheduleName
from meshwright.program.codes import Codes
from meshwright.program.schedules import schedule_codes
from meshwright.program.work import Work, fits, seconds
from meshwright.search.list_scheduler.greedy import Rule, listed
from meshwright.search.list_scheduler.refine import refined
from meshwright.search.list_scheduler.steady_state import extrapolated, shortened
from meshwright.stopping import raise_if_stopped

LOOKED_AT = 1_000_000
"""Actions that are placed or timed in the search for one order: the end of the search, the same on
every machine (a long pipeline has its first few orders looked at all the same)."""

TRIES = 12_000
"""Changes that are tried on the best order, at most."""

KEPT = 2
"""Schedules with a rule, and rules, that are fast on few micro-batches and are tried on all."""

FEWEST_RULES = 6
"""Rules that are tried on long pipelines too: among them those that leave backwards whole."""

WORTH = 20
"""If the budget allows fewer changes than this, none is tried."""

NAMES: tuple[ScheduleName, ...] = tuple(
    name
    for name in get_args(ScheduleName)
    if name not in EXPLICIT_SCHEDULES and not name.endswith("-2bp")
)
"""Schedules with a rule, of two that differ in joined weight parts the one that joins them. For the
timing of an order, a joined weight part is several."""


Settings = tuple[
    Literal["just", "eager", "every"],
    Literal["soon", "late"],
    float,
    bool,
    Literal["all", "last", "none"],
]
"""Forwards ahead, weight parts left to do, patience, whether forwards go first, and the backwards
in two parts of a rule. Two parts cost more than one: the `last` ones fill gaps while the pipeline
drains."""

UNDIVIDED: tuple[Settings, ...] = (
    ("every", "late", 1.0, False, "all"),
    ("eager", "late", 1.0, True, "all"),
    ("eager", "late", 1.0, True, "last"),
    ("eager", "late", 0.5, True, "all"),
    ("every", "late", 0.5, False, "all"),
    ("eager", "late", 0.0, False, "none"),
    ("eager", "soon", 0.5, True, "all"),
    ("every", "soon", 0.5, False, "all"),
    ("eager", "late", 1.0, False, "all"),
    ("eager", "late", 0.0, True, "none"),
    ("eager", "late", 0.0, True, "last"),
    ("eager", "soon", 0.5, False, "all"),
    ("eager", "soon", 1.0, True, "all"),
    ("every", "late", 0.0, False, "all"),
    ("eager", "soon", 0.0, True, "all"),
    ("eager", "late", 0.5, False, "all"),
)
DIVIDED: tuple[Settings, ...] = (
    ("eager", "late", 1.0, False, "all"),
    ("just", "late", 1.0, True, "last"),
    ("just", "late", 0.0, True, "none"),
    ("eager", "late", 1.0, True, "last"),
    ("every", "late", 1.0, False, "all"),
    ("just", "late", 1.0, False, "all"),
    ("eager", "late", 0.0, True, "none"),
    ("every", "late", 0.0, True, "none"),
    ("just", "late", 1.0, True, "all"),
    ("eager", "late", 0.5, True, "all"),
)
"""Settings that have won on pipelines with one stage on each group of devices, and with several."""


def best_order(
    work: Work, looked_at: int = LOOKED_AT, known: list[Codes] | None = None
) -> list[Codes] | None:
    """Returns the fastest order found that fits; None if none does.

    Candidates are every schedule with a rule, an order that is `known` to fit, and list schedules
    after many rules; the best of them is then annealed. Long pipelines have fewer candidates: what
    is known stands for the schedules with a rule, and list schedules are compared on few of many
    micro-batches.
    """
    length = 3 * work.micro_batches * len(work.forward)
    names, rules = list(NAMES), list(_rules(work))
    if length * (len(names) + len(rules)) > looked_at:
        names, rules = _promising(work, [] if known else names, rules, looked_at)
    candidates = [codes for _, codes in _named(work, names)]
    if known:
        candidates.append(known)
    timed = ((seconds(work, codes), codes) for codes in candidates)
    best = min(timed, key=itemgetter(0), default=None)
    for rule in rules:
        found = _listed(work, rule, best[0] if best else inf)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    if best is None:
        return None
    tries = min(TRIES, looked_at // length)
    return refined(work, best[1], tries)[1] if tries >= WORTH else best[1]


def _promising(
    work: Work, names: list[ScheduleName], rules: list[Rule], looked_at: int
) -> tuple[list[ScheduleName], list[Rule]]:
    """Returns the few of some schedules with a rule, and rules of list schedules, that are fastest
    for as many micro-batches as a pipeline needs to run evenly."""
    short = shortened(work)
    number = looked_at // (3 * short.micro_batches * len(work.forward)) - len(NAMES)
    rules = rules[: max(number, FEWEST_RULES)]
    if short == work:
        return names, rules
    named = [(extrapolated(work, short, codes), name) for name, codes in _named(short, names)]
    listed = [
        (extrapolated(work, short, found[1]), k)
        for k, rule in zip(range(len(rules)), _rules(short), strict=False)
        if (found := _listed(short, rule))
    ]
    return (
        [name for _, name in sorted(named, key=itemgetter(0))[:KEPT]],
        [rules[k] for _, k in sorted(listed)[:KEPT]],
    )


def _listed(work: Work, rule: Rule, limit: float = inf) -> tuple[float, list[Codes]] | None:
    raise_if_stopped()
    return listed(work, rule, limit)


def _named(work: Work, names: Sequence[ScheduleName]) -> Iterator[tuple[ScheduleName, list[Codes]]]:
    """Yields the schedules with a rule that fit, and their orders."""
    for name in names:
        raise_if_stopped()
        if not needed_layout(name, work.layout):
            codes = schedule_codes(name, work.layout, work.micro_batches)
            if fits(work, codes):
                yield name, codes


def _rules(work: Work) -> Iterator[Rule]:
    """Yields the combinations of settings that have won, those that most often did first."""
    stages, count = len(work.forward), work.micro_batches
    aheads = {
        "just": tuple(stages - s for s in range(stages)),
        "eager": tuple(2 * (stages - s) - 1 for s in range(stages)),
        "every": (count,) * stages,
    }
    lags = {"soon": tuple(range(stages)), "late": (count,) * stages}
    splits = {"all": count, "last": stages, "none": 0}
    divided = any(len(held) > 1 for held in work.layout)
    for ahead, lag, patience, forward_first, split in DIVIDED if divided else UNDIVIDED:
        yield Rule(
            ahead=aheads[ahead],
            lag=lags[lag],
            patience=patience,
            forward_first=forward_first,
            split=splits[split],
        )
