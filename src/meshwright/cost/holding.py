"""Finds the most activations that a pipeline rank holds at once along its schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from meshwright.plan.ranks import StageSeats, stage_seats
from meshwright.plan.spec import Plan
from meshwright.program.actions import Order, high_water
from meshwright.program.orders import orders_of
from meshwright.records import record


@record
class Holders:
    """Groups the ranks that hold the same stages: one pipeline rank."""

    stages: tuple[StageSeats, ...]
    order: Order
    """The actions of the pipeline rank; they name stages by their position in the pipeline."""
    first: int
    """The number in the plan of the pipeline's first stage."""

    @property
    def path(self) -> str:
        """Return the path of its first stage in the plan, for messages."""
        stage = self.stages[0]
        return f"pipelines[{stage.pipeline}].stages[{stage.number - self.first}]"


def holders_of(plan: Plan) -> Iterator[Holders]:
    """Yield every pipeline rank of a plan with its schedule.

    Raises PlanError for a schedule written in the plan that cannot be played.
    """
    stages = stage_seats(plan)
    for p in range(len(plan.pipelines)):
        own = [stage for stage in stages if stage.pipeline == p]
        for position, order in enumerate(orders_of(plan, p)):
            held = tuple(stage for stage in own if stage.position == position)
            yield Holders(stages=held, order=order, first=own[0].number)


def most_held(holders: Holders, full: Sequence[float], half: Sequence[float]) -> float:
    """Return the most bytes of activations held at once.

    `full` has for each stage, in the order of `holders.stages`, the bytes that a micro-batch holds
    between its forward and its backward, and `half` those between the two parts I and W of the
    backward.
    """
    place = {stage.number - holders.first: k for k, stage in enumerate(holders.stages)}
    return high_water(holders.order, lambda s: full[place[s]], lambda s: half[place[s]])
