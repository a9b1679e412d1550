"""Where the seconds of a step go adds up, and each kind is recognised."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cost.priced_plan import PricedPlan
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Plan
from meshwright.program.timeline import Timeline
from meshwright.simulate.compare_timelines import compare_timelines
from meshwright.simulate.critical_path import (
    PARTS,
    InOrder,
    critical_path,
    latest,
    step_breakdown,
)
from meshwright.simulate.simulator import simulate_plan, simulated_step
from plain_constants import PLAINLY
from strategies import models_and_plans
from worlds import even_model, even_plan, one_node


@given(models_and_plans(), st.sampled_from([1e5, 1e6, 1e9]))
def test_the_parts_add_up_to_the_step(case: tuple[LayerGraph, Plan], bandwidth: float) -> None:
    model, plan = case
    timeline = simulate_plan(plan, model, one_node(len(plan.devices), bandwidth=bandwidth))
    seconds = step_breakdown(timeline)
    assert tuple(seconds) == PARTS
    assert sum(seconds.values()) == pytest.approx(timeline.step_seconds, rel=1e-9)
    assert all(value >= 0 for value in seconds.values())
    assert seconds["overhead"] <= 1e-6 * timeline.step_seconds


@given(models_and_plans(), st.integers(0, 2**32))
def test_the_parts_of_a_measured_step_add_up_too(case: tuple[LayerGraph, Plan], seed: int) -> None:
    """Intervals of a real run do not touch: here each is shortened by a random share."""
    model, plan = case
    exact = simulate_plan(plan, model, one_node(len(plan.devices), bandwidth=1e6))
    intervals = tuple(
        replace(
            i,
            start_seconds=i.start_seconds
            + (i.end_seconds - i.start_seconds) * ((seed + 7919 * n) % 100) / 300,
        )
        for n, i in enumerate(exact.intervals)
    )
    measured = replace(exact, source="measured", intervals=intervals)
    assert sum(step_breakdown(measured).values()) == pytest.approx(exact.step_seconds, rel=1e-9)


@given(models_and_plans())
def test_the_critical_path_covers_the_step_without_gap(case: tuple[LayerGraph, Plan]) -> None:
    model, plan = case
    timeline = simulate_plan(plan, model, one_node(len(plan.devices), bandwidth=1e6))
    now = 0.0
    for segment in critical_path(timeline):
        assert segment.start_seconds == pytest.approx(now, abs=1e-9 * timeline.step_seconds)
        assert segment.end_seconds > segment.start_seconds
        now = segment.end_seconds
    assert now == pytest.approx(timeline.step_seconds)


@given(stages=st.integers(1, 4), micro_batches=st.integers(1, 6))
def test_fill_and_drain_of_a_pipeline_is_bubble(stages: int, micro_batches: int) -> None:
    """Equal stages of 3 ms a micro-batch: m x 3 ms compute, (p - 1) x 3 ms bubble."""
    model, cluster = even_model(stages), one_node(stages, bandwidth=1e18)
    plan = even_plan(model, cluster, stages=stages, micro_batches=micro_batches)
    seconds = step_breakdown(simulate_plan(plan, model, cluster, PLAINLY))
    assert seconds["compute"] == pytest.approx(3e-3 * micro_batches)
    assert seconds["bubble"] == pytest.approx(3e-3 * (stages - 1), abs=1e-9)


def test_transfers_on_the_way_are_transfers() -> None:
    """One micro-batch through two stages: 1 ms there and 1 ms back."""
    model, cluster = even_model(2, cut_bytes=1e6), one_node(2, bandwidth=1e9)
    plan = even_plan(model, cluster, stages=2)
    seconds = step_breakdown(simulate_plan(plan, model, cluster, PLAINLY))
    assert seconds["transfers"] == pytest.approx(2e-3)


def test_only_the_exposed_part_of_a_reduction_counts() -> None:
    """4 MB reduced at 1 GB/s takes 4 ms; it starts when the backward ends."""
    model, cluster = even_model(1, parameters=10**6), one_node(2, bandwidth=1e9)
    plan = even_plan(model, cluster, data=2)
    seconds = step_breakdown(simulate_plan(plan, model, cluster, PLAINLY))
    assert seconds["reductions"] == pytest.approx(4e-3, rel=1e-4)
    assert seconds["compute"] == pytest.approx(3e-3)


def test_a_step_with_nothing_in_it_is_overhead() -> None:
    empty = Timeline(source="measured", devices=("n:0",), step_seconds=2.0, intervals=())
    assert step_breakdown(empty)["overhead"] == 2.0


@given(models_and_plans())
def test_a_timeline_equals_itself(case: tuple[LayerGraph, Plan]) -> None:
    model, plan = case
    timeline = simulate_plan(plan, model, one_node(len(plan.devices)))
    found = compare_timelines(timeline, timeline)
    assert found.step_error == 0
    assert len(found.rows) == len(timeline.intervals)
    assert found.unmatched == ()
    assert all(kind.median_error == 0 for kind in found.kinds)
    assert sum(kind.count for kind in found.kinds) == len(found.rows)


def test_errors_are_relative_to_what_was_measured() -> None:
    model, cluster = even_model(2), one_node(2, bandwidth=1e18)
    plan = even_plan(model, cluster, stages=2, micro_batches=3)
    predicted = simulate_plan(plan, model, cluster)
    stretched = replace(
        predicted,
        source="measured",
        step_seconds=2 * predicted.step_seconds,
        intervals=tuple(
            replace(i, start_seconds=2 * i.start_seconds, end_seconds=2 * i.end_seconds)
            for i in predicted.intervals[1:]
        ),
    )
    found = compare_timelines(predicted, stretched)
    assert found.step_error == pytest.approx(-0.5)
    assert [k.median_error for k in found.kinds if k.op == "F"] == [pytest.approx(0.5)]
    lost = predicted.intervals[0]
    assert found.unmatched == (f"rank {lost.rank}: {lost.label}",)


@given(
    ends=st.lists(st.integers(0, 20), min_size=1),
    ordered=st.booleans(),
    before=st.integers(-1, 22),
    tolerance=st.sampled_from([0.0, 0.5, 3.0]),
)
def test_what_ends_last_is_found_without_a_look_at_all(ends, ordered, before, tolerance):
    every = [(0, n, 0.0, float(end)) for n, end in enumerate(sorted(ends) if ordered else ends)]
    assert InOrder(every).latest(before, tolerance) == latest(every, before, tolerance)


class Watched(tuple[int, int, float, float]):
    """Something carried out that counts who asks when."""

    asked = 0

    def __getitem__(self, key):
        Watched.asked += 1
        return super().__getitem__(key)


def test_a_long_step_is_not_looked_through_at_every_turn() -> None:
    number = 2_000
    row = InOrder([Watched((0, end, 0.0, float(end))) for end in range(number)])
    Watched.asked = 0
    for before in range(number):
        assert len(row.latest(before, 1e-9)) == 1
    assert Watched.asked == 0


@given(models_and_plans(), st.sampled_from([1e5, 1e9]))
def test_a_simulated_step_needs_no_timeline(
    case: tuple[LayerGraph, Plan], bandwidth: float
) -> None:
    model, plan = case
    priced = PricedPlan(plan, model, one_node(len(plan.devices), bandwidth=bandwidth))
    step = simulated_step(priced.program, priced.prices)
    assert critical_path(step) == critical_path(step.timeline())
    assert step_breakdown(step) == step_breakdown(step.timeline())
