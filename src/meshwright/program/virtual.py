"""Defines schedules in which every pipeline rank holds several virtual stages."""

from __future__ import annotations

from meshwright.program.actions import Action, Order, one
from meshwright.program.operations import Op


def interleaved(groups: int, chunks: int, micro_batches: int) -> tuple[Order, ...]:
    """Return interleaved 1F1B (Narayanan et al. 2021): stage k stands on pipeline rank k modulo p.

    Micro-batches pass through all chunks p at a time, so that the bubble is (p - 1)(F + B) of one
    chunk. If p does not divide M, the last round is a longer one.
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
    """Divide the micro-batches into rounds of `groups`; the last one takes the remainder too."""
    count = max(1, micro_batches // groups)
    ends = [groups * (r + 1) for r in range(count - 1)] + [micro_batches]
    return [range(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _alternating(forwards: list[Action], backwards: list[Action], warm_up: int) -> Order:
    """Run `warm_up` forwards, then alternate backwards and forwards."""
    order = forwards[:warm_up]
    for k, backward in enumerate(backwards):
        order.append(backward)
        order += forwards[warm_up + k : warm_up + k + 1]
    return tuple(order)


class _Turns:
    """Builds the order of a pipeline rank, with the next micro-batch of each stage and
    operation."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.order: list[Action] = []
        self.next: dict[tuple[Op, int], int] = {}

    def take(self, stage: int, *ops: Op) -> None:
        """Append the next micro-batch of each operation; those beyond the last are skipped."""
        for op in ops:
            m = self.next.get((op, stage), 0)
            self.next[op, stage] = m + 1
            if m < self.micro_batches:
                self.order.append(one(op, stage, m))

    def left(self, op: Op, stage: int) -> int:
        """Return the number of micro-batches for which an operation is still to be done."""
        return self.micro_batches - self.next.get((op, stage), 0)


def zb_v(groups: int, micro_batches: int) -> tuple[Order, ...]:
    """Return ZB-V (Qi et al. 2024, arXiv 2405.15362), with stages s and 2p - 1 - s on pipeline rank
    s.

    A micro-batch's backward therefore begins on the pipeline rank where its forward ended. If F, I
    and W take equal time, no pipeline rank idles between its first and its last action, and none
    holds more than p micro-batches of both its stages. With fewer than 2p - 1 micro-batches the
    same pattern has gaps.
    """
    return tuple(_one_v(s, groups, micro_batches) for s in range(groups))


def _one_v(group: int, groups: int, micro_batches: int) -> Order:
    """Return the order of the pipeline rank `group`.

    Its stage `down` is one of the first p stages, its stage `up` one of the last p.
    """
    down, up = group, 2 * groups - 1 - group
    f, i, w = Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT
    # No stage waits for the first one, whose backwards therefore stay whole, in fewer passes.
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
