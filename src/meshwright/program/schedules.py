"""Defines schedules as data: the order of actions on every pipeline rank.

A pipeline rank holds one stage, or several virtual ones. Letters: p pipeline ranks, s the index of
one, v stages on each, M micro-batches; F, I, W and B = I + W are seconds of one stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache

from meshwright.plan.spec import ScheduleName
from meshwright.plan.virtual import IN_PLAN, Layout
from meshwright.program.actions import Action, Order, high_water, one
from meshwright.program.operations import Op
from meshwright.program.virtual import interleaved, zb_v


def gpipe(stage: int, micro_batches: int) -> Order:
    """Run all forwards, then all backwards, oldest first (Huang et al. 2019)."""
    forwards = (one(Op.FORWARD, stage, m) for m in range(micro_batches))
    backwards = (one(Op.BACKWARD, stage, m) for m in range(micro_batches))
    return (*forwards, *backwards)


def one_f_one_b(stage: int, micro_batches: int, warm_up: int) -> Order:
    """Run `warm_up` forwards, then backwards and forwards in turn, then the remaining backwards.

    PipeDream-flush (Narayanan et al. 2021). At most `warm_up` micro-batches are held. With
    `warm_up` 2 and 3 micro-batches: F0 F1 B0 F2 B1 B2.
    """
    order = [one(Op.FORWARD, stage, m) for m in range(min(warm_up, micro_batches))]
    for m in range(micro_batches):
        order.append(one(Op.BACKWARD, stage, m))
        if m + warm_up < micro_batches:
            order.append(one(Op.FORWARD, stage, m + warm_up))
    return tuple(order)


def zero_bubble(stage: int, micro_batches: int, warm_up: int, lag: int) -> Order:
    """Run 1F1B with a split backward whose weight part follows `lag` micro-batches behind.

    At most `warm_up + lag` micro-batches are held (Qi et al. 2023, arXiv 2401.10241). Without a
    lag, on the first stage, a whole backward does the same in fewer passes.
    """
    if lag == 0:
        return one_f_one_b(stage, micro_batches, warm_up)
    order = [one(Op.FORWARD, stage, m) for m in range(min(warm_up, micro_batches))]
    for m in range(micro_batches):
        order.append(one(Op.BACKWARD_INPUT, stage, m))
        if m >= lag:
            order.append(one(Op.BACKWARD_WEIGHT, stage, m - lag))
        if m + warm_up < micro_batches:
            order.append(one(Op.FORWARD, stage, m + warm_up))
    order += (
        one(Op.BACKWARD_WEIGHT, stage, m) for m in range(max(micro_batches - lag, 0), micro_batches)
    )
    return tuple(order)


def delayed(order: Order, *, filled: bool, batched: bool) -> Order:
    """Split the backwards of an order and delay their weight parts: 2BP (arXiv 2405.18047).

    A backward hands on its input gradients first. If the base schedule alternates (`filled`), each
    of its backwards after the last forward leaves room for one delayed weight part. The remaining
    ones come at the end, those of one stage at once if `batched`. After the last forward no stage
    waits for the first stage, so its backwards stay whole, in fewer passes.
    """
    last_forward = max(k for k, action in enumerate(order) if action.op is Op.FORWARD)
    waiting: deque[Action] = deque()
    found: list[Action] = []
    for k, action in enumerate(order):
        if action.op is Op.FORWARD or (action.stage == 0 and k > last_forward):
            found.append(action)
            continue
        found.append(action._replace(op=Op.BACKWARD_INPUT))
        waiting.append(action._replace(op=Op.BACKWARD_WEIGHT))
        if filled and last_forward < k < len(order) - 1:
            found.append(waiting.popleft())
    return (*found, *(_batched(waiting) if batched else waiting))


def _batched(weights: Iterable[Action]) -> list[Action]:
    """Join weight parts of neighbouring micro-batches of one stage into one action.

    Stages keep the order of their first weight part.
    """
    runs: dict[int, list[Action]] = {}
    for action in weights:
        own = runs.setdefault(action.stage, [])
        if own and own[-1].last == action.first:
            own[-1] = own[-1]._replace(last=action.last)
        else:
            own.append(action)
    return [action for own in runs.values() for action in own]


def _one_each(make: Callable[[int, int, int], Order]) -> Callable[[Layout, int], tuple[Order, ...]]:
    """Adapt a rule make(stage, p, M) for pipeline ranks that hold one stage each."""
    return lambda layout, count: tuple(make(s, len(layout), count) for s in range(len(layout)))


_BASES: dict[str, Callable[[Layout, int], tuple[Order, ...]]] = {
    "gpipe": _one_each(lambda s, _, count: gpipe(s, count)),
    "1f1b": _one_each(lambda s, p, count: one_f_one_b(s, count, p - s)),
    # One more forward ahead for every boundary below, so that each transfer has a slot of its own
    # to hide in (arXiv 2211.05322, "overlapping-friendly").
    "eager-1f1b": _one_each(lambda s, p, count: one_f_one_b(s, count, 2 * (p - s) - 1)),
    "interleaved-1f1b": lambda layout, count: interleaved(len(layout), len(layout[0]), count),
    "zb-h1": _one_each(lambda s, p, count: zero_bubble(s, count, p - s, s)),
    "zb-h2": _one_each(lambda s, p, count: zero_bubble(s, count, 2 * (p - s) - 1, 2 * s)),
    "zb-v": lambda layout, count: zb_v(len(layout), count),
}


@lru_cache(maxsize=64)
def orders(schedule: ScheduleName, layout: Layout, micro_batches: int) -> tuple[Order, ...]:
    """Return the order of every pipeline rank by a schedule's rule.

    The schedule must have a rule and be able to play this layout (`layout_wanted`).
    """
    base, two_parts, how = schedule.partition("-2bp")
    found = _BASES[base](layout, micro_batches)
    if not two_parts:
        return found
    filled, batched = base != "gpipe", how == "-batched"
    return tuple(delayed(order, filled=filled, batched=batched) for order in found)


def in_flight(schedule: ScheduleName, stage: int, stages: int, micro_batches: int) -> int:
    """Return the most micro-batches that a stage alone on its pipeline rank holds at once.

    A micro-batch is held from its forward to the last part of its backward. For a schedule whose
    actions the plan lists, the number is an upper bound.
    """
    if schedule == "gpipe" or schedule in IN_PLAN:
        return micro_batches
    if schedule == "1f1b":
        return min(stages - stage, micro_batches)
    layout = tuple((s,) for s in range(stages))
    return round(high_water(orders(schedule, layout, micro_batches)[stage], _each, _each))


def _each(_stage: int) -> float:
    return 1.0
