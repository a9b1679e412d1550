"""Answers what-if questions: plans again for an edited cluster, and compares."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from meshwright.cluster.edit import EditedCluster, edit_cluster
from meshwright.cluster.figures import cluster_warnings
from meshwright.cluster.spec import Cluster
from meshwright.cost.links import with_measured_links
from meshwright.cost.out_of_memory import memory_problems
from meshwright.cost.profile import LinkTimes, Profile
from meshwright.errors import FitError, MeshwrightError, PlanError, Problem
from meshwright.plan.spec import Plan, PlanInput
from meshwright.plan.validate import validate_plan
from meshwright.records import record
from meshwright.report.resources import named_loads
from meshwright.report.whatif import WhatIf, WhatIfOption, what_if_option
from meshwright.search.explore import Progress
from meshwright.simulate.plan_figures import simulate_figures
from meshwright.stopping import never
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
    """Edits of a cluster, as the command line writes them."""

    without: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


def what_if(
    session: Session,
    plan: Plan,
    edits: ClusterEdits,
    limits: SearchLimits = NO_LIMITS,
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] = never,
) -> tuple[WhatIf, Cluster]:
    """Returns what the edits gain, and the edited cluster.

    A plan is searched for each of the two clusters, within the same `limits`; `progress` is told of
    both searches, and `stop` ends both. Raises ClusterError for edits at fault, PlanError if there
    are none, if measured times override one, or if a search ended before it had found a plan, and
    FitError if no plan fits the edited cluster.
    """
    _check(session, edits)
    base = _with_own_links(session)
    change = edit_cluster(
        base.cluster, without=edits.without, added=edits.added, settings=edits.settings
    )
    other = replace(base, cluster=change.cluster)
    before = search_plan(base, limits, progress=progress, stop=stop)
    now = [
        _simulated("this plan, cluster as it is", base, plan),
        _simulated("best plan, cluster as it is", base, before),
    ]
    after = search_plan(other, limits, progress=progress, stop=stop)
    found = _simulated("best plan, edited cluster", other, after)
    kept = _kept(other, plan)
    keep = (kept.step_seconds or math.inf) < (found.step_seconds or math.inf)
    best = simulate_figures("best", priced(other, _free(plan) if keep else after))
    return WhatIf(
        edits=_notes(base.cluster, edits, change),
        options=(*now, kept, found),
        seconds_before=min(each.step_seconds for each in now if each.step_seconds),
        seconds_after=best.figures.step_seconds,
        best=best.plan,
        busiest=next(iter(named_loads(best.figures.links)), None),
    ), change.cluster


def _notes(before: Cluster, edits: ClusterEdits, change: EditedCluster) -> tuple[str, ...]:
    """Returns what was edited and assumed, and the warnings of figures that come with it."""
    known = cluster_warnings(before)
    doubts = [each for each in cluster_warnings(change.cluster) if each not in known]
    return (*change.notes, *(f"set {each}" for each in edits.settings), *doubts)


def _simulated(name: str, session: Session, plan: Plan) -> WhatIfOption:
    """Returns the line of a plan on the cluster of a session."""
    return what_if_option(name, plan, simulate_priced(priced(session, plan)).step_seconds)


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


def _kept(session: Session, plan: Plan) -> WhatIfOption:
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
    return what_if_option(name, plan, simulate_priced(priced(session, free)).step_seconds)


def _free(plan: Plan) -> Plan:
    """Returns the plan without its cluster and its prediction."""
    return replace(plan, cluster=PlanInput(name="", fingerprint=""), prediction=None)
