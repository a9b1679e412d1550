"""Tries how tensors cross each cut of the best plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from meshwright.plan.spec import BoundaryKind, Pipeline, Plan
from meshwright.search.finishing import PlanOption, Proposal, Proposals, Pruned
from meshwright.search.incumbent import Incumbent, work_of

KINDS: tuple[BoundaryKind, ...] = ("scatter_gather", "broadcast")

WORK = 4_000
"""Limit on ranks x micro-batches, summed over the plans that are simulated."""

Cut = tuple[int, int]
"""The pipeline, and the stage after the cut."""


def propose(incumbent: Incumbent) -> Proposals:
    """Changes the boundaries of the best plan: all of them to one kind, then one by one.

    Where neither side shares layers by tensor parallelism, all kinds are the same.
    """
    if incumbent.best is None:
        return
    cuts = list(wide_cuts(incumbent.best.plan))
    kinds = (*KINDS, None)
    tries = [(cuts, kind) for kind in kinds if cuts]
    tries += [([cut], kind) for cut in cuts for kind in kinds if len(cuts) > 1]
    left = WORK
    for done, (changed, kind) in enumerate(tries):
        best = incumbent.best
        plan = with_boundaries(best.plan, changed, kind)
        work = work_of(incumbent.costs, plan)
        if work > left:
            yield Pruned("too large to try", len(tries) - done)
            break
        left -= work
        if plan != best.plan:
            where = "" if len(changed) > 1 else f" before stage {changed[0][1] + 1}"
            yield Proposal(plan, f"{best.name}, {kind or 'direct'}{where}", is_variant=True)


OPTION = PlanOption("boundary-kinds", propose)


def wide_cuts(plan: Plan) -> Iterator[Cut]:
    """Yields the cuts with several tensor ranks in a replica on either side."""
    for p, pipeline in enumerate(plan.pipelines):
        for s in range(1, len(pipeline.stages)):
            sides = pipeline.stages[s - 1 : s + 1]
            if any(len(replica) > 1 for stage in sides for replica in stage.devices):
                yield p, s


def with_boundaries(plan: Plan, cuts: Iterable[Cut], kind: BoundaryKind | None) -> Plan:
    """Returns the plan with another kind of boundary at these cuts; None: direct."""
    chosen = set(cuts)

    def changed(p: int, pipeline: Pipeline) -> Pipeline:
        stages = (
            replace(stage, boundary=kind) if (p, s) in chosen else stage
            for s, stage in enumerate(pipeline.stages)
        )
        return replace(pipeline, stages=tuple(stages))

    pipelines = tuple(changed(p, pipeline) for p, pipeline in enumerate(plan.pipelines))
    return replace(plan, pipelines=pipelines)
