"""Checks which stages of a plan divide their states, and names them in its description."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from meshwright.errors import Problem
from meshwright.model.spec import LayerGraph, Tied
from meshwright.plan.mesh import mesh_of
from meshwright.plan.spec import Plan, Stage, StateDivision


def divides_optimizer(states: StateDivision | None) -> bool:
    """True if a division covers optimizer states."""
    return states is not None and states.optimizer == "all"


def divides(stage: Stage) -> bool:
    """True if the optimizer states of a stage are divided."""
    return divides_optimizer(stage.states)


def stage_text(stage: Stage) -> str:
    """Formats the division in the one-line description of a plan: `[12z|12]`."""
    return "z" if divides(stage) else ""


def without(stage: Stage) -> Stage:
    """Returns the stage with states that are whole on every replica."""
    return replace(stage, states=None)


def divided_layers(plan: Plan, model: LayerGraph) -> list[bool]:
    """Returns for each layer whether every stage that holds it divides its states."""
    found = [True] * len(model.layers)
    for stage in plan.stages:
        if not divides(stage):
            first, last = stage.layers
            found[first:last] = [False] * (last - first)
    return found


_Held = tuple[tuple[int, int], bool, frozenset[int]]
"""The layers of a stage, whether it divides their states, and the tensor widths of its replicas."""


def problems(plan: Plan, model: LayerGraph | None, source: str) -> Iterator[Problem]:
    """Finds stages that cannot divide their states with the others that hold the same layers."""
    held = list(dict.fromkeys(map(_held, plan.stages)))
    for p, pipeline in enumerate(plan.pipelines):
        for s, stage in enumerate(pipeline.stages):
            if not divides(stage):
                continue
            field = f"pipelines[{p}].stages[{s}].states.optimizer"
            others = [each for each in held if overlap(each[0], stage.layers)]
            if not all(divided for _, divided, _ in others):
                found = f"'all', and 'none' in another stage that holds layers {stage.layers}"
                yield Problem(source, field, found, "the same in all stages that share layers")
            widths = sorted(frozenset().union(*(widths for _, _, widths in others)))
            if len(widths) > 1:
                found = f"replicas of tensor widths {', '.join(map(str, widths))}"
                mend = "leave out `states`, or give all replicas of these layers one width"
                yield Problem(source, field, found, "one tensor width for these layers", mend)
            if model is not None and _is_alone(stage, plan, model):
                found = f"'all', but one replica alone holds layers {stage.layers}"
                wanted = "several replicas, or a weight that another stage shares"
                yield Problem(source, field, found, wanted, "leave out `states`")
            for name, widths in _uneven_ties(stage, plan, model) if model is not None else ():
                found = f"stages of tensor widths {', '.join(map(str, widths))} that share {name}"
                mend = "leave out `states` in one of them, or give them one tensor width"
                yield Problem(source, field, found, "one tensor width for a shared weight", mend)


def _held(stage: Stage) -> _Held:
    return stage.layers, divides(stage), frozenset(mesh_of(stage).widths("tensor"))


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """True if two ranges of layers have a layer in common."""
    return one[0] < other[1] and other[0] < one[1]


def _uneven_ties(stage: Stage, plan: Plan, model: LayerGraph) -> Iterator[tuple[str, list[int]]]:
    """Yields each tied weight of a stage whose states are divided and whose holders have different
    tensor widths, with these widths."""
    for tied in model.tied:
        users = _users(plan, tied)
        if stage in users and all(map(divides, users)):
            widths = sorted({width for user in users for width in mesh_of(user).widths("tensor")})
            if len(widths) > 1:
                yield tied.name, widths


def holds(stage: Stage, tied: Tied) -> bool:
    """True if a stage holds a tied weight."""
    first, end = stage.layers
    return any(first <= layer < end for layer in tied.layers)


def _users(plan: Plan, tied: Tied) -> list[Stage]:
    """Returns the stages that hold a tied weight."""
    return [stage for stage in plan.stages if holds(stage, tied)]


def _is_alone(stage: Stage, plan: Plan, model: LayerGraph) -> bool:
    """True if no other rank holds any weight of a stage, so that there is nothing to divide."""
    if len(plan.pipelines) > 1 or mesh_of(stage).width("data") > 1:
        return False
    for tied in model.tied:
        users = _users(plan, tied)
        if stage in users and any(user.devices != stage.devices for user in users):
            return False
    return True
