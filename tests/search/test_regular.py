"""Regular pipelines: which there are, what the best of them is, and by how much others miss."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster.spec import Link, node_of
from meshwright.cost.memory import device_memory, total_bytes
from meshwright.search.candidate import CandidatePipeline, excess_bytes, plan_of
from meshwright.search.candidate_estimate import candidate_seconds
from meshwright.search.costs import costs_of
from meshwright.search.hill_climb import LocalSearch
from meshwright.search.incumbent import Incumbent
from meshwright.search.layer_partition import least_excess
from meshwright.search.regular import (
    MOST,
    divided,
    explore,
    promise,
    regular_pipelines,
    sample,
    with_best_cuts,
)
from meshwright.search.space import is_large, rows_in_order
from meshwright.simulate.simulator import simulate_plan
from plain_constants import PLAINLY
from soaks import portion
from worlds import FAST, GIB, SLOW, cluster, job, model


@st.composite
def worlds(draw):
    """Prices of a model on two or three nodes, which may be too small for it."""
    per_node = draw(st.sampled_from([1, 2, 4]))
    kinds = st.sampled_from(["fast", "slow"])
    nodes = draw(st.lists(kinds, min_size=2, max_size=3))
    memory = draw(st.sampled_from([1.3, 2.0, 16.0]))
    types = tuple(replace(kind, memory=int(memory * GIB)) for kind in (FAST, SLOW))
    graph = model(
        draw(st.lists(st.sampled_from([5.0, 10.0, 40.0]), min_size=2, max_size=6)),
        parameters=draw(st.sampled_from([100_000, 20_000_000])),
        tied=draw(st.booleans()),
        saved=draw(st.sampled_from([1e6, 5e7])),
    )
    where = cluster(*((kind,) * per_node for kind in nodes), types=types)
    return costs_of(graph, where, job(draw(st.sampled_from([1, 3, 8]))), recomputation=True)


@settings(max_examples=portion(40))
@given(worlds())
def test_each_uses_devices_once_and_works_through_the_whole_batch(costs):
    every = regular_pipelines(costs)
    assert every
    assert len(set(every)) == len(every) <= MOST
    for pipeline in every:
        data, tensor, depth = pipeline.widths
        groups = [group for stage in pipeline.stages for group in stage.groups]
        names = [name for group in groups for name in group]
        assert len(names) == len(set(names)) == data * tensor * depth
        assert all(len(stage.groups) == data for stage in pipeline.stages)
        assert all(len({node_of(name) for name in group}) == 1 for group in groups)
        rows = {sum(stage.rows) for stage in pipeline.stages}
        assert rows == {costs.job.global_batch // pipeline.micro_batches}
        assert all(min(stage.rows) > 0 for stage in pipeline.stages)


@settings(max_examples=portion(40))
@given(worlds())
def test_every_grid_that_uses_all_devices_of_one_kind_is_among_them(costs):
    """Data width x tensor width x stages, with every size of micro-batches, as AMP's space has
    them."""
    everything = set(costs.devices)
    found = {
        (*pipeline.widths, pipeline.micro_batches)
        for pipeline in regular_pipelines(costs)
        if {n for s in pipeline.stages for g in s.groups for n in g} == everything
    }
    batch, layers = costs.job.global_batch, len(costs.model.layers)
    per_node = len(everything) // len(costs.cluster.nodes)
    for tensor in (t for t in (1, 2, 4) if per_node % t == 0):
        groups = len(everything) // tensor
        for depth in (d for d in range(1, min(groups, layers) + 1) if groups % d == 0):
            data = groups // depth
            for rows in (r for r in range(data, batch + 1) if batch % r == 0):
                assert (data, tensor, depth, batch // rows) in found


def names(stages):
    return [" ".join(name for group in stage for name in group) for stage in stages]


def test_replicas_of_a_stage_are_neighbours_or_stages_are():
    costs = costs_of(model([10.0] * 4), cluster(("fast",) * 2, ("fast",) * 2), job(8))
    row = next(rows_in_order(costs))
    assert names(divided(costs, row, 2, 2, across=False)) == ["a:0 a:1", "b:0 b:1"]
    assert names(divided(costs, row, 2, 2, across=True)) == ["a:0 b:0", "a:1 b:1"]


def test_stages_inside_nodes_do_not_mix_speeds_where_numbers_allow():
    nodes = [("slow",) * 2, ("slow",) * 2, ("fast",) * 2, ("fast",) * 2]
    costs = costs_of(model([10.0] * 4), cluster(*nodes), job(8))
    row = next(rows_in_order(costs))
    wanted = ["a:0 b:0", "a:1 b:1", "c:0 d:0", "c:1 d:1"]
    assert names(divided(costs, row, 4, 2, across=True)) == wanted


def test_slow_types_and_slow_nodes_may_be_left_out():
    where = cluster(("fast", "fast"), ("fast", "slow"), ("slow", "slow"))
    costs = costs_of(model([10.0] * 4, units=1), where, job(8))
    used = {
        "".join(sorted({n for s in each.stages for g in s.groups for n in g}))
        for each in regular_pipelines(costs)
    }
    assert {"a:0a:1b:0b:1c:0c:1", "a:0a:1b:0", "b:1c:0c:1", "a:0a:1b:0b:1", "a:0a:1"} <= used


def test_what_is_promised_of_one_stage_is_all_that_it_computes():
    """Five micro-batches of 30 GFLOP forward and twice that backward, at 20 TFLOP/s."""
    costs = costs_of(model([10.0, 20.0]), cluster(("fast",)), job(5), PLAINLY)
    five = next(each for each in regular_pipelines(costs) if each.micro_batches == 5)
    assert promise(costs, five) == pytest.approx(5 * 3 * 30e9 / 20e12, rel=1e-3)


@pytest.mark.parametrize("micro_batches", [1, 4, 8])
def test_equal_stages_take_the_textbook_time(micro_batches):
    """(M + S - 1) rounds, next to nothing else: instant links, hardly any parameters."""
    where = cluster(("fast",) * 4)
    instant = Link(bandwidth=1e15, latency=0.0)
    where = replace(where, nodes=(replace(where.nodes[0], inside=instant),))
    costs = costs_of(model([200.0] * 8, parameters=1), where, job(8), PLAINLY)
    each = next(
        each
        for each in regular_pipelines(costs)
        if each.widths == (1, 1, 4) and each.micro_batches == micro_batches
    )
    found = with_best_cuts(costs, each, "1f1b")
    seconds = (micro_batches + 3) * 2 * 3 * 200e9 * 8 / micro_batches / 20e12
    assert found.bounds == (0, 2, 4, 6, 8)
    assert promise(costs, each) == pytest.approx(seconds, rel=1e-3)
    assert candidate_seconds(costs, (found,), "1f1b") == pytest.approx(seconds, rel=0.02)


@settings(max_examples=portion(60))
@given(worlds(), st.data())
def test_the_closed_form_is_near_the_simulator(costs, data):
    """Within a quarter: it leaves out how single transfers queue."""
    each = data.draw(st.sampled_from(regular_pipelines(costs)))
    schedule = data.draw(st.sampled_from(["1f1b", "gpipe"]))
    found = with_best_cuts(costs, each, schedule)
    if found is not None:
        plan = plan_of(costs, (found,), schedule)
        played = simulate_plan(plan, costs.model, costs.cluster).step_seconds
        assert candidate_seconds(costs, (found,), schedule) == pytest.approx(played, rel=0.25)


@settings(max_examples=portion(60))
@given(worlds(), st.data())
def test_what_is_said_to_fit_fits_and_what_is_not_never_does(costs, data):
    each = data.draw(st.sampled_from(regular_pipelines(costs)))
    found = with_best_cuts(costs, each, "1f1b")
    nearest = least_excess(costs, each.stages, each.micro_batches, "1f1b")
    layers, depth = len(costs.model.layers), len(each.stages)
    every = [
        CandidatePipeline(each.stages, (0, *inner, layers), each.micro_batches)
        for inner in combinations(range(1, layers), depth - 1)
    ]

    def worst(pipeline):
        plan = plan_of(costs, (pipeline,), "1f1b")
        memory = device_memory(plan, costs.model, costs.cluster)
        return max(total_bytes(m) - m.capacity for m in memory)

    if found is not None:
        assert worst(found) <= 0
        assert excess_bytes(costs, found, "1f1b") <= 0
    else:
        assert worst(nearest) == pytest.approx(min(map(worst, every)), abs=16)
        assert excess_bytes(costs, nearest, "1f1b") == pytest.approx(worst(nearest), abs=16)
        assert worst(nearest) > 0


def explored(costs, left=10_000_000):
    search = LocalSearch(Incumbent(costs, ""), ("1f1b", "gpipe"), left)
    return search, explore(search, lambda *_: None)


@settings(max_examples=portion(30))
@given(worlds())
def test_the_best_is_hardly_slower_than_any_and_all_are_counted(costs):
    """A few of each depth and tensor width get cuts: those that promise most."""
    search, found = explored(costs)
    fitted = [with_best_cuts(costs, each, "1f1b") for each in regular_pipelines(costs)]
    seconds = [candidate_seconds(costs, (each,), "1f1b") for each in fitted if each]
    assert (found.best is None) == (not seconds)
    if found.best is None:
        assert len(found.misfits) == len(fitted)
        return
    assert candidate_seconds(costs, found.best[1], "1f1b") <= 1.1 * min(seconds)
    assert sum(search.incumbent.pruned.values()) == len(fitted)


def test_few_steps_end_it_but_not_before_something_fits():
    """The fast devices promise most, and have no room: they are looked at first."""
    types = (replace(FAST, memory=int(1.05 * GIB)), SLOW)
    where = cluster(("fast",) * 4, ("slow",) * 4, types=types)
    costs = costs_of(model([10.0] * 6, parameters=10_000_000), where, job(16))
    _, found = explored(costs, left=1)
    assert found.misfits
    assert found.best
    assert excess_bytes(costs, found.best[1][0], "1f1b") <= 0


def test_a_sample_of_very_many_devices_is_small_and_varied():
    where = cluster(*[("fast",) * 8] * 250, names=[f"n{i}" for i in range(250)])
    costs = costs_of(model([10.0] * 40, units=8), where, job(512))
    assert is_large(costs)
    found = sample(costs)
    assert 8 <= len(found) <= 100
    assert len({each.widths for each in found}) > 10
    assert len({each.micro_batches for each in found}) > 3
    assert np.mean([len(each.stages) for each in found]) > 2
