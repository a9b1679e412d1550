"""Climbs: never downhill, within their allowance."""

from dataclasses import replace

import pytest

from meshwright.search.candidate_estimate import candidate_seconds
from meshwright.search.costs import costs_of
from meshwright.search.hill_climb import LocalSearch, around, climb, rate
from meshwright.search.incumbent import Incumbent
from meshwright.search.layer_partition import fit_pipeline
from worlds import cluster, job, model

WHERE = cluster(("fast",) * 2, ("slow",) * 2)


def scouted(left, schedules=("1f1b", "gpipe"), *, any_order=False):
    costs = costs_of(model([10.0, 5.0, 40.0, 10.0, 10.0, 20.0]), WHERE, job(24))
    line = fit_pipeline(costs, ((("a:0",),), (("b:0",),)), 12, 2, "1f1b").pipeline
    incumbent = Incumbent(costs, "", any_order=any_order)
    return LocalSearch(incumbent, schedules, left), ("1f1b", (line,))


@pytest.mark.parametrize("any_order", [False, True])
def test_a_climb_ends_where_no_change_helps(any_order):
    search, start = scouted(10_000_000, any_order=any_order)
    optimum = climb(search, start)
    assert rate(search, optimum) < 0.7 * rate(search, start)
    assert around(search, optimum, rate(search, optimum) * (1 - 1e-6)) == []


def test_an_allowance_ends_it_earlier_with_the_best_so_far():
    search, start = scouted(2_000)
    known = len(search.known)
    optimum = climb(search, start)
    assert rate(search, optimum) <= rate(search, start)
    assert len(search.known) < known + 12


def test_schedules_that_are_not_wanted_are_never_taken():
    search, start = scouted(10_000_000, ("1f1b",))
    assert climb(search, start)[0] == "1f1b"
    assert rate(search, ("gpipe", start[1])) == float("inf")


def test_where_orders_may_be_made_all_strategies_are_rated_in_the_best_one():
    """The schedule says nothing then: a second strategy with another one would be the same."""
    search, start = scouted(10_000_000, any_order=True)
    seconds = candidate_seconds(search.incumbent.costs, start[1], "best")
    assert rate(search, start) == seconds
    assert seconds <= candidate_seconds(search.incumbent.costs, start[1], "1f1b")
    assert rate(search, ("gpipe", start[1])) == float("inf")


def test_a_rating_below_its_limit_is_final_and_a_bound_is_not():
    search, start = scouted(10_000_000)
    costs = search.incumbent.costs
    seconds = candidate_seconds(costs, start[1], "1f1b")
    bound = rate(search, start, 0.1 * seconds)
    assert bound <= seconds
    assert rate(search, start) == pytest.approx(seconds, rel=1e-12)
    left = search.left
    assert rate(search, start, 0.5 * seconds) == rate(search, start)
    assert search.left == left


def test_of_equally_balanced_cuts_one_with_lighter_ends_is_climbed_to():
    """Eight stages, 24 equal layers and a dear head, a table tied to both ends: some stage has to
    take four layers, but the first one, which has the table to reduce, had better take few."""
    where = cluster(("fast",) * 8, ("fast",) * 8)
    where = replace(where, nodes=tuple(replace(n, inside=n.network) for n in where.nodes))
    graph = model([1e-6, *[100.0] * 24, 200.0], parameters=12_000_000, tied=True)
    graph = replace(graph, tied=(replace(graph.tied[0], parameters=50_000_000),))
    costs = costs_of(graph, where, job(32))
    names = list(costs.devices)
    stages = tuple(((names[s],), (names[s + 1],)) for s in range(0, 16, 2))
    balanced = fit_pipeline(costs, stages, 2, 16, "1f1b").pipeline
    heavy = replace(balanced, bounds=(0, 5, 8, 11, 14, 17, 20, 23, 26))
    search = LocalSearch(Incumbent(costs, ""), ("1f1b",), 200_000)
    start = ("1f1b", (heavy,))
    found = climb(search, start)
    assert found[1][0].bounds[1] < heavy.bounds[1]
    assert rate(search, found) < 0.95 * rate(search, start)
