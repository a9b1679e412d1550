"""Schedules as data: the order of forwards and backwards on one stage of a pipeline."""

from __future__ import annotations

from itertools import chain

from meshwright.plan.spec import ScheduleName
from meshwright.program.instructions import Op

Action = tuple[Op, int]
"""FORWARD or BACKWARD, and its micro-batch."""


def gpipe(micro_batches: int) -> tuple[Action, ...]:
    """All forwards, then all backwards, oldest first (Huang et al. 2019)."""
    forwards = ((Op.FORWARD, m) for m in range(micro_batches))
    backwards = ((Op.BACKWARD, m) for m in range(micro_batches))
    return (*forwards, *backwards)


def one_f_one_b(depth: int, micro_batches: int) -> tuple[Action, ...]:
    """Warm up, alternate, drain (PipeDream-flush, Narayanan et al. 2021).

    `depth` is the number of stages from this one to the last, itself included: the stage holds at
    most min(depth, micro_batches) micro-batches at once.
    """
    warm_up = min(depth - 1, micro_batches)
    forwards = tuple((Op.FORWARD, m) for m in range(micro_batches))
    backwards = tuple((Op.BACKWARD, m) for m in range(micro_batches))
    steady = chain.from_iterable(zip(forwards[warm_up:], backwards, strict=False))
    return (*forwards[:warm_up], *steady, *backwards[micro_batches - warm_up :])


def actions(
    schedule: ScheduleName, stage: int, stages: int, micro_batches: int
) -> tuple[Action, ...]:
    """The schedule of stage number `stage` (from 0) of a pipeline of `stages`."""
    if schedule == "gpipe":
        return gpipe(micro_batches)
    return one_f_one_b(stages - stage, micro_batches)


def in_flight(schedule: ScheduleName, stage: int, stages: int, micro_batches: int) -> int:
    """Most micro-batches whose activations a stage holds at once."""
    if schedule == "gpipe":
        return micro_batches
    return min(stages - stage, micro_batches)
