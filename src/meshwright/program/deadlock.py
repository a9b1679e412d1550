"""Finds deadlocks: plays a program without times and reports the ranks that wait for ever."""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.errors import Problem
from meshwright.program.instructions import Instruction, Program, text
from meshwright.program.messages import Message, message
from meshwright.program.operations import Op


def deadlocks(program: Program, source: str) -> Iterator[Problem]:
    """Yield one Problem for every rank that does not reach its end."""
    step = _Step(program)
    moved = True
    while moved:
        moved = any(step.advance(rank) for rank in range(len(program.ranks)))
    for rank, instructions in enumerate(program.ranks):
        at = step.at[rank]
        if at < len(instructions):
            found = f"{text(instructions[at])}, which waits for {step.waits_for(rank)}"
            wanted = "an order in which every wait ends"
            yield Problem(source, f"rank {rank}, instruction {at}", found, wanted)


class _Step:
    """Keeps what has been sent and computed so far."""

    def __init__(self, program: Program) -> None:
        self.ranks = program.ranks
        self.reads = [_receives_of(instructions) for instructions in program.ranks]
        self.stages = [{i.stage for i in instructions} for instructions in program.ranks]
        self.at = [0] * len(program.ranks)
        self.sent: set[Message] = set()
        self.done: set[tuple[int, bool, int, int | None]] = set()

    def advance(self, rank: int) -> bool:
        """Play a rank until it has to wait; return True if it advanced."""
        began = self.at[rank]
        while self.at[rank] < len(self.ranks[rank]) and self.waits_for(rank) is None:
            i = self.ranks[rank][self.at[rank]]
            if i.op.kind == "send":
                self.sent.add(message(rank, i))
            elif _reads(i) is not None:
                self.done.add((rank, i.op is Op.FORWARD, i.stage, i.micro_batch))
            self.at[rank] += 1
        return self.at[rank] > began

    def waits_for(self, rank: int) -> str | None:
        """Return what keeps a rank from its next instruction, or None."""
        i = self.ranks[rank][self.at[rank]]
        reads = _reads(i)
        if reads is None:
            return None
        for position, receive in self.reads[rank].get((reads, i.stage, i.micro_batch), ()):
            if position > self.at[rank]:
                return f"its own {text(receive)}, posted after it"
            if message(rank, receive) not in self.sent:
                return f"{text(receive)}, which rank {receive.peer} has not sent"
        forward = i.op is Op.FORWARD
        beside = i.stage - 1 if forward else i.stage + 1
        key = (rank, forward, beside, i.micro_batch)
        if beside in self.stages[rank] and key not in self.done:
            name = "forward" if forward else "backward"
            return f"its own {name} of micro-batch {i.micro_batch} on stage {beside}, after it"
        return None


def _reads(i: Instruction) -> Op | None:
    """The receives that a compute instruction waits for."""
    return i.op.reads if i.op.kind == "compute" else None


def _receives_of(
    instructions: tuple[Instruction, ...],
) -> dict[tuple[Op, int, int | None], list[tuple[int, Instruction]]]:
    """Return the receives with their indices, keyed by what they serve: (RECV_*, stage,
    micro-batch)."""
    found: dict[tuple[Op, int, int | None], list[tuple[int, Instruction]]] = {}
    for position, i in enumerate(instructions):
        if i.op.kind == "receive":
            found.setdefault((i.op, i.stage, i.micro_batch), []).append((position, i))
    return found
