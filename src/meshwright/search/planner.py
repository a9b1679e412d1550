"""Finds the plan: candidates, layer cuts, ranking in closed form, and a play-off in the simulator.

space -> candidates -> partition -> rank -> simulate -> explain
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from meshwright.cluster.spec import Cluster
from meshwright.cost.memory import device_memory, total_bytes
from meshwright.cost.profile import Profile
from meshwright.errors import PlanError, Problem
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Job, Plan, Prediction, RunnerUp, ScheduleName
from meshwright.records import fingerprint
from meshwright.search.baselines import BASELINES
from meshwright.search.costs import Costs, costs_of
from meshwright.search.estimate import Candidate, Estimate, Misfit, optimistic_seconds
from meshwright.search.explain import (
    as_plan,
    label,
    misfits_as_runners_up,
    nothing_fits,
    why_misfit,
    why_slower,
)
from meshwright.search.explore import (
    Explored,
    Progress,
    best_by_hand,
    candidates_of,
    explore,
    whole,
)
from meshwright.simulate.engine import simulate_plan
from meshwright.simulate.parts import parts as parts_of

SIMULATED_WORK = 80_000
"""Devices x micro-batches, over all finalists: on large clusters the simulator ranks fewer of them,
but never less than two."""

MISFITS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Played:
    """A strategy that fits, as the simulator sees it."""

    name: str
    candidate: Candidate
    plan: Plan
    seconds: float
    parts: dict[str, float]


def find_plan(
    model: LayerGraph,
    cluster: Cluster,
    job: Job,
    profile: Profile | None = None,
    *,
    schedules: Sequence[ScheduleName] = ("1f1b", "gpipe"),
    progress: Progress | None = None,
) -> Plan:
    """The fastest plan of AMP's space by Meshwright's own costs, with its prediction filled in.

    The same input gives the same plan, byte for byte. Raises FitError when nothing fits, saying by
    how much and what would help; ClusterError when no device offers the job's precision; PlanError
    when job and model disagree.
    """
    _check_job(model, job)
    costs = costs_of(model, cluster, job, profile)
    tell = progress or (lambda _what, _done, _all: None)
    dropped: Counter[str] = Counter()
    explored = explore(costs, candidates_of(costs, schedules, dropped), dropped, tell)
    if not explored.finalists:
        raise nothing_fits(costs, explored.misfits, explored.tried)
    by_hand = _all_by_hand(costs)
    field = [("", estimate) for estimate in _affordable(explored.finalists)]
    field += [(name, found) for name, found in by_hand if isinstance(found, Estimate)]
    cluster_print = fingerprint(cluster)
    played: list[Played] = []
    for index, (name, estimate) in enumerate(field):
        tell("simulating", index, len(field))
        played.append(_play(costs, cluster, estimate, name, cluster_print))
    tell("simulating", len(field), len(field))
    winner = min(played, key=lambda p: p.seconds)
    others = [
        *_runners_up(winner, played),
        *_misfits(costs, winner.seconds, by_hand, explored),
    ]
    return _with_prediction(costs, winner, others, dropped)


def _all_by_hand(costs: Costs) -> list[tuple[str, Estimate | Misfit]]:
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
    played = _play(costs, cluster, found, name, fingerprint(cluster))
    return _with_prediction(costs, played, [], Counter())


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


def _play(
    costs: Costs, cluster: Cluster, estimate: Estimate, name: str, cluster_print: str
) -> Played:
    plan = as_plan(costs, estimate.candidate, estimate.bounds, cluster_print)
    timeline = simulate_plan(plan, costs.model, cluster, costs.profile)
    title = label(estimate.candidate, estimate.bounds)
    noise = 1e-12 * timeline.step_seconds
    return Played(
        name=f"{name}: {title}" if name else title,
        candidate=estimate.candidate,
        plan=plan,
        seconds=timeline.step_seconds,
        parts={part: s if s > noise else 0.0 for part, s in parts_of(timeline).items()},
    )


def _runners_up(winner: Played, played: Iterable[Played]) -> list[RunnerUp]:
    return [
        RunnerUp(
            name=other.name,
            step_seconds=other.seconds,
            reason="the same plan"
            if other.plan == winner.plan
            else why_slower(winner.parts, other.parts),
        )
        for other in sorted(played, key=lambda p: p.seconds)
        if other is not winner
    ]


def _with_prediction(
    costs: Costs, played: Played, others: list[RunnerUp], dropped: Counter[str]
) -> Plan:
    memory = device_memory(played.plan, costs.model, costs.cluster)
    over = [m for m in memory if total_bytes(m) > m.capacity]
    assert not over, "the closed form and the final check of memory disagree"
    return replace(
        played.plan,
        prediction=Prediction(
            step_seconds=played.seconds,
            parts=played.parts,
            memory=memory,
            runners_up=tuple(others),
            dropped={reason: count for reason, count in sorted(dropped.items()) if count},
        ),
    )
