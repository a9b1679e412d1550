"""Prints predicted against measured times as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from meshwright.cost.links import LinkReport
from meshwright.report.terminal import plain_text
from meshwright.simulate.compare_timelines import TimelineComparison
from meshwright.units import format_bandwidth, format_bytes, format_seconds


def kinds_table(parts: TimelineComparison) -> Table:
    """Returns a table of every kind of instruction in one step: sums of durations, and their
    error."""
    table = Table(box=None, pad_edge=False)
    for heading in ("instruction", "count", "predicted", "measured", "error", "median of each"):
        table.add_column(heading, justify="left" if heading == "instruction" else "right")
    for kind in parts.kinds:
        table.add_row(
            str(kind.op),
            str(kind.count),
            format_seconds(kind.predicted_seconds),
            format_seconds(kind.measured_seconds),
            _error(kind.predicted_seconds, kind.measured_seconds),
            "" if kind.median_error is None else f"{kind.median_error:.1%}",
        )
    table.add_row(
        "one step",
        "",
        format_seconds(parts.predicted_seconds),
        format_seconds(parts.measured_seconds),
        _error(parts.predicted_seconds, parts.measured_seconds),
        "",
    )
    return table


def strategies_table(rows: Sequence[tuple[str, str, float, float, float]]) -> Table:
    """Returns a table of strategies from rows (name, plan, predicted seconds, measured seconds,
    spread)."""
    table = Table(box=None, pad_edge=False)
    for heading in ("strategy", "plan", "predicted", "measured", "error", "spread"):
        table.add_column(heading, justify="left" if heading in ("strategy", "plan") else "right")
    for name, plan, predicted, measured, spread in rows:
        table.add_row(
            plain_text(name),
            plain_text(plan),
            format_seconds(predicted),
            format_seconds(measured),
            _error(predicted, measured),
            f"{spread:.1%}",
        )
    return table


def _error(predicted: float, measured: float) -> str:
    return "" if measured == 0 else f"{predicted / measured - 1:+.1%}"


def fitted_links_table(report: LinkReport) -> Table:
    """Returns a table of the fitted links: their residual, and the bandwidth that two concurrent
    pairs get relative to half each; then the all-reduces with their prediction error."""
    table = Table(box=None, pad_edge=False)
    for heading in ("link", "latency", "bandwidth", "residual", "two pairs"):
        table.add_column(heading, justify="left" if heading == "link" else "right")
    for pair in report.pairs:
        table.add_row(
            plain_text(f"{pair.between[0]} - {pair.between[1]}"),
            format_seconds(pair.latency),
            format_bandwidth(pair.bandwidth),
            f"{pair.residual:.1%}",
            "" if pair.sharing is None else f"{pair.sharing:.2f} of half each",
        )
    measured = report.all_reduce
    for point, residual in (
        zip(measured.points, measured.residuals, strict=True) if measured else ()
    ):
        what = f"all-reduce of {format_bytes(point.bytes)}"
        table.add_row(what, format_seconds(point.seconds), "", f"{residual:+.1%}", "")
    return table
