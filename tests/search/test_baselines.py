"""Hand-made plans and AMP's choice, as candidates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.search.baselines import (
    amp_ranking,
    best_by_hand,
    blocks,
    ddp,
    even,
    even_bounds,
    in_rank_order,
)
from meshwright.search.candidate import excess_bytes
from meshwright.search.costs import costs_of, group_times
from plain_constants import PLAINLY
from worlds import cluster, device, job, model


def setting(gflops, *nodes, batch=8, **options):
    where = cluster(*nodes)
    return costs_of(model(gflops, **options), where, job(batch), PLAINLY)


def widths(pipeline):
    groups = pipeline.stages[0].groups
    return len(groups), len(groups[0]), len(pipeline.stages)


def test_blocks_are_the_commonest_layers():
    costs = setting([1.0, *[5.0] * 6, 9.0, 2.0], ("fast",))
    assert blocks(costs) == (1, 7)
    assert blocks(setting([1.0, 2.0, 3.0], ("fast",))) == (0, 3)


@pytest.mark.parametrize(
    ("stages", "bounds"),
    [(1, (0, 9)), (2, (0, 4, 9)), (4, (0, 3, 5, 6, 9)), (6, (0, 2, 3, 4, 5, 6, 9)), (7, None)],
)
def test_even_cuts_share_out_the_blocks(stages, bounds):
    costs = setting([1.0, *[5.0] * 6, 9.0, 2.0], ("fast",))
    assert even_bounds(costs, stages) == bounds


def test_ddp_is_one_replica_a_device_at_every_micro_batch():
    found = ddp(setting([1.0] * 4, ("fast",) * 2, ("slow",) * 2))
    assert {widths(each) for each in found} == {(4, 1, 1)}
    assert [(each.stages[0].rows, each.micro_batches) for each in found] == [
        ((1, 1, 1, 1), 2),
        ((2, 2, 2, 2), 1),
    ]


def test_ddp_needs_a_batch_that_can_be_shared_out():
    assert ddp(setting([1.0] * 4, ("fast",) * 3)) == []


@given(st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 24), st.integers(1, 9))
def test_even_covers_all_and_only_the_legal_grids_in_rank_order(nodes, per_node, batch, layers):
    costs = setting([1.0] * layers, *[("fast",) * per_node] * nodes, batch=batch, units=4)
    count = nodes * per_node
    expected = {
        (d, t, s, batch // d // rows)
        for d in range(1, count + 1)
        for t in range(1, count + 1)
        for s in range(1, layers + 1)
        if d * t * s == count and per_node % t == 0 and 4 % t == 0 and batch % d == 0
        for rows in range(1, batch // d + 1)
        if batch // d % rows == 0
    }
    found = even(costs)
    assert {(*widths(each), each.micro_batches) for each in found} == expected
    assert len(found) == len(expected)
    assert all(each.devices == list(costs.devices) for each in found)
    assert all(each.share == batch for each in found)


def test_ranks_count_tensor_ranks_first_then_replicas_then_stages():
    names = [str(rank) for rank in range(8)]
    assert in_rank_order(names, (2, 2, 2)) == (
        (("0", "1"), ("2", "3")),
        (("4", "5"), ("6", "7")),
    )


@pytest.mark.parametrize(("memory", "fits"), [(1.2, False), (1.4, True)])
def test_given_cuts_are_kept_and_weighed(memory, fits):
    """160 MB of states a layer; the device has room for one layer, or two."""
    types = (device("fast", memory_gib=memory),)
    where = cluster(("fast",) * 2, types=types)
    graph = model([10.0] * 4, parameters=10_000_000, units=1)
    costs = costs_of(graph, where, job(4))
    found = best_by_hand(costs, "even")
    assert found.pipeline.bounds == (0, 2, 4)
    assert found.fits == fits == (excess_bytes(costs, found.pipeline, "1f1b") <= 0)


def test_amp_ranks_the_whole_space_by_the_average_device():
    """AMP gives both stages as many layers: it does not see that one of them is slower."""
    costs = setting([100.0] * 8, ("fast",), ("slow",), batch=32)
    ranking = amp_ranking(costs)
    assert len(ranking) == 5 + 6
    piped = next(each for each in ranking if len(each.stages) == 2 and each.micro_batches > 1)
    assert piped.bounds == (0, 4, 8)
    assert group_times(costs, ("a:0",), 1)[0].sum() * 2 == pytest.approx(
        group_times(costs, ("b:0",), 1)[0].sum()
    )


def test_amp_cannot_express_unequal_nodes():
    assert amp_ranking(setting([1.0] * 4, ("fast",) * 2, ("slow",))) == []
