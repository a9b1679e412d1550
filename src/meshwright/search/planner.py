"""Finds the plan: candidates, layer cuts, ranking in closed form, and a play-off in the simulator.

space -> candidates -> partition -> rank -> simulate -> explain
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from meshwright.cluster.spec import Cluster
from meshwright.cost.memory import device_memory
from meshwright.cost.profile import Profile
from meshwright.errors import ClusterError, PlanError, Problem
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Job, Plan, Prediction, RunnerUp, ScheduleName
from meshwright.records import fingerprint
from meshwright.search.baselines import BASELINES
from meshwright.search.costs import Costs, costs_of, speeds
from meshwright.search.estimate import (
    Candidate,
    Estimate,
    Misfit,
    evaluate,
    optimistic_seconds,
)
from meshwright.search.explain import (
    as_plan,
    label,
    misfits_as_runners_up,
    nothing_fits,
    why_misfit,
    why_slower,
)
from meshwright.search.placement import placements
from meshwright.search.space import DeviceSet, device_sets, fewer_devices, grids, shapes
from meshwright.search.space import usable_devices as usable
from meshwright.simulate.engine import simulate_plan
from meshwright.simulate.parts import parts as parts_of

FINALISTS = 8
"""Candidates that the simulator ranks again."""

ALIKE = 3
"""Finalists of one grid on one set of devices: neighbours in closed form are neighbours in the
simulator."""

MISFITS_SHOWN = 3

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class Played:
    """A strategy that fits, as the simulator sees it."""

    name: str
    candidate: Candidate
    plan: Plan
    seconds: float
    parts: dict[str, float]


@dataclass(frozen=True, slots=True)
class Explored:
    """What the closed form says of a space."""

    finalists: tuple[Estimate, ...]
    """Best first."""
    misfits: tuple[Misfit, ...]
    """Most promising first."""
    tried: int


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
    candidates = _candidates(costs, schedules, dropped)
    explored = explore(costs, candidates, dropped, tell)
    if not explored.finalists:
        raise nothing_fits(costs, explored.misfits, explored.tried)
    cluster_print = fingerprint(cluster)
    hand_made = [
        (name, found)
        for name in BASELINES
        if (found := _best_by_hand(costs, name, _whole(costs))) is not None
    ]
    field = [("", estimate) for estimate in explored.finalists]
    field += [(name, found) for name, found in hand_made if isinstance(found, Estimate)]
    played: list[Played] = []
    for index, (name, estimate) in enumerate(field):
        tell("simulating", index, len(field))
        played.append(_play(costs, cluster, estimate, name, cluster_print))
    tell("simulating", len(field), len(field))
    winner = min(played, key=lambda p: p.seconds)
    others = _runners_up(winner, played)
    others += [
        RunnerUp(
            name=f"{name}: {label(found.candidate, found.bounds)}",
            reason=why_misfit(costs, found),
        )
        for name, found in hand_made
        if isinstance(found, Misfit)
    ]
    worth = [m for m in explored.misfits if optimistic_seconds(costs, m.candidate) < winner.seconds]
    others += misfits_as_runners_up(costs, worth[:MISFITS_SHOWN])
    return _with_prediction(costs, winner, others, dropped)


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
    found = _best_by_hand(costs, name, _whole(costs))
    if found is None:
        raise PlanError(
            Problem(
                f"baseline {name}",
                "cluster",
                f"{len(_whole(costs).devices)} devices, {job.global_batch} rows, "
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


def _whole(costs: Costs) -> DeviceSet:
    devices = usable(costs.cluster, costs.job)
    if not devices:
        offers = sorted({p for kind in costs.cluster.types.values() for p in kind.peak})
        raise ClusterError(
            Problem(
                f"cluster {costs.cluster.name}",
                "devices",
                f"none that offers {costs.job.precision}",
                f"at least one device with a peak in {costs.job.precision}",
                f"its devices offer {', '.join(offers)}",
            )
        )
    return DeviceSet(devices=devices)


def _candidates(
    costs: Costs, schedules: Sequence[ScheduleName], dropped: Counter[str]
) -> list[Candidate]:
    devices = _whole(costs).devices
    speed = speeds(costs, sorted({device.type for device in devices}))
    found = [
        candidate
        for used in device_sets(devices, speed)
        for candidate in _on(costs, used, speed, schedules, dropped)
    ]
    if found:
        return found
    for used in fewer_devices(devices, speed):
        found = list(_on(costs, used, speed, schedules, dropped))
        if found:
            break
    return found


def _on(
    costs: Costs,
    used: DeviceSet,
    speed: dict[str, float],
    schedules: Sequence[ScheduleName],
    dropped: Counter[str],
) -> Iterator[Candidate]:
    for grid in grids(used.devices, costs.model, costs.job, dropped):
        places = placements(used.devices, grid, speed)
        for shape in shapes(grid, costs.job, schedules):
            for place in places:
                yield Candidate(used, place, shape)


def explore(
    costs: Costs, candidates: Iterable[Candidate], dropped: Counter[str], tell: Progress
) -> Explored:
    """The best candidates in closed form.

    The most promising by their lower bound come first, so that the rest need not be looked at once
    no bound is below the last finalist.
    """
    queue = [(optimistic_seconds(costs, c), i, c) for i, c in enumerate(candidates)]
    queue.sort(key=lambda entry: entry[:2])
    finalists: list[Estimate] = []
    misfits: list[Misfit] = []
    for done, (bound, _, candidate) in enumerate(queue):
        if len(finalists) == FINALISTS and bound >= finalists[-1].seconds:
            dropped["lower bound above the finalists"] += len(queue) - done
            break
        if done % 64 == 0:
            tell("searching", done, len(queue))
        found = evaluate(costs, candidate)
        if isinstance(found, Misfit):
            dropped["does not fit in memory"] += 1
            misfits.append(found)
        else:
            finalists = _best([*finalists, found])
            dropped["slower in closed form"] += 1
    dropped["slower in closed form"] -= len(finalists)
    tell("searching", len(queue), len(queue))
    return Explored(finalists=tuple(finalists), misfits=tuple(misfits), tried=len(queue))


def _best(estimates: list[Estimate]) -> list[Estimate]:
    """The finalists among these: best first, few of one grid, none that only looks different."""
    chosen: list[Estimate] = []
    alike: Counter[object] = Counter()
    seen = set()
    for estimate in sorted(estimates, key=lambda e: e.seconds):
        candidate = estimate.candidate
        family = (candidate.used, candidate.shape.grid)
        same = (candidate.used, candidate.shape, estimate.bounds, estimate.seconds)
        if alike[family] < ALIKE and same not in seen:
            alike[family] += 1
            seen.add(same)
            chosen.append(estimate)
    return chosen[:FINALISTS]


def _best_by_hand(costs: Costs, name: str, used: DeviceSet) -> Estimate | Misfit | None:
    """The best hand-made candidate that fits; else the nearest to it; None if there is none. AMP
    chooses by its own ranking, the others by ours."""
    found = [evaluate(costs, candidate) for candidate in BASELINES[name](costs, used)]
    fitting = [e for e in found if isinstance(e, Estimate)]
    if fitting:
        return fitting[0] if name == "amp" else min(fitting, key=lambda e: e.seconds)
    misfits = [m for m in found if isinstance(m, Misfit)]
    return min(misfits, key=lambda m: m.excess_bytes, default=None)


def _play(
    costs: Costs, cluster: Cluster, estimate: Estimate, name: str, cluster_print: str
) -> Played:
    plan = as_plan(costs, estimate.candidate, estimate.bounds, cluster_print)
    timeline = simulate_plan(plan, costs.model, cluster, costs.profile)
    title = label(estimate.candidate, estimate.bounds)
    return Played(
        name=f"{name}: {title}" if name else title,
        candidate=estimate.candidate,
        plan=plan,
        seconds=timeline.step_seconds,
        parts=parts_of(timeline),
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
    over = [
        m
        for m in memory
        if m.parameters + m.gradients + m.optimizer + m.activations + m.buffers > m.capacity
    ]
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
