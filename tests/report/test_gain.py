"""The answer of `whatif` says in a sentence what the edits of a cluster gain."""

from __future__ import annotations

import pytest
import steps_on_paper as paper

from meshwright.report.whatif import WhatIf, gain_sentence


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (0.0100001, "It would buy nothing"),
        (0.005, "It would be 2 times as fast"),
        (0.00999, "It would be 1 times as fast"),
        (0.04, "A step would be 4 times as long"),
    ],
)
def test_the_gain_is_said_as_a_ratio_of_step_times(after: float, said: str) -> None:
    found = WhatIf(
        edits=(),
        options=(),
        seconds_before=0.010,
        seconds_after=after,
        best=paper.plan(),
        busiest=None,
    )
    assert gain_sentence(found).startswith(f"{said}: 10 ms before, ")
