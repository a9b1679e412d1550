"""Defines actions, the computations of which schedules are made, and their textual form.

`F3` is the forward of micro-batch 3, `B3` its backward, `I3` and `W3` the two parts of a backward:
input gradients and weight gradients. `W0:4` computes the weight gradients of micro-batches 0 to 3
at once. A pipeline rank is the group of devices that hold the same stages of a pipeline; if it
holds several stages, an action begins with its stage: `2F3`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from meshwright.errors import PROBLEMS_SHOWN, PlanError, Problem
from meshwright.program.operations import Op, operation


class Action(NamedTuple):
    """Describes one computation of a stage."""

    op: Op
    """FORWARD, BACKWARD, BACKWARD_INPUT or BACKWARD_WEIGHT."""
    stage: int
    """The position of the stage in its pipeline, from 0."""
    first: int
    """The micro-batch, or the first one of a batched W."""
    last: int
    """One past the last micro-batch; more than first + 1 only for a batched W."""


Order = tuple[Action, ...]
"""The actions of one pipeline rank in a step, in order."""


def single_action(op: Op, stage: int, micro_batch: int) -> Action:
    """Returns an action on a single micro-batch."""
    return Action(op, stage, micro_batch, micro_batch + 1)


def format_action(action: Action, *, alone: bool) -> str:
    """Returns an action as text: `F3`, `W0:4`, or with its stage `2F3`.

    `alone` leaves the stage out: it is the only one of its pipeline rank.
    """
    op, stage, first, last = action
    batches = f"{first}" if last == first + 1 else f"{first}:{last}"
    return f"{op}{batches}" if alone else f"{stage}{op}{batches}"


def format_order(order: Iterable[Action], *, alone: bool) -> str:
    """Returns a whole order as text."""
    return " ".join(format_action(action, alone=alone) for action in order)


def with_joined_weights(order: Iterable[Action]) -> Order:
    """Joins weight parts of neighbouring micro-batches of a stage that nothing comes between: one
    product over more rows reads and writes the gradients once."""
    found: list[Action] = []
    for action in order:
        op, stage, first, last = action
        before = found[-1] if found else None
        if before and op is Op.BACKWARD_WEIGHT and (op, stage, first) == before[:2] + before[3:]:
            found[-1] = before._replace(last=last)
        else:
            found.append(action)
    return tuple(found)


_WORD = re.compile(r"([0-9]{0,9})([FBIW])([0-9]{1,9})(?::([0-9]{1,9}))?")


def parse_order(text: str, held: Sequence[int], *, source: str, field: str) -> Order:
    """Parses the text of an order of a pipeline rank that holds the stages `held`; the inverse of
    `format_order`.

    Raises PlanError that names every word that is not an action.
    """
    found: list[Action] = []
    problems: list[Problem] = []
    for index, each in enumerate(text.split()):
        if len(problems) >= PROBLEMS_SHOWN:
            break
        action = _action(each, held)
        if action is None:
            wanted = "F, B, I or W with a micro-batch, as F0, or W0:4 for several"
            if len(held) > 1:
                wanted += f", after a stage among {', '.join(map(str, held))}, as {held[0]}F0"
            problems.append(Problem(source, f"{field}, word {index}", repr(each), wanted))
        else:
            found.append(action)
    PlanError.check(problems)
    return tuple(found)


def _action(each: str, held: Sequence[int]) -> Action | None:
    match = _WORD.fullmatch(each)
    if match is None or not (match[1] or len(held) == 1):
        return None
    stage, op, first = int(match[1] or held[0]), operation(match[2]), int(match[3])
    last = int(match[4]) if match[4] else first + 1
    if stage not in held or last <= first or (op is not Op.BACKWARD_WEIGHT and last > first + 1):
        return None
    return Action(op, stage, first, last)


def peak_held(
    order: Iterable[Action], full: Callable[[int], float], half: Callable[[int], float]
) -> float:
    """Returns the most that a pipeline rank holds at once, in the unit of `full` and `half`.

    For each micro-batch, a stage holds full(stage) between its forward and its B or I, and
    half(stage) between I and W.
    """
    held = most = 0.0
    for op, stage, first, last in order:
        if op is Op.FORWARD:
            held += full(stage)
        elif op is Op.BACKWARD:
            held -= full(stage)
        elif op is Op.BACKWARD_INPUT:
            held += half(stage) - full(stage)
        else:
            held -= half(stage) * (last - first)
        most = max(most, held)
    return most
