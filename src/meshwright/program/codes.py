"""Writes orders of actions as numbers, which are quick to make and to play.

Every kind of work of a stage takes its micro-batches in turn, so that they need not be named.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate

from meshwright.program.actions import Action, Order
from meshwright.program.operations import Op

F, B, I, W = range(4)  # noqa: E741 - the words of schedules
OPS = (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
CODES = {op: code for code, op in enumerate(OPS)}

Codes = list[int]
"""An order as numbers, 4 x stage + F, B, I or W."""


def to_orders(codes: Sequence[Codes]) -> tuple[Order, ...]:
    """Turns orders written as numbers into orders of actions."""
    return tuple(_to_order(own) for own in codes)


def _to_order(own: Codes) -> Order:
    stages = max(own, default=0) // 4 + 1
    forwards, backwards = [0] * stages, [0] * stages
    waiting: list[deque[int]] = [deque() for _ in range(stages)]
    order = []
    for code in own:
        kind, s = code & 3, code >> 2
        if kind == F:
            m = forwards[s]
            forwards[s] = m + 1
        elif kind == W:
            m = waiting[s].popleft()
        else:
            m = backwards[s]
            backwards[s] = m + 1
            if kind == I:
                waiting[s].append(m)
        order.append(Action(OPS[kind], s, m, m + 1))
    return tuple(order)


def to_codes(orders: Sequence[Order]) -> list[Codes]:
    """Turns orders of actions into numbers; a batched W becomes several single ones."""
    return [
        [4 * a.stage + CODES[a.op] for a in order for _ in range(a.last - a.first)]
        for order in orders
    ]


def peak(own: Codes, changes: Sequence[float]) -> float:
    """Returns the most that an order holds at once, given what every code adds to it."""
    return max(accumulate(map(changes.__getitem__, own)), default=0.0)
