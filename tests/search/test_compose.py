"""Pools, the shapes that are made of them, and the pipelines of these shapes."""

from itertools import pairwise

import pytest

from meshwright.search.costs import costs_of
from meshwright.search.layer_partition import fit_pipeline
from meshwright.search.pool_pipelines import (
    PoolStages,
    blocks,
    by_build,
    drafts,
    orders,
    pool_table,
    pools,
    single_pipelines,
    two_ways,
    written,
)
from meshwright.search.space import legal_widths
from worlds import cluster, job, model

WHERE = cluster(("fast",) * 4, ("fast",) * 4, ("slow",) * 2)
COSTS = costs_of(model([10.0, 5.0, 40.0, 10.0, 10.0, 20.0]), WHERE, job(24))


def used(stages):
    return [name for units in stages for unit in units for name in unit]


def test_a_pool_is_what_is_interchangeable():
    table = pool_table(COSTS, (1, 2, 4))
    assert [{t: len(p.groups) for t, p in widths.items()} for widths in table] == [
        {1: 8, 2: 4, 4: 2},
        {1: 2, 2: 1},
    ]
    assert all(len({n.split(":")[0] for n in u}) == 1 for u in table[0][4].groups)
    fastest = pools(COSTS, 1)
    assert [len(pool.groups) for pool in fastest] == [8, 2]
    assert fastest[0].pace < fastest[1].pace
    assert [len(pool.groups) for pool in pools(COSTS, 4)] == [2]


def test_drafts_are_sorted_have_enough_rows_and_every_tensor_width():
    table = pool_table(COSTS, (1, 2, 4))
    found = drafts(COSTS, table, 24, (1, 2, 6, 24))
    assert all(a.guess <= b.guess for a, b in pairwise(found))
    assert all(draft.rows >= max(draft.shape.widths) for draft in found)
    assert all(sum(draft.shape.depths) <= 6 for draft in found)
    widths = {tuple(pool.tensor for pool in draft.shape.pools) for draft in found}
    assert {(1, 1), (4, 1), (4, 2), (2, 1)} <= widths
    assert any(draft.shape.mixed for draft in found)


def test_a_guess_is_close_for_a_balanced_line():
    (widths,) = pool_table(costs_of(model([10.0] * 8), cluster(("fast",) * 4), job(24)), (1,))
    costs = costs_of(model([10.0] * 8), cluster(("fast",) * 4), job(24))
    for draft in drafts(costs, [widths], 24, (1, 2)):
        stages = written(draft.shape, across=False)
        fitted = fit_pipeline(costs, stages, draft.rows, 24 // draft.rows, "1f1b")
        if draft.shape.depths == (4,):
            seconds = fitted.once + (24 // draft.rows - 1) * fitted.slowest
            assert draft.guess == pytest.approx(seconds, rel=0.05)


def test_builds_take_turns():
    found = by_build(drafts(COSTS, pool_table(COSTS, (1, 2)), 24, (2, 6)))
    builds = [draft.build for draft in found]
    number = len(set(builds))
    assert len(set(builds[:number])) == number
    assert len(found) == len(drafts(COSTS, pool_table(COSTS, (1, 2)), 24, (2, 6)))


def test_a_shape_is_written_without_using_a_device_twice():
    fast, slow = pools(COSTS, 1)
    for shape in (
        PoolStages((fast, slow), (2, 1)),
        PoolStages((slow, fast), (2, 3)),
        PoolStages((fast, slow), (5,)),
    ):
        for across in (False, True):
            stages = written(shape, across=across)
            assert len(stages) == sum(shape.depths)
            assert len(used(stages)) == len(set(used(stages)))
    beside = written(PoolStages((fast,), (2,)), across=False)
    across = written(PoolStages((fast,), (2,)), across=True)
    assert {name[0] for name in used(beside[:1])} == {"a"}
    assert {name[0] for name in used(across[:1])} == {"a", "b"}
    assert two_ways(PoolStages((fast,), (2,)))
    assert not two_ways(PoolStages((fast,), (8,)))


def test_pools_stand_in_every_order():
    fast, slow = pools(COSTS, 1)
    found = list(orders(PoolStages((fast, slow), (4, 1))))
    assert [(s.pools, s.depths) for s in found] == [((fast, slow), (4, 1)), ((slow, fast), (1, 4))]
    assert list(orders(PoolStages((fast, slow), (3,)))) == [PoolStages((fast, slow), (3,))]


def test_blocks_of_few_pools_are_all_there_are():
    table = pool_table(COSTS, (1,))
    assert [len(block) for block in blocks(table)] == [2, 1, 1]
    many = cluster(*((kind,) * n for kind in ("fast", "slow") for n in (1, 2, 3)))
    costs = costs_of(model([10.0] * 4), many, job(8))
    table = pool_table(costs, (1,))
    found = list(blocks(table))
    assert len(table) == 6
    assert len(found[0]) == 6
    assert all([one] != two for one, two in pairwise(found))
    assert {len(block) for block in found} >= {1, 2, 3, 4, 5, 6}


def test_legal_widths_divide_every_layer_and_fit_a_node():
    assert legal_widths(COSTS) == (1, 2, 4)
    odd = costs_of(model([10.0] * 3, units=3), WHERE, job(8))
    assert legal_widths(odd) == (1, 3)


def test_lines_hold_the_whole_batch():
    single = [lines for lines in single_pipelines(COSTS, lambda: float("inf")) if lines]
    assert single
    assert all(line.share == 24 for (line,) in single)
    tensors = {tuple(len(t.groups[0]) for t in line.stages) for (line,) in single}
    assert any(len(set(widths)) > 1 for widths in tensors)


def test_nothing_is_composed_above_the_limit():
    assert list(single_pipelines(COSTS, lambda: 0.0)) == []
