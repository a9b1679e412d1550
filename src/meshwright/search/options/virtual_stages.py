"""Proposes several stages on each device, for plans whose devices wait.

A pipeline fills and drains in the time of its stages; cut in two, they take half of that, for twice
as many transfers. The layers of every finalist are cut anew into several stages for each group of
devices, dealt out in turn (interleaved) or down the line and back up (V); the quick clock times
them, and the simulator runs the few that may win.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from meshwright.cost.memory import memory_by_class, total_bytes
from meshwright.plan.ranks import StageLayout
from meshwright.plan.spec import BoundaryKind, Pipeline, Plan, ScheduleName, Stage
from meshwright.search.bounds import after_pipelines
from meshwright.search.candidate import candidate_of
from meshwright.search.costs import Costs
from meshwright.search.finishing import PlanOption, Proposals, Pruned
from meshwright.search.incumbent import Incumbent, work_of
from meshwright.search.layer_partition import fluid_rate
from meshwright.search.options.other_schedules import (
    MOST_ACTIONS,
    finalists,
    in_fastest_orders,
)
from meshwright.search.space import is_large
from meshwright.search.virtual_stage_partition import Bounds, cut_virtual_stages, group_by_stage

LAYOUTS: tuple[tuple[ScheduleName, int], ...] = (
    ("interleaved-1f1b", 2),
    ("interleaved-1f1b", 4),
    ("zb-v", 2),
)
"""The rule that deals out the stages, and how many each group of devices gets."""

WORTH = 0.02
"""Share of the best step that must be lost to anything but work for stages to be divided."""

ROUGH = 0.03
"""Share by which the closed form may be too slow."""

TIMED, PLAYED = 8, 5
"""Divided plans, the fastest in closed form, that are timed in every order, and that are simulated
in an order."""


OF_MANY = 2
"""Finalists whose stages are divided on large clusters, where that takes long."""


@dataclass(frozen=True, slots=True)
class DividedPlan:
    """Describes a plan with several stages on each group of devices."""

    seconds: float
    """Seconds of its slowest pipeline in closed form."""
    plan: Plan


def propose(incumbent: Incumbent) -> Proposals:
    """Divides the stages of each finalist in every layout, where that may be faster, and proposes
    the fastest few in their best orders."""
    divided: list[tuple[DividedPlan, int]] = []
    for plan in finalists(incumbent)[: OF_MANY if is_large(incumbent.costs) else None]:
        if not _hopeful(incumbent, plan):
            yield Pruned("lower bound above the best")
        elif (work := work_of(incumbent.costs, plan)) > MOST_ACTIONS:
            yield Pruned("too large to try")
        else:
            for found in _divided_plans(incumbent, plan):
                if isinstance(found, Pruned):
                    yield found
                else:
                    divided.append((found, work))
    divided.sort(key=lambda pair: pair[0].seconds)
    if len(divided) > TIMED:
        yield Pruned("slower in closed form", len(divided) - TIMED)
    fastest = [(found.plan, work) for found, work in divided[:TIMED]]
    yield from in_fastest_orders(incumbent, fastest, PLAYED)


OPTION = PlanOption("virtual-stages", propose)


def _hopeful(incumbent: Incumbent, plan: Plan) -> bool:
    """True if a plan would beat the best step by enough with devices that are never idle."""
    costs, limit = incumbent.costs, incumbent.limit * (1 - WORTH)
    pipelines = [candidate_of(pipeline) for pipeline in plan.pipelines]
    busy = max(each.micro_batches / fluid_rate(costs, each.stages) for each in pipelines)
    return busy + after_pipelines(costs, pipelines) < limit


def _divided_plans(incumbent: Incumbent, plan: Plan) -> Iterator[DividedPlan | Pruned]:
    """Divides the stages of a plan in every layout."""
    after = after_pipelines(incumbent.costs, [candidate_of(each) for each in plan.pipelines])
    limit = (incumbent.limit - after) * (1 + ROUGH)
    for schedule, chunks in LAYOUTS:
        yield divided_plan(incumbent.costs, plan, schedule, chunks, limit)


def divided_plan(
    costs: Costs, plan: Plan, schedule: ScheduleName, chunks: int, limit: float = float("inf")
) -> DividedPlan | Pruned:
    """Returns the plan with `chunks` stages on every group of devices, in the layout that the
    schedule plays; or why there is none: too few layers, not enough memory even where groups
    recompute, or pipelines that would take `limit` seconds in closed form."""
    candidates = [candidate_of(pipeline) for pipeline in plan.pipelines]
    layouts = [_layout(schedule, len(candidate.stages), chunks) for candidate in candidates]
    if any(sum(map(len, layout)) > len(costs.model.layers) for layout in layouts):
        return Pruned("impossible for this plan")
    recompute = [frozenset[int]()] * len(candidates)
    while True:
        cuts = [
            cut_virtual_stages(costs, candidate, layout, schedule, groups)
            for candidate, layout, groups in zip(candidates, layouts, recompute, strict=True)
        ]
        slowest = max(seconds for _, seconds in cuts)
        if slowest >= limit:
            return Pruned("slower in closed form")
        pipelines = tuple(
            _divided(*each) for each in zip(plan.pipelines, layouts, cuts, recompute, strict=True)
        )
        found = replace(
            plan,
            name=f"{plan.name}-vpp{chunks}",
            schedule=schedule,
            pipelines=pipelines,
            prediction=None,
        )
        overfull = _overfull(costs, found)
        if not overfull:
            return DividedPlan(slowest, found)
        more = [
            groups
            | {g for g, stage in enumerate(candidate.stages) if _any_of(stage.groups, overfull)}
            for candidate, groups in zip(candidates, recompute, strict=True)
        ]
        if costs.recomputed is None or more == recompute:
            return Pruned("does not fit in memory")
        recompute = more


def _overfull(costs: Costs, plan: Plan) -> set[str]:
    """Returns the devices that have too little memory for their part of a plan."""
    return {
        placement.device
        for memory, placements in memory_by_class(plan, costs.model, costs.cluster)
        if total_bytes(memory) > memory.capacity
        for placement in placements
    }


def _any_of(groups: tuple[tuple[str, ...], ...], names: set[str]) -> bool:
    return any(name in names for group in groups for name in group)


def _layout(schedule: ScheduleName, groups: int, chunks: int) -> StageLayout:
    """Returns the stages of every group."""
    if schedule == "zb-v":
        return tuple((g, 2 * groups - 1 - g) for g in range(groups))
    each = chunks if groups > 1 else 1
    return tuple(tuple(range(g, each * groups, groups)) for g in range(groups))


def _divided(
    pipeline: Pipeline, layout: StageLayout, cuts: tuple[Bounds, float], recompute: frozenset[int]
) -> Pipeline:
    places = group_by_stage(layout)
    stages = tuple(
        Stage(
            layers=layers,
            devices=pipeline.stages[g].devices,
            rows=pipeline.stages[g].rows,
            boundary=_boundary(pipeline, places[k - 1], g) if k else None,
            recompute=g in recompute,
        )
        for k, (layers, g) in enumerate(zip(pairwise(cuts[0]), places, strict=True))
    )
    return replace(pipeline, stages=stages, actions=None)


def _boundary(pipeline: Pipeline, source: int, target: int) -> BoundaryKind | None:
    """Returns the kind of boundary between these two groups; None if they are not neighbours."""
    neighbours = abs(source - target) == 1
    return pipeline.stages[max(source, target)].boundary if neighbours else None
