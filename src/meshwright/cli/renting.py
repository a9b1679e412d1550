"""Plans by a user's terms, and tells what plans cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.cli.options import ObjectiveChoice, say

if TYPE_CHECKING:
    from meshwright.cli.progress import SearchProgress
    from meshwright.money.spec import MoneyTerms
    from meshwright.plan.spec import Plan
    from meshwright.workflows.session import SearchLimits, Session


def money_terms(
    prices: Path | None,
    objective: ObjectiveChoice = ObjectiveChoice.TIME,
    limit: list[str] | None = None,
    front: Path | None = None,
) -> MoneyTerms | None:
    """Returns what PricesOption, ObjectiveOption, LimitOption and FrontOption set, for each verb
    that says what plans cost; None without prices. Raises OptionError or MoneyError, before any
    work is done, for values that they cannot have."""
    from meshwright.workflows.rent import open_terms

    return open_terms(prices, objective.value, limit or (), front=front is not None)


def planned(
    session: Session,
    limits: SearchLimits,
    terms: MoneyTerms | None,
    front: Path | None,
    watch: SearchProgress,
) -> Plan:
    """Returns the plan for a cluster: the fastest, or the best by the terms, for which the front of
    speed and cost is printed and drawn. Raises LimitError if no plan keeps the limits."""
    from meshwright.errors import OptionError, Problem
    from meshwright.money.outcomes import check_limits, cluster_prices
    from meshwright.workflows.session import search_plan

    # A missing price is told before any search.
    here = cluster_prices(terms.prices, session.cluster) if terms else None
    if terms is None or here is None or not (terms.choose or front):
        return search_plan(session, limits, progress=watch.tell, stop=watch.stop, found=watch.found)
    if limits.margin is not None:
        wanted = "none with --objective cost, --limit or --front: rentals are compared as predicted"
        raise OptionError(Problem("--margin", "", f"{limits.margin:g}", wanted))
    from meshwright import files
    from meshwright.report.expenses import front_svg, print_choice, rented_text
    from meshwright.workflows.rent import rent

    choice = rent(
        session,
        terms,
        here,
        limits,
        whole_front=front is not None,
        progress=watch.tell,
        stop=watch.stop,
    )
    watch.close()
    print_choice(choice, session.cluster, terms)
    if front:
        files.write_text(front, front_svg(choice, session.cluster, terms))
        say(f"wrote {front}")
    best = choice.best
    check_limits(best.outcome, terms, f"for {rented_text(best.plan, session.cluster)}")
    return best.plan


def expense_text(
    plan: Plan, session: Session, terms: MoneyTerms | None, step_seconds: float
) -> str:
    """Says what a plan costs; empty without prices. Raises MoneyError."""
    if terms is None:
        return ""
    from meshwright.money.outcomes import cluster_prices, plan_outcome
    from meshwright.report.expenses import expense_sentence

    here = cluster_prices(terms.prices, session.cluster)
    found = plan_outcome(here, plan, step_seconds)
    return expense_sentence(plan, here, found)
