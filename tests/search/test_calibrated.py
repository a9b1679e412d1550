"""A search under a calibrated profile predicts what the simulator says of its plan."""

from __future__ import annotations

import pytest

from meshwright.cluster.spec import Link
from meshwright.cost.constants import Calibration, SystemConstants
from meshwright.cost.profile import Profile
from meshwright.search.planner import find_plan
from meshwright.simulate.simulator import simulate_plan
from worlds import cluster, job, model

REACHED = SystemConstants(inside_efficiency=0.5, network_efficiency=0.6)
"""Links reach about half of what the cluster states, so that scaling them twice shows."""


def test_the_predicted_step_is_the_simulated_one():
    graph = model([10.0] * 8, parameters=10_000_000)
    where = cluster(("fast",) * 2, ("slow",) * 2, network=Link(bandwidth=1e8, latency=1e-5))
    profile = Profile(model="chain", sequence=16, calibration=Calibration(system=REACHED))
    found = find_plan(graph, where, job(8), profile)
    seconds = simulate_plan(found, graph, where, profile).step_seconds
    assert found.prediction is not None
    assert found.prediction.step_seconds == pytest.approx(seconds, rel=1e-9)
    without = simulate_plan(found, graph, where).step_seconds
    assert seconds > 1.002 * without
