"""Puts reduce-scatters and gathers into the program of a rank whose states are divided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Plan
from meshwright.program.compile import Rewriting
from meshwright.program.instructions import Instruction, summed_layers
from meshwright.program.operations import Op
from meshwright.techniques.data_parallel.operations import REDUCE_GRAD
from meshwright.techniques.state_division.operations import GATHER_PARAMETERS, REDUCE_SCATTER
from meshwright.techniques.state_division.plan import divided_layers, divides


def rewriting(plan: Plan, model: LayerGraph) -> Rewriting | None:
    """Returns a function that replaces a rank's all-reduces of divided layers by reduce-scatters,
    and gathers the weights of these layers after the update; None if no stage divides its states.

    A gather follows the optimizer step of its own bucket, or the rank's only one.
    """
    if not any(map(divides, plan.stages)):
        return None
    divided = divided_layers(plan, model)

    def scattered(i: Instruction) -> Instruction:
        if i.op is not REDUCE_GRAD:
            return i
        layers = summed_layers(i.layers, i.tied, model)
        return i._replace(op=REDUCE_SCATTER) if all(divided[n] for n in layers) else i

    def rewrite(instructions: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
        found = [scattered(i) for i in instructions]
        gathers = [i._replace(op=GATHER_PARAMETERS) for i in found if i.op is REDUCE_SCATTER]
        return tuple(_gathered(found, gathers))

    return rewrite


def _gathered(
    instructions: Sequence[Instruction], gathers: Sequence[Instruction]
) -> Iterator[Instruction]:
    alone = sum(i.op is Op.OPTIMIZER_STEP for i in instructions) == 1
    for i in instructions:
        yield i
        if i.op is Op.OPTIMIZER_STEP:
            yield from (g for g in gathers if alone or (g.layers, g.tied) == (i.layers, i.tied))
