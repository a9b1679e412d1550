"""Schedules in which every group of devices holds several stages of one pipeline."""

from __future__ import annotations

from meshwright.program.actions import Action, Order, one
from meshwright.program.instructions import Op


def interleaved(groups: int, chunks: int, micro_batches: int) -> tuple[Order, ...]:
    """Interleaved 1F1B (Narayanan et al. 2021): stage k stands on group k modulo p. Micro-batches
    go through all chunks p at a time, which makes the bubble (p - 1)(F + B) of one chunk.

    Where p does not divide M, the last round is a longer one.
    """
    rounds = _rounds(groups, micro_batches)
    found = []
    for s in range(groups):
        stages = [s + c * groups for c in range(chunks)]
        forwards = [one(Op.FORWARD, k, m) for r in rounds for k in stages for m in r]
        backwards = [one(Op.BACKWARD, k, m) for r in rounds for k in reversed(stages) for m in r]
        longest = len(rounds[0]) if len(rounds) == 1 else max(map(len, rounds))
        warm_up = (chunks - 1) * max(groups, longest) + 2 * (groups - 1 - s) + 1
        found.append(_alternating(forwards, backwards, warm_up))
    return tuple(found)


def _rounds(groups: int, micro_batches: int) -> list[range]:
    count = max(1, micro_batches // groups)
    ends = [groups * (r + 1) for r in range(count - 1)] + [micro_batches]
    return [range(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _alternating(forwards: list[Action], backwards: list[Action], warm_up: int) -> Order:
    order = forwards[:warm_up]
    for k, backward in enumerate(backwards):
        order.append(backward)
        order += forwards[warm_up + k : warm_up + k + 1]
    return tuple(order)


class _Turns:
    """The order of one group that grows, with the next micro-batch of each kind of work."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.order: list[Action] = []
        self.next: dict[tuple[Op, int], int] = {}

    def take(self, stage: int, *ops: Op) -> None:
        """The next of each of these; what is beyond the last micro-batch is left out."""
        for op in ops:
            m = self.next.get((op, stage), 0)
            self.next[op, stage] = m + 1
            if m < self.micro_batches:
                self.order.append(one(op, stage, m))

    def left(self, op: Op, stage: int) -> int:
        return self.micro_batches - self.next.get((op, stage), 0)


def zb_v(groups: int, micro_batches: int) -> tuple[Order, ...]:
    """ZB-V (Qi et al. 2024, arXiv 2405.15362): group s holds stages s and 2p - 1 - s, so that a
    micro-batch's backward begins where its forward did. No group idles between its first and its
    last action if F = I = W, and none holds more than p micro-batches of both its stages.

    Fewer micro-batches than 2p - 1 leave gaps in the same pattern.
    """
    return tuple(_one_v(s, groups, micro_batches) for s in range(groups))


def _one_v(group: int, groups: int, micro_batches: int) -> Order:
    down, up = group, 2 * groups - 1 - group
    f, i, w = Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT
    # Nobody waits for the first stage's, whose parts would follow each other at once.
    both = (i, w) if down else (Op.BACKWARD,)
    played = max(micro_batches, 2 * groups - 1)
    turns = _Turns(micro_batches)
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
