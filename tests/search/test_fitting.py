"""Rows are shared out such that the slowest group could not be done sooner."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.search.costs import costs_of, pace
from meshwright.search.layer_partition import apportion
from plain_constants import PLAINLY
from worlds import cluster, device, job, model

SPEEDS = {"fast": 35.0, "slow": 10.0, "slower": 4.0}
TYPES = tuple(device(name, tflops) for name, tflops in SPEEDS.items())


@given(st.lists(st.sampled_from(sorted(SPEEDS)), min_size=1, max_size=4), st.integers(0, 9))
def test_the_slowest_replica_is_done_as_soon_as_can_be(kinds: list[str], more: int) -> None:
    rows = len(kinds) + more
    costs = costs_of(model([10.0, 5.0]), cluster(tuple(kinds), types=TYPES), job(rows))
    units = tuple((f"a:{i}",) for i in range(len(kinds)))
    seconds = [1 / SPEEDS[kind] for kind in kinds]
    found = apportion(costs, units, rows)
    assert sum(found) == rows
    assert min(found) >= 1
    best = min(
        max(n * s for n, s in zip(shares, seconds, strict=True))
        for shares in product(range(1, rows + 1), repeat=len(kinds))
        if sum(shares) == rows
    )
    assert max(n * s for n, s in zip(found, seconds, strict=True)) == pytest.approx(best)


def test_the_pace_of_a_device_is_the_work_of_a_row_over_its_speed() -> None:
    """15 GFLOP forward and twice that backward, at 35 TFLOP/s."""
    costs = costs_of(model([10.0, 5.0]), cluster(("fast",), types=TYPES), job(4), PLAINLY)
    for rows in (1, 4):
        assert pace(costs, ("a:0",), rows) == pytest.approx(45e9 / 35e12, rel=1e-3)
