"""Defines timelines, the common form of a simulated and a measured step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from meshwright.program.instructions import Instruction
from meshwright.program.operations import Op, Stream
from meshwright.records import Bytes, Line, Name, PositiveSeconds, Rank, record

StepMoment = Annotated[float, Field(ge=-1e9, le=1e30)]
"""Seconds from the start of a step; the clocks of several machines may make it slightly
negative."""
MicroBatch = Annotated[int, Field(ge=0, le=2**20)]


@record
class Interval:
    """Describes when one instruction of one rank began and ended."""

    rank: Rank
    stream: Stream
    op: Op
    stage: Rank
    micro_batch: MicroBatch | None = None
    label: Line
    """The first word of the instruction's text, such as `0F3`; see `interval_label`."""
    start_seconds: StepMoment
    end_seconds: StepMoment
    peer: Rank | None = None
    bytes: Bytes = 0


@record
class MemoryPoint:
    """Gives the bytes in use on one rank from this moment on."""

    rank: Rank
    seconds: StepMoment
    bytes: Bytes


@record
class Timeline:
    """Holds one step; seconds count from its start, the same instant on every rank."""

    source: Literal["simulated", "measured"]
    devices: tuple[Name, ...]
    """The device of every rank."""
    step_seconds: PositiveSeconds
    intervals: tuple[Interval, ...]
    memory: tuple[MemoryPoint, ...] = ()


def interval_of(rank: int, i: Instruction, start_seconds: float, end_seconds: float) -> Interval:
    """Returns the interval in which a rank ran an instruction."""
    return Interval(
        rank=rank,
        stream=i.op.stream,
        op=i.op,
        stage=i.stage,
        micro_batch=i.micro_batch,
        label=interval_label(i),
        start_seconds=start_seconds,
        end_seconds=end_seconds,
        peer=i.peer,
        bytes=i.bytes,
    )


def interval_label(instruction: Instruction) -> str:
    """Returns the label of an instruction: `0F3`, `0W0:4`, `0OPTIMIZER_STEP 4:8` with its layers,
    `0OPTIMIZER_STEP wte` with its tied parameter; a tile follows as `1:2/4`."""
    micro_batch = "" if instruction.micro_batch is None else f"{instruction.micro_batch}"
    if instruction.micro_batches is not None:
        micro_batch = "{}:{}".format(*instruction.micro_batches)
    word = f"{instruction.stage}{instruction.op}{micro_batch}"
    if not instruction.op.named_by_layers:
        return word
    if instruction.layers is not None:
        word = f"{word} {instruction.layers[0]}:{instruction.layers[1]}"
    elif instruction.tied is not None:
        word = f"{word} {instruction.tied}"
    return word if instruction.tile is None else f"{word} {instruction.tile}"


def busy_seconds(timeline: Timeline, rank: int) -> float:
    """Returns the seconds in which a rank's compute stream was busy."""
    return sum(
        i.end_seconds - i.start_seconds
        for i in timeline.intervals
        if i.rank == rank and i.stream == "compute"
    )
