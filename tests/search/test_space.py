"""The space holds every legal strategy, and counts what it leaves out."""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.spec import devices_of
from meshwright.search.costs import costs_of
from meshwright.search.space import (
    Grid,
    device_sets,
    fewer_devices,
    grids,
    shapes,
    usable_devices,
)
from worlds import cluster, job, model

SPEED = {"fast": 2.0, "slow": 1.0}


@given(st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 24), st.integers(1, 9))
def test_grids_are_all_and_only_the_legal_ones(nodes, per_node, batch, layers):
    where = cluster(*[("fast",) * per_node] * nodes)
    graph, count = model([1.0] * layers, units=4), nodes * per_node
    expected = {
        Grid(data=d, tensor=t, stages=s)
        for d in range(1, count + 1)
        for t in range(1, count + 1)
        for s in range(1, count + 1)
        if d * t * s == count
        and per_node % t == 0
        and 4 % t == 0
        and batch % d == 0
        and s <= layers
    }
    dropped = Counter()
    found = grids(devices_of(where), graph, job(batch), dropped)
    assert set(found) == expected
    assert len(found) == len(expected)


def test_what_is_impossible_is_counted_by_reason():
    dropped = Counter()
    grids(devices_of(cluster(("fast",) * 3, ("fast",) * 3)), model([1.0, 1.0]), job(4), dropped)
    assert dropped == {
        "tensor width does not divide a node's devices": 2,
        "tensor width does not divide the layers": 1,
        "data width does not divide the batch": 2,
        "more stages than layers": 2,
    }


@given(st.sampled_from([1, 2, 4]), st.integers(1, 12))
def test_micro_batches_work_through_the_whole_batch(data, share):
    grid, batch = Grid(data=data, tensor=1, stages=2), data * share
    found = list(shapes(grid, job(batch), ("1f1b", "gpipe")))
    assert all(s.rows * s.micro_batches * data == batch for s in found)
    sizes = {s.rows for s in found}
    assert sizes == {r for r in range(1, share + 1) if share % r == 0}


def test_a_schedule_is_chosen_only_where_it_matters():
    one_stage = shapes(Grid(data=2, tensor=1, stages=1), job(8), ("1f1b", "gpipe"))
    assert {s.schedule for s in one_stage} == {"1f1b"}
    found = list(shapes(Grid(data=2, tensor=1, stages=2), job(8), ("1f1b", "gpipe")))
    assert [s.schedule for s in found if s.micro_batches == 1] == ["1f1b"]
    assert sorted(s.schedule for s in found if s.micro_batches == 4) == ["1f1b", "gpipe"]


def test_slow_types_and_slow_nodes_may_be_left_out():
    where = cluster(("fast", "fast"), ("fast", "slow"), ("slow", "slow"))
    found = {
        s.without: "".join(d.type[0] for d in s.devices)
        for s in device_sets(devices_of(where), SPEED)
    }
    assert found == {
        "": "fffsss",
        "slow": "fff",
        "all but slow": "sss",
        "c": "fffs",
        "c and 1 more nodes": "ff",
    }


def test_device_sets_differ_and_never_are_empty():
    found = device_sets(devices_of(cluster(("fast",), ("slow",), ("slow",))), SPEED)
    assert len({s.devices for s in found}) == len(found)
    assert all(s.devices for s in found)


def test_fewer_devices_gives_up_the_slowest_first():
    found = list(fewer_devices(devices_of(cluster(("slow", "fast", "fast"))), SPEED))
    assert [[d.name for d in s.devices] for s in found] == [["a:1", "a:2"], ["a:1"]]
    assert [s.without for s in found] == ["1 device", "2 devices"]


def test_devices_without_the_precision_are_not_usable():
    graph, where = model([10.0]), cluster(("fast",))
    assert usable_devices(costs_of(graph, where, job())) != ()
    assert usable_devices(costs_of(graph, where, replace(job(), precision="bf16"))) == ()
