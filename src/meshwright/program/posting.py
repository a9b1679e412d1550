"""When receives are posted: ahead of need, and in the order in which the other side sends."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.program.actions import Order
from meshwright.program.instructions import Op

AHEAD = 2
"""Computations of a rank between posting a receive and reading it, beside waiting: a transfer hides
behind this many. Of a stage that alternates, a forward and a backward: with one, gradients would
have a forward alone to hide behind."""


def receives_ahead(
    orders: Sequence[Order], groups: Sequence[int]
) -> tuple[dict[int, tuple[int, ...]], ...]:
    """For every group: indices of the actions whose receives are posted ahead of an action.

    `groups` is the group of every stage. Between two ranks messages of one direction have no names
    (NCCL), so they are received in the order in which they were sent, some earlier than needed.
    """
    made = {
        (action.op if action.op is Op.FORWARD else Op.BACKWARD, action.stage, action.first): index
        for order in orders
        for index, action in enumerate(order)
        if action.op is not Op.BACKWARD_WEIGHT
    }
    found = []
    for group, order in enumerate(orders):
        channels: dict[tuple[int, bool], list[tuple[int, int]]] = {}
        for index, (op, stage, micro_batch, _) in enumerate(order):
            forward = op is Op.FORWARD
            source = stage - 1 if forward else stage + 1
            if op is Op.BACKWARD_WEIGHT or not 0 <= source < len(groups):
                continue
            if groups[source] != group:
                sent = made[Op.FORWARD if forward else Op.BACKWARD, source, micro_batch]
                channels.setdefault((groups[source], forward), []).append((sent, index))
        found.append(_posts(channels))
    return tuple(found)


def _posts(
    channels: dict[tuple[int, bool], list[tuple[int, int]]],
) -> dict[int, tuple[int, ...]]:
    posts: dict[int, list[int]] = {}
    for messages in channels.values():
        messages.sort()
        latest = no_later_than_the_next([max(0, index - AHEAD) for _, index in messages])
        for at, (_, index) in zip(latest, messages, strict=True):
            posts.setdefault(at, []).append(index)
    return {at: tuple(indices) for at, indices in posts.items()}


def no_later_than_the_next(places: Sequence[int]) -> list[int]:
    """The latest places, none after its own, that stand in order."""
    found = list(places)
    for k in range(len(found) - 2, -1, -1):
        found[k] = min(found[k], found[k + 1])
    return found
