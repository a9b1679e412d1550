"""Finds the plan: candidates, layer cuts, ranking in closed form, and a play-off in the simulator.

regular grids: space -> candidates -> partition -> rank -> simulate
everything else: small inputs exhaustively, large ones by composing and improving -> certificate
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from meshwright.cluster.spec import Cluster
from meshwright.cost.memory import device_memory, total_bytes
from meshwright.cost.profile import Profile
from meshwright.errors import PlanError, Problem
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Job, Plan, Prediction, RunnerUp, ScheduleName
from meshwright.records import fingerprint
from meshwright.search.baselines import BASELINES
from meshwright.search.certificate import EXHAUSTIVE, Certificate, certificate
from meshwright.search.contest import SAME, Contest, Played, enter, parts_in
from meshwright.search.costs import Costs, costs_of
from meshwright.search.estimate import Estimate, Misfit, optimistic_seconds
from meshwright.search.explain import (
    as_plan,
    label,
    misfits_as_runners_up,
    nothing_fits,
    why_misfit,
    why_slower,
)
from meshwright.search.explore import (
    ALIKE,
    MANY_DEVICES,
    Explored,
    Progress,
    best_by_hand,
    candidates_of,
    explore,
    whole,
)
from meshwright.search.improve import improve
from meshwright.search.schedule import reschedule

SIMULATED_WORK = 80_000
"""Devices x micro-batches, over all finalists of the regular grids: on large clusters the simulator
ranks fewer of them, but never less than two."""

MISFITS_SHOWN = 3
RUNNERS_UP = 6


def find_plan(
    model: LayerGraph,
    cluster: Cluster,
    job: Job,
    profile: Profile | None = None,
    *,
    schedules: Sequence[ScheduleName] = ("1f1b", "gpipe"),
    progress: Progress | None = None,
    budget_seconds: float | None = None,
) -> Plan:
    """The fastest plan found by Meshwright's own costs, with its prediction and certificate.

    Without `budget_seconds` the same input gives the same plan, byte for byte; with it, the best
    plan found when the time was up (regular grids are always ranked to the end). Raises FitError
    when nothing fits, saying by how much and what would help; ClusterError when no device offers
    the job's precision; PlanError when job and model disagree.
    """
    deadline = None if budget_seconds is None else time.monotonic() + budget_seconds
    _check_job(model, job)
    costs = costs_of(model, cluster, job, profile)
    tell = progress or (lambda _what, _done, _all: None)
    contest = Contest(costs, fingerprint(cluster), deadline)
    explored = explore(
        costs, candidates_of(costs, schedules, contest.dropped), contest.dropped, tell
    )
    by_hand = _all_by_hand(costs, contest.dropped)
    _regular(contest, explored, by_hand, tell)
    exhausted = improve(contest, schedules, tell)
    if contest.best is None:
        raise nothing_fits(costs, explored.misfits, explored.tried)
    reschedule(contest, tell)
    winner = _simplest(contest)
    misfits = _misfits(costs, winner.seconds, by_hand, explored)
    covered = exhausted and winner.plan.schedule in schedules
    proof = Certificate(winner.seconds, EXHAUSTIVE) if covered else certificate(costs)
    return _with_prediction(contest, winner, [*_runners_up(contest, winner), *misfits], proof)


def _simplest(contest: Contest) -> Played:
    """Of the strategies that are as good as the best, one with the fewest pipelines and stages."""

    def parts(played: Played) -> tuple[int, int]:
        pipelines = played.plan.pipelines
        return len(pipelines), sum(len(pipeline.stages) for pipeline in pipelines)

    assert contest.best is not None
    limit = contest.best.seconds * (1 + SAME)
    return min((p for p in contest.others if p.seconds <= limit), key=parts)


def _regular(
    contest: Contest,
    explored: Explored,
    by_hand: Sequence[tuple[str, Estimate | Misfit]],
    tell: Progress,
) -> None:
    """Play the finalists of the regular grids and the hand-made plans that fit."""
    field = [("", estimate) for estimate in _affordable(explored.finalists)]
    field += [(name, found) for name, found in by_hand if isinstance(found, Estimate)]
    for index, (name, estimate) in enumerate(field):
        tell("simulating", index, len(field))
        _play(contest, estimate, name)
    tell("simulating", len(field), len(field))


def _all_by_hand(costs: Costs, dropped: Counter[str]) -> list[tuple[str, Estimate | Misfit]]:
    if len(costs.devices) > MANY_DEVICES:
        dropped[f"hand-made plans, which are not compared above {MANY_DEVICES} devices"] += 1
        return []
    found = ((name, best_by_hand(costs, name, whole(costs))) for name in BASELINES)
    return [(name, best) for name, best in found if best is not None]


def _misfits(
    costs: Costs,
    seconds: float,
    by_hand: Iterable[tuple[str, Estimate | Misfit]],
    explored: Explored,
) -> Iterable[RunnerUp]:
    """Hand-made plans that do not fit, and strategies that could be faster if they did."""
    for name, found in by_hand:
        if isinstance(found, Misfit):
            title = f"{name}: {label(found.candidate, found.bounds)}"
            yield RunnerUp(name=title, reason=why_misfit(costs, found))
    faster = (m for m in explored.misfits if optimistic_seconds(costs, m.candidate) < seconds)
    yield from misfits_as_runners_up(costs, faster, MISFITS_SHOWN)


def baseline_plan(
    name: str,
    model: LayerGraph,
    cluster: Cluster,
    job: Job,
    profile: Profile | None = None,
) -> Plan:
    """The plan that a person (`ddp`, `even`) or AMP (`amp`) would have made, with its prediction.

    Raises FitError when it does not fit, PlanError when the name or the job allows no such plan.
    """
    _check_job(model, job)
    if name not in BASELINES:
        wanted = " or ".join(repr(known) for known in BASELINES)
        raise PlanError(Problem("baseline", "name", repr(name), wanted))
    costs = costs_of(model, cluster, job, profile)
    found = best_by_hand(costs, name, whole(costs))
    if found is None:
        raise PlanError(
            Problem(
                f"baseline {name}",
                "cluster",
                f"{len(whole(costs).devices)} devices, {job.global_batch} rows, "
                f"{len(model.layers)} layers",
                "a batch, nodes and layers that can be shared out evenly",
            )
        )
    if isinstance(found, Misfit):
        raise nothing_fits(costs, [found], 1)
    contest = Contest(costs, fingerprint(cluster))
    return _with_prediction(contest, _play(contest, found, name), [], certificate(costs))


def _check_job(model: LayerGraph, job: Job) -> None:
    problems = []
    if job.global_batch < 1:
        problems.append(Problem("job", "global_batch", str(job.global_batch), "at least 1"))
    if not model.layers:
        problems.append(Problem(f"model {model.name}", "layers", "none", "at least one layer"))
    for name, found, wanted in (
        ("sequence", job.sequence, model.sequence),
        ("precision", job.precision, model.precision),
    ):
        if found != wanted:
            problems.append(
                Problem(
                    "job",
                    name,
                    str(found),
                    f"{wanted}, for which model {model.name} was described",
                    "describe the model again for this job",
                )
            )
    PlanError.check(problems)


def _affordable(finalists: tuple[Estimate, ...]) -> list[Estimate]:
    """As many of the best as SIMULATED_WORK allows."""
    chosen: list[Estimate] = []
    work = 0
    for estimate in finalists:
        shape = estimate.candidate.shape
        work += len(estimate.candidate.used.devices) * shape.micro_batches
        if len(chosen) >= 2 and work > SIMULATED_WORK:
            break
        chosen.append(estimate)
    return chosen


def _play(contest: Contest, estimate: Estimate, name: str) -> Played:
    plan = as_plan(contest.costs, estimate.candidate, estimate.bounds, contest.cluster_print)
    title = label(estimate.candidate, estimate.bounds)
    return enter(contest, plan, f"{name}: {title}" if name else title)


def _runners_up(contest: Contest, winner: Played) -> list[RunnerUp]:
    """The best of those that lost, few of one build; hand-made plans always."""
    chosen: list[Played] = []
    names, builds = {winner.name}, Counter[str]()
    for other in sorted(contest.others, key=lambda p: p.seconds):
        hand_made = other.name.split(":")[0] in BASELINES
        room = len(chosen) < RUNNERS_UP and builds[other.plan.name] < ALIKE
        if other is not winner and (hand_made or (room and other.name not in names)):
            names.add(other.name)
            builds[other.plan.name] += 1
            chosen.append(other)
    parts = parts_in(contest.costs, winner.plan)
    return [
        RunnerUp(
            name=other.name,
            step_seconds=other.seconds,
            reason="the same plan"
            if other.plan == winner.plan
            else why_slower(parts, parts_in(contest.costs, other.plan)),
        )
        for other in chosen
    ]


def _with_prediction(
    contest: Contest, played: Played, others: list[RunnerUp], proof: Certificate
) -> Plan:
    costs = contest.costs
    memory = device_memory(played.plan, costs.model, costs.cluster)
    over = [m for m in memory if total_bytes(m) > m.capacity]
    assert not over, "the closed form and the final check of memory disagree"
    return replace(
        played.plan,
        prediction=Prediction(
            step_seconds=played.seconds,
            parts=parts_in(costs, played.plan),
            memory=memory,
            runners_up=tuple(others),
            dropped={reason: count for reason, count in sorted(contest.dropped.items()) if count},
            lower_bound_seconds=min(proof.seconds, played.seconds),
            bound_reason=proof.reason,
        ),
    )
