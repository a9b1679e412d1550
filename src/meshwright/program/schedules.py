"""Defines schedules as data: the order of actions on every pipeline rank.

A pipeline rank holds one stage, or several virtual ones. Letters: p pipeline ranks, s the index of
one, v stages on each, M micro-batches; F, I, W and B = I + W are seconds of one stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache

from meshwright.plan.ranks import EXPLICIT_SCHEDULES, StageLayout
from meshwright.plan.spec import ScheduleName
from meshwright.program.actions import Action, Order, peak_held, single_action
from meshwright.program.operations import Op


def interleaved(groups: int, chunks: int, micro_batches: int) -> tuple[Order, ...]:
    """Returns interleaved 1F1B (Narayanan et al. 2021): stage k stands on pipeline rank k modulo p.

    Micro-batches pass through all chunks p at a time, so that the bubble is (p - 1)(F + B) of one
    chunk. If p does not divide M, the last round is a longer one.
    """
    rounds = _rounds(groups, micro_batches)
    found = []
    for s in range(groups):
        stages = [s + c * groups for c in range(chunks)]
        forwards = [single_action(Op.FORWARD, k, m) for r in rounds for k in stages for m in r]
        backwards = [
            single_action(Op.BACKWARD, k, m) for r in rounds for k in reversed(stages) for m in r
        ]
        longest = len(rounds[0]) if len(rounds) == 1 else max(map(len, rounds))
        warm_up = (chunks - 1) * max(groups, longest) + 2 * (groups - 1 - s) + 1
        found.append(_alternating(forwards, backwards, warm_up))
    return tuple(found)


def _rounds(groups: int, micro_batches: int) -> list[range]:
    """Divides the micro-batches into rounds of `groups`; the last one takes the remainder too."""
    count = max(1, micro_batches // groups)
    ends = [groups * (r + 1) for r in range(count - 1)] + [micro_batches]
    return [range(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _alternating(forwards: list[Action], backwards: list[Action], warm_up: int) -> Order:
    """Returns an order with `warm_up` forwards, then backwards and forwards in turn, then the
    remaining backwards."""
    order = forwards[:warm_up]
    for k, backward in enumerate(backwards):
        order.append(backward)
        order += forwards[warm_up + k : warm_up + k + 1]
    return tuple(order)


class _OrderBuilder:
    """Builds the order of a pipeline rank, with the next micro-batch of each stage and
    operation."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.order: list[Action] = []
        self.next: dict[tuple[Op, int], int] = {}

    def take(self, stage: int, *ops: Op) -> None:
        """Appends the next micro-batch of each operation; those beyond the last are skipped."""
        for op in ops:
            m = self.next.get((op, stage), 0)
            self.next[op, stage] = m + 1
            if m < self.micro_batches:
                self.order.append(single_action(op, stage, m))

    def left(self, op: Op, stage: int) -> int:
        """Returns the number of micro-batches for which an operation is still to be done."""
        return self.micro_batches - self.next.get((op, stage), 0)


def zb_v(groups: int, micro_batches: int) -> tuple[Order, ...]:
    """Returns ZB-V (Qi et al. 2024, arXiv 2405.15362), with stages s and 2p - 1 - s on pipeline
    rank s.

    A micro-batch's backward therefore begins on the pipeline rank where its forward ended. If F, I
    and W take equal time, no pipeline rank idles between its first and its last action, and none
    holds more than p micro-batches of both its stages. With fewer than 2p - 1 micro-batches the
    same pattern has gaps."""
    return tuple(_v_order(s, groups, micro_batches) for s in range(groups))


def _v_order(group: int, groups: int, micro_batches: int) -> Order:
    """Returns the order of the pipeline rank `group`.

    Its stage `down` is one of the first p stages, its stage `up` one of the last p.
    """
    down, up = group, 2 * groups - 1 - group
    f, i, w = Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT
    # No stage waits for the first one, whose backwards therefore stay whole, in fewer passes.
    both = (i, w) if down else (Op.BACKWARD,)
    played = max(micro_batches, 2 * groups - 1)
    turns = _OrderBuilder(micro_batches)
    for _ in range(2 * (groups - group) - 1):
        turns.take(down, f)
    for _ in range(group):
        turns.take(up, f)
        turns.take(down, f)
    for _ in range(groups - group):
        turns.take(up, f, i, w)
    for _ in range(played - groups):
        if turns.next[f, down] < played:
            turns.take(down, f)
        turns.take(down, *both)
        turns.take(up, f, i, w)
    for _ in range(group):
        turns.take(down, i)
        turns.take(up, i)
    for _ in range(groups - group):
        turns.take(down, *both)
    for stage, last in ((up, w), (down, both[-1])):
        while turns.left(last, stage) > 0:
            turns.take(stage, last)
    return tuple(turns.order)


def gpipe(stage: int, micro_batches: int) -> Order:
    """Returns GPipe's order: all forwards, then all backwards, oldest first (Huang et al. 2019)."""
    forwards = (single_action(Op.FORWARD, stage, m) for m in range(micro_batches))
    backwards = (single_action(Op.BACKWARD, stage, m) for m in range(micro_batches))
    return (*forwards, *backwards)


def one_f_one_b(stage: int, micro_batches: int, warm_up: int) -> Order:
    """Returns the order of 1F1B: `warm_up` forwards, then backwards and forwards in turn, then the
    remaining backwards.

    PipeDream-flush (Narayanan et al. 2021). At most `warm_up` micro-batches are held. With
    `warm_up` 2 and 3 micro-batches: F0 F1 B0 F2 B1 B2.
    """
    order = [single_action(Op.FORWARD, stage, m) for m in range(min(warm_up, micro_batches))]
    for m in range(micro_batches):
        order.append(single_action(Op.BACKWARD, stage, m))
        if m + warm_up < micro_batches:
            order.append(single_action(Op.FORWARD, stage, m + warm_up))
    return tuple(order)


def zero_bubble(stage: int, micro_batches: int, warm_up: int, lag: int) -> Order:
    """Returns the order of 1F1B with split backwards: the weight part of a micro-batch comes `lag`
    micro-batches after its input part.

    At most `warm_up + lag` micro-batches are held (Qi et al. 2023, arXiv 2401.10241). Without a
    lag, on the first stage, a whole backward does the same in fewer passes.
    """
    if lag == 0:
        return one_f_one_b(stage, micro_batches, warm_up)
    order = [single_action(Op.FORWARD, stage, m) for m in range(min(warm_up, micro_batches))]
    for m in range(micro_batches):
        order.append(single_action(Op.BACKWARD_INPUT, stage, m))
        if m >= lag:
            order.append(single_action(Op.BACKWARD_WEIGHT, stage, m - lag))
        if m + warm_up < micro_batches:
            order.append(single_action(Op.FORWARD, stage, m + warm_up))
    order += (
        single_action(Op.BACKWARD_WEIGHT, stage, m)
        for m in range(max(micro_batches - lag, 0), micro_batches)
    )
    return tuple(order)


def two_bp(order: Order, *, filled: bool, batched: bool) -> Order:
    """Splits the backwards of an order in two parts, and delays their weight parts: 2BP (arXiv
    2405.18047).

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
    """Joins weight parts of neighbouring micro-batches of one stage into one action.

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


def _one_each(
    make: Callable[[int, int, int], Order],
) -> Callable[[StageLayout, int], tuple[Order, ...]]:
    """Adapts a rule make(stage, p, M) for pipeline ranks that hold one stage each."""
    return lambda layout, count: tuple(make(s, len(layout), count) for s in range(len(layout)))


_BASES: dict[str, Callable[[StageLayout, int], tuple[Order, ...]]] = {
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
def schedule_orders(
    schedule: ScheduleName, layout: StageLayout, micro_batches: int
) -> tuple[Order, ...]:
    """Returns the order of every pipeline rank by a schedule's rule.

    The schedule must have a rule and be able to play this layout (`needed_layout`).
    """
    base, two_parts, how = schedule.partition("-2bp")
    found = _BASES[base](layout, micro_batches)
    if not two_parts:
        return found
    filled, batched = base != "gpipe", how == "-batched"
    return tuple(two_bp(order, filled=filled, batched=batched) for order in found)


def in_flight(schedule: ScheduleName, stage: int, stages: int, micro_batches: int) -> int:
    """Returns the most micro-batches that a stage alone on its pipeline rank holds at once.

    A micro-batch is held from its forward to the last part of its backward. For a schedule whose
    actions the plan lists, the number is an upper bound.
    """
    if schedule == "gpipe" or schedule in EXPLICIT_SCHEDULES:
        return micro_batches
    if schedule == "1f1b":
        return min(stages - stage, micro_batches)
    layout = tuple((s,) for s in range(stages))
    return round(peak_held(schedule_orders(schedule, layout, micro_batches)[stage], _each, _each))


def _each(_stage: int) -> float:
    return 1.0
