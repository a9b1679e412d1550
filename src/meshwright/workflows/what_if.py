"""Answers what-if questions: plans again for an edited cluster, and compares."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from meshwright.cluster.edit import EditedCluster, edit_cluster
from meshwright.cluster.figures import cluster_warnings
from meshwright.cluster.spec import Cluster
from meshwright.cost.links import with_measured_links
from meshwright.cost.out_of_memory import memory_problems
from meshwright.cost.profile import LinkTimes, Profile
from meshwright.errors import FitError, MeshwrightError, PlanError, Problem
from meshwright.money.outcomes import (
    ClusterPrices,
    cluster_prices,
    merit,
    misses,
    plan_outcome,
)
from meshwright.money.spec import MoneyTerms, Outcome
from meshwright.plan.spec import Plan, PlanInput
from meshwright.plan.validate import validate_plan
from meshwright.records import record
from meshwright.report.expenses import prices_text
from meshwright.report.resources import named_loads
from meshwright.report.whatif import WhatIf, WhatIfOption, what_if_option
from meshwright.search.incumbent import Progress
from meshwright.simulate.plan_figures import simulate_figures
from meshwright.stopping import never
from meshwright.workflows.rent import rent
from meshwright.workflows.session import (
    NO_LIMITS,
    SearchLimits,
    Session,
    priced,
    search_plan,
    simulate_priced,
)

_TIMED = ("peak", "memory_bandwidth", "matmul_", "attention_", "memory_efficiency")


@record
class ClusterEdits:
    """Lists edits of a cluster as the command line writes them."""

    without: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


def what_if(
    session: Session,
    plan: Plan,
    edits: ClusterEdits,
    limits: SearchLimits = NO_LIMITS,
    terms: MoneyTerms | None = None,
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] = never,
) -> tuple[WhatIf, Cluster]:
    """Returns what the edits gain, and the edited cluster.

    A plan is searched for each of the two clusters, within the same `limits`, and by the same
    `terms` if there are any; `progress` is told of both searches, and `stop` ends both. Raises
    ClusterError for edits at fault, PlanError if there are none, if measured times override one, or
    if a search ended before it had found a plan, FitError if no plan fits the edited cluster, and
    MoneyError for prices at fault.
    """
    _check(session, edits)
    base = _with_own_links(session)
    change = edit_cluster(
        base.cluster, without=edits.without, added=edits.added, settings=edits.settings
    )
    other = replace(base, cluster=change.cluster)
    here, there = _judge(base, other, terms), _judge(other, base, terms)
    before = _best_plan(base, here, limits, progress, stop)
    now = [
        _simulated("this plan, cluster as it is", base, plan, here),
        _simulated("best plan, cluster as it is", base, before, here),
    ]
    after = _best_plan(other, there, limits, progress, stop)
    found = _simulated("best plan, edited cluster", other, after, there)
    kept = _kept(other, plan, there)
    keep = kept.step_seconds is not None and _merit(kept, there) < _merit(found, there)
    best = simulate_figures("best", priced(other, _free(plan) if keep else after))
    ahead = min(now, key=lambda each: _merit(each, here))
    return WhatIf(
        edits=_notes(base.cluster, edits, change),
        options=(*now, kept, found),
        seconds_before=ahead.step_seconds or 0.0,
        seconds_after=best.figures.step_seconds,
        best=best.plan,
        busiest=next(iter(named_loads(best.figures.links)), None),
        prices=prices_text(terms.prices) if terms else None,
        expense_before=ahead.expense,
        expense_after=(kept if keep else found).expense,
    ), change.cluster


@dataclass(frozen=True, slots=True)
class _Judge:
    """Says what plans for one of the two clusters are judged by: by seconds alone, or by a user's
    terms."""

    terms: MoneyTerms | None = None
    prices: ClusterPrices | None = None


def _judge(session: Session, other: Session, terms: MoneyTerms | None) -> _Judge:
    if terms is None:
        return _Judge()
    return _Judge(terms, cluster_prices(terms.prices, session.cluster, other.cluster))


def _best_plan(
    session: Session,
    judge: _Judge,
    limits: SearchLimits,
    progress: Progress | None,
    stop: Callable[[], bool],
) -> Plan:
    """Returns the plan that a search finds for a cluster, by the terms if there are any."""
    terms, prices = judge.terms, judge.prices
    if terms is None or prices is None or not terms.choose:
        return search_plan(session, limits, progress=progress, stop=stop)
    return rent(session, terms, prices, limits, progress=progress, stop=stop).best.plan


def _merit(option: WhatIfOption, judge: _Judge) -> tuple[float, ...]:
    """Returns the key by which options are compared; the best option has the least."""
    if judge.terms is None or option.expense is None or option.tokens_per_second is None:
        return (option.step_seconds or math.inf,)
    outcome = Outcome(
        step_seconds=option.step_seconds or math.inf,
        tokens_per_second=option.tokens_per_second,
        expense=option.expense,
    )
    return merit(outcome, judge.terms)


def _notes(before: Cluster, edits: ClusterEdits, change: EditedCluster) -> tuple[str, ...]:
    """Returns what was edited and assumed, and the warnings of figures that come with it."""
    known = cluster_warnings(before)
    doubts = [each for each in cluster_warnings(change.cluster) if each not in known]
    return (*change.notes, *(f"set {each}" for each in edits.settings), *doubts)


def _simulated(name: str, session: Session, plan: Plan, judge: _Judge) -> WhatIfOption:
    """Returns the line of a plan on the cluster of a session."""
    seconds = simulate_priced(priced(session, plan)).step_seconds
    option = what_if_option(name, plan, seconds)
    if judge.terms is None or judge.prices is None:
        return option
    outcome = plan_outcome(judge.prices, plan, seconds)
    return replace(option, expense=outcome.expense, misses=misses(outcome, judge.terms))


def _check(session: Session, edits: ClusterEdits) -> None:
    if not (edits.without or edits.added or edits.settings):
        wanted = "at least one of --set, --without and --add"
        raise PlanError(Problem("whatif", "", "nothing to change", wanted))
    timed = {layer.device for layer in session.profile.layers} if session.profile else set()
    PlanError.check(
        Problem(
            "--set",
            each.partition("=")[0],
            f"a figure that measured times replace ({session.profile_source})",
            "memory, or a figure of a device type that was not measured",
            "ask it of a plan that was made without --profile",
        )
        for each in edits.settings
        for name in timed
        for figure in _TIMED
        if each.strip().startswith(f"device.{name}.{figure}")
    )


def _with_own_links(session: Session) -> Session:
    """Moves measured links into the cluster, so that an edit can change them."""
    profile = session.profile
    if profile is None or profile.links is None:
        return session
    kept: Profile = replace(
        profile, links=LinkTimes(all_reduce_latency=profile.links.all_reduce_latency)
    )
    cluster = with_measured_links(session.cluster, profile.links)
    return replace(session, cluster=cluster, profile=kept)


def _kept(session: Session, plan: Plan, judge: _Judge) -> WhatIfOption:
    """Returns the line of the unchanged plan on the edited cluster, or the reason why it cannot run
    there."""
    name = "this plan, edited cluster"
    free = _free(plan)
    try:
        validate_plan(free, session.model, session.cluster, source=plan.name)
        FitError.check(memory_problems(free, session.model, session.cluster))
    except MeshwrightError as failure:
        problem = failure.problems[0]
        field = f"{problem.field}: " if problem.field else ""
        return WhatIfOption(name=name, reason=f"cannot: {field}{problem.found}")
    return _simulated(name, session, free, judge)


def _free(plan: Plan) -> Plan:
    """Returns the plan without its cluster and its prediction."""
    return replace(plan, cluster=PlanInput(name="", fingerprint=""), prediction=None)
