"""Whether the cheapest plan is the fastest, and what planning for all choices of nodes adds."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from planner import mixed_cluster

from meshwright.errors import FitError
from meshwright.money.choose import RentalChoice, RentedPlan
from meshwright.money.outcomes import ClusterPrices, cluster_prices, dominates, plan_outcome
from meshwright.money.rentals import node_classes, rentals, rented_cluster, rented_devices
from meshwright.money.spec import MoneyTerms
from meshwright.report.expenses import print_choice, rented_text
from meshwright.search.planner import find_plan
from meshwright.workflows.rent import open_terms, rent
from meshwright.workflows.session import Session, open_session

EXAMPLES = Path(__file__).parents[1] / "examples"
CASES = (
    ("a100-v100-t4", "gpt2-medium", 64),
    ("a100-v100-t4", "gpt2-xl", 64),
)
"""Cluster, model and rows of a step."""


def timed(work: Callable[[], RentalChoice]) -> tuple[RentalChoice, float]:
    """What the work found, and its CPU seconds."""
    began = time.process_time()
    return work(), time.process_time() - began


def every_plan(session: Session, here: ClusterPrices) -> list[RentedPlan]:
    """A plan for every rental that is considered, with nothing left out."""
    found = []
    classes = node_classes(session.cluster, here, session.job.precision)
    for counts in rentals(classes, here):
        rented = rented_cluster(session.cluster, rented_devices(classes, counts))
        try:
            plan = find_plan(session.model, rented, session.job)
        except FitError:
            continue
        assert plan.prediction is not None
        reached = plan_outcome(here, plan, plan.prediction.step_seconds)
        found.append(RentedPlan(plan=plan, outcome=reached))
    return found


def told(each: RentedPlan, session: Session) -> str:
    """A plan in a line."""
    outcome = each.outcome
    amount = 1e6 * outcome.expense.per_token
    return (
        f"{rented_text(each.plan, session.cluster)}: {outcome.step_seconds:.3f} s, "
        f"{amount:.4f} {outcome.expense.currency}/Mtoken"
    )


def compare_with_all(session: Session, terms: MoneyTerms, choice: RentalChoice) -> None:
    """Print what planning for every rental finds beside the front, and its CPU seconds."""
    here = cluster_prices(terms.prices, session.cluster)
    began = time.process_time()
    every = every_plan(session, here)
    seconds = time.process_time() - began
    kept = [choice.found[index].outcome for index in choice.front]
    missed = [each for each in every if not any(dominates(one, each.outcome) for one in kept)]
    sys.stdout.write(f"all {len(every)} planned for: {seconds:.1f} CPU s\n")
    for each in missed:
        sys.stdout.write(f"  not on the front: {told(each, session)}\n")
    if not missed:
        sys.stdout.write("  nothing is faster or cheaper than the front\n")


def sessions(devices: int | None) -> Iterator[tuple[str, Session]]:
    """The cases, each with its title; of so many devices the mixed cluster of `planner.py`."""
    for name, model, rows in CASES if devices is None else ((str(devices), "gpt2-xl", 1024),):
        session = open_session(
            model=model,
            cluster=EXAMPLES / "clusters" / f"{'v100-t4' if devices else name}.toml",
            profile=None,
            global_batch=rows,
            sequence=1024,
            precision="fp16",
            optimizer="adamw",
        )
        if devices:
            session = replace(session, cluster=mixed_cluster(devices))
        yield f"{model}, {rows} rows of 1024, on {session.cluster.name}", session


def main() -> None:
    """Print the front of every case, and the fastest plan beside the cheapest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prices", type=Path, default=EXAMPLES / "prices.toml")
    parser.add_argument("--devices", type=int, help="instead: so many, the cheapest plan alone")
    parser.add_argument("--all", action="store_true", help="also plan for every choice: minutes")
    options = parser.parse_args()
    terms = open_terms(options.prices, "cost", ())
    assert terms is not None
    for title, session in sessions(options.devices):
        sys.stdout.write(f"== {title}\n")
        here = cluster_prices(terms.prices, session.cluster)
        ask = partial(rent, session, terms, here)
        choice, seconds = timed(ask)
        least = f"the cheapest alone: {seconds:.1f} CPU s\n"
        if not options.devices:
            choice, seconds = timed(partial(ask, whole_front=True))
        print_choice(choice, session.cluster, terms)
        sys.stdout.write(f"fastest: {told(choice.found[0], session)}\n")
        sys.stdout.write(f"cheapest: {told(choice.best, session)}\n{least}")
        if not options.devices:
            sys.stdout.write(f"the whole front: {seconds:.1f} CPU s\n")
        if options.all:
            compare_with_all(session, terms, choice)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
