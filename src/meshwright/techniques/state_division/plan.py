"""Checks which stages of a plan divide their states, and names them in its description."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from meshwright.errors import Problem
from meshwright.plan.spec import Plan, Stage


def divides(stage: Stage) -> bool:
    """True if the optimizer states of a stage are divided."""
    return stage.states is not None and stage.states.optimizer == "all"


def stage_text(stage: Stage) -> str:
    """Format the division in the one-line description of a plan: `[12z|12]`."""
    return "z" if divides(stage) else ""


def holders(plan: Plan, layers: Sequence[int]) -> list[Stage]:
    """The stages of all pipelines that hold any of some layers."""
    return [
        stage
        for pipeline in plan.pipelines
        for stage in pipeline.stages
        if any(stage.layers[0] <= layer < stage.layers[1] for layer in layers)
    ]


def problems(plan: Plan, source: str) -> Iterator[Problem]:
    """Find stages that cannot divide their states with the others that hold the same layers."""
    for p, pipeline in enumerate(plan.pipelines):
        for s, stage in enumerate(pipeline.stages):
            if not divides(stage):
                continue
            field = f"pipelines[{p}].stages[{s}].states.optimizer"
            others = holders(plan, range(*stage.layers))
            if not all(map(divides, others)):
                found = f"'all', and 'none' in another stage that holds layers {stage.layers}"
                yield Problem(source, field, found, "the same in all stages that share layers")
            widths = sorted({len(replica) for each in others for replica in each.devices})
            if len(widths) > 1:
                found = f"replicas of tensor widths {', '.join(map(str, widths))}"
                mend = "leave out `states`, or give all replicas of these layers one width"
                yield Problem(source, field, found, "one tensor width for these layers", mend)
