"""Gives every pipeline rank its order of actions, by the schedule's rule or as the plan lists
them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from meshwright.errors import PlanError, Problem
from meshwright.plan.ranks import EXPLICIT_SCHEDULES, StageLayout, stage_layout
from meshwright.plan.spec import Plan
from meshwright.program.actions import Order, format_action, parse_order
from meshwright.program.operations import Op
from meshwright.program.schedules import schedule_orders


def orders_of(plan: Plan, pipeline: int) -> tuple[Order, ...]:
    """Returns the order of every pipeline rank of a pipeline.

    Raises PlanError, naming the word, for actions in the plan that are missing, repeated, out of
    order, or wait for ever.
    """
    found = plan.pipelines[pipeline]
    layout = stage_layout(found)
    if plan.schedule not in EXPLICIT_SCHEDULES:
        return schedule_orders(plan.schedule, layout, found.micro_batches)
    actions = found.actions or ()
    return _checked(actions, layout, found.micro_batches, plan.name, f"pipelines[{pipeline}]")


@lru_cache(maxsize=64)
def _checked(
    actions: tuple[str, ...], layout: StageLayout, micro_batches: int, source: str, where: str
) -> tuple[Order, ...]:
    """Parses and checks the orders that a plan lists."""
    if len(actions) != len(layout):
        found, wanted = f"{len(actions)} texts", f"{len(layout)}, one for each pipeline rank"
        raise PlanError(Problem(source, f"{where}.actions", found, wanted))
    parsed = tuple(
        parse_order(text, held, source=source, field=f"{where}.actions[{g}]")
        for g, (text, held) in enumerate(zip(actions, layout, strict=True))
    )
    check_orders(parsed, layout, micro_batches, source=source, where=where)
    return parsed


def check_orders(
    found: Sequence[Order], layout: StageLayout, micro_batches: int, *, source: str, where: str
) -> None:
    """Raises PlanError for orders that cannot be played.

    Every pipeline rank must do each part of its micro-batches once and after what it depends on,
    and no two ranks may wait for each other for ever.
    """
    problems: list[Problem] = []
    for g, (order, held) in enumerate(zip(found, layout, strict=True)):
        field = f"{where}.actions[{g}]"
        problems += _incomplete(order, held, micro_batches, source, field)
    PlanError.check(problems)
    PlanError.check(_stuck(found, layout, source, where))


def _incomplete(
    order: Order, held: Sequence[int], micro_batches: int, source: str, field: str
) -> Iterator[Problem]:
    """Walks through the order of a pipeline rank and checks each action against those before it."""
    alone = len(held) == 1
    done: set[tuple[Op, int, int]] = set()
    for index, action in enumerate(order):
        op, stage = action.op, action.stage
        for m in range(action.first, action.last):
            here = f"{field}, word {index}"
            needed = _needs(op)
            if m >= micro_batches:
                wanted = f"micro-batches below {micro_batches}"
                yield Problem(source, here, format_action(action, alone=alone), wanted)
            elif (op, stage, m) in done:
                yield Problem(source, here, format_action(action, alone=alone), "each action once")
            elif needed and (needed, stage, m) not in done:
                yield Problem(
                    source, here, format_action(action, alone=alone), f"its {needed}{m} before it"
                )
            elif op in (Op.BACKWARD, Op.BACKWARD_INPUT) and _other(op, stage, m) in done:
                wanted = "a backward whole (B) or in two parts (I, W), not both"
                yield Problem(source, here, format_action(action, alone=alone), wanted)
            done.add((op, stage, m))
    for stage in held:
        for m in range(micro_batches):
            missing = _missing(done, stage, m)
            if missing:
                prefix = "" if alone else str(stage)
                yield Problem(source, field, f"no {prefix}{missing}{m}", "every part of each once")


def _needs(op: Op) -> Op | None:
    """Returns the operation on the same stage and micro-batch that must come before this one."""
    if op is Op.BACKWARD_WEIGHT:
        return Op.BACKWARD_INPUT
    return None if op is Op.FORWARD else Op.FORWARD


def _other(op: Op, stage: int, micro_batch: int) -> tuple[Op, int, int]:
    """Returns the action that would do a backward a second time: I for a B, B for an I."""
    other = Op.BACKWARD_INPUT if op is Op.BACKWARD else Op.BACKWARD
    return other, stage, micro_batch


def _missing(done: set[tuple[Op, int, int]], stage: int, m: int) -> str:
    """Returns the first operation that is missing for a micro-batch, or an empty string."""
    if (Op.FORWARD, stage, m) not in done:
        return Op.FORWARD
    if (Op.BACKWARD_INPUT, stage, m) in done:
        return "" if (Op.BACKWARD_WEIGHT, stage, m) in done else Op.BACKWARD_WEIGHT
    return "" if (Op.BACKWARD, stage, m) in done else Op.BACKWARD


def _stuck(
    found: Sequence[Order], layout: StageLayout, source: str, where: str
) -> Iterator[Problem]:
    """Plays the orders without times; reports every pipeline rank that waits for ever, and for
    what."""
    last = max(stage for held in layout for stage in held)
    done: set[tuple[Op, int, int]] = set()
    at = [0] * len(found)

    def awaited(g: int) -> tuple[Op, int, int] | None:
        op, stage, m, _ = found[g][at[g]]
        if op is Op.FORWARD:
            need = (Op.FORWARD, stage - 1, m) if stage else None
        elif op is Op.BACKWARD_WEIGHT or stage == last:
            need = None
        else:
            need = (Op.BACKWARD_INPUT, stage + 1, m)
        return need if need and need not in done else None

    moved = True
    while moved:
        moved = False
        for g, order in enumerate(found):
            while at[g] < len(order) and awaited(g) is None:
                op, stage, m, _ = order[at[g]]
                done.add((Op.BACKWARD_INPUT if op is Op.BACKWARD else op, stage, m))
                at[g] += 1
                moved = True
    for g, order in enumerate(found):
        if at[g] < len(order):
            need = awaited(g)
            assert need is not None
            stuck = format_action(order[at[g]], alone=len(layout[g]) == 1)
            text = f"{stuck}, which waits for {need[1]}{need[0]}{need[2]} for ever"
            field = f"{where}.actions[{g}], word {at[g]}"
            yield Problem(source, field, text, "an order in which every wait ends")
