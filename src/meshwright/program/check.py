"""Checks that a program is sound: every send has its receive, no action is repeated, and nothing
deadlocks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace

from meshwright.errors import Problem, ProgramError
from meshwright.program.instructions import (
    Instruction,
    Program,
    format_instruction,
    micro_batches_of,
)
from meshwright.program.messages import Message, message_of
from meshwright.program.operations import MATCHING_RECEIVE, Op

Task = tuple[int, int]
"""A stage, and one of its micro-batches."""


def check_program(program: Program, *, source: str = "program") -> None:
    """Raises ProgramError with every mistake found; a program without mistakes runs to its end."""
    problems = [*_unknown_ranks(program, source)]
    if not problems:
        problems = [
            *_repeated(program, source),
            *_unmatched(program, source),
            *_out_of_order(program, source),
            *_collectives(program, source),
            *_end_of_step(program, source),
        ]
    if not problems:
        problems = [*deadlocks(program, source)]
    ProgramError.check(replace(each, each=("rank", _rank(each.field))) for each in problems)


def _rank(field: str) -> str:
    """Returns the rank that a problem's field names, as `rank 3`."""
    return field.partition(",")[0]


def _at(rank: int, index: int) -> str:
    return f"rank {rank}, instruction {index}"


def _unknown_ranks(program: Program, source: str) -> Iterator[Problem]:
    """Checks that every rank and peer exists, and that messages have a peer and a micro-batch."""
    count = len(program.ranks)
    for rank, instructions in enumerate(program.ranks):
        for index, i in enumerate(instructions):
            named = (*i.ranks, *(() if i.peer is None else (i.peer,)))
            strangers = [r for r in named if not 0 <= r < count]
            if strangers or i.peer == rank:
                wanted = f"another rank below {count}"
                yield Problem(source, _at(rank, index), format_instruction(i), wanted)
            if i.op.kind in ("send", "receive") and (i.peer is None or i.micro_batch is None):
                yield Problem(
                    source, _at(rank, index), format_instruction(i), "a peer and a micro-batch"
                )


def _repeated(program: Program, source: str) -> Iterator[Problem]:
    """Checks that no instruction of a rank is repeated."""
    for rank, instructions in enumerate(program.ranks):
        seen: dict[str, int] = {}
        for index, i in enumerate(instructions):
            key = format_instruction(i)
            if key in seen:
                first = f"once only; it stands at instruction {seen[key]} already"
                yield Problem(source, _at(rank, index), key, first, "remove one of the two")
            seen.setdefault(key, index)
        yield from _halves(rank, instructions, source)


def _halves(rank: int, instructions: tuple[Instruction, ...], source: str) -> Iterator[Problem]:
    """Checks that every forward is followed by its backward: whole, or an input part and then a
    weight part."""
    forwards: set[Task] = set()
    inputs: set[Task] = set()
    whole: set[Task] = set()
    weights: set[Task] = set()
    for index, i in enumerate(instructions):
        for m in micro_batches_of(i):
            task = (i.stage, m)
            if i.op is Op.FORWARD:
                forwards.add(task)
            elif i.op in (Op.BACKWARD, Op.BACKWARD_INPUT):
                if task not in forwards:
                    yield Problem(
                        source, _at(rank, index), format_instruction(i), "its forward before it"
                    )
                (whole if i.op is Op.BACKWARD else inputs).add(task)
            elif i.op is Op.BACKWARD_WEIGHT:
                if task not in inputs:
                    yield Problem(
                        source,
                        _at(rank, index),
                        format_instruction(i),
                        f"a {i.stage}I{m} before it",
                    )
                if task in weights:
                    yield Problem(
                        source, _at(rank, index), format_instruction(i), f"W{m} once only"
                    )
                weights.add(task)
    for stage, m in sorted(forwards - whole - inputs):
        yield Problem(source, f"rank {rank}", f"{stage}F{m}", f"a {stage}B{m} after it")
    for stage, m in sorted(inputs - weights):
        yield Problem(source, f"rank {rank}", f"{stage}I{m}", f"a {stage}W{m} after it")
    for stage, m in sorted(inputs & whole):
        wanted = f"a {stage}B{m} or a {stage}I{m}, not both"
        yield Problem(source, f"rank {rank}", f"{stage}I{m}", wanted)


def _messages(program: Program, op: Op, rank: int) -> list[Message]:
    """Returns the messages that a rank sends (SEND_*) or receives (RECV_*), in its own order."""
    return [message_of(rank, i) for i in program.ranks[rank] if i.op is op]


def _unmatched(program: Program, source: str) -> Iterator[Problem]:
    """Checks that every send has its receive, and every receive its send."""
    ranks = range(len(program.ranks))
    for send, receive in MATCHING_RECEIVE.items():
        sent = Counter(m for rank in ranks for m in _messages(program, send, rank))
        received = Counter(m for rank in ranks for m in _messages(program, receive, rank))
        for m in _in_order(sent - received):
            found = f"{send}{m.micro_batch} peer={m.target}"
            wanted = f"{receive}{m.micro_batch} on rank {m.target}"
            yield Problem(source, f"rank {m.source}", found, wanted)
        for m in _in_order(received - sent):
            found = f"{receive}{m.micro_batch} peer={m.source}"
            wanted = f"{send}{m.micro_batch} on rank {m.source}"
            yield Problem(source, f"rank {m.target}", found, wanted)


def _in_order(messages: Counter[Message]) -> list[Message]:
    """Sorts messages by source, target, micro-batch and cut."""
    return sorted(messages, key=lambda m: (m.source, m.target, m.micro_batch or 0, m.cut))


def _out_of_order(program: Program, source: str) -> Iterator[Problem]:
    """Checks that a rank receives messages of one direction in the order in which the other rank
    sends them.

    NCCL has no tags that could tell them apart.
    """
    for send, receive in MATCHING_RECEIVE.items():
        sent: dict[tuple[int, int], list[Message]] = defaultdict(list)
        received: dict[tuple[int, int], list[Message]] = defaultdict(list)
        for rank in range(len(program.ranks)):
            for m in _messages(program, send, rank):
                sent[m.source, m.target].append(m)
            for m in _messages(program, receive, rank):
                received[m.source, m.target].append(m)
        for (a, b), order in sorted(sent.items()):
            other = received[a, b]
            if order != other and Counter(order) == Counter(other):
                found = f"{send} to rank {b} in the order {[m.micro_batch for m in order]}"
                wanted = f"the order of its {receive}s, {[m.micro_batch for m in other]}"
                yield Problem(source, f"rank {a}", found, wanted)


def _collectives(program: Program, source: str) -> Iterator[Problem]:
    """Checks that all members of a group take part in the same collectives in the same order."""
    calls: dict[tuple[int, ...], dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for rank, instructions in enumerate(program.ranks):
        for index, i in enumerate(instructions):
            if i.op.kind != "collective":
                continue
            if rank not in i.ranks:
                yield Problem(
                    source, _at(rank, index), format_instruction(i), f"rank {rank} among its ranks"
                )
            call = format_instruction(i) if i.op.reads else format_instruction(i).split(" ", 1)[1]
            calls[i.ranks][rank].append(call)
    for group, by_rank in sorted(calls.items()):
        first = by_rank[group[0]]
        for rank in group[1:]:
            if by_rank[rank] != first:
                found = f"collectives over ranks {group}: {by_rank[rank]}"
                yield Problem(source, f"rank {rank}", found, f"as on rank {group[0]}: {first}")


def _updates(rank: int, instructions: tuple[Instruction, ...], source: str) -> Iterator[Problem]:
    """Checks that a rank has one norm, and one optimizer step or several ones before the norm.

    Several steps must together update every parameter whose gradient is reduced.
    """
    norms = [k for k, i in enumerate(instructions) if i.op.awaits == "all"]
    steps = [k for k, i in enumerate(instructions) if i.op.awaits == "own"]
    if len(norms) != 1:
        found = f"{len(norms)} {Op.REDUCE_NORM}"
        yield Problem(source, f"rank {rank}", found, f"exactly one {Op.REDUCE_NORM}")
    early = [k for k in steps if norms and k < norms[0]]
    if not steps or (len(steps) > 1 and early != steps):
        found = f"{len(steps)} {Op.OPTIMIZER_STEP}"
        wanted = f"exactly one {Op.OPTIMIZER_STEP}, or several before {Op.REDUCE_NORM}"
        yield Problem(source, f"rank {rank}", found, wanted)
    if len(steps) > 1:
        updated = {(instructions[k].layers, instructions[k].tied) for k in steps}
        for k, i in enumerate(instructions):
            if i.op.of_gradients and (i.layers, i.tied) not in updated:
                wanted = f"an {Op.OPTIMIZER_STEP} of the same layers or tied parameter"
                yield Problem(source, _at(rank, k), format_instruction(i), wanted)


def _end_of_step(program: Program, source: str) -> Iterator[Problem]:
    """Checks the end of a step: the norm and the optimizer steps follow all complete gradients.

    They come in either order, which must be the same on all ranks.
    """
    first: dict[Op, int] = {}
    for rank, instructions in enumerate(program.ranks):
        yield from _updates(rank, instructions, source)
        ends = (k for k, i in enumerate(instructions) if i.op.ends_step)
        end = next(ends, len(instructions))
        for i in instructions[end : end + 1]:
            first.setdefault(i.op, rank)
        last_backward = {i.stage: k for k, i in enumerate(instructions) if i.op.completes_gradients}
        late = [k for k, i in enumerate(instructions) if k > end and not i.op.ends_step]
        for k in late:
            wanted = "backwards and transfers, then REDUCE_NORM, then OPTIMIZER_STEP"
            yield Problem(source, _at(rank, k), format_instruction(instructions[k]), wanted)
        for k, i in enumerate(instructions):
            if i.op.of_gradients and last_backward.get(i.stage, -1) < k < end:
                wanted = "posted before the backward that completes its gradients"
                yield Problem(source, _at(rank, k), format_instruction(i), wanted)
    if len(first) > 1:
        found = ", ".join(f"{op} on rank {rank}" for op, rank in first.items())
        wanted = "all ranks to clip (REDUCE_NORM first) or none"
        yield Problem(source, "end of the step", f"first {found}", wanted)


def deadlocks(program: Program, source: str) -> Iterator[Problem]:
    """Yields one Problem for every rank that does not reach its end."""
    step = _Progress(program)
    moved = True
    while moved:
        moved = any(step.advance(rank) for rank in range(len(program.ranks)))
    for rank, instructions in enumerate(program.ranks):
        at = step.at[rank]
        if at < len(instructions):
            found = (
                f"{format_instruction(instructions[at])}, which waits for {step.waits_for(rank)}"
            )
            wanted = "an order in which every wait ends"
            yield Problem(source, f"rank {rank}, instruction {at}", found, wanted)


class _Progress:
    """Plays the ranks of a program, and keeps what has been sent and computed so far."""

    def __init__(self, program: Program) -> None:
        self.ranks = program.ranks
        self.reads = [_receives_of(instructions) for instructions in program.ranks]
        self.stages = [{i.stage for i in instructions} for instructions in program.ranks]
        self.at = [0] * len(program.ranks)
        self.sent: set[Message] = set()
        self.done: set[tuple[int, bool, int, int | None]] = set()

    def advance(self, rank: int) -> bool:
        """Plays a rank until it has to wait; returns True if it advanced."""
        began = self.at[rank]
        while self.at[rank] < len(self.ranks[rank]) and self.waits_for(rank) is None:
            i = self.ranks[rank][self.at[rank]]
            if i.op.kind == "send":
                self.sent.add(message_of(rank, i))
            elif _reads(i) is not None:
                self.done.add((rank, i.op is Op.FORWARD, i.stage, i.micro_batch))
            self.at[rank] += 1
        return self.at[rank] > began

    def waits_for(self, rank: int) -> str | None:
        """Returns what keeps a rank from its next instruction, or None."""
        i = self.ranks[rank][self.at[rank]]
        reads = _reads(i)
        if reads is None:
            return None
        for position, receive in self.reads[rank].get((reads, i.stage, i.micro_batch), ()):
            if position > self.at[rank]:
                return f"its own {format_instruction(receive)}, posted after it"
            if message_of(rank, receive) not in self.sent:
                return f"{format_instruction(receive)}, which rank {receive.peer} has not sent"
        forward = i.op is Op.FORWARD
        beside = i.stage - 1 if forward else i.stage + 1
        key = (rank, forward, beside, i.micro_batch)
        if beside in self.stages[rank] and key not in self.done:
            name = "forward" if forward else "backward"
            return f"its own {name} of micro-batch {i.micro_batch} on stage {beside}, after it"
        return None


def _reads(i: Instruction) -> Op | None:
    """Returns the receives that a compute instruction waits for."""
    return i.op.reads if i.op.kind == "compute" else None


def _receives_of(
    instructions: tuple[Instruction, ...],
) -> dict[tuple[Op, int, int | None], list[tuple[int, Instruction]]]:
    """Returns the receives with their indices, keyed by what they serve: (RECV_*, stage,
    micro-batch)."""
    found: dict[tuple[Op, int, int | None], list[tuple[int, Instruction]]] = {}
    for position, i in enumerate(instructions):
        if i.op.kind == "receive":
            found.setdefault((i.op, i.stage, i.micro_batch), []).append((position, i))
    return found
