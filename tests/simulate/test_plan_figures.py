"""Bytes on links, counted by hand, and which of two plans wins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.cost.priced_plan import PricedPlan
from meshwright.errors import PlanError
from meshwright.program.compile import REDUCE_NORM_BYTES
from meshwright.report.resources import resource_name
from meshwright.simulate.plan_figures import check_comparable, compare_plans, simulate_figures
from meshwright.simulate.traffic import link_loads
from plain_constants import PLAINLY
from worlds import divided, even_model, even_plan, one_node


def loads(plan, model, cluster):
    found = link_loads(PricedPlan(plan, model, cluster))
    return {resource_name(load.resource): load for load in found}


def test_a_cut_is_crossed_once_by_every_micro_batch_each_way():
    cluster, model = one_node(2), even_model(4, cut_bytes=1000.0)
    plan = even_plan(model, cluster, stages=2, micro_batches=3)
    found = loads(plan, model, cluster)
    # An all-reduce of n bytes between two devices sends n from each.
    assert found["n:0 out"].bytes == 3 * 1000 + REDUCE_NORM_BYTES
    assert found["n:1 out"].bytes == 3 * 1000 + REDUCE_NORM_BYTES
    assert found["n:1 in"].bytes == found["n:0 out"].bytes
    assert found["n:0 out"].seconds == pytest.approx(found["n:0 out"].bytes / 1e9)


def test_gradients_are_counted_once_for_all_members():
    cluster, model = one_node(4), even_model(2, parameters=1000)
    plan = even_plan(model, cluster, data=4)
    found = loads(plan, model, cluster)
    ring = 2 * 3 / 4
    assert found["n:0 out"].bytes == pytest.approx(ring * (2 * 1000 * 4 + REDUCE_NORM_BYTES))


def test_all_reduces_inside_layers_are_counted():
    cluster, model = one_node(2), even_model(2)
    layers = tuple(
        divided(
            layer,
            units=2,
            forward_all_reduce_bytes=(100.0, 100.0),
            backward_all_reduce_bytes=(50.0,),
        )
        for layer in model.layers
    )
    model = replace(model, layers=layers)
    plan = even_plan(model, cluster, tensor=2, micro_batches=5)
    found = loads(plan, model, cluster)
    assert found["n:0 out"].bytes == pytest.approx(5 * 2 * 250 + REDUCE_NORM_BYTES)
    (pipeline,) = plan.pipelines
    threefold = replace(plan, pipelines=(replace(pipeline, rows=3),))
    found = loads(threefold, model, cluster)
    assert found["n:0 out"].bytes == pytest.approx(3 * 5 * 2 * 250 + REDUCE_NORM_BYTES)


def measured(plan, model, cluster, name):
    return simulate_figures(name, PricedPlan(plan, model, cluster, PLAINLY))


def test_the_faster_plan_wins_and_the_reason_names_the_part():
    cluster, model = one_node(2), even_model(4)
    slow = measured(even_plan(model, cluster, micro_batches=8), model, cluster, "slow")
    two = replace(
        even_plan(model, cluster, stages=2, micro_batches=8),
        job=slow.plan.job,
    )
    fast = measured(two, model, cluster, "fast")
    for pair in ((slow, fast), (fast, slow)):
        verdict = compare_plans(*pair)
        assert verdict.winner == "fast"
        assert verdict.speed_up == pytest.approx(16 / 9, rel=1e-3)
        assert "more on its slowest stage" in verdict.reason
        assert "less on the bubble cannot make up for" in verdict.reason
    assert compare_plans(fast, fast).winner is None


def test_plans_with_unlike_batches_are_compared_by_token():
    cluster, model = one_node(1), even_model(2)
    small = measured(even_plan(model, cluster, micro_batches=1), model, cluster, "small")
    large = measured(even_plan(model, cluster, micro_batches=8), model, cluster, "large")
    verdict = compare_plans(small, large)
    assert verdict.speed_up == pytest.approx(1, abs=1e-6)
    assert verdict.differences == ("rows a step: 1 and 8",)


def test_plans_for_different_models_are_refused():
    cluster = one_node(1)
    pair = [
        measured(even_plan(model, cluster), model, cluster, f"{len(model.layers)}.json")
        for model in (even_model(2), even_model(3))
    ]
    with pytest.raises(PlanError, match=r"3\.json: model: found even \(3 layers\)"):
        check_comparable(*pair)
