"""On small inputs the plan found is the best there is: every plan is simulated to check."""

import pytest
from bruteforce import least_seconds
from hypothesis import given, seed, settings

from meshwright.errors import FitError
from meshwright.search.certificate import EXHAUSTIVE, certificate
from meshwright.search.costs import costs_of
from meshwright.search.options import OPTION_NAMES
from meshwright.search.planner import find_plan
from soaks import portion, tenth
from strategies import small_worlds, worlds_with_islands

SIZES = {1: (6, 8), 2: (6, 5), 3: (6, 3), 4: (6, 2)}
"""Devices: most layers, most rows that brute force can get through in about a second."""


def check_exact(world):
    graph, where, todo = world
    best, _ = least_seconds(graph, where, todo)
    if best is None:
        with pytest.raises(FitError):
            find_plan(graph, where, todo, forbidden=OPTION_NAMES)
        return
    found = find_plan(graph, where, todo, forbidden=OPTION_NAMES).prediction
    assert found.step_seconds == pytest.approx(best, rel=2e-9)
    assert found.bound_reason == EXHAUSTIVE
    bound = certificate(costs_of(graph, where, todo))
    assert bound.seconds <= best * (1 + 1e-12)


@settings(max_examples=portion(20))
@given(small_worlds({1: (6, 6), 2: (5, 3), 3: (3, 2)}))
def test_the_plan_found_is_the_best_of_all(world):
    check_exact(world)


@settings(max_examples=portion(20))
@given(worlds_with_islands({2: (5, 3), 3: (3, 2)}))
def test_the_plan_found_is_the_best_of_all_where_devices_are_in_islands(world):
    check_exact(world)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@seed(1)
@settings(max_examples=tenth(400), database=None)
@given(small_worlds(SIZES))
def test_the_plan_found_is_the_best_of_all_in_many_cases(world):
    check_exact(world)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@seed(2)
@settings(max_examples=tenth(200), database=None)
@given(worlds_with_islands({3: (6, 3), 4: (6, 2)}))
def test_the_plan_found_is_the_best_of_all_in_many_cases_with_islands(world):
    check_exact(world)
