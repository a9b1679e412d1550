"""Proposes plans whose stages divide their optimizer states, where that is faster or lets them fit
in memory."""

from __future__ import annotations

from dataclasses import replace

from meshwright.model.spec import LayerGraph
from meshwright.plan.mesh import mesh_of
from meshwright.plan.spec import Plan, StateDivision, with_stages
from meshwright.search.bounds import slowest_optimizer
from meshwright.search.candidate import candidate_of
from meshwright.search.finishing import PlanOption, Proposal, Proposals, Pruned
from meshwright.search.incumbent import Evaluated, Incumbent, simplest, work_of
from meshwright.techniques.state_division.plan import holds, overlap

DIVISION = StateDivision(optimizer="all")

PLAYED = 3
"""Plans of different builds that are simulated with divided states."""

WORK, FURTHER_WORK = 8_000, 1_000
"""Limits on ranks x micro-batches of the best plan, and of the other plans together."""

MISFITS_PLAYED = 8
"""Plans that fit only with divided states, and are then simulated."""


def propose(incumbent: Incumbent) -> Proposals:
    """Divides the states of the best plan of each build; if no plan fits, of those that lack
    memory."""
    if incumbent.best is None:
        yield from _mended(incumbent)
        return
    left, proposed = WORK, 0
    for played in _best_of_builds(incumbent):
        plan = divided(played.plan, incumbent.costs.model)
        work = work_of(incumbent.costs, plan) if plan else 0
        if plan is None:
            yield Pruned("impossible for this plan")
        elif _least_seconds(incumbent, played) >= incumbent.limit:
            yield Pruned("slower in closed form")
        elif proposed == PLAYED or work > left:
            yield Pruned("too large to try")
        else:
            left = FURTHER_WORK if proposed == 0 else left - work
            proposed += 1
            yield Proposal(plan, f"{played.name}, optimizer states divided", is_variant=True)


OPTION = PlanOption("divided-states", propose)


def _mended(incumbent: Incumbent) -> Proposals:
    """Divides the states of plans that lack memory."""
    fitting = 0
    for misfit in incumbent.misfits:
        plan = divided(misfit, incumbent.costs.model)
        if plan is None:
            continue
        found = yield Proposal(plan, f"{plan.name}, optimizer states divided")
        fitting += found is not None
        if fitting == MISFITS_PLAYED:
            break


def _best_of_builds(incumbent: Incumbent) -> list[Evaluated]:
    """Returns the simplest of the plans that are about as fast as the best one, then the fastest
    plan of every other name; a name gives widths and depths. Of equally fast ones, those with fewer
    pipelines come first."""
    builds: dict[str, Evaluated] = {}
    ordered = sorted(incumbent.others, key=lambda each: (each.seconds, len(each.plan.pipelines)))
    for played in (simplest(incumbent), *ordered):
        builds.setdefault(played.plan.name, played)
    return list(builds.values())


def _least_seconds(incumbent: Incumbent, played: Evaluated) -> float:
    """Estimates the seconds of the step if each rank updates its share alone, and nothing else
    takes longer.

    The reduce-scatters and gathers that take the place of all-reduces carry as many bytes.
    """
    pipelines = played.plan.pipelines
    seconds = slowest_optimizer(incumbent.costs, [candidate_of(pipeline) for pipeline in pipelines])
    most = sum(max(mesh_of(stage).width("data") for stage in each.stages) for each in pipelines)
    return played.seconds - seconds * (1 - 1 / most)


def divided(plan: Plan, model: LayerGraph) -> Plan | None:
    """Returns the plan with divided states in every stage that may divide them; None if none may.

    All stages that hold a layer must divide alike, with replicas of one tensor width, and several
    replicas must hold it. Of stages with different tensor widths that share a weight, those that
    are unlike the first do not divide.
    """
    able = _may_divide(plan, model)
    if not any(able):
        return None
    chosen = iter(able)
    changed = with_stages(
        plan, lambda stage: replace(stage, states=DIVISION) if next(chosen) else stage
    )
    return replace(changed, name=f"{plan.name}-zero1", prediction=None)


def _may_divide(plan: Plan, model: LayerGraph) -> list[bool]:
    """Returns for every stage whether it may divide its states."""
    stages = plan.stages
    meshes = [mesh_of(stage) for stage in stages]
    width = [{*mesh.widths("tensor")} for mesh in meshes]
    able = [len(plan.pipelines) > 1 or mesh.width("data") > 1 for mesh in meshes]
    ties = [[j for j, each in enumerate(stages) if holds(each, tied)] for tied in model.tied]
    beside = [
        [j for j, other in enumerate(stages) if overlap(each.layers, other.layers)]
        for each in stages
    ]
    changed = True
    while changed:
        still = [
            own and all(able[j] for j in near) and len(set().union(*(width[j] for j in near))) == 1
            for own, near in zip(able, beside, strict=True)
        ]
        for users in ties:
            if users and all(still[j] for j in users):
                for j in users:
                    still[j] = width[j] == width[users[0]]
        changed, able = still != able, still
    return able
