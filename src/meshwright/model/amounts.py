"""What runs of one layer say of a row: amounts that grow with the rows, and worst moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from meshwright.model.shard import Split
from meshwright.model.spec import Moment
from meshwright.records import record

ROWS = (2, 4)
"""Rows of the two runs whose difference is what a row costs."""


@record
class Run:
    """One forward and backward of a layer."""

    flops: float
    attention_flops: float
    backward_flops: float
    traffic: float
    births: list[int]
    forward_events: list[int]
    backward_events: list[int]
    saved: set[int]
    outputs: set[int]
    casts: set[int]
    keeps: tuple[bool, ...]
    """Of each tensor read, whether it is among those saved."""
    forward_all_reduce: list[int]
    backward_all_reduce: list[int]


@record
class Amounts:
    """A layer's cost per row."""

    forward_flops: float
    attention_flops: float
    backward_flops: float
    traffic_bytes: float
    saved_bytes: float
    fixed_saved_bytes: float
    workspace_bytes: float
    runs: tuple[Run, Run]
    keeps: tuple[bool, ...]
    forward_all_reduce_bytes: tuple[float, ...]
    backward_all_reduce_bytes: tuple[float, ...]


def peak(events: list[int], sizes: list[float], ignored: set[int]) -> float:
    """Most bytes alive at once among the storages that are not ignored."""
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
    """Bytes alive after each event, whatever the rows and per row."""
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
    runs: tuple[Run, Run], wanted: Iterable[int] | None = None
) -> dict[int, tuple[float, float]]:
    """Bytes alive beyond the saved ones, at the wanted events or at those that are the worst for
    some number of rows. Casts of weights are not counted. Events of the forward come first; in the
    backward, outputs belong to whoever reads them."""
    few, many = runs
    rows = ROWS[1] - ROWS[0]
    sizes = []
    for number, (a, b) in enumerate(zip(few.births, many.births, strict=True)):
        row = (b - a) / rows
        sizes.append((0.0 if number in few.casts else a - ROWS[0] * row, row))
    kept = [sum(sizes[number][k] for number in few.saved) for k in range(2)]
    alive = _alive(few.forward_events, sizes, set())
    alive += _alive(few.backward_events, sizes, few.outputs)
    beyond = [(fixed - kept[0], row - kept[1]) for fixed, row in alive]
    if wanted is None:
        counts = [2**k for k in range(17)]
        wanted = {max(range(len(beyond)), key=lambda n: beyond[n][0] + c * beyond[n][1])
                  for c in counts} if beyond else ()  # fmt: skip
    return {n: beyond[n] for n in sorted(wanted)}


def per_row(runs: tuple[Run, Run]) -> Amounts:
    """The amounts that grow with the rows, from runs with `ROWS` rows.

    Workspace: the most bytes alive at any moment beyond the saved ones.
    """
    few, many = runs
    rows = ROWS[1] - ROWS[0]
    sizes = [(b - a) / rows for a, b in zip(few.births, many.births, strict=True)]
    saved = sum(sizes[number] for number in few.saved)
    forward_peak = peak(few.forward_events, sizes, set())
    backward_peak = peak(few.backward_events, sizes, few.outputs)

    def slope(name: str) -> float:
        return float((getattr(many, name) - getattr(few, name)) / rows)

    def slopes(name: str) -> tuple[float, ...]:
        pairs = zip(getattr(few, name), getattr(many, name), strict=True)
        return tuple((b - a) / rows for a, b in pairs)

    return Amounts(
        forward_flops=slope("flops"),
        attention_flops=slope("attention_flops"),
        backward_flops=slope("backward_flops"),
        traffic_bytes=slope("traffic"),
        saved_bytes=saved,
        fixed_saved_bytes=sum(
            few.births[n] - ROWS[0] * sizes[n] for n in few.saved if n not in few.casts
        ),
        runs=(few, many),
        keeps=few.keeps,
        workspace_bytes=max(forward_peak, backward_peak, saved) - saved,
        forward_all_reduce_bytes=slopes("forward_all_reduce"),
        backward_all_reduce_bytes=slopes("backward_all_reduce"),
    )


def first_width(units: int, table: Mapping[str, Split]) -> int:
    """The smallest legal tensor width above 1; 1 if there is none or nothing is divided."""
    if not table or units == 1:
        return 1
    return next(width for width in range(2, units + 2) if units % width == 0) if units else 2


def widths_run(units: int, table: Mapping[str, Split]) -> tuple[int, ...]:
    """1, and up to two tensor widths from whose difference it is seen what they divide."""
    first = first_width(units, table)
    second = 2 * first if units % (2 * first) == 0 else first
    return tuple(sorted({1, first, second} if first > 1 else {1}))


def worst_moments(amounts: dict[int, Amounts]) -> tuple[Moment, ...]:
    """Of one rank, or of one of several: the widest that was run tells which moments are bad."""
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
            [parts_of(a, less, b, most) for a, b in zip(wide, narrow, strict=True)]
            for wide, narrow in zip(*pairs, strict=True)
        )
    )


class Parts(NamedTuple):
    """What of an amount is whole on each tensor rank, and what they divide."""

    whole: float
    split: float


def parts_of(at_less: float, less: int, at_most: float, most: int) -> Parts:
    """What of an amount is whole on each rank and what is split, from whole + split / width at two
    widths."""
    split = (at_less - at_most) / (1 / less - 1 / most)
    return Parts(at_less - split / less, split)


def _length(amounts: Amounts) -> int:
    run, _ = amounts.runs
    return len(run.forward_events) + len(run.backward_events)
