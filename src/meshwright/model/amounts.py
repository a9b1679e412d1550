"""Turns two runs of a layer, with different numbers of rows, into its cost per row and its memory
peaks. Tracing (`model.trace`) and counting (`model.transformer.counted_graph`) both use it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from meshwright.model.spec import Moment
from meshwright.records import record

ROWS_OF_RUNS = (2, 4)
"""Numbers of rows of the two runs; the difference of their costs gives the cost of a row."""


@record
class LayerRun:
    """Holds what one forward and backward of a layer did at one number of rows. Storages (memory
    blocks) are numbered in the order of their allocation."""

    flops: float
    attention_flops: float
    unfused_flops: float
    """The part of `attention_flops` that is not in a fused kernel."""
    backward_flops: float
    traffic: float
    births: list[int]
    """Bytes of each storage."""
    forward_events: list[int]
    """Allocations and releases in order: n + 1 when storage n is allocated, -(n + 1) when it is
    freed."""
    backward_events: list[int]
    """The same for forward and backward together."""
    saved: set[int]
    """Storages that the forward saves for the backward."""
    outputs: set[int]
    """Storages of outputs that are not saved."""
    casts: set[int]
    """Storages that hold casts of weights."""
    keeps: tuple[bool, ...]
    """For each input tensor, True if it is saved for the backward."""
    forward_all_reduce: list[int]
    """Bytes of each tensor-parallel all-reduce in the forward."""
    backward_all_reduce: list[int]
    """Bytes of each tensor-parallel all-reduce in the backward."""


@record
class RowCosts:
    """Holds the cost of a layer per row; its fields are named as those of `model.spec.Layer`."""

    forward_flops: float
    attention_flops: float
    unfused_flops: float
    backward_flops: float
    traffic_bytes: float
    saved_bytes: float
    fixed_saved_bytes: float
    workspace_bytes: float
    runs: tuple[LayerRun, LayerRun]
    keeps: tuple[bool, ...]
    forward_all_reduce_bytes: tuple[float, ...]
    backward_all_reduce_bytes: tuple[float, ...]


def peak_bytes_of(events: list[int], sizes: list[float], ignored: set[int]) -> float:
    """Gives the largest number of bytes allocated at once, without the ignored storages."""
    alive = most = 0.0
    for event in events:
        number = abs(event) - 1
        if number not in ignored:
            alive += sizes[number] if event > 0 else -sizes[number]
            most = max(most, alive)
    return most


def _alive(
    events: list[int], sizes: list[tuple[float, float]], ignored: set[int]
) -> list[tuple[float, float]]:
    """Gives the bytes allocated after each event, as (constant bytes, bytes per row)."""
    fixed = row = 0.0
    found = []
    for event in events:
        number = abs(event) - 1
        if number not in ignored:
            sign = 1 if event > 0 else -1
            fixed += sign * sizes[number][0]
            row += sign * sizes[number][1]
        found.append((fixed, row))
    return found


def moments_of(
    runs: tuple[LayerRun, LayerRun], wanted: Iterable[int] | None = None
) -> dict[int, tuple[float, float]]:
    """Gives the bytes allocated beyond the saved ones, as event -> (constant bytes, bytes per row).

    Events are the `wanted` ones, or those at which memory peaks for some number of rows from 1 to
    65,536. Those of the forward are numbered first. Casts of weights are not counted, nor are
    outputs during the backward, which count for the layers that read them.
    """
    few, many = runs
    rows = ROWS_OF_RUNS[1] - ROWS_OF_RUNS[0]
    sizes = []
    for number, (a, b) in enumerate(zip(few.births, many.births, strict=True)):
        row = (b - a) / rows
        sizes.append((0.0 if number in few.casts else a - ROWS_OF_RUNS[0] * row, row))
    kept = [sum(sizes[number][k] for number in few.saved) for k in range(2)]
    alive = _alive(few.forward_events, sizes, set())
    alive += _alive(few.backward_events, sizes, few.outputs)
    beyond = [(fixed - kept[0], row - kept[1]) for fixed, row in alive]
    if wanted is None:
        counts = [2**k for k in range(17)]
        wanted = {max(range(len(beyond)), key=lambda n: beyond[n][0] + c * beyond[n][1])
                  for c in counts} if beyond else ()  # fmt: skip
    return {n: beyond[n] for n in sorted(wanted)}


def costs_per_row(runs: tuple[LayerRun, LayerRun]) -> RowCosts:
    """Computes the cost of a row from runs with `ROWS_OF_RUNS` rows.

    The workspace is the largest number of bytes allocated at any moment, less the saved ones.
    """
    few, many = runs
    rows = ROWS_OF_RUNS[1] - ROWS_OF_RUNS[0]
    sizes = [(b - a) / rows for a, b in zip(few.births, many.births, strict=True)]
    saved = sum(sizes[number] for number in few.saved)
    forward_peak = peak_bytes_of(few.forward_events, sizes, set())
    backward_peak = peak_bytes_of(few.backward_events, sizes, few.outputs)

    def slope(name: str) -> float:
        return float((getattr(many, name) - getattr(few, name)) / rows)

    def slopes(name: str) -> tuple[float, ...]:
        pairs = zip(getattr(few, name), getattr(many, name), strict=True)
        return tuple((b - a) / rows for a, b in pairs)

    return RowCosts(
        forward_flops=slope("flops"),
        attention_flops=slope("attention_flops"),
        unfused_flops=slope("unfused_flops"),
        backward_flops=slope("backward_flops"),
        traffic_bytes=slope("traffic"),
        saved_bytes=saved,
        fixed_saved_bytes=sum(
            few.births[n] - ROWS_OF_RUNS[0] * sizes[n] for n in few.saved if n not in few.casts
        ),
        runs=(few, many),
        keeps=few.keeps,
        workspace_bytes=max(forward_peak, backward_peak, saved) - saved,
        forward_all_reduce_bytes=slopes("forward_all_reduce"),
        backward_all_reduce_bytes=slopes("backward_all_reduce"),
    )


def peak_moments_of(amounts: dict[int, RowCosts]) -> tuple[Moment, ...]:
    """Gives the moments at which memory may peak, from the runs at each tensor-parallel width.

    Which moments these are is found from the runs at the two largest widths. What differs between
    the two is divided; with a single width, everything counts as divided.
    """
    *fewer, most = amounts
    worst = moments_of(amounts[most].runs)
    if most == 1:
        return tuple(Moment(fixed=fixed, row=row) for fixed, row in worst.values())
    if not fewer or _length(amounts[fewer[-1]]) != _length(amounts[most]):
        return tuple(
            Moment(split_fixed=most * fixed, split_row=most * row) for fixed, row in worst.values()
        )
    less = fewer[-1]
    events = sorted({*worst, *moments_of(amounts[less].runs)})
    pairs = (moments_of(amounts[width].runs, events).values() for width in (less, most))
    return tuple(
        Moment(fixed=fixed.whole, split_fixed=fixed.split, row=row.whole, split_row=row.split)
        for fixed, row in (
            [split_amount(a, less, b, most) for a, b in zip(wide, narrow, strict=True)]
            for wide, narrow in zip(*pairs, strict=True)
        )
    )


class TensorParallelParts(NamedTuple):
    """Divides an amount into two summands: `whole` is on every tensor-parallel rank, `split` is
    divided among them."""

    whole: float
    split: float


def split_amount(at_less: float, less: int, at_most: float, most: int) -> TensorParallelParts:
    """Solves whole + split / width for `whole` and `split`, given the amounts at two widths."""
    split = (at_less - at_most) / (1 / less - 1 / most)
    return TensorParallelParts(at_less - split / less, split)


def _length(amounts: RowCosts) -> int:
    run, _ = amounts.runs
    return len(run.forward_events) + len(run.backward_events)
