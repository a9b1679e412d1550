"""Finds an order for a pipeline's own times and memory, at least as good as any schedule with a
rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf
from operator import itemgetter
from typing import Literal, get_args

from meshwright.plan.ranks import EXPLICIT_SCHEDULES, needed_layout
from meshwright.plan.spec import ScheduleName
from meshwright.program.work import (
    B,
    Codes,
    I,
    Work,
    fits,
    group_ends,
    play,
    schedule_codes,
    seconds,
)
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
    named = ((seconds(work, codes), codes) for _, codes in _named(work, names))
    best = min(named, key=itemgetter(0), default=None)
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
    named = [(_extrapolated(work, short, codes), name) for name, codes in _named(short, NAMES)]
    listed = [
        (_extrapolated(work, short, found[1]), k)
        for k, (_, rule) in enumerate(rules)
        if (found := _listed(short, rule))
    ]
    return (
        [name for _, name in sorted(named, key=itemgetter(0))[:KEPT]],
        [rules[k][0] for _, k in sorted(listed)[:KEPT]],
    )


def _extrapolated(work: Work, short: Work, codes: Sequence[Codes]) -> float:
    """Returns the seconds of an order for few micro-batches if it went on for all of them at the
    pace of its middle."""
    ends = play(short, codes)
    assert ends is not None, "the order comes to its end"
    whole = max(group_ends(work, ends))
    more = work.micro_batches - short.micro_batches
    if not more:
        return whole
    first, last = short.micro_batches // 3, 2 * short.micro_batches // 3
    pace = 0.0
    for own, ended in zip(codes, ends, strict=True):
        stage = min(code >> 2 for code in own)
        back = [
            end
            for code, end in zip(own, ended, strict=True)
            if code in (4 * stage + B, 4 * stage + I)
        ]
        pace = max(pace, (back[last] - back[first]) / (last - first))
    return whole + more * pace


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
