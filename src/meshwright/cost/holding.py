"""How much of its activations a device holds at once: counted along its order of work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from meshwright.plan.ranks import StageSeats, stage_seats
from meshwright.plan.spec import Plan
from meshwright.program.actions import Order, high_water
from meshwright.program.orders import orders_of
from meshwright.records import record


@record
class Holders:
    """Ranks that hold the same stages."""

    stages: tuple[StageSeats, ...]
    order: Order
    """Actions name stages by their place in the pipeline."""
    first: int
    """Number of the pipeline's first stage."""

    @property
    def path(self) -> str:
        """Of the first of the stages, in the plan."""
        stage = self.stages[0]
        return f"pipelines[{stage.pipeline}].stages[{stage.number - self.first}]"


def holders_of(plan: Plan) -> Iterator[Holders]:
    """Every group of ranks of a plan, with what it does. Raises PlanError for a schedule in the
    plan that cannot be played."""
    stages = stage_seats(plan)
    for p in range(len(plan.pipelines)):
        own = [stage for stage in stages if stage.pipeline == p]
        for position, order in enumerate(orders_of(plan, p)):
            held = tuple(stage for stage in own if stage.position == position)
            yield Holders(stages=held, order=order, first=own[0].number)


def most_held(holders: Holders, full: Sequence[float], half: Sequence[float]) -> float:
    """The most held at once, if of each stage, in their order, so much is held of a micro-batch
    between its forward and its backward, and between the two parts of that."""
    place = {stage.number - holders.first: k for k, stage in enumerate(holders.stages)}
    return high_water(holders.order, lambda s: full[place[s]], lambda s: half[place[s]])
