"""The least that a pipeline of two stages takes, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.cluster.spec import Link
from meshwright.search.bounds import pipeline_bound
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.costs import costs_of
from meshwright.search.stage_devices import StageDevices
from plain_constants import PLAINLY
from worlds import FAST, cluster, job, model

FORWARD = 10e9 / 20e12
"""Seconds of a row on a layer; its backward takes twice that."""


def bound(schedule: str, latency: float, micro_batches: int) -> float:
    """Of a layer on each of two nodes, between which a row takes 0.1 ms and the latency."""
    where = cluster(
        ("fast",), ("fast",), network=Link(bandwidth=1e9, latency=latency, kind="measured")
    )
    costs = costs_of(model([10.0, 10.0], parameters=1000), where, job(micro_batches), PLAINLY)
    line = CandidatePipeline(
        (StageDevices((("a:0",),), (1,)), StageDevices((("b:0",),), (1,))), (0, 1, 2), micro_batches
    )
    assert FAST.peak["fp32"] == 20e12
    return pipeline_bound(costs, line, schedule)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_last_stage_works_from_the_first_arrival_until_the_way_back(
    schedule: str, micro_batches: int
) -> None:
    there, back = FORWARD + 1.1e-4, 1.1e-4 + 2 * FORWARD
    wanted = there + micro_batches * 3 * FORWARD + back
    assert bound(schedule, 1e-5, micro_batches) == pytest.approx(wanted, rel=1e-4)


def test_a_first_stage_that_may_hold_two_micro_batches_waits_for_round_trips() -> None:
    """Four micro-batches are two round trips, of both stages and a transfer each way; with GPipe,
    where all of them may be on the way, that is no more than one."""
    trip = 2 * 3 * FORWARD + 2 * 5.1e-3
    assert bound("1f1b", 5e-3, 4) == pytest.approx(2 * trip, rel=1e-4)
    assert bound("1f1b", 5e-3, 5) == pytest.approx(3 * trip, rel=1e-4)
    late = FORWARD + 4 * 3 * FORWARD + 2 * FORWARD + 2 * 5.1e-3
    assert bound("gpipe", 5e-3, 4) == pytest.approx(late, rel=1e-4)


def test_who_holds_a_shared_table_whole_passes_all_of_it() -> None:
    """First and last stage share 2 MB, of which each of the two devices of the last has a half:
    around a ring of two go as many bytes as there are, at 1 GB/s."""
    graph = model([10.0, 10.0], parameters=0, tied=True)
    graph = replace(graph, tied=(replace(graph.tied[0], divided=("tensor",)),))
    where = cluster(
        ("fast",), ("fast", "fast"), network=Link(bandwidth=1e9, latency=0.0, kind="measured")
    )
    stages = (StageDevices((("a:0",),), (1,)), StageDevices((("b:0", "b:1"),), (1,)))
    costs = costs_of(graph, where, job(1))
    alone = costs_of(replace(graph, tied=()), where, job(1))
    line = CandidatePipeline(stages, (0, 1, 2), 1)
    exposed = pipeline_bound(costs, line, "1f1b") - pipeline_bound(alone, line, "1f1b")
    assert exposed == pytest.approx(2e-3, rel=0.05)
