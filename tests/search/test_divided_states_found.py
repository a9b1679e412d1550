"""The search divides optimizer states where that is faster, or where nothing else fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster.spec import Link
from meshwright.cost.memory import device_memory, total_bytes
from meshwright.errors import FitError, PlanError
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import Plan, StateDivision, with_stages
from meshwright.plan.validate import validate_plan
from meshwright.program.check import check_program
from meshwright.program.compile import compile_plan
from meshwright.report.sentences import limits
from meshwright.search.certificate import certificate
from meshwright.search.costs import costs_of
from meshwright.search.planner import find_plan
from meshwright.simulate.simulator import simulate_plan
from meshwright.techniques.state_division.options import divided
from meshwright.techniques.state_division.plan import divides
from meshwright.workflows.export_plan import regular_forms
from soaks import portion
from strategies import small_worlds
from worlds import FAST, cluster, device, even_plan, job, model, one_node

SLOW_UPDATES = replace(FAST, memory_bandwidth=1e11)
"""A device whose optimizer step takes a quarter of the step."""
WITHOUT = ("divided-states",)


def division(plan: Plan) -> list[bool]:
    """Whether each stage of the first pipeline divides its states."""
    return [divides(stage) for stage in plan.pipelines[0].stages]


def test_the_search_divides_states_where_that_is_faster():
    graph = model([40.0] * 4, parameters=10_000_000, units=0)
    where = cluster(("fast",) * 4, types=(SLOW_UPDATES,))
    found = find_plan(graph, where, job(8))
    plain = find_plan(graph, where, job(8), forbidden=WITHOUT)
    assert all(division(found))
    assert not any(division(plain))
    assert found.prediction.step_seconds < 0.98 * plain.prediction.step_seconds
    # A device updates a quarter of the weights instead of half: undivided, two stages are faster.
    assert found.prediction.parts["optimizer"] < 0.6 * plain.prediction.parts["optimizer"]
    whole = simulate_plan(found, graph, where).step_seconds
    assert whole == pytest.approx(found.prediction.step_seconds, rel=1e-9)
    assert found == find_plan(graph, where, job(8))
    assert found.name.endswith("-zero1")
    assert "[4z]" in describe_plan(found)
    assert "Optimizer states are divided (ZeRO-1)" in limits(found)[-1]
    reasons = {r.name: r.reason for r in found.prediction.runners_up}
    assert "optimizer +" in reasons["dp4-tp1-pp1 1x8"]


def test_another_plan_wins_once_its_states_are_divided():
    """With whole states four stages are fastest, for each device updates its own layer alone."""
    graph = model([10.0] * 4, parameters=10_000_000, units=0)
    where = cluster(("fast",) * 4, types=(SLOW_UPDATES,))
    plain = find_plan(graph, where, job(8), forbidden=WITHOUT)
    found = find_plan(graph, where, job(8))
    assert plain.name == "dp1-tp1-pp4"
    assert found.name == "dp4-tp1-pp1-zero1"
    assert found.prediction.step_seconds < 0.98 * plain.prediction.step_seconds


def test_states_stay_whole_where_gathering_weights_takes_longer():
    graph = model([10.0] * 4, parameters=10_000_000, units=0)
    slow = Link(bandwidth=1e8, latency=1e-4)
    where = cluster(("fast",), ("fast",), network=slow)
    found = find_plan(graph, where, job(8))
    assert not any(division(found))
    assert found == replace(
        find_plan(graph, where, job(8), forbidden=WITHOUT),
        prediction=found.prediction,
    )


def test_divided_states_fit_where_nothing_else_does():
    """Half of the states of a layer leave 320 MB more room on each of two devices."""
    graph = model([10.0], parameters=80_000_000, units=0)
    where = cluster(("small",) * 2, types=(device("small", memory_gib=2.0),))
    with pytest.raises(FitError):
        find_plan(graph, where, job(2), forbidden=WITHOUT)
    found = find_plan(graph, where, job(2))
    assert all(division(found))
    validate_plan(found, graph, where)
    assert all(total_bytes(m) <= m.capacity for m in device_memory(found, graph, where))
    assert certificate(costs_of(graph, where, job(2))).seconds <= found.prediction.step_seconds


@pytest.mark.slow
@settings(max_examples=portion(25))
@given(small_worlds({1: (6, 6), 2: (5, 6), 3: (4, 6), 4: (4, 4)}), st.sampled_from([1e10, 1e15]))
def test_no_plan_with_divided_states_is_below_the_certificate(world, bandwidth):
    graph, where, todo = world
    types = {name: replace(kind, memory_bandwidth=bandwidth) for name, kind in where.types.items()}
    where = replace(where, types=types)
    try:
        plan = find_plan(graph, where, todo, forbidden=WITHOUT)
    except FitError:
        return
    changed = divided(plan, graph)
    if changed is None:
        return
    validate_plan(changed, graph, where)
    check_program(compile_plan(changed, graph))
    step = simulate_plan(changed, graph, where).step_seconds
    assert certificate(costs_of(graph, where, todo)).seconds <= step * (1 + 1e-9)
    found = find_plan(graph, where, todo).prediction.step_seconds
    assert found <= min(step, plan.prediction.step_seconds) * (1 + 1e-9)


def test_what_is_forbidden_must_be_an_option():
    with pytest.raises(PlanError, match="divided-states"):
        find_plan(model([1.0]), cluster(("fast",)), job(), forbidden=["zero"])


def test_the_nearest_plans_for_a_tool_include_one_with_whole_states():
    graph = model([40.0] * 4, parameters=10_000_000, units=0)
    found = find_plan(graph, cluster(("fast",) * 4, types=(SLOW_UPDATES,)), job(8))
    whole = [not any(division(form)) for form in regular_forms(found, graph)]
    assert whole
    assert whole == [False, True] * (len(whole) // 2)


def test_the_nearest_plans_include_every_choice_of_techniques_that_the_plan_uses():
    graph = model([10.0] * 4)
    plan = even_plan(graph, one_node(4), data=2, stages=2)
    used = with_stages(
        plan, lambda s: replace(s, recompute=True, states=StateDivision(optimizer="all"))
    )
    forms = [*regular_forms(used, graph)]
    found = [(form.stages[0].recompute, divides(form.stages[0])) for form in forms]
    assert found[:4] == [(True, True), (False, True), (True, False), (False, False)]
    assert len(forms) == len(set(forms))
    assert len([*regular_forms(plan, graph)]) * 4 == len(forms)
