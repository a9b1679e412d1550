"""Finds the most activations that a pipeline rank holds at once along its schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from meshwright.plan.ranks import StagePlacement, stage_placements
from meshwright.plan.spec import Plan
from meshwright.program.actions import Order, peak_held
from meshwright.program.orders import orders_of
from meshwright.records import record


@record
class ScheduledStages:
    """Holds the stages of one pipeline rank (a group of ranks that hold the same stages), and their
    schedule."""

    stages: tuple[StagePlacement, ...]
    order: Order
    """The actions of the pipeline rank; they name stages by their position in the pipeline."""
    first_stage: int
    """The number in the plan of the pipeline's first stage."""

    @property
    def path(self) -> str:
        """Returns the path of its first stage in the plan, for messages."""
        stage = self.stages[0]
        return f"pipelines[{stage.pipeline}].stages[{stage.number - self.first_stage}]"


def scheduled_stages(plan: Plan) -> Iterator[ScheduledStages]:
    """Yields every pipeline rank of a plan with its schedule.

    Raises PlanError for a schedule written in the plan that cannot be played.
    """
    stages = stage_placements(plan)
    for p in range(len(plan.pipelines)):
        own = [stage for stage in stages if stage.pipeline == p]
        for position, order in enumerate(orders_of(plan, p)):
            held = tuple(stage for stage in own if stage.position == position)
            yield ScheduledStages(stages=held, order=order, first_stage=own[0].number)


def peak_activation_bytes(
    scheduled: ScheduledStages, full: Sequence[float], half: Sequence[float]
) -> float:
    """Returns the most bytes of activations that a pipeline rank holds at once.

    `full` has for each stage, in the order of `scheduled.stages`, the bytes that a micro-batch
    holds between its forward and its backward, and `half` those between the two parts I and W of
    the backward.
    """
    place = {stage.number - scheduled.first_stage: k for k, stage in enumerate(scheduled.stages)}
    return peak_held(scheduled.order, lambda s: full[place[s]], lambda s: half[place[s]])
