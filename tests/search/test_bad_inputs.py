"""Inputs that no search could deal with, or hardly: an answer or a clear refusal, never a crash."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.spec import DirectLink, Link
from meshwright.errors import ClusterError, FitError, PlanError
from meshwright.plan.validate import validate_plan
from meshwright.search.inputs import MOST_LAYERS, MOST_ROWS
from meshwright.search.planner import find_plan
from meshwright.search.space import divisors
from worlds import cluster, device, job, model


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan"), float("inf")])
def test_links_that_carry_nothing_are_refused_all_at_once(bandwidth):
    where = cluster(("fast",), ("fast",), network=Link(bandwidth=bandwidth))
    with pytest.raises(ClusterError, match="reach the others") as failure:
        find_plan(model([1.0]), where, job())
    (problem,) = failure.value.problems
    assert problem.source == "2 links (node a, node b)"


def test_a_pair_of_nodes_that_cannot_reach_each_other_is_refused():
    where = cluster(("fast",), ("fast",))
    cut = DirectLink(between=("a", "b"), link=Link(bandwidth=1e9, latency=float("inf")))
    with pytest.raises(ClusterError, match="nodes a and b"):
        find_plan(model([1.0]), replace(where, direct=(cut,)), job())


def test_one_device_and_one_layer_are_enough():
    plan = find_plan(model([1.0]), cluster(("fast",)), job(1))
    assert len(plan.devices) == 1


@pytest.mark.parametrize("nodes", [1, 12])
def test_one_layer_is_never_cut(nodes):
    where = cluster(*[("fast",) * 8] * min(nodes, 8))
    plan = find_plan(model([100.0]), where, job(64))
    validate_plan(plan, model([100.0]), where)
    assert all(len(pipeline.stages) == 1 for pipeline in plan.pipelines)


def test_models_and_batches_beyond_all_bounds_are_refused_together():
    deep = model([1.0] * (10 * MOST_LAYERS))
    with pytest.raises(PlanError) as failure:
        find_plan(deep, cluster(("fast",)), job(MOST_ROWS + 1))
    assert [problem.field for problem in failure.value.problems] == ["global_batch", "layers"]


def test_a_layer_larger_than_every_device_fits_nowhere():
    heavy = model([1.0, 1.0], parameters=4_000_000_000)
    with pytest.raises(FitError, match="What would help"):
        find_plan(heavy, cluster(("fast",) * 2), job(4))


@pytest.mark.slow
@pytest.mark.heavy
def test_a_batch_of_a_prime_number_of_rows_on_many_devices():
    where = cluster(*[("fast",) * 4 + ("slow",) * 8] * 8)
    plan = find_plan(model([10.0] * 6), where, job(97))
    validate_plan(plan, model([10.0] * 6), where)
    assert sum(each.micro_batches * each.rows for each in plan.pipelines) == 97


@given(st.integers(1, 3000))
def test_divisors_are_all_of_them_ascending(number):
    assert divisors(number) == tuple(d for d in range(1, number + 1) if number % d == 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_layers_are_planned():
    graph = model([1.0] * MOST_LAYERS, parameters=1000)
    where = cluster(("fast",) * 8, ("slow",) * 8)
    plan = find_plan(graph, where, job(64))
    validate_plan(plan, graph, where)
    assert 0 < plan.prediction.lower_bound_seconds <= plan.prediction.step_seconds


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_devices_are_planned():
    one = cluster(("fast",) * 8, types=(device("fast"),))
    nodes = tuple(replace(one.nodes[0], name=f"n{i}") for i in range(12_500))
    where = replace(one, nodes=nodes)
    graph = model([50.0] * 24, parameters=1_000_000)
    plan = find_plan(graph, where, job(8192))
    validate_plan(plan, graph, where)
    assert plan.prediction.step_seconds < find_plan(graph, one, job(8192)).prediction.step_seconds
