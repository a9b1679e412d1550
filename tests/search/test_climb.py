"""Climbs: never downhill, within their allowance."""

import pytest

from meshwright.search.climb import Scout, around, climb, rate
from meshwright.search.contest import Contest
from meshwright.search.costs import costs_of
from meshwright.search.fitting import fit_line
from meshwright.search.preview import preview_seconds
from worlds import cluster, job, model

WHERE = cluster(("fast",) * 2, ("slow",) * 2)


def scouted(left, schedules=("1f1b", "gpipe")):
    costs = costs_of(model([10.0, 5.0, 40.0, 10.0, 10.0, 20.0]), WHERE, job(24))
    line = fit_line(costs, ((("a:0",),), (("b:0",),)), 12, 2, "1f1b").line
    return Scout(Contest(costs, ""), schedules, left), ("1f1b", (line,))


def test_a_climb_ends_where_no_change_helps():
    scout, start = scouted(10_000_000)
    summit = climb(scout, start)
    assert rate(scout, summit) < 0.7 * rate(scout, start)
    assert around(scout, summit, rate(scout, summit) * (1 - 1e-6)) == []


def test_an_allowance_ends_it_earlier_with_the_best_so_far():
    scout, start = scouted(2_000)
    known = len(scout.known)
    summit = climb(scout, start)
    assert rate(scout, summit) <= rate(scout, start)
    assert len(scout.known) < known + 12


def test_schedules_that_are_not_wanted_are_never_taken():
    scout, start = scouted(10_000_000, ("1f1b",))
    assert climb(scout, start)[0] == "1f1b"
    assert rate(scout, ("gpipe", start[1])) == float("inf")


def test_a_rating_below_its_limit_is_final_and_a_bound_is_not():
    scout, start = scouted(10_000_000)
    costs = scout.contest.costs
    seconds = preview_seconds(costs, start[1], "1f1b")
    bound = rate(scout, start, 0.1 * seconds)
    assert bound <= seconds
    assert rate(scout, start) == pytest.approx(seconds, rel=1e-12)
    left = scout.left
    assert rate(scout, start, 0.5 * seconds) == rate(scout, start)
    assert scout.left == left
