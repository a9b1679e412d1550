"""Defines schedules as data: the order of actions on every pipeline rank.

A pipeline rank holds one stage, or several virtual ones. Letters: p pipeline ranks, s the index of
one, v stages on each, M micro-batches; F, I, W and B = I + W are seconds of one stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import lru_cache

from meshwright.plan.ranks import EXPLICIT_SCHEDULES, StageLayout
from meshwright.plan.spec import ScheduleName
from meshwright.program.actions import Order, with_joined_weights
from meshwright.program.codes import B, Codes, F, I, W, peak, to_orders


def interleaved(groups: int, chunks: int, micro_batches: int) -> list[Codes]:
    """Returns interleaved 1F1B (Narayanan et al. 2021): stage k stands on pipeline rank k modulo p.

    Micro-batches pass through all chunks p at a time, so that the bubble is (p - 1)(F + B) of one
    chunk. If p does not divide M, the last round is a longer one.
    """
    rounds = _rounds(groups, micro_batches)
    found = []
    for s in range(groups):
        stages = [s + c * groups for c in range(chunks)]
        forwards = [4 * k + F for r in rounds for k in stages for _ in range(r)]
        backwards = [4 * k + B for r in rounds for k in reversed(stages) for _ in range(r)]
        longest = rounds[0] if len(rounds) == 1 else max(rounds)
        warm_up = (chunks - 1) * max(groups, longest) + 2 * (groups - 1 - s) + 1
        found.append(_alternating(forwards, backwards, warm_up))
    return found


def _rounds(groups: int, micro_batches: int) -> list[int]:
    """Divides the micro-batches into rounds of `groups`; the last one takes the remainder too."""
    count = max(1, micro_batches // groups)
    return [groups] * (count - 1) + [micro_batches - groups * (count - 1)]


def _alternating(forwards: Codes, backwards: Codes, warm_up: int) -> Codes:
    """Returns an order with `warm_up` forwards, then backwards and forwards in turn, then the
    remaining backwards."""
    order = forwards[:warm_up]
    for k, backward in enumerate(backwards):
        order.append(backward)
        order += forwards[warm_up + k : warm_up + k + 1]
    return order


class _OrderBuilder:
    """Builds the order of a pipeline rank, and counts the micro-batches of each stage and kind of
    work."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.order: Codes = []
        self.done: dict[int, int] = {}

    def take(self, stage: int, *kinds: int) -> None:
        """Appends the next micro-batch of each kind of work; those beyond the last are skipped."""
        for kind in kinds:
            code = 4 * stage + kind
            m = self.done.get(code, 0)
            self.done[code] = m + 1
            if m < self.micro_batches:
                self.order.append(code)

    def left(self, kind: int, stage: int) -> int:
        """Returns the number of micro-batches for which some work is still to be done."""
        return self.micro_batches - self.done.get(4 * stage + kind, 0)


def zb_v(groups: int, micro_batches: int) -> list[Codes]:
    """Returns ZB-V (Qi et al. 2024, arXiv 2405.15362), with stages s and 2p - 1 - s on pipeline
    rank s.

    A micro-batch's backward therefore begins on the pipeline rank where its forward ended. If F, I
    and W take equal time, no pipeline rank idles between its first and its last action, and none
    holds more than p micro-batches of both its stages. With fewer than 2p - 1 micro-batches the
    same pattern has gaps."""
    return [_v_order(s, groups, micro_batches) for s in range(groups)]


def _v_order(group: int, groups: int, micro_batches: int) -> Codes:
    """Returns the order of the pipeline rank `group`.

    Its stage `down` is one of the first p stages, its stage `up` one of the last p.
    """
    down, up = group, 2 * groups - 1 - group
    # No stage waits for the first one, whose backwards therefore stay whole, in fewer passes.
    both = (I, W) if down else (B,)
    played = max(micro_batches, 2 * groups - 1)
    turns = _OrderBuilder(micro_batches)
    for _ in range(2 * (groups - group) - 1):
        turns.take(down, F)
    for _ in range(group):
        turns.take(up, F)
        turns.take(down, F)
    for _ in range(groups - group):
        turns.take(up, F, I, W)
    for _ in range(played - groups):
        if turns.done[4 * down + F] < played:
            turns.take(down, F)
        turns.take(down, *both)
        turns.take(up, F, I, W)
    for _ in range(group):
        turns.take(down, I)
        turns.take(up, I)
    for _ in range(groups - group):
        turns.take(down, *both)
    for stage, last in ((up, W), (down, both[-1])):
        while turns.left(last, stage) > 0:
            turns.take(stage, last)
    return turns.order


def gpipe(stage: int, micro_batches: int) -> Codes:
    """Returns GPipe's order: all forwards, then all backwards, oldest first (Huang et al. 2019)."""
    return [4 * stage + F] * micro_batches + [4 * stage + B] * micro_batches


def one_f_one_b(stage: int, micro_batches: int, warm_up: int) -> Codes:
    """Returns the order of 1F1B: `warm_up` forwards, then backwards and forwards in turn, then the
    remaining backwards.

    PipeDream-flush (Narayanan et al. 2021). At most `warm_up` micro-batches are held. With
    `warm_up` 2 and 3 micro-batches: F0 F1 B0 F2 B1 B2.
    """
    forward, backward = 4 * stage + F, 4 * stage + B
    ahead = min(warm_up, micro_batches)
    return [forward] * ahead + [backward, forward] * (micro_batches - ahead) + [backward] * ahead


def zero_bubble(stage: int, micro_batches: int, warm_up: int, lag: int) -> Codes:
    """Returns the order of 1F1B with split backwards: the weight part of a micro-batch comes `lag`
    micro-batches after its input part.

    At most `warm_up + lag` micro-batches are held (Qi et al. 2023, arXiv 2401.10241). Without a
    lag, on the first stage, a whole backward does the same in fewer passes.
    """
    if lag == 0:
        return one_f_one_b(stage, micro_batches, warm_up)
    forward, inputs, weights = 4 * stage + F, 4 * stage + I, 4 * stage + W
    order = [forward] * min(warm_up, micro_batches)
    for m in range(micro_batches):
        order.append(inputs)
        if m >= lag:
            order.append(weights)
        if m + warm_up < micro_batches:
            order.append(forward)
    return order + [weights] * min(lag, micro_batches)


def two_bp(order: Codes, *, filled: bool, batched: bool) -> Codes:
    """Splits the backwards of an order in two parts, and delays their weight parts: 2BP (arXiv
    2405.18047).

    A backward hands on its input gradients first. If the base schedule alternates (`filled`), each
    of its backwards after the last forward leaves room for one delayed weight part. The remaining
    ones come at the end, those of one stage together if `batched`. After the last forward no stage
    waits for the first stage, so its backwards stay whole, in fewer passes.
    """
    last_forward = max(k for k, code in enumerate(order) if code & 3 == F)
    found = [code - B + I if code & 3 == B else code for code in order[:last_forward]]
    waiting = deque(code - B + W for code in order[:last_forward] if code & 3 == B)
    found.append(order[last_forward])
    for k, code in enumerate(order[last_forward + 1 :], last_forward + 1):
        if code == B:  # of the first stage
            found.append(code)
            continue
        found.append(code - B + I)
        waiting.append(code - B + W)
        if filled and k < len(order) - 1:
            found.append(waiting.popleft())
    if batched:  # stages keep the order of their first weight part
        stages = {code: n for n, code in enumerate(dict.fromkeys(waiting))}
        return found + sorted(waiting, key=stages.__getitem__)
    return [*found, *waiting]


def _one_each(
    make: Callable[[int, int, int], Codes],
) -> Callable[[StageLayout, int], list[Codes]]:
    """Adapts a rule make(stage, p, M) for pipeline ranks that hold one stage each."""
    return lambda layout, count: [make(s, len(layout), count) for s in range(len(layout))]


_BASES: dict[str, Callable[[StageLayout, int], list[Codes]]] = {
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
def schedule_codes(schedule: ScheduleName, layout: StageLayout, micro_batches: int) -> list[Codes]:
    """Returns the order of every pipeline rank by a schedule's rule, as numbers: the same lists
    each time, which are not to be changed.

    The schedule must have a rule and be able to play this layout (`needed_layout`).
    """
    base, two_parts, how = schedule.partition("-2bp")
    found = _BASES[base](layout, micro_batches)
    if not two_parts:
        return found
    filled, batched = base != "gpipe", how == "-batched"
    return [two_bp(order, filled=filled, batched=batched) for order in found]


@lru_cache(maxsize=64)
def schedule_orders(
    schedule: ScheduleName, layout: StageLayout, micro_batches: int
) -> tuple[Order, ...]:
    """Returns the order of every pipeline rank by a schedule's rule, with the weight parts at its
    end as one action for each stage if the schedule batches them."""
    orders = to_orders(schedule_codes(schedule, layout, micro_batches))
    return tuple(map(with_joined_weights, orders)) if schedule.endswith("-batched") else orders


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
    own = schedule_codes(schedule, layout, micro_batches)[stage]
    return round(peak(own, [1, -1, 0, -1] * stages))
