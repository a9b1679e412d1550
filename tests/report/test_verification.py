"""Predicted against measured durations, as `verify` prints them."""

from __future__ import annotations

from meshwright.program.operations import Op
from meshwright.report.verification import kinds_table
from meshwright.simulate.compare_timelines import KindRow, TimelineComparison


def test_a_kind_has_a_median_error_where_it_was_measured() -> None:
    timed = KindRow(
        op=Op.FORWARD, count=4, predicted_seconds=0.011, measured_seconds=0.010, median_error=0.125
    )
    untimed = KindRow(
        op=Op.BACKWARD_WEIGHT,
        count=2,
        predicted_seconds=0.001,
        measured_seconds=0.0,
        median_error=None,
    )
    parts = TimelineComparison(
        predicted_seconds=0.012,
        measured_seconds=0.010,
        step_error=0.2,
        kinds=(timed, untimed),
        rows=(),
        unmatched=(),
    )
    table = kinds_table(parts)
    assert list(table.columns[-1].cells) == ["12.5%", "", ""]
    assert next(iter(table.columns[-2].cells)) == "+10.0%"
