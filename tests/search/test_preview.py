"""The preview against the simulator: exact where nothing is shared, close elsewhere."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster.spec import Link
from meshwright.search.candidate import plan_of
from meshwright.search.costs import costs_of
from meshwright.search.layer_partition import fit_pipeline
from meshwright.search.stage_simulation import stage_level_seconds
from meshwright.simulate.simulator import simulate_plan
from soaks import portion
from strategies import small_worlds
from worlds import NVLINK, cluster, freeze, job, model

SCHEDULES = ("1f1b", "gpipe")


def simulated(costs, lines, schedule):
    plan = plan_of(costs, lines, schedule)
    return simulate_plan(plan, costs.model, costs.cluster).step_seconds


def chain_of(costs, rows, count, schedule):
    """Every device a stage."""
    stages = tuple(((name,),) for name in costs.devices)
    return fit_pipeline(costs, stages, rows, count, schedule)


@settings(max_examples=portion(30))
@given(
    st.lists(st.sampled_from(["fast", "slow"]), min_size=1, max_size=2),
    st.lists(st.sampled_from([5.0, 10.0, 40.0]), min_size=5, max_size=8),
    st.integers(1, 20),
    st.sampled_from(SCHEDULES),
    st.sampled_from([1e8, 1e10]),
)
def test_it_is_exact_where_every_link_has_one_user(kinds, layers, count, schedule, bandwidth):
    network = Link(bandwidth=bandwidth, latency=1e-5)
    where = cluster(*((kind,) for kind in kinds), network=network)
    costs = costs_of(model(layers), where, job(2 * count))
    pipeline = chain_of(costs, 2, count, schedule).pipeline
    seconds = stage_level_seconds(costs, (pipeline,), schedule)
    assert seconds == pytest.approx(simulated(costs, (pipeline,), schedule), rel=1e-9)


@settings(max_examples=portion(30))
@given(
    st.lists(st.sampled_from([5.0, 10.0, 40.0]), min_size=5, max_size=8),
    st.integers(1, 20),
    st.sampled_from(SCHEDULES),
    st.sampled_from([1e8, 1e10]),
    st.data(),
)
def test_it_is_exact_where_nobody_waits_for_a_gradient(layers, count, schedule, bandwidth, data):
    """The first layer is frozen, and perhaps others."""
    network = Link(bandwidth=bandwidth, latency=1e-5)
    frozen = data.draw(st.sets(st.integers(0, len(layers) - 1))) | {0}
    graph = freeze(model(layers), frozen)
    costs = costs_of(graph, cluster(("fast",), ("slow",), network=network), job(2 * count))
    pipeline = chain_of(costs, 2, count, schedule).pipeline
    seconds = stage_level_seconds(costs, (pipeline,), schedule)
    assert seconds == pytest.approx(simulated(costs, (pipeline,), schedule), rel=1e-9)


@settings(max_examples=portion(20))
@given(st.integers(3, 5), st.integers(1, 20), st.sampled_from(SCHEDULES))
def test_long_lines_are_close_where_links_are_fast(depth, count, schedule):
    """An inner stage sends activations one way and gradients the other through one port."""
    where = cluster(("fast", "slow", "fast", "slow", "fast")[:depth])
    costs = costs_of(model([5.0, 10.0, 40.0, 5.0, 5.0, 10.0]), where, job(2 * count))
    pipeline = chain_of(costs, 2, count, schedule).pipeline
    seconds = stage_level_seconds(costs, (pipeline,), schedule)
    assert seconds == pytest.approx(simulated(costs, (pipeline,), schedule), rel=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_micro_batches_that_are_not_followed_come_at_an_even_pace(schedule):
    where = cluster(("fast", "slow"), ("slow", "fast"))
    costs = costs_of(model([10.0, 5.0, 40.0, 10.0, 20.0]), where, job(200))
    pipeline = chain_of(costs, 1, 200, schedule).pipeline
    seconds = stage_level_seconds(costs, (pipeline,), schedule)
    assert seconds == pytest.approx(simulated(costs, (pipeline,), schedule), rel=5e-3)


@settings(max_examples=portion(30))
@given(small_worlds({2: (4, 6), 3: (5, 6)}), st.sampled_from(SCHEDULES))
def test_replicas_and_tied_layers_are_close(world, schedule):
    graph, where, todo = world
    costs = costs_of(graph, where, todo)
    units = tuple((name,) for name in costs.devices)
    rows = max(len(units), todo.global_batch)
    found = fit_pipeline(costs, (units,), rows, 2, schedule)
    if found is not None:
        seconds = stage_level_seconds(costs, (found.pipeline,), schedule)
        assert seconds == pytest.approx(simulated(costs, (found.pipeline,), schedule), rel=0.25)


@settings(max_examples=portion(20))
@given(st.floats(0.1, 2), st.integers(1, 12), st.sampled_from(SCHEDULES))
def test_a_limit_is_kept_from_both_sides(share, count, schedule):
    """Below the limit the answer is the same; else it is something between limit and answer."""
    where = cluster(("fast", "slow"), ("slow",), network=NVLINK)
    costs = costs_of(model([10.0, 5.0, 40.0, 10.0]), where, job(count))
    pipeline = chain_of(costs, 1, count, schedule).pipeline
    seconds = stage_level_seconds(costs, (pipeline,), schedule)
    limited = stage_level_seconds(costs, (pipeline,), schedule, share * seconds)
    if share > 1:
        assert limited == seconds
    else:
        assert share * seconds * (1 - 1e-12) <= limited <= seconds * (1 + 1e-9)


@pytest.mark.parametrize("before", [0, 1])
def test_where_messages_take_long_the_bound_counts_every_round_trip(before):
    """The last stage but one holds two micro-batches: six times two go to the last and back, a
    tenth of a second each way."""
    far = Link(bandwidth=1e10, latency=0.1)
    where = cluster(("fast",) * (1 + before), ("fast",), network=far)
    costs = costs_of(model([1.0] * 3), where, job(12))
    pipeline = chain_of(costs, 1, 12, "1f1b").pipeline
    seconds = stage_level_seconds(costs, (pipeline,), "1f1b")
    bound = stage_level_seconds(costs, (pipeline,), "1f1b", limit=0.0)
    assert 0.9 * seconds < bound <= seconds
