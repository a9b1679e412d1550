"""Who does what in which order: the vocabulary, its meaning and its textual form.

The words are torch.distributed.pipelining's where it has one: `0F3` is the forward of micro-batch 3
on stage 0. One rule gives every instruction its timing, in the simulator and in the runtime alike:

* Communication is *posted*: RECV_F, RECV_B, SEND_F, SEND_B and REDUCE_GRAD return at once. A send
  moves when its receive is posted too. A REDUCE_GRAD is posted ahead of the backward (the stage's
  last B or W) that completes its gradients and starts, inside it, when the last of its layers is
  done; a rank's REDUCE_GRADs start in the order of its list.
* Messages of one broadcast (sends and receives that name the same ranks) move together, when all of
  them are posted.
* GATHER_F and GATHER_B block: they wait for the receives of their micro-batch and meet the other
  tensor ranks of the replica.
* Compute (F, B, I, W) runs on the rank's compute stream in order, and waits for the receives that
  it reads: RECV_F is read by F, RECV_B by B or I, and W reads what its I has kept.
* A rank may hold several stages of a pipeline; its list then mixes their instructions. Between two
  neighbouring stages on the same rank nothing is sent: the later F, B or I takes what the earlier
  one has left.
* REDUCE_NORM waits for all the rank's REDUCE_GRADs, then meets every other rank; OPTIMIZER_STEP
  follows it. Where gradients are not clipped, OPTIMIZER_STEPs come before it instead: one for each
  bucket, which waits for the REDUCE_GRADs of the same layers or tied parameter alone, and before
  them one for all that nobody else holds. What is done early does not wait for what is late.
* A step ends when everything that was posted has arrived.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

from meshwright.errors import Problem, ProgramError
from meshwright.model.shard import Tile
from meshwright.records import record


class Op(StrEnum):
    """What an instruction does."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    """The part of a backward that the stage before waits for: gradients of the stage's inputs."""
    BACKWARD_WEIGHT = "W"
    """The rest of a backward: gradients of the stage's parameters."""
    SEND_F = "SEND_F"
    """Hand the activations of a cut to the next stage."""
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    """Hand the gradients of a cut to the stage before."""
    RECV_B = "RECV_B"
    GATHER_F = "GATHER_F"
    """Put activations together of which each tensor rank of a replica has received a part."""
    GATHER_B = "GATHER_B"
    """The same for gradients of a cut."""
    REDUCE_GRAD = "REDUCE_GRAD"
    """Sum the gradients of some layers over every rank that holds them."""
    REDUCE_NORM = "REDUCE_NORM"
    """Sum loss and squared gradient norm over all ranks."""
    OPTIMIZER_STEP = "OPTIMIZER_STEP"

    # Enum's own is a call into Python, in every look-up of an operation.
    __hash__ = str.__hash__


COMPUTE = frozenset(
    {Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT, Op.OPTIMIZER_STEP}
)
SENDS = frozenset({Op.SEND_F, Op.SEND_B})
RECEIVES = frozenset({Op.RECV_F, Op.RECV_B})
MATCHING_RECEIVE = {Op.SEND_F: Op.RECV_F, Op.SEND_B: Op.RECV_B}
GATHERS = {Op.RECV_F: Op.GATHER_F, Op.RECV_B: Op.GATHER_B}
"""What completes a receive that brings only a part."""
GATHERED = {gather: receive for receive, gather in GATHERS.items()}


@record
class Instruction:
    """One entry of a rank's list. Fields that an operation does not use stay None or empty."""

    op: Op
    stage: int
    micro_batch: int | None = None
    micro_batches: tuple[int, int] | None = None
    """Of a W that makes the weight gradients of several micro-batches at once: [first, last)."""
    peer: int | None = None
    """Rank at the other end of a send or receive."""
    rows: tuple[int, int] | None = None
    """Rows of the micro-batch that are computed or moved, [first, last)."""
    part: tuple[int, int, int] | None = None
    """Of a send or receive that moves only pieces [first, last) of so many equal ones, of each
    tensor's rows laid flat."""
    layers: tuple[int, int] | None = None
    """Layers of an F or B, those whose gradients a REDUCE_GRAD sums, or whose weights an
    OPTIMIZER_STEP changes (None there: all that no other one of the rank does), [first, last)."""
    tied: str | None = None
    """Tied parameter of a REDUCE_GRAD or OPTIMIZER_STEP, instead of layers."""
    tile: Tile | None = None
    """Of a REDUCE_GRAD whose members hold the layers in unlike tensor widths: the part of the
    gradients that it sums, which all of them hold (of UNDIVIDED, each 1 / its tensor width). None:
    all that a member holds."""
    ranks: tuple[int, ...] = ()
    """Members of a collective, ascending; of a send or receive that is one message of a broadcast:
    its source, then all who receive it."""
    bytes: int = 0
    """Size of the message, or of the buffer that is reduced."""


Key = tuple[tuple[int, int] | None, str | None]
"""Layers or tied parameter, of a REDUCE_GRAD or OPTIMIZER_STEP."""


@record
class Program:
    """For every rank the list of its instructions in one optimizer step."""

    ranks: tuple[tuple[Instruction, ...], ...]


def _pair(value: tuple[int, int]) -> str:
    return f"{value[0]}:{value[1]}"


def text(instruction: Instruction) -> str:
    """`0F3 rows=0:2 layers=0:4`, `0SEND_F3 peer=1 rows=0:2 bytes=4096`."""
    micro_batch = "" if instruction.micro_batch is None else instruction.micro_batch
    words = [f"{instruction.stage}{instruction.op}{micro_batch}"]
    if instruction.micro_batches is not None:
        words.append(f"micro_batches={_pair(instruction.micro_batches)}")
    if instruction.peer is not None:
        words.append(f"peer={instruction.peer}")
    if instruction.rows is not None:
        words.append(f"rows={_pair(instruction.rows)}")
    if instruction.part is not None:
        words.append("part={}:{}/{}".format(*instruction.part))
    if instruction.layers is not None:
        words.append(f"layers={_pair(instruction.layers)}")
    if instruction.tied is not None:
        words.append(f"tied={instruction.tied}")
    if instruction.tile is not None:
        tile = instruction.tile
        words.append(f"tile={tile.first}:{tile.last}/{tile.of}")
    if instruction.ranks:
        words.append("ranks=" + ",".join(map(str, instruction.ranks)))
    if instruction.bytes:
        words.append(f"bytes={instruction.bytes}")
    return " ".join(words)


_HEAD = re.compile(
    rf"(\d+)({'|'.join(sorted((op.value for op in Op), key=len, reverse=True))})(\d*)"
)


def _value(key: str, value: str) -> Any:
    if key in ("peer", "bytes"):
        return int(value)
    if key in ("rows", "layers", "micro_batches"):
        first, last = value.split(":")
        return int(first), int(last)
    if key == "part":
        pieces, _, of = value.partition("/")
        first, last = pieces.split(":")
        return int(first), int(last), int(of)
    if key == "ranks":
        return tuple(int(rank) for rank in value.split(","))
    if key == "tied":
        return value
    if key == "tile":
        shares, _, of = value.partition("/")
        first, last = shares.split(":")
        return Tile(first=int(first), last=int(last), of=int(of))
    raise ValueError(f"unknown word {key!r}")


def parse(line: str, *, source: str = "program", field: str = "") -> Instruction:
    """The inverse of `text`. Raises ProgramError naming `source` and `field`."""
    head, *words = line.split()
    match = _HEAD.fullmatch(head)
    try:
        if match is None:
            raise ValueError(f"unknown instruction {head!r}")
        fields = {key: _value(key, value) for key, _, value in (w.partition("=") for w in words)}
    except ValueError as failure:
        wanted = "an instruction such as '0F3 rows=0:2' or '0SEND_F3 peer=1 rows=0:2 bytes=4096'"
        raise ProgramError(Problem(source, field, f"{line!r} ({failure})", wanted)) from None
    return Instruction(
        op=Op(match[2]),
        stage=int(match[1]),
        micro_batch=int(match[3]) if match[3] else None,
        **fields,
    )


def dumps(program: Program) -> str:
    """A program as text: a `rank N` line, then one instruction a line."""
    blocks = []
    for rank, instructions in enumerate(program.ranks):
        blocks.append("\n".join([f"rank {rank}", *(f"  {text(i)}" for i in instructions)]))
    return "\n".join(blocks) + "\n"


def loads(document: str, *, source: str = "program") -> Program:
    """The inverse of `dumps`. Raises ProgramError naming the line."""
    ranks: list[list[Instruction]] = []
    for number, line in enumerate(document.splitlines(), start=1):
        if not line.strip():
            continue
        if line.startswith("rank "):
            ranks.append([])
        elif not ranks:
            raise ProgramError(Problem(source, f"line {number}", repr(line), "a line 'rank 0'"))
        else:
            ranks[-1].append(parse(line, source=source, field=f"line {number}"))
    return Program(ranks=tuple(tuple(instructions) for instructions in ranks))
