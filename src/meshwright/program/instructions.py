"""Defines instructions: their vocabulary, their timing and their textual form.

The words are those of torch.distributed.pipelining where it has one: `0F3` is the forward of
micro-batch 3 on stage 0. The same rules time every instruction in the simulator and in the runtime:

* Communication is *posted*: RECV_F, RECV_B, SEND_F, SEND_B and reductions return at once. A send
  moves when its receive is posted too. A reduction is posted ahead of the backward (the stage's
  last B or W) that completes its gradients, and starts inside that backward, when the last of its
  layers is done. The reductions of a rank start in the order of its list.
* The messages of one broadcast (sends and receives that name the same ranks) move together, when
  all of them are posted.
* A collective that completes receives blocks: it waits for those of its micro-batch and for the
  other tensor ranks of the replica.
* Compute (F, B, I, W) runs in order on the rank's compute stream, and waits for the receives that
  it reads: F reads RECV_F, B or I reads RECV_B, and W reads what its I has kept.
* A rank may hold several stages of a pipeline; its list then mixes their instructions. Two
  neighbouring stages on the same rank exchange no messages: the later F, B or I takes what the
  earlier one has left.
* REDUCE_NORM waits for all reductions of its rank, then for every other rank; OPTIMIZER_STEP
  follows it. Without gradient clipping, OPTIMIZER_STEPs come before it instead: one for each
  bucket, which waits only for the reductions of the same layers or tied parameter, and before
  them one for all weights that no other rank holds. So an early update need not wait for a late
  reduction.
* A step ends when everything that was posted has arrived.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from meshwright.errors import Problem, ProgramError
from meshwright.layout.shares import Share
from meshwright.model.spec import LayerGraph
from meshwright.program.operations import Op, operation, operations
from meshwright.records import record


class Instruction(NamedTuple):
    """Describes one entry of a rank's list; fields that its operation does not use are None or
    empty. A tuple, because searches make millions."""

    op: Op
    stage: int
    micro_batch: int | None = None
    micro_batches: tuple[int, int] | None = None
    """The micro-batches [first, last) of a W that computes the weight gradients of several at
    once."""
    peer: int | None = None
    """The rank at the other end of a send or receive."""
    rows: tuple[int, int] | None = None
    """The rows of the micro-batch that are computed or moved, [first, last)."""
    part: Share | None = None
    """For a message that carries only a part of its rows: its share of each tensor's rows,
    flattened and cut into equal pieces."""
    layers: tuple[int, int] | None = None
    """A range of layers, [first, last): those that an F, B, I or W computes, whose gradients a
    reduction sums, or whose weights an OPTIMIZER_STEP updates. None in an OPTIMIZER_STEP: all
    weights that no other one of the rank updates."""
    tied: str | None = None
    """The tied parameter of a reduction or OPTIMIZER_STEP, instead of layers."""
    tile: Share | None = None
    """The part of the gradients that a reduction sums, where its members have different tensor
    widths; every member holds that part. UNDIVIDED stands for the gradients that every tensor rank
    holds whole, of which each member contributes 1 / its tensor width. None: all gradients that a
    member holds."""
    ranks: tuple[int, ...] = ()
    """The members of a collective, ascending; for a message of a broadcast, its source and then all
    receivers."""
    bytes: int = 0
    """The size of the message, or of the buffer that is reduced."""


GradientKey = tuple[tuple[int, int] | None, str | None]
"""The layers or the tied parameter of a reduction or OPTIMIZER_STEP."""


def micro_batches_of(i: Instruction) -> range:
    """Returns the micro-batches that an instruction works on; there is none at the end of a
    step."""
    if i.micro_batches is not None:
        return range(*i.micro_batches)
    return range(0) if i.micro_batch is None else range(i.micro_batch, i.micro_batch + 1)


def of_micro_batch(patterns: Iterable[Instruction], micro_batch: int) -> list[Instruction]:
    """Returns instructions that are alike but for their micro-batch for one of them."""
    found = []
    for op, stage, _, several, peer, rows, part, layers, tied, tile, ranks, size in patterns:
        of_one = (
            op,
            stage,
            micro_batch,
            several,
            peer,
            rows,
            part,
            layers,
            tied,
            tile,
            ranks,
            size,
        )
        found.append(tuple.__new__(Instruction, of_one))
    return found


def collective_key(i: Instruction) -> tuple[object, ...]:
    """Returns what is equal on all members of a collective."""
    return (i.op, i.ranks, *(getattr(i, name) for name in i.op.meets))


def completing_layer(reduction: Instruction, layers: tuple[int, int], model: LayerGraph) -> int:
    """Returns the layer of a stage whose backward completes the gradients of a reduction.

    That is the first of its layers, or the stage's first user of its tied parameter.
    """
    summed = summed_layers(reduction.layers, reduction.tied, model)
    return next(layer for layer in summed if layers[0] <= layer < layers[1])


def summed_layers(
    layers: tuple[int, int] | None, tied: str | None, model: LayerGraph
) -> Sequence[int]:
    """Returns the layers, ascending, whose gradients are summed under some layers or a tied
    name."""
    if layers is not None:
        return range(*layers)
    return next(each.layers for each in model.tied if each.name == tied)


@record
class Program:
    """Holds the instructions of every rank in one optimizer step."""

    ranks: tuple[tuple[Instruction, ...], ...]


def _pair(value: tuple[int, int]) -> str:
    return f"{value[0]}:{value[1]}"


def format_instruction(instruction: Instruction) -> str:
    """Returns an instruction as one line: `0F3 rows=0:2 layers=0:4`, `0SEND_F3 peer=1 rows=0:2
    bytes=4096`."""
    micro_batch = "" if instruction.micro_batch is None else instruction.micro_batch
    words = [f"{instruction.stage}{instruction.op}{micro_batch}"]
    if instruction.micro_batches is not None:
        words.append(f"micro_batches={_pair(instruction.micro_batches)}")
    if instruction.peer is not None:
        words.append(f"peer={instruction.peer}")
    if instruction.rows is not None:
        words.append(f"rows={_pair(instruction.rows)}")
    if instruction.part is not None:
        words.append(f"part={instruction.part}")
    if instruction.layers is not None:
        words.append(f"layers={_pair(instruction.layers)}")
    if instruction.tied is not None:
        words.append(f"tied={instruction.tied}")
    if instruction.tile is not None:
        words.append(f"tile={instruction.tile}")
    if instruction.ranks:
        words.append("ranks=" + ",".join(map(str, instruction.ranks)))
    if instruction.bytes:
        words.append(f"bytes={instruction.bytes}")
    return " ".join(words)


@cache
def _head() -> re.Pattern[str]:
    """Matches the first word of an instruction: stage, operation, micro-batch."""
    return re.compile(rf"(\d+)({'|'.join(sorted(operations(), key=len, reverse=True))})(\d*)")


def _value(key: str, value: str) -> Any:
    if key in ("peer", "bytes"):
        return int(value)
    if key in ("rows", "layers", "micro_batches"):
        first, last = value.split(":")
        return int(first), int(last)
    if key == "ranks":
        return tuple(int(rank) for rank in value.split(","))
    if key == "tied":
        return value
    if key in ("part", "tile"):
        shares, _, of = value.partition("/")
        first, last = shares.split(":")
        return Share(first=int(first), last=int(last), of=int(of))
    raise ValueError(f"unknown word {key!r}")


def parse_instruction(line: str, *, source: str = "program", field: str = "") -> Instruction:
    """Parses one line, the inverse of `format_instruction`.

    Raises ProgramError that names `source` and `field`.
    """
    head, *words = line.split()
    match = _head().fullmatch(head)
    try:
        if match is None:
            raise ValueError(f"unknown instruction {head!r}")
        fields = {key: _value(key, value) for key, _, value in (w.partition("=") for w in words)}
    except ValueError as failure:
        wanted = "an instruction such as '0F3 rows=0:2' or '0SEND_F3 peer=1 rows=0:2 bytes=4096'"
        raise ProgramError(Problem(source, field, f"{line!r} ({failure})", wanted)) from None
    return Instruction(
        op=operation(match[2]),
        stage=int(match[1]),
        micro_batch=int(match[3]) if match[3] else None,
        **fields,
    )


def format_program(program: Program) -> str:
    """Returns a program as text: a line `rank N`, then one line for each instruction."""
    blocks = []
    for rank, instructions in enumerate(program.ranks):
        blocks.append(
            "\n".join([f"rank {rank}", *(f"  {format_instruction(i)}" for i in instructions)])
        )
    return "\n".join(blocks) + "\n"


def parse_program(document: str, *, source: str = "program") -> Program:
    """Parses a whole program, the inverse of `format_program`.

    Raises ProgramError that names the line.
    """
    ranks: list[list[Instruction]] = []
    for number, line in enumerate(document.splitlines(), start=1):
        if not line.strip():
            continue
        if line.startswith("rank "):
            ranks.append([])
        elif not ranks:
            raise ProgramError(Problem(source, f"line {number}", repr(line), "a line 'rank 0'"))
        else:
            ranks[-1].append(parse_instruction(line, source=source, field=f"line {number}"))
    return Program(ranks=tuple(tuple(instructions) for instructions in ranks))
