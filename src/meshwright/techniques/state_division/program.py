"""Puts reduce-scatters and gathers into the program of a rank whose states are divided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from meshwright.plan.ranks import RankView
from meshwright.program.buckets import summed_layers
from meshwright.program.instructions import Instruction
from meshwright.program.operations import Op
from meshwright.techniques.state_division.operations import GATHER_PARAMETERS, REDUCE_SCATTER
from meshwright.techniques.state_division.plan import divides, holders


def rewrite(instructions: tuple[Instruction, ...], rank: RankView) -> tuple[Instruction, ...]:
    """Replace the all-reduces of divided layers, and gather their weights after the update.

    A gather follows the optimizer step of its own bucket, or the rank's only one.
    """
    if not any(divides(stage.of_plan) for stage in rank.stages):
        return instructions
    scattered = [
        replace(i, op=REDUCE_SCATTER) if i.op is Op.REDUCE_GRAD and _is_divided(i, rank) else i
        for i in instructions
    ]
    gathers = [replace(i, op=GATHER_PARAMETERS) for i in scattered if i.op is REDUCE_SCATTER]
    return tuple(_gathered(scattered, gathers))


def _gathered(
    instructions: Sequence[Instruction], gathers: Sequence[Instruction]
) -> Iterator[Instruction]:
    alone = sum(i.op is Op.OPTIMIZER_STEP for i in instructions) == 1
    for i in instructions:
        yield i
        if i.op is Op.OPTIMIZER_STEP:
            yield from (g for g in gathers if alone or (g.layers, g.tied) == (i.layers, i.tied))


def _is_divided(i: Instruction, rank: RankView) -> bool:
    """True if every stage that holds what a reduction sums divides its states."""
    return all(map(divides, holders(rank.plan, summed_layers(i.layers, i.tied, rank.model))))
