"""On small inputs no order of work makes any plan much faster than the plan found.

Every plan is simulated in every schedule that has a rule, and those of two stages also in every
order that can run.
"""

import pytest
from bruteforce import LAYOUTS, NAMED, every_order, every_plan, least_seconds
from hypothesis import given, seed, settings

from meshwright.errors import FitError
from meshwright.search.planner import find_plan
from meshwright.simulate.simulator import simulate_plan
from soaks import portion, tenth
from strategies import small_worlds

NAMED_SLACK = 0.05
"""Share by which the plan found may be slower than the best one in a schedule with a rule: only the
dozen that are fastest in the best order of work, in closed form, are tried in every schedule. The
worst of 80 cases is slower by 2 %."""

LISTED_SLACK = 0.02
"""The same where every order of two stages is tried; none of 16 cases is slower."""


def check_named(world):
    graph, where, todo = world
    best, _ = least_seconds(graph, where, todo, NAMED, LAYOUTS)
    if best is None:
        with pytest.raises(FitError):
            find_plan(graph, where, todo)
        return
    found = find_plan(graph, where, todo).prediction
    assert found.step_seconds <= best * (1 + NAMED_SLACK)


def check_listed(world):
    graph, where, todo = world
    every = [
        simulate_plan(ordered, graph, where).step_seconds
        for plan in every_plan(graph, where, todo, ("1f1b",))
        if len(plan.pipelines) == 1 and len(plan.stages) == 2
        for ordered in every_order(plan, graph, where)
    ]
    if every:
        found = find_plan(graph, where, todo).prediction
        assert found.step_seconds <= min(every) * (1 + LISTED_SLACK)


@settings(max_examples=portion(10))
@given(small_worlds({2: (3, 3), 3: (2, 2)}))
def test_no_named_order_of_any_plan_is_much_faster(world):
    check_named(world)


@settings(max_examples=portion(10))
@given(small_worlds({2: (3, 2)}))
def test_no_order_at_all_of_two_stages_is_much_faster(world):
    check_listed(world)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@seed(1)
@settings(max_examples=tenth(200), database=None)
@given(small_worlds({2: (4, 4), 3: (4, 2), 4: (3, 1)}))
def test_no_named_order_of_any_plan_is_much_faster_in_many_cases(world):
    check_named(world)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@seed(1)
@settings(max_examples=tenth(100), database=None)
@given(small_worlds({2: (4, 3)}))
def test_no_order_at_all_of_two_stages_is_much_faster_in_many_cases(world):
    check_listed(world)
