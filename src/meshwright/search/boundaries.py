"""Last of all, for the best plan: how tensors cross each of its cuts, tried in the simulator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from meshwright.plan.spec import BoundaryKind, Pipeline, Plan
from meshwright.search.contest import SAME, Contest, enter, work_of
from meshwright.search.explore import Progress
from meshwright.simulate.fold import fold

KINDS: tuple[BoundaryKind, ...] = ("scatter_gather", "broadcast")

WORK = 4_000
"""Ranks x micro-batches that may be simulated for it."""

Cut = tuple[int, int]
"""Pipeline, and the stage after the cut."""


def choose_boundaries(contest: Contest, tell: Progress) -> None:
    """Give the best plan the boundaries with which it is fastest: one kind for all its cuts, then
    cut by cut. Where neither side shares layers by tensor parallelism, all kinds are the same."""
    if contest.best is None:
        return
    cuts = list(wide_cuts(contest.best.plan))
    tries = [(cuts, kind) for kind in KINDS if cuts]
    tries += [([cut], kind) for cut in cuts for kind in KINDS if len(cuts) > 1]
    left = WORK
    for done, (changed, kind) in enumerate(tries):
        tell("choosing boundaries", done, len(tries))
        plan = with_boundaries(contest.best.plan, changed, kind)
        work = work_of(plan, fold(plan, contest.costs.cluster))
        late = contest.stopped or (contest.deadline is not None and contest.over)
        if late or work > left:
            contest.dropped["boundaries beyond the budget"] += len(tries) - done
            break
        left -= work
        _try(contest, plan, changed, kind)
    tell("choosing boundaries", len(tries), len(tries))


def wide_cuts(plan: Plan) -> Iterator[Cut]:
    """Cuts with several tensor ranks in a replica on either side."""
    for p, pipeline in enumerate(plan.pipelines):
        for s in range(1, len(pipeline.stages)):
            sides = pipeline.stages[s - 1 : s + 1]
            if any(len(replica) > 1 for stage in sides for replica in stage.devices):
                yield p, s


def all_direct(plan: Plan) -> bool:
    """Whether all boundaries are as the rest of the search assumes them."""
    stages = (stage for pipeline in plan.pipelines for stage in pipeline.stages)
    return all(stage.boundary in (None, "direct") for stage in stages)


def with_boundaries(plan: Plan, cuts: Iterable[Cut], kind: BoundaryKind) -> Plan:
    """The plan with another kind of boundary at these cuts."""
    chosen = set(cuts)

    def changed(p: int, pipeline: Pipeline) -> Pipeline:
        stages = (
            replace(stage, boundary=kind) if (p, s) in chosen else stage
            for s, stage in enumerate(pipeline.stages)
        )
        return replace(pipeline, stages=tuple(stages))

    pipelines = tuple(changed(p, pipeline) for p, pipeline in enumerate(plan.pipelines))
    return replace(plan, pipelines=pipelines)


def _try(contest: Contest, plan: Plan, cuts: list[Cut], kind: BoundaryKind) -> None:
    best = contest.best
    assert best is not None
    if plan == best.plan:
        return
    where = "" if len(cuts) > 1 else f" before stage {cuts[0][1] + 1}"
    played = enter(contest, plan, f"{best.name}, {kind}{where}")
    if played.seconds >= best.seconds * (1 - SAME):
        contest.best = best
        contest.others.remove(played)
        contest.dropped["boundaries that are not faster"] += 1
