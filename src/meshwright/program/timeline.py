"""What happened when: the one type that a simulated and a measured step have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from meshwright.program.instructions import Instruction, Op
from meshwright.records import Bytes, Line, Name, PositiveSeconds, Rank, record

Stream = Literal["compute", "send", "receive", "reduce"]
"""Tracks of one rank. Compute is serial; transfers overlap it and each other."""

Moment = Annotated[float, Field(ge=-1e9, le=1e30)]
"""Seconds from the start of a step; clocks of several machines may put it a little before."""
MicroBatch = Annotated[int, Field(ge=0, le=2**20)]


@record
class Interval:
    """One instruction of one rank."""

    rank: Rank
    stream: Stream
    op: Op
    stage: Rank
    micro_batch: MicroBatch | None = None
    label: Line
    """The first word of its text, `0F3`; for a REDUCE_GRAD with layers, `0REDUCE_GRAD 4:8`."""
    start_seconds: Moment
    end_seconds: Moment
    peer: Rank | None = None
    bytes: Bytes = 0


@record
class MemoryPoint:
    """Bytes in use on one rank from this moment on."""

    rank: Rank
    seconds: Moment
    bytes: Bytes


@record
class Timeline:
    """One step. Seconds count from its start, the same instant for every rank."""

    source: Literal["simulated", "measured"]
    devices: tuple[Name, ...]
    """By rank."""
    step_seconds: PositiveSeconds
    intervals: tuple[Interval, ...]
    memory: tuple[MemoryPoint, ...] = ()


def label(instruction: Instruction) -> str:
    """`0F3`, `0W0:4`, `0REDUCE_GRAD 4:8`, `0REDUCE_GRAD wte`, and of a tile
    `0REDUCE_GRAD 4:8 1:2/4`."""
    micro_batch = "" if instruction.micro_batch is None else f"{instruction.micro_batch}"
    if instruction.micro_batches is not None:
        micro_batch = "{}:{}".format(*instruction.micro_batches)
    word = f"{instruction.stage}{instruction.op}{micro_batch}"
    if instruction.op not in (Op.REDUCE_GRAD, Op.OPTIMIZER_STEP):
        return word
    if instruction.layers is not None:
        word = f"{word} {instruction.layers[0]}:{instruction.layers[1]}"
    elif instruction.tied is not None:
        word = f"{word} {instruction.tied}"
    tile = instruction.tile
    return word if tile is None else f"{word} {tile.first}:{tile.last}/{tile.of}"


def busy_seconds(timeline: Timeline, rank: int) -> float:
    """Time that a rank's compute stream was not idle."""
    return sum(
        i.end_seconds - i.start_seconds
        for i in timeline.intervals
        if i.rank == rank and i.stream == "compute"
    )
