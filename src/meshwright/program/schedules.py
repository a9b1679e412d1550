"""Schedules as data: the order of work on every group of devices of a pipeline.

A group holds one stage, or several virtual ones. Letters: p groups, s a group's place, v stages of
each group, M micro-batches; F, I, W and B = I + W are seconds of one stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache

from meshwright.plan.spec import ScheduleName
from meshwright.plan.virtual import IN_PLAN, Layout
from meshwright.program.actions import Action, Order, high_water, one
from meshwright.program.instructions import Op
from meshwright.program.virtual import interleaved, zb_v


def gpipe(stage: int, micro_batches: int) -> Order:
    """All forwards, then all backwards, oldest first (Huang et al. 2019)."""
    forwards = (one(Op.FORWARD, stage, m) for m in range(micro_batches))
    backwards = (one(Op.BACKWARD, stage, m) for m in range(micro_batches))
    return (*forwards, *backwards)


def one_f_one_b(stage: int, micro_batches: int, warm_up: int) -> Order:
    """`warm_up` forwards, then a backward and a forward in turn, then the other backwards
    (PipeDream-flush, Narayanan et al. 2021): at most `warm_up` micro-batches are held."""
    order = [one(Op.FORWARD, stage, m) for m in range(min(warm_up, micro_batches))]
    for m in range(micro_batches):
        order.append(one(Op.BACKWARD, stage, m))
        if m + warm_up < micro_batches:
            order.append(one(Op.FORWARD, stage, m + warm_up))
    return tuple(order)


def zero_bubble(stage: int, micro_batches: int, warm_up: int, lag: int) -> Order:
    """As 1F1B with the backward in two parts, the weight part `lag` micro-batches behind: at most
    `warm_up + lag` micro-batches are held (Qi et al. 2023, arXiv 2401.10241). Where there is no lag
    (on the first stage), a whole backward does the same in fewer passes."""
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
    """2BP (arXiv 2405.18047): a backward hands the gradients of its inputs on first, and the
    weight part waits. Where the base schedule alternates (`filled`), its backwards after the last
    forward leave room for one weight part each; the rest comes at the end, those of one stage at
    once if `batched`. After the last forward nobody waits for what the first stage does: its
    backwards stay whole, in fewer passes."""
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
    """Neighbouring micro-batches of one stage in one action, stages in the order of their first."""
    runs: dict[int, list[Action]] = {}
    for action in weights:
        own = runs.setdefault(action.stage, [])
        if own and own[-1].last == action.first:
            own[-1] = own[-1]._replace(last=action.last)
        else:
            own.append(action)
    return [action for own in runs.values() for action in own]


def _one_each(make: Callable[[int, int, int], Order]) -> Callable[[Layout, int], tuple[Order, ...]]:
    """Orders of groups with one stage each, by make(stage, p, M)."""
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
    """What each group of devices does, by a schedule that has a rule for it and can play this
    layout (`layout_wanted`)."""
    base, two_parts, how = schedule.partition("-2bp")
    found = _BASES[base](layout, micro_batches)
    if not two_parts:
        return found
    filled, batched = base != "gpipe", how == "-batched"
    return tuple(delayed(order, filled=filled, batched=batched) for order in found)


def in_flight(schedule: ScheduleName, stage: int, stages: int, micro_batches: int) -> int:
    """Most micro-batches that a stage alone on its devices holds at once, from their forward until
    the last part of their backward; an upper bound where the plan says what is done."""
    if schedule == "gpipe" or schedule in IN_PLAN:
        return micro_batches
    if schedule == "1f1b":
        return min(stages - stage, micro_batches)
    layout = tuple((s,) for s in range(stages))
    return round(high_water(orders(schedule, layout, micro_batches)[stage], _each, _each))


def _each(_stage: int) -> float:
    return 1.0
