"""Decides when receives are posted: ahead of their use, in the order in which the other side
sends."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.program.actions import Order
from meshwright.program.operations import Op

AHEAD = 2
"""The number of compute instructions between posting a receive and reading it, behind which the
transfer can hide. In 1F1B, 2 covers a forward and a backward; with 1, a gradient could hide behind
a forward only."""


def receives_ahead(
    orders: Sequence[Order], groups: Sequence[int]
) -> tuple[dict[int, tuple[int, ...]], ...]:
    """Return, for every pipeline rank, the actions whose receives are posted ahead of an action.

    The result maps the index of an action to the indices of those actions. `groups` holds the
    pipeline rank of every stage. Messages in one direction between two ranks have no tags (NCCL),
    so they are received in the order in which they were sent, some earlier than needed.
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
    """Choose where a pipeline rank posts its receives, so that messages keep their order."""
    posts: dict[int, list[int]] = {}
    for messages in channels.values():
        messages.sort()
        latest = no_later_than_the_next([max(0, index - AHEAD) for _, index in messages])
        for at, (_, index) in zip(latest, messages, strict=True):
            posts.setdefault(at, []).append(index)
    return {at: tuple(indices) for at, indices in posts.items()}


def no_later_than_the_next(places: Sequence[int]) -> list[int]:
    """Lower each place to the least of those after it: [3, 1, 2] becomes [1, 1, 2]."""
    found = list(places)
    for k in range(len(found) - 2, -1, -1):
        found[k] = min(found[k], found[k + 1])
    return found
