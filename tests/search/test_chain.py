"""Rows of devices cut into stages: nothing is lost, and no other cut of the row is better."""

from itertools import islice, pairwise
from random import Random

from meshwright.search.chain_partition import chains, cut_chain
from meshwright.search.costs import costs_of
from meshwright.search.layer_partition import fit_pipeline
from worlds import cluster, job, model

WHERE = cluster(("fast",) * 2, ("slow",) * 2)
GROUPS = (("a:0",), ("a:1",), ("b:0",), ("b:1",))


def costs():
    return costs_of(model([10.0, 5.0, 40.0, 10.0, 10.0, 20.0]), WHERE, job(24))


def groupings(units):
    for chosen in range(1 << (len(units) - 1)):
        ends = [i + 1 for i in range(len(units) - 1) if chosen >> i & 1]
        yield tuple(units[a:b] for a, b in pairwise([0, *ends, len(units)]))


def test_every_number_of_stages_is_offered_once_and_no_unit_is_lost():
    found = list(cut_chain(costs(), GROUPS, 4, 6))
    assert sorted(len(stages) for _, stages in found) == [1, 2, 3, 4]
    assert [seconds for seconds, _ in found] == sorted(seconds for seconds, _ in found)
    for _, stages in found:
        assert tuple(unit for stage in stages for unit in stage) == GROUPS


def test_fewer_rows_than_replicas_forbid_a_stage():
    assert all(
        len(stage) == 1 for _, stages in cut_chain(costs(), GROUPS, 1, 6) for stage in stages
    )


def test_the_best_pipeline_of_a_row_is_not_far_from_what_is_offered():
    priced = costs()

    def seconds(stages):
        fitted = fit_pipeline(priced, stages, 4, 6, "1f1b")
        return fitted.once + 5 * fitted.slowest

    offered = min(seconds(stages) for _, stages in cut_chain(priced, GROUPS, 4, 6))
    assert offered <= 1.05 * min(seconds(stages) for stages in groupings(GROUPS))


def test_the_same_seed_draws_the_same_strategies_which_hold_all_rows():
    once, again = (list(islice(chains(costs(), Random(3)), 120)) for _ in range(2))
    assert once == again
    for steps, strategies in once:
        assert steps > 0
        for _, lines in strategies:
            assert sum(line.share for line in lines) == 24
