"""Finds the devices to rent: the plan that serves a user's objective and limits by given prices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from meshwright.errors import OptionError, Problem
from meshwright.money.choose import RentalChoice, RentedPlan, choose_rental
from meshwright.money.files import load_prices, parse_limit
from meshwright.money.outcomes import ClusterPrices
from meshwright.money.spec import MoneyTerms, Objective
from meshwright.search.incumbent import Progress
from meshwright.stopping import never
from meshwright.workflows.session import NO_LIMITS, SearchLimits, Session, with_sources


def open_terms(
    prices: Path | None, objective: Objective, limits: Sequence[str], *, front: bool = False
) -> MoneyTerms | None:
    """Reads a user's terms; None without prices. Raises OptionError for an objective, limits or a
    front that need prices, and MoneyError for prices at fault."""
    if prices is None:
        OptionError.check(_need_prices(objective, limits, front))
        return None
    given = load_prices(prices)
    wanted = tuple(parse_limit(text, given.currency) for text in limits)
    return MoneyTerms(prices=given, objective=objective, limits=wanted)


def _need_prices(objective: Objective, limits: Sequence[str], front: bool) -> Iterator[Problem]:
    mend = "give a file of hourly prices: --prices prices.toml"
    if objective != "time":
        yield Problem("--objective", "", f"{objective}, without prices", "prices", mend)
    for text in limits:
        yield Problem("--limit", "", f"{text!r}, without prices", "prices", mend)
    if front:
        yield Problem("--front", "", "a front of speed and cost, without prices", "prices", mend)


def rent(
    session: Session,
    terms: MoneyTerms,
    prices: ClusterPrices,
    limits: SearchLimits = NO_LIMITS,
    *,
    whole_front: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] = never,
) -> RentalChoice:
    """Finds the devices to rent and the plan for them; the arguments are those of
    `choose_rental`."""
    found = choose_rental(
        session.model,
        session.cluster,
        session.job,
        session.profile,
        prices,
        terms,
        whole_front=whole_front,
        forbidden=limits.forbidden,
        budget_seconds=limits.budget_seconds,
        progress=progress,
        stop=stop,
    )

    def known(each: RentedPlan) -> RentedPlan:
        return replace(each, plan=with_sources(session, each.plan))

    return replace(found, best=known(found.best), found=tuple(map(known, found.found)))
