"""What tells one message from every other: its ends, direction and cut, and what it carries."""

from __future__ import annotations

from typing import NamedTuple

from meshwright.program.instructions import MATCHING_RECEIVE, SENDS, Instruction, Op


class Message(NamedTuple):
    """What a send and its receive have in common, and no other send or receive has."""

    source: int
    target: int
    direction: Op
    """RECV_F or RECV_B: what its receiver does."""
    cut: int
    """The stage before the cut that it crosses: two ranks may share several cuts."""
    micro_batch: int | None
    rows: tuple[int, int] | None
    part: tuple[int, int, int] | None


def message(rank: int, i: Instruction) -> Message:
    """The message of a send or receive in the list of a rank."""
    assert i.peer is not None
    sends = i.op in SENDS
    return Message(
        source=rank if sends else i.peer,
        target=i.peer if sends else rank,
        direction=direction(i),
        cut=stage_before(i),
        micro_batch=i.micro_batch,
        rows=i.rows,
        part=i.part,
    )


def direction(i: Instruction) -> Op:
    """RECV_F for activations, RECV_B for gradients, at both ends of a message."""
    return MATCHING_RECEIVE.get(i.op, i.op)


def stage_before(i: Instruction) -> int:
    """The stage before the cut that a message crosses."""
    return i.stage if i.op in (Op.SEND_F, Op.RECV_B) else i.stage - 1


Chain = tuple[Op, tuple[int, ...]]
"""A direction, and the ranks along which something is broadcast: its source, then all who receive
it. Stages that share ranks may broadcast activations and gradients along the same ranks, and each
rank then posts the two in an order of its own."""


def chain_of(i: Instruction) -> Chain:
    """The chain of a send or receive that is one message of a broadcast."""
    return direction(i), i.ranks
