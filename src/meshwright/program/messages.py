"""Identifies messages: two ranks, a direction, a cut, and the rows that they carry."""

from __future__ import annotations

from typing import NamedTuple

from meshwright.layout.shares import Share
from meshwright.program.instructions import Instruction
from meshwright.program.operations import MATCHING_RECEIVE, Op


class Message(NamedTuple):
    """Holds what a send shares with its receive and with no other send or receive."""

    source: int
    target: int
    direction: Op
    """RECV_F for activations, RECV_B for gradients: the operation of the receiver."""
    cut: int
    """The stage before the cut that is crossed; two ranks may share several cuts."""
    micro_batch: int | None
    rows: tuple[int, int] | None
    part: Share | None


def message_of(rank: int, i: Instruction) -> Message:
    """Returns the message of a send or receive in the list of a rank."""
    assert i.peer is not None
    sends = i.op.kind == "send"
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
    """Returns RECV_F for activations and RECV_B for gradients, at both ends of a message."""
    return MATCHING_RECEIVE.get(i.op, i.op)


def stage_before(i: Instruction) -> int:
    """Returns the stage before the cut that a message crosses."""
    return i.stage if i.op in (Op.SEND_F, Op.RECV_B) else i.stage - 1


Chain = tuple[Op, tuple[int, ...]]
"""A direction, and the ranks of a broadcast: its source, then all receivers. The direction belongs
to it because stages that share ranks may broadcast both activations and gradients along the same
ranks, and each rank posts the two in an order of its own."""


def chain_of(i: Instruction) -> Chain:
    """Returns the chain of a send or receive that belongs to a broadcast."""
    return direction(i), i.ranks
