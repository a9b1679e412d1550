"""Compares a predicted timeline with a measured one, instruction by instruction."""

from __future__ import annotations

from collections import defaultdict
from math import isfinite
from statistics import median

from meshwright.program.operations import Op, operations
from meshwright.program.timeline import Interval, Timeline
from meshwright.records import record


@record
class InstructionRow:
    """Describes one instruction in both timelines."""

    rank: int
    label: str
    op: Op
    peer: int | None
    predicted_seconds: float
    """Its predicted duration."""
    measured_seconds: float
    """Its measured duration."""
    predicted_end: float
    """The predicted end, in seconds from the start of the step."""
    measured_end: float
    """The measured end, in seconds from the start of the step."""


@record
class KindRow:
    """Sums up all instructions of one operation."""

    op: Op
    count: int
    predicted_seconds: float
    """The sum of the predicted durations."""
    measured_seconds: float
    """The sum of the measured durations."""
    median_error: float | None
    """The median over instructions of |predicted - measured| / measured duration, without those
    that were predicted to last but measured as zero. None if no instruction is left."""


@record
class TimelineComparison:
    """Holds the comparison of a predicted and a measured timeline of one program."""

    predicted_seconds: float
    """The predicted seconds of the step."""
    measured_seconds: float
    """The measured seconds of the step."""
    step_error: float
    """(predicted - measured) / measured."""
    kinds: tuple[KindRow, ...]
    rows: tuple[InstructionRow, ...]
    unmatched: tuple[str, ...]
    """The instructions that only one of the two has, as `rank 0: 0F3`."""


IntervalKey = tuple[int, str, int | None, int]
"""A rank, a label, a peer, and the number of earlier intervals with the same three."""


def _by_key(timeline: Timeline) -> dict[IntervalKey, Interval]:
    """Returns the intervals of a timeline by rank, label, peer and repetition."""
    turns: dict[tuple[int, str, int | None], int] = defaultdict(int)
    found: dict[IntervalKey, Interval] = {}
    for i in sorted(timeline.intervals, key=lambda i: i.start_seconds):
        name = (i.rank, i.label, i.peer)
        found[(*name, turns[name])] = i
        turns[name] += 1
    return found


def _seconds(i: Interval) -> float:
    return i.end_seconds - i.start_seconds


def _error(predicted: float, measured: float) -> float:
    """Returns (predicted - measured) / measured; 0 if both are zero."""
    if measured == 0:
        return 0.0 if predicted == 0 else float("inf")
    return (predicted - measured) / measured


def compare_timelines(predicted: Timeline, measured: Timeline) -> TimelineComparison:
    """Compares two timelines of one program, instruction by instruction and operation by
    operation."""
    left, right = _by_key(predicted), _by_key(measured)
    rows = tuple(
        InstructionRow(
            rank=i.rank,
            label=i.label,
            op=i.op,
            peer=i.peer,
            predicted_seconds=_seconds(i),
            measured_seconds=_seconds(right[key]),
            predicted_end=i.end_seconds,
            measured_end=right[key].end_seconds,
        )
        for key, i in left.items()
        if key in right
    )
    return TimelineComparison(
        predicted_seconds=predicted.step_seconds,
        measured_seconds=measured.step_seconds,
        step_error=_error(predicted.step_seconds, measured.step_seconds),
        kinds=_kinds(rows),
        rows=rows,
        unmatched=tuple(
            f"rank {key[0]}: {key[1]}" for key in sorted(left.keys() ^ right.keys(), key=str)
        ),
    )


def _median_error(rows: list[InstructionRow]) -> float | None:
    errors = (abs(_error(row.predicted_seconds, row.measured_seconds)) for row in rows)
    known = [error for error in errors if isfinite(error)]
    return median(known) if known else None


def _kinds(rows: tuple[InstructionRow, ...]) -> tuple[KindRow, ...]:
    by_op: dict[Op, list[InstructionRow]] = defaultdict(list)
    for row in rows:
        by_op[row.op].append(row)
    return tuple(
        KindRow(
            op=op,
            count=len(by_op[op]),
            predicted_seconds=sum(row.predicted_seconds for row in by_op[op]),
            measured_seconds=sum(row.measured_seconds for row in by_op[op]),
            median_error=_median_error(by_op[op]),
        )
        for op in operations().values()
        if op in by_op
    )
