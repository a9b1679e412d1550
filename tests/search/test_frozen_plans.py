"""Freezing weights never makes the best plan slower, or a bound wrong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_properties import TINY, any_worlds, check_legal, seconds

from meshwright.cost.memory import total_bytes
from meshwright.errors import FitError
from meshwright.search.planner import find_plan
from soaks import portion, tenth
from strategies import small_worlds
from worlds import cluster, freeze, job, model

TINIER = {1: (4, 3), 2: (3, 2), 3: (3, 1)}


@settings(max_examples=portion(40))
@given(small_worlds(TINIER), st.data())
def test_freezing_never_makes_the_best_plan_slower(world, data):
    graph, where, todo = world
    layers = data.draw(st.sets(st.integers(0, len(graph.layers) - 1)))
    frozen = freeze(graph, layers, tied=data.draw(st.booleans()))
    assert seconds(frozen, where, todo) <= seconds(graph, where, todo) * (1 + 2e-9)


@pytest.mark.slow
@pytest.mark.heavy
@settings(max_examples=portion(12))
@given(any_worlds(), st.data())
def test_plans_for_frozen_models_are_legal_and_above_their_bounds(world, data):
    graph, where, todo = world
    layers = data.draw(st.sets(st.integers(0, len(graph.layers) - 1)))
    check_legal((freeze(graph, layers, tied=data.draw(st.booleans())), where, todo))


def test_what_fits_frozen_does_not_fit_trained():
    """40 million parameters of fp32: 640 MB with Adam's states, 160 MB without."""
    graph, where, todo = model([10.0] * 4, parameters=40_000_000), cluster(("fast",)), job(2)
    held = {layer.frozen_parameters for layer in freeze(graph, range(3)).layers}
    assert held == {0, 40_000_000}
    small = find_plan(freeze(graph, range(3)), where, todo).prediction.memory[0]
    assert small.parameters == 4 * 160_000_000
    assert small.gradients == 4 * 40_000_000
    try:
        large = total_bytes(find_plan(graph, where, todo).prediction.memory[0])
    except FitError:
        return
    assert total_bytes(small) <= large - 12 * 120_000_000


@pytest.mark.slow
@settings(max_examples=tenth(500))
@given(small_worlds(TINY), st.data())
def test_freezing_never_makes_the_best_plan_slower_in_many_cases(world, data):
    graph, where, todo = world
    layers = data.draw(st.sets(st.integers(0, len(graph.layers) - 1)))
    frozen = freeze(graph, layers, tied=data.draw(st.booleans()))
    assert seconds(frozen, where, todo) <= seconds(graph, where, todo) * (1 + 2e-9)
