"""Chooses which devices of a cluster to rent: searches a plan for each rental that could matter."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import isfinite

from meshwright.cluster.spec import Cluster, cluster_fingerprint
from meshwright.cost.memory import usable_bytes
from meshwright.cost.profile import Profile
from meshwright.errors import FitError, PlanError
from meshwright.model.spec import LayerGraph, num_parameters
from meshwright.money.outcomes import (
    ClusterPrices,
    Merit,
    dominates,
    front,
    hourly_price,
    merit,
    outcome,
    plan_outcome,
)
from meshwright.money.rentals import (
    Counts,
    NodeClass,
    every_choice,
    node_classes,
    rentals,
    rented_cluster,
    rented_devices,
    used_counts,
    within,
)
from meshwright.money.spec import MoneyTerms, Outcome
from meshwright.plan.spec import Job, Plan
from meshwright.records import Count, Line, record
from meshwright.search.certificate import certificate
from meshwright.search.costs import Costs, costs_of
from meshwright.search.incumbent import Progress
from meshwright.search.inputs import check_inputs
from meshwright.search.planner import find_plan
from meshwright.stopping import Stopped, never, stoppable

DOMINATED = "another one is as fast and as cheap, whatever its plan"
WORSE = "another one serves the objective and the limits better, whatever its plan"
NO_ROOM = "the model does not fit"
ANSWERED = "the fastest plan for more devices uses no others"
NO_TIME = "the time was up"
LEAST_SECONDS = 0.01
"""Seconds of a search for which there is no time left: it ends with its first plan."""


@record
class RentedPlan:
    """Holds a plan with what it achieves and costs."""

    plan: Plan
    outcome: Outcome


@record
class RentalChoice:
    """Holds the plans that were found for the rentals of a cluster, and the best of them."""

    best: RentedPlan
    found: tuple[RentedPlan, ...]
    """All plans that were found, fastest first, one for each set of devices in use."""
    front: tuple[Count, ...]
    """Indices of the plans that no other one found beats or equals in both speed and cost per
    token, fastest first."""
    choices: Count
    """Number of ways to choose nodes, if interchangeable ones are not told apart."""
    considered: Count
    """Number of rentals that were considered."""
    searched: Count
    skipped: dict[Line, Count]
    """Numbers of rentals for which no plan was searched, by reason."""


@dataclass(frozen=True, slots=True)
class _Question:
    """Holds all that the search of a plan depends on, except the devices."""

    model: LayerGraph
    cluster: Cluster
    job: Job
    profile: Profile | None
    prices: ClusterPrices
    terms: MoneyTerms
    whole_front: bool
    forbidden: Collection[str]
    tell: Progress
    stop: Callable[[], bool]
    deadline: float | None

    @property
    def over(self) -> bool:
        """True if no further search may begin."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return late or self.stop()


@dataclass(frozen=True, slots=True)
class _Rental:
    """Describes a rental that may be searched."""

    counts: Counts
    cluster: Cluster
    bound: Outcome
    """What a plan that uses all devices of the rental cannot beat."""


@dataclass(slots=True)
class _Searched:
    """Collects what has been found so far."""

    plans: dict[Counts, RentedPlan] = field(default_factory=dict)
    """The best plan found for each combination of devices in use, which are counted by class."""
    misfits: list[Counts] = field(default_factory=list)
    answered: list[tuple[Counts, Counts]] = field(default_factory=list)
    """For each rental that was searched: what its plan uses, and the rental."""
    skipped: Counter[str] = field(default_factory=Counter)
    searched: int = 0


def choose_rental(  # noqa: PLR0913 - options, each with a default
    model: LayerGraph,
    cluster: Cluster,
    job: Job,
    profile: Profile | None,
    prices: ClusterPrices,
    terms: MoneyTerms,
    *,
    whole_front: bool = False,
    forbidden: Collection[str] = (),
    budget_seconds: float | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = never,
) -> RentalChoice:
    """Finds the devices to rent, and the plan for them, that serve the terms best.

    For each rental a plan is searched by `find_plan`, unless it is known beforehand that it is of
    no use: even if it used all its devices and reached its certificate's bound, it would serve the
    terms no better than a plan that was found. If `whole_front`, it must also be no faster or no
    cheaper than some plan that was found. The seconds of `budget_seconds` are shared out equally
    among the rentals that are still to come. The best plan may miss a limit if no plan keeps all of
    them; it is then the one that comes closest. Raises the errors of `find_plan` if no rental has a
    plan.
    """
    check_inputs(model, cluster, job)
    question = _Question(
        model,
        cluster,
        job,
        profile,
        prices,
        terms,
        whole_front,
        forbidden,
        progress or (lambda _what, _done, _all: None),
        stop,
        None if budget_seconds is None else time.monotonic() + budget_seconds,
    )
    classes, seen = node_classes(cluster, prices, job.precision), _Searched()
    every = rentals(classes, prices) if classes else ()
    _search_all(question, classes, _bounded(question, classes, every, seen), seen)
    if not seen.plans:  # says why, or finds what was not expected
        _search(question, classes, every[0] if every else (), cluster, seen, 1)
    return _choice(question, classes, seen, len(every))


def _bounded(
    question: _Question, classes: tuple[NodeClass, ...], every: tuple[Counts, ...], seen: _Searched
) -> list[_Rental]:
    """Returns the rentals into which the model may fit, in the order in which they are searched.

    They are sorted by the lower bound of their step, so that every rental that could be faster than
    another is searched before it. Larger rentals mostly come first; if the plan of one leaves
    devices idle, it answers for the rentals without these (`_answered`). Unless the whole front is
    wanted, rentals that must miss a limit come last, those that come nearest to it first. At least
    one rental is returned, however little time is left.
    """
    found: list[_Rental] = []
    with suppress(Stopped), stoppable(lambda: bool(found) and question.over):
        for index, counts in enumerate(every):
            question.tell("bounding", index, len(every))
            devices = rented_devices(classes, counts)
            rented = rented_cluster(question.cluster, devices)
            costs = costs_of(
                question.model, rented, question.job, question.profile, recomputation=True
            )
            least = certificate(costs).seconds if _may_fit(costs) else float("inf")
            if isfinite(least):
                per_hour = hourly_price(question.prices, devices)
                bound = outcome(question.prices, question.job, per_hour, least)
                found.append(_Rental(counts, rented, bound))
            else:
                seen.skipped[NO_ROOM] += 1
    seen.skipped[NO_TIME] += len(every) - len(found) - seen.skipped[NO_ROOM]
    if question.whole_front:
        return sorted(found, key=lambda rental: rental.bound.step_seconds)
    return sorted(found, key=lambda rental: _limits_then_speed(rental.bound, question.terms))


def _limits_then_speed(bound: Outcome, terms: MoneyTerms) -> tuple[float, float]:
    return merit(bound, terms)[0], bound.step_seconds


def _may_fit(costs: Costs) -> bool:
    """True if all devices together have room for one copy of the trained weights, their gradients
    and their states."""
    unit = costs.table.weights.unit
    room = sum(usable_bytes(costs.cluster.types[each.type]) for each in costs.devices.values())
    return num_parameters(costs.model) * (unit.weights + unit.gradients + unit.optimizer) <= room


def _search_all(
    question: _Question, classes: tuple[NodeClass, ...], ahead: list[_Rental], seen: _Searched
) -> None:
    """Searches a plan for each rental that could matter when its turn comes."""
    number = len(ahead)
    while ahead:
        if question.over and (seen.plans or question.stop()):
            seen.skipped[NO_TIME] += len(ahead)
            return
        rental = ahead.pop(_next(question, ahead, seen))
        if why := _needless(question, rental, seen):
            seen.skipped[why] += 1
            continue
        to_come = 1 + sum(not _needless(question, each, seen) for each in ahead)
        done = replace(question, tell=_numbered(question.tell, number - len(ahead), number))
        with suppress(FitError):
            _search(done, classes, rental.counts, rental.cluster, seen, to_come)


def _next(question: _Question, ahead: list[_Rental], seen: _Searched) -> int:
    """Returns the index of the rental to search next: the first in order. Until a plan has been
    found, it is instead the one whose bound serves the terms best, as later ones are measured by
    its plan; for the whole front always the first."""
    if seen.plans or question.whole_front:
        return 0
    return min(range(len(ahead)), key=lambda index: merit(ahead[index].bound, question.terms))


def _numbered(tell: Progress, number: int, of: int) -> Progress:
    return lambda what, done, whole: tell(f"choice {number} of {of}: {what}", done, whole)


def _needless(question: _Question, rental: _Rental, seen: _Searched) -> str:
    """Returns the reason why a rental need not be searched; empty if it must be."""
    if any(within(rental.counts, misfit) for misfit in seen.misfits):
        return NO_ROOM
    if _answered(rental.counts, seen):
        return ANSWERED
    plans = seen.plans.values()
    best = _best_merit(question, seen)
    if best is None or merit(rental.bound, question.terms) < best:
        return ""
    if not question.whole_front:
        return WORSE
    return DOMINATED if any(dominates(each.outcome, rental.bound) for each in plans) else ""


def _answered(counts: Counts, seen: _Searched) -> bool:
    """True if the plan that was found for a larger rental uses only devices of this one, and not
    all of them: then it is the best plan here too. A rental of exactly the devices that it uses is
    still searched, since a search among fewer devices may find more."""
    return any(
        counts != used and within(used, counts) and within(counts, of) for used, of in seen.answered
    )


def _best_merit(question: _Question, seen: _Searched) -> Merit | None:
    merits = (merit(each.outcome, question.terms) for each in seen.plans.values())
    return min(merits, default=None)


def _search(
    question: _Question,
    classes: tuple[NodeClass, ...],
    counts: Counts,
    rented: Cluster,
    seen: _Searched,
    to_come: int,
) -> None:
    """Searches a plan for a rental, with its share of the time that is left. Raises FitError if
    there is none, and PlanError if it was interrupted before there was any plan at all."""
    left = None
    if question.deadline is not None:
        left = max(question.deadline - time.monotonic(), LEAST_SECONDS) / to_come
    try:
        plan = find_plan(
            question.model,
            rented,
            question.job,
            question.profile,
            forbidden=question.forbidden,
            budget_seconds=left,
            progress=question.tell,
            stop=question.stop,
        )
    except FitError:
        seen.misfits.append(counts)
        seen.searched += 1
        raise
    except PlanError:
        if not seen.plans and (question.over or to_come == 1):
            raise
        seen.skipped[NO_TIME] += 1
        return
    seen.searched += 1
    _keep(question, classes, counts, _for_whole_cluster(plan, question.cluster, rented), seen)


def _keep(
    question: _Question, classes: tuple[NodeClass, ...], counts: Counts, plan: Plan, seen: _Searched
) -> None:
    """Records the plan of a rental under the devices that it uses."""
    assert plan.prediction is not None, "a search predicts what it finds"
    reached = plan_outcome(question.prices, plan, plan.prediction.step_seconds)
    used = used_counts(classes, plan.devices)
    known = seen.plans.get(used)
    if known is None or reached.step_seconds < known.outcome.step_seconds:
        seen.plans[used] = RentedPlan(plan=plan, outcome=reached)
    seen.answered.append((used, counts))


def _for_whole_cluster(plan: Plan, cluster: Cluster, rented: Cluster) -> Plan:
    """Returns the plan of a rental as one of its cluster. The bound of its step is left out, for it
    holds for the rental alone."""
    if rented == cluster or plan.prediction is None:
        return plan
    known = replace(plan.cluster, fingerprint=cluster_fingerprint(cluster))
    prediction = replace(plan.prediction, lower_bound_seconds=None, bound_reason="")
    return replace(plan, cluster=known, prediction=prediction)


def _choice(
    question: _Question, classes: tuple[NodeClass, ...], seen: _Searched, considered: int
) -> RentalChoice:
    found = sorted(
        seen.plans.values(),
        key=lambda each: (each.outcome.step_seconds, each.outcome.expense.per_token),
    )
    return RentalChoice(
        best=min(found, key=lambda each: merit(each.outcome, question.terms)),
        found=tuple(found),
        front=front([each.outcome for each in found]),
        choices=every_choice(classes),
        considered=considered,
        searched=seen.searched,
        skipped={reason: count for reason, count in sorted(seen.skipped.items()) if count},
    )
