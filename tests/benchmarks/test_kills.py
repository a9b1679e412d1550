"""Kills at every moment leave no process, end in time and name their cause: the small soak."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from test_resharding import load

kills = load("kills")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_at_any_moment_leaves_nothing_and_names_the_cause() -> None:
    """One of each process and moment; `python benchmarks/kills.py` does a hundred."""
    count = len(kills.VICTIMS) * len(kills.MOMENTS)
    trials = kills.soak(count, seed=1)
    assert not [
        f"{t.victim} {t.moment} {t.number.name}: {t.problems}" for t in trials if t.problems
    ]
    assert set(Counter((each.victim, each.moment) for each in trials).values()) == {1}
    assert not [*Path("/tmp").glob("meshwright-kills-*")]
