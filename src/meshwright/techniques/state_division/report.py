"""Says in a report that a plan divides optimizer states, and what that does."""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.plan.spec import Plan
from meshwright.techniques.state_division.plan import divides


def sentences(plan: Plan) -> Iterator[str]:
    """Yields a sentence if any stage divides its optimizer states."""
    stages = plan.stages
    number = sum(map(divides, stages))
    if number:
        some = "" if number == len(stages) else f" of {number} of {len(stages)} stages"
        yield (
            f"Optimizer states{some} are divided (ZeRO-1): of the devices that hold the same "
            "weights each updates an equal share, and all gather the others' afterwards."
        )
