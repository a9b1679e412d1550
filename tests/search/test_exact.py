"""On small inputs the plan found is the best there is: every plan is simulated to check."""

import pytest
from bruteforce import least_seconds
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from searchworlds import cluster, device, job, model

from meshwright.cluster.spec import Link
from meshwright.errors import FitError
from meshwright.search.certificate import EXHAUSTIVE, certificate
from meshwright.search.costs import costs_of
from meshwright.search.planner import find_plan

SIZES = {1: (6, 8), 2: (6, 5), 3: (6, 3), 4: (6, 2)}
"""Devices: most layers, most rows that brute force can get through in about a second."""


@st.composite
def small_worlds(draw, sizes=SIZES):
    """Up to four devices of two types in one to three nodes."""
    count = draw(st.sampled_from(sorted(sizes)))
    most_layers, most_rows = sizes[count]
    kinds = draw(st.lists(st.sampled_from(["fast", "slow"]), min_size=count, max_size=count))
    first, second = sorted(draw(st.tuples(st.integers(1, count), st.integers(1, count))))
    nodes = [tuple(kinds[a:b]) for a, b in ((0, first), (first, second), (second, count)) if b > a]
    memory = draw(st.sampled_from([1.15, 1.3, 16.0]))
    types = (
        device("fast", draw(st.sampled_from([10.0, 20.0, 35.0])), memory),
        device("slow", 10.0, draw(st.sampled_from([memory, 16.0]))),
    )
    network = Link(
        bandwidth=draw(st.sampled_from([1e7, 1e9, 1e11])),
        latency=draw(st.sampled_from([0.0, 1e-5, 1e-3])),
        shared=draw(st.booleans()),
    )
    layers = draw(st.lists(st.sampled_from([5.0, 10.0, 40.0]), min_size=1, max_size=most_layers))
    graph = model(
        layers,
        parameters=draw(st.sampled_from([1000, 1_000_000, 10_000_000])),
        tied=draw(st.booleans()),
        units=draw(st.sampled_from([0, 1, 2, 4])),
    )
    where = cluster(*nodes, network=network, types=types)
    return graph, where, job(draw(st.integers(1, most_rows)))


def check_exact(world):
    graph, where, todo = world
    best, _ = least_seconds(graph, where, todo)
    if best is None:
        with pytest.raises(FitError):
            find_plan(graph, where, todo)
        return
    found = find_plan(graph, where, todo).prediction
    assert found.step_seconds == pytest.approx(best, rel=2e-9)
    assert found.bound_reason == EXHAUSTIVE
    bound = certificate(costs_of(graph, where, todo))
    assert bound.seconds <= best * (1 + 1e-12)


@settings(max_examples=20)
@given(small_worlds({1: (6, 6), 2: (5, 3), 3: (3, 2)}))
def test_the_plan_found_is_the_best_of_all(world):
    check_exact(world)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@seed(1)
@settings(max_examples=300, database=None)
@given(small_worlds())
def test_the_plan_found_is_the_best_of_all_in_hundreds_of_cases(world):
    check_exact(world)
