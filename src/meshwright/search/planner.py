"""Finds the plan: candidates, layer cuts, ranking in closed form, and a play-off in the simulator.

few devices: the best regular pipeline, then everything else exhaustively or by improving
many devices: classes of nodes -> templates -> rank -> simulate
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from meshwright.cluster.spec import Cluster, cluster_fingerprint
from meshwright.cost.memory import device_memory, total_bytes
from meshwright.cost.profile import Profile
from meshwright.errors import MeshwrightError, PlanError, Problem
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Job, Plan, Prediction, RunnerUp, ScheduleName
from meshwright.search.baselines import BASELINES, HandMade, best_by_hand
from meshwright.search.candidate import plan_of, strategy_label
from meshwright.search.certificate import EXHAUSTIVE, Certificate, certificate, certificate_in_haste
from meshwright.search.costs import Costs, costs_of
from meshwright.search.exact import LIMIT, space_size
from meshwright.search.explain import (
    misfit_as_runner_up,
    nothing_fits,
    pipeline_title,
    why_slower,
)
from meshwright.search.finishing import finish
from meshwright.search.first_plan import plain_plan
from meshwright.search.garbage_collection import rare_collections
from meshwright.search.hill_climb import LocalSearch
from meshwright.search.incumbent import (
    SAME,
    Evaluated,
    Incumbent,
    Progress,
    chosen,
    ignore,
    parts_in,
    pieces,
    simulate_and_record,
    step_of,
    work_of,
)
from meshwright.search.inputs import check_inputs
from meshwright.search.local_search import improve, regular_steps
from meshwright.search.options import options_without
from meshwright.search.options.boundary_kinds import OPTION as BOUNDARY_KINDS
from meshwright.search.options.boundary_kinds import wide_cuts, with_boundaries
from meshwright.search.regular import (
    Explored,
    RegularPipeline,
    explore,
    nearest_misfits,
    promise,
    sample,
)
from meshwright.search.space import is_large, usable_devices
from meshwright.stopping import Stopped, never, stoppable

SIMULATED_WORK = 80_000
"""Most work of a hand-made plan that is simulated."""

MOST_BY_HAND = 20_000
"""Devices up to which hand-made plans are compared with: beyond them they take longer than the
search. AMP's own algorithm does where devices are counted by class."""

HOPELESS, MOST_HOPELESS = 1.25, 8_000
"""A plan that takes more than HOPELESS times the best plan's seconds, in closed form, is only
simulated if that is less work than MOST_HOPELESS."""

INTERRUPTED = "all that was left when the search was interrupted"
"""The reason why a search that the user has stopped did not look further."""

PROOF_SECONDS = 1.0
"""How long a certificate may take that an interrupted search has not worked out before."""

MISFITS_SHOWN = 3
MISFITS_TRIED = 200
"""Plans without enough memory that further options may make fit, where no other plan fits."""

RUNNERS_UP, ALIKE = 6, 3
"""Runners-up that are told, and those of them that have the same widths and depths."""


@rare_collections()
def find_plan(  # noqa: PLR0913 - options, each with a default
    model: LayerGraph,
    cluster: Cluster,
    job: Job,
    profile: Profile | None = None,
    *,
    schedules: Sequence[ScheduleName] = ("1f1b", "gpipe"),
    forbidden: Collection[str] = (),
    progress: Progress | None = None,
    budget_seconds: float | None = None,
    margin: float = 0.0,
    stop: Callable[[], bool] = never,
    found: Callable[[float], None] = ignore,
) -> Plan:
    """Finds the fastest plan by Meshwright's own costs, with its prediction and certificate.

    `schedules` are those that every candidate is tried in; the best are then tried with every
    option of `search.options` whose name is not `forbidden`. Without `budget_seconds`
    the same input gives the same plan, byte for byte; with it, the best plan found when the time
    was up, or the first one that fits if that takes a moment longer. `stop` is asked several times
    a second; once it says yes, the search ends at once in the same way. `found` is told the step
    seconds of every plan that is the best so far. Of plans within `margin` of the fastest one, a
    share, it returns one with few, large pieces of work (see `chosen`). Raises FitError when
    nothing fits, saying by how much and what would help; ClusterError when no device offers the
    job's precision or a link carries nothing; PlanError when job and model disagree, are too large,
    or the search had to end before a plan was found.
    """
    deadline = None if budget_seconds is None else time.monotonic() + budget_seconds
    check_inputs(model, cluster, job)
    options = options_without(forbidden)
    scatters = BOUNDARY_KINDS in options
    costs = costs_of(model, cluster, job, profile, recomputation=True, scatters=scatters)
    incumbent = Incumbent(
        costs,
        cluster_fingerprint(cluster),
        deadline,
        grace_seconds=budget_seconds or 0.0,
        stop=stop,
        found=found,
        margin=margin,
        any_order=any(option.name == "schedules" for option in options),
    )
    tell = progress or (lambda _what, _done, _all: None)
    seen = _Seen()
    with suppress(Stopped), stoppable(incumbent.may_leave_off):
        _search(incumbent, seen, schedules, tell)
        seen.best_without_options = incumbent.best
        if incumbent.best is None:
            incumbent.misfits = _misfit_plans(incumbent, seen.explored)
        finish(incumbent, options, tell)
    if incumbent.best is None and incumbent.spare:
        incumbent.best = incumbent.spare
        incumbent.others.append(incumbent.spare)
    if incumbent.best is None:
        raise _nothing(incumbent, seen.explored)
    return _found(incumbent, seen)


@dataclass(slots=True)
class _Seen:
    """Keeps what a search has found out without simulating it."""

    explored: Explored = Explored()
    by_hand: list[HandMade] = field(default_factory=list)
    exhausted: bool = False
    """Every plan of the space was looked at."""
    best_without_options: Evaluated | None = None
    """The best plan before further options were tried."""
    proof: Certificate | None = None
    """The certificate, worked out during the search so that an interrupting user need not wait."""


def _search(
    incumbent: Incumbent, seen: _Seen, schedules: Sequence[ScheduleName], tell: Progress
) -> None:
    """Searches all but the options; `incumbent` and `seen` keep what is found."""
    costs, search = incumbent.costs, LocalSearch(incumbent, schedules)
    unable = len(costs.devices) - len(usable_devices(costs))
    incumbent.pruned[f"devices that do not offer {costs.job.precision}"] += unable
    if is_large(costs):
        tell("looking for a first plan", 0, 1)
        incumbent.spare = plain_plan(incumbent)
        if incumbent.spare:
            incumbent.found(incumbent.spare.seconds)
        tell("looking for a first plan", 1, 1)
    else:
        search.left = regular_steps(costs)
        seen.explored = explore(search, tell)
        _play_first(incumbent, seen.explored)
    if (incumbent.best or incumbent.spare) and space_size(costs) > LIMIT:
        tell("bounding", 0, 1)
        seen.proof = certificate(costs)
        tell("bounding", 1, 1)
    seen.exhausted = improve(search, tell)
    seen.by_hand = _all_by_hand(incumbent)
    _play_by_hand(incumbent, [each for each in seen.by_hand if each.fits], tell)


def _found(incumbent: Incumbent, seen: _Seen) -> Plan:
    """Returns the chosen plan with its prediction, its runners-up and its certificate."""
    costs = incumbent.costs
    if incumbent.stopped:
        incumbent.pruned[INTERRUPTED] += 1
    winner = chosen(incumbent)
    evaluated = {each.name for each in incumbent.others}
    misfits = _misfits(costs, winner.seconds, evaluated, seen)
    before = seen.best_without_options
    settled = seen.exhausted and before and winner.seconds >= before.seconds * (1 - SAME)
    proof = Certificate(winner.seconds, EXHAUSTIVE) if settled else _proof(incumbent, seen)
    return _with_prediction(incumbent, winner, [*_runners_up(incumbent, winner), *misfits], proof)


def _proof(incumbent: Incumbent, seen: _Seen) -> Certificate:
    """Returns the certificate; if the user has interrupted the search before it was worked out, one
    that takes no time."""
    if seen.proof is not None:
        return seen.proof
    limit = time.monotonic() + PROOF_SECONDS
    with suppress(Stopped), stoppable(lambda: incumbent.stopped and time.monotonic() > limit):
        return certificate(incumbent.costs)
    return certificate_in_haste(incumbent.costs)


def _play_first(incumbent: Incumbent, explored: Explored) -> None:
    """Simulates the best regular pipeline."""
    if explored.best:
        schedule, pipelines = explored.best
        plan = plan_of(incumbent.costs, pipelines, schedule, incumbent.cluster_print)
        title = strategy_label(incumbent.costs, pipelines, schedule)
        simulate_and_record(incumbent, plan, title)


def _misfit_plans(incumbent: Incumbent, explored: Explored) -> tuple[Plan, ...]:
    costs, mark = incumbent.costs, incumbent.cluster_print
    nearest = nearest_misfits(costs, explored.misfits[:MISFITS_TRIED])
    return tuple(plan_of(costs, (pipeline,), "1f1b", mark) for pipeline in nearest)


def _nothing(incumbent: Incumbent, explored: Explored) -> MeshwrightError:
    """Says why there is no plan: nothing fits, or the search had to end before anything was
    found."""
    with suppress(Stopped), stoppable(incumbent.may_leave_off):
        if not incumbent.out_of_time:
            misfits = explored.misfits or tuple(sample(incumbent.costs))
            nearest = nearest_misfits(incumbent.costs, misfits)
            return nothing_fits(incumbent.costs, nearest, len(misfits))
    if incumbent.stopped:
        where, found, mend = "interrupted", "no plan that fits so far", "let it search for longer"
    else:
        where, found = "budget", "no plan that fits when the time was up"
        mend = "give it more time, or no budget"
    wanted, mend = "time for at least one plan", f"{mend}: then it says by how much nothing fits"
    return PlanError(Problem("search", where, found, wanted, mend))


def _play_by_hand(incumbent: Incumbent, field: Sequence[HandMade], tell: Progress) -> None:
    """Simulates hand-made plans, unless that is much work."""
    for index, each in enumerate(field):
        tell("simulating", index, len(field))
        if incumbent.best and incumbent.out_of_time:
            incumbent.pruned["beyond the budget"] += len(field) - index
            break
        plan = plan_of(incumbent.costs, (each.pipeline,), "1f1b", incumbent.cluster_print)
        plan = with_boundaries(plan, wide_cuts(plan), None)  # as people write them
        hopeless = incumbent.best and each.seconds > HOPELESS * incumbent.best.seconds
        most = MOST_HOPELESS if hopeless else SIMULATED_WORK
        if incumbent.best and work_of(incumbent.costs, plan) > most:
            incumbent.pruned["too much to simulate"] += 1
        else:
            simulate_and_record(incumbent, plan, _title(incumbent.costs, each))
    tell("simulating", len(field), len(field))


def _title(costs: Costs, by_hand: HandMade) -> str:
    return f"{by_hand.name}: {pipeline_title(costs, by_hand.pipeline)}"


def _all_by_hand(incumbent: Incumbent) -> list[HandMade]:
    found = []
    for name in BASELINES:
        many = len(incumbent.costs.devices) > MOST_BY_HAND
        if many or (name == "amp" and is_large(incumbent.costs)):
            incumbent.pruned[f"{name}, which takes longer than the search here"] += 1
        elif incumbent.out_of_time:
            incumbent.pruned["hand-made plans beyond the budget"] += 1
        else:
            found.append(best_by_hand(incumbent.costs, name))
    return [best for best in found if best is not None]


def _misfits(
    costs: Costs, seconds: float, evaluated: Container[str], seen: _Seen
) -> Iterator[RunnerUp]:
    """Yields the hand-made plans that do not fit or were too much to simulate, and regular
    pipelines that promise to be faster if they did fit: the first of each widths and depth."""
    for each in seen.by_hand:
        title = _title(costs, each)
        if not each.fits:
            yield misfit_as_runner_up(costs, each.pipeline, title)
        elif title not in evaluated:
            reason = "in closed form, too much to simulate"
            yield RunnerUp(name=title, step_seconds=each.seconds, reason=reason)
    faster: dict[object, RegularPipeline] = {}
    for misfit in seen.explored.misfits:
        if promise(costs, misfit) < seconds:
            faster.setdefault(misfit.widths, misfit)
    for pipeline in nearest_misfits(costs, list(faster.values())[:MISFITS_SHOWN]):
        yield misfit_as_runner_up(costs, pipeline)


def baseline_plan(
    name: str, model: LayerGraph, cluster: Cluster, job: Job, profile: Profile | None = None
) -> Plan:
    """Returns the plan that a person (`ddp`, `even`) or AMP (`amp`) would have made, with its
    prediction.

    Raises FitError when it does not fit, PlanError when the name or the job allows no such plan.
    """
    check_inputs(model, cluster, job)
    if name not in BASELINES:
        wanted = " or ".join(repr(known) for known in BASELINES)
        raise PlanError(Problem("baseline", "name", repr(name), wanted))
    costs = costs_of(model, cluster, job, profile, recomputation=True)
    found = best_by_hand(costs, name)
    if found is None:
        raise PlanError(
            Problem(
                f"baseline {name}",
                "cluster",
                f"{len(usable_devices(costs))} devices, {job.global_batch} rows, "
                f"{len(model.layers)} layers",
                "a batch, nodes and layers that can be shared out evenly",
            )
        )
    if not found.fits:
        raise nothing_fits(costs, [found.pipeline], 1)
    incumbent = Incumbent(costs, cluster_fingerprint(cluster))
    _play_by_hand(incumbent, [found], lambda _what, _done, _all: None)
    assert incumbent.best is not None, "the first plan is always played"
    return _with_prediction(incumbent, incumbent.best, [], certificate(costs))


def _runners_up(incumbent: Incumbent, winner: Evaluated) -> list[RunnerUp]:
    """Returns the best of those that lost, few of one build; hand-made plans always."""
    found: list[Evaluated] = []
    names, builds = {winner.name}, Counter[str]()
    for other in sorted(incumbent.others, key=lambda p: p.seconds):
        hand_made = other.name.split(":")[0] in BASELINES
        room = len(found) < RUNNERS_UP and builds[other.plan.name] < ALIKE
        if other is not winner and (hand_made or (room and other.name not in names)):
            names.add(other.name)
            builds[other.plan.name] += 1
            found.append(other)
    return [
        RunnerUp(
            name=other.name, step_seconds=other.seconds, reason=_why_lost(incumbent, winner, other)
        )
        for other in found
    ]


def _why_lost(incumbent: Incumbent, winner: Evaluated, other: Evaluated) -> str:
    """Says what a strategy spends more time on. Once the search is stopped, no further step is
    simulated for this."""
    if other.plan == winner.plan:
        return "the same plan"
    if other.seconds < winner.seconds * (1 - SAME):
        more = pieces(other.plan.pipelines) / pieces(winner.plan.pipelines)
        gain = f"faster by {winner.seconds / other.seconds - 1:.1%}"
        return f"{gain}, less than predictions tell apart, with {more:.2g}x the pieces of work"
    if incumbent.stopped and step_of(incumbent, other) is None:
        return "slower in the simulator"
    return why_slower(parts_in(incumbent, winner), parts_in(incumbent, other))


def _with_prediction(
    incumbent: Incumbent, evaluated: Evaluated, others: list[RunnerUp], proof: Certificate
) -> Plan:
    costs = incumbent.costs
    memory = device_memory(evaluated.plan, costs.model, costs.cluster)
    overfull = [m for m in memory if total_bytes(m) > m.capacity]
    assert not overfull, "the closed form and the final check of memory disagree"
    return replace(
        evaluated.plan,
        prediction=Prediction(
            step_seconds=evaluated.seconds,
            parts=parts_in(incumbent, evaluated),
            memory=memory,
            runners_up=tuple(others),
            dropped={reason: count for reason, count in sorted(incumbent.pruned.items()) if count},
            lower_bound_seconds=min(proof.seconds, evaluated.seconds),
            bound_reason=proof.reason,
        ),
    )
