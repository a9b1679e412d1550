"""What strategies are made of: usable devices, and rows of them."""

from dataclasses import replace

from meshwright.search.costs import costs_of
from meshwright.search.space import (
    MOST_ROWS_OF_FEWER,
    rows_by_type,
    rows_in_order,
    usable_devices,
)
from worlds import cluster, job, model


def kinds(costs, row):
    return "".join(costs.devices[group[0]].type[0] for group in row)


def test_rows_by_type_have_every_set_of_types_in_every_order():
    where = cluster(("fast", "slow"), ("slow", "fast"))
    costs = costs_of(model([10.0], units=1), where, job())
    assert [kinds(costs, row) for row in rows_by_type(costs)] == ["ffss", "ssff", "ff", "ss"]


def test_rows_in_order_leave_the_slowest_nodes_out():
    """Of equal nodes the last one goes first."""
    where = cluster(("fast",), ("slow",), ("slow",), ("fast", "fast"))
    costs = costs_of(model([10.0], units=1), where, job())
    found = [" ".join(group[0] for group in row) for row in rows_in_order(costs)]
    assert found == ["a:0 b:0 c:0 d:0 d:1", "a:0 b:0 d:0 d:1", "a:0 d:0 d:1", "d:0 d:1"]


def test_of_many_nodes_few_numbers_are_left_out():
    where = cluster(*[("fast",)] * 40, names=[f"n{i}" for i in range(40)])
    found = [len(row) for row in rows_in_order(costs_of(model([10.0]), where, job()))]
    assert len(set(found)) == len(found) <= 1 + MOST_ROWS_OF_FEWER
    assert found[0] == 40
    assert min(found) < 10


def test_tensor_groups_of_a_row_stay_inside_nodes_and_types():
    where = cluster(("fast",) * 3, ("slow", "fast", "slow"))
    costs = costs_of(model([10.0], units=2), where, job())
    wide = [row for row in rows_in_order(costs) if row and len(row[0]) == 2]
    assert wide[0] == (("a:0", "a:1"), ("b:0", "b:2"))


def test_devices_without_the_precision_are_not_usable():
    graph, where = model([10.0]), cluster(("fast",))
    assert usable_devices(costs_of(graph, where, job())) != ()
    assert usable_devices(costs_of(graph, where, replace(job(), precision="bf16"))) == ()
