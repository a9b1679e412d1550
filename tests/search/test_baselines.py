"""Hand-made plans and AMP's choice, as candidates."""

import pytest

from meshwright.cluster.spec import devices_of
from meshwright.search.baselines import amp_ranking, blocks, ddp, even, even_bounds
from meshwright.search.costs import costs_of, group_times
from meshwright.search.space import DeviceSet
from worlds import cluster, job, model


def setting(gflops, *nodes, batch=8, **options):
    where = cluster(*nodes)
    costs = costs_of(model(gflops, **options), where, job(batch))
    return costs, DeviceSet(devices=devices_of(where))


def test_blocks_are_the_commonest_layers():
    costs, _ = setting([1.0, *[5.0] * 6, 9.0, 2.0], ("fast",))
    assert blocks(costs) == (1, 7)
    assert blocks(setting([1.0, 2.0, 3.0], ("fast",))[0]) == (0, 3)


@pytest.mark.parametrize(
    ("stages", "bounds"),
    [(1, (0, 9)), (2, (0, 4, 9)), (4, (0, 3, 5, 6, 9)), (6, (0, 2, 3, 4, 5, 6, 9)), (7, None)],
)
def test_even_cuts_share_out_the_blocks(stages, bounds):
    costs, _ = setting([1.0, *[5.0] * 6, 9.0, 2.0], ("fast",))
    assert even_bounds(costs, stages) == bounds


def test_ddp_is_one_replica_a_device_at_every_micro_batch():
    found = ddp(*setting([1.0] * 4, ("fast",) * 2, ("slow",) * 2))
    assert {(c.shape.grid.data, c.shape.grid.tensor, c.shape.grid.stages) for c in found} == {
        (4, 1, 1)
    }
    assert [(c.shape.rows, c.shape.micro_batches) for c in found] == [(1, 2), (2, 1)]


def test_ddp_needs_a_batch_that_can_be_shared_out():
    assert ddp(*setting([1.0] * 4, ("fast",) * 3)) == []


def test_even_covers_every_grid_in_rank_order():
    found = even(*setting([1.0] * 4, ("fast",) * 2, ("slow",) * 2))
    assert {(c.shape.grid.data, c.shape.grid.tensor, c.shape.grid.stages) for c in found} == {
        (4, 1, 1),
        (2, 1, 2),
        (1, 1, 4),
        (2, 2, 1),
        (1, 2, 2),
    }
    assert {c.placement.name for c in found} == {"in order"}


def test_amp_ranks_the_whole_space_by_the_average_device():
    """AMP gives both stages as many layers: it does not see that one of them is slower."""
    costs, used = setting([100.0] * 8, ("fast",), ("slow",), batch=32)
    ranking = amp_ranking(costs, used)
    assert len(ranking) == 5 + 6
    piped = next(c for c in ranking if c.shape.grid.stages == 2 and c.shape.micro_batches > 1)
    assert piped.fixed == (0, 4, 8)
    assert group_times(costs, ("a:0",), 1)[0].sum() * 2 == pytest.approx(
        group_times(costs, ("b:0",), 1)[0].sum()
    )


def test_amp_cannot_express_unequal_nodes():
    assert amp_ranking(*setting([1.0] * 4, ("fast",) * 2, ("slow",))) == []
