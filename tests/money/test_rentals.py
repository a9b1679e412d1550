"""Which devices could be rented: every count of interchangeable nodes, each once."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prices import priced

from meshwright.cluster.spec import Cluster, DirectLink, Link, devices_of
from meshwright.money.outcomes import cluster_prices
from meshwright.money.rentals import (
    MOST_RENTALS,
    every_choice,
    node_classes,
    rentals,
    rented_cluster,
    rented_devices,
    used_counts,
    within,
)
from worlds import cluster

PRICES = priced(fast=2.0, slow=1.0)
QUICK = Link(bandwidth=1e10, latency=1e-6)


def classes_of(where: Cluster, prices=PRICES):
    return node_classes(where, cluster_prices(prices, where), "fp32")


def grouped(where: Cluster, prices=PRICES) -> list[list[str]]:
    return [[node.name for node in each.nodes] for each in classes_of(where, prices)]


def rented(where: Cluster, prices=PRICES) -> set[tuple[str, ...]]:
    found = classes_of(where, prices)
    here = cluster_prices(prices, where)
    return {rented_devices(found, counts) for counts in rentals(found, here)}


def test_nodes_are_alike_in_devices_links_and_price():
    where = cluster(("fast",), ("slow",), ("slow",), ("slow", "slow"), ("fast",))
    assert grouped(where) == [["a", "e"], ["b", "c"], ["d"]]
    assert grouped(where, priced({"c": 9.0}, fast=2.0, slow=1.0)) == [
        ["a", "e"], ["b"], ["c"], ["d"],
    ]  # fmt: skip
    slow = replace(where.nodes[4], network=QUICK)
    assert grouped(replace(where, nodes=(*where.nodes[:4], slow))) == [
        ["a"], ["b", "c"], ["d"], ["e"],
    ]  # fmt: skip


def test_an_explicit_link_tells_nodes_apart_unless_all_have_it():
    where = cluster(*[("slow",)] * 4)
    pairs = [DirectLink(between=pair, link=QUICK) for pair in combinations("abcd", 2)]
    assert grouped(replace(where, direct=tuple(pairs))) == [["a", "b", "c", "d"]]
    one = (DirectLink(between=("a", "b"), link=QUICK),)
    assert grouped(replace(where, direct=one)) == [["a", "b"], ["c", "d"]]
    two = (*one, DirectLink(between=("c", "d"), link=QUICK))
    assert len(classes_of(replace(where, direct=two))) == 2
    star = tuple(DirectLink(between=("a", other), link=QUICK) for other in "bcd")
    assert grouped(replace(where, direct=star)) == [["a"], ["b", "c", "d"]]


def test_two_pairs_with_a_cable_each_are_four_nodes_of_two_kinds_at_most():
    """Any two of them are not any other two: a pair with its cable is not one without."""
    where = cluster(*[("slow",)] * 4)
    cables = tuple(DirectLink(between=pair, link=QUICK) for pair in (("a", "b"), ("c", "d")))
    choices = rented(replace(where, direct=cables))
    assert {("a:0", "b:0"), ("a:0", "c:0")} <= choices


def test_every_count_of_few_nodes_and_parts_of_one():
    where = cluster(("fast",) * 4, ("slow",), ("slow",))
    assert rented(where) == {
        ("a:0", "a:1", "a:2", "a:3", "b:0", "c:0"), ("a:0", "a:1", "a:2", "a:3", "b:0"),
        ("a:0", "a:1", "a:2", "a:3"), ("b:0", "c:0"), ("b:0",), ("a:0",), ("a:0", "a:1"),
    }  # fmt: skip
    assert every_choice(classes_of(where)) == 5


def test_a_node_that_is_priced_whole_or_mixed_is_rented_whole():
    whole = priced({"a": 5.0}, fast=2.0, slow=1.0)
    assert ("a:0",) not in rented(cluster(("fast",) * 4, ("slow",)), whole)
    assert rented(cluster(("fast", "slow"))) == {("a:0", "a:1")}


def test_nodes_that_do_not_offer_the_precision_are_no_choice():
    where = cluster(("fast",), ("slow",))
    none = replace(where.types["slow"], peak={"fp64": 1e12})
    assert grouped(replace(where, types={**where.types, "slow": none})) == [["a"]]


@pytest.mark.parametrize("nodes", [1, 5, 40, 3000])
@pytest.mark.parametrize("kinds", [1, 2, 3, 6, 7, 12, 50])
def test_many_nodes_and_many_kinds_stay_few_rentals(nodes, kinds):
    if nodes * kinds > 6000:
        nodes = 6000 // kinds
    where = cluster(("slow",))
    node = where.nodes[0]
    many = tuple(
        replace(node, name=f"{kind}-{index}", network=Link(bandwidth=1e9 + kind))
        for kind in range(kinds)
        for index in range(nodes)
    )
    where = replace(where, nodes=many)
    found = classes_of(where)
    assert len(found) == kinds
    every = rentals(found, cluster_prices(PRICES, where))
    assert len(every) <= 2 * MOST_RENTALS + 6 * kinds
    assert every[0] == tuple(each.each * len(each.nodes) for each in found)
    assert len(set(every)) == len(every)
    assert all(any(counts) for counts in every)
    for index in range(kinds):
        assert any(sum(map(bool, counts)) == 1 and counts[index] for counts in every)


def test_of_many_nodes_powers_of_two_are_combined_and_few_are_rented_alone():
    where = cluster(("slow",))
    node = where.nodes[0]
    many = tuple(
        replace(node, name=f"{kind}-{index}", network=Link(bandwidth=1e9 + kind))
        for kind in range(3)
        for index in range(600)
    )
    where = replace(where, nodes=many)
    every = rentals(classes_of(where), cluster_prices(PRICES, where))
    numbers = sorted({counts[0] for counts in every})
    assert numbers == [0, 1, 4, 16, 32, 64, 256, 600]
    assert {counts[0] for counts in every if counts[1]} == {0, 1, 32, 600}


clusters = st.lists(
    st.lists(st.sampled_from(["fast", "slow"]), min_size=1, max_size=3).map(tuple),
    min_size=1,
    max_size=4,
).map(lambda nodes: cluster(*nodes))


@given(clusters)
def test_every_set_of_nodes_is_a_rental_up_to_names(where):
    found = classes_of(where)
    every = set(rentals(found, cluster_prices(PRICES, where)))
    names = [node.name for node in where.nodes]
    for number in range(1, len(names) + 1):
        for some in combinations(names, number):
            used = [d.name for d in devices_of(where) if d.node in some]
            assert used_counts(found, used) in every


@given(clusters, st.data())
def test_a_rented_cluster_has_its_devices_by_their_names(where, data):
    found = classes_of(where)
    every = rentals(found, cluster_prices(PRICES, where))
    counts = data.draw(st.sampled_from(every))
    devices = rented_devices(found, counts)
    left = rented_cluster(where, devices)
    assert {device.name for device in devices_of(left)} == set(devices)
    assert used_counts(found, devices) == counts
    kinds = {device.name: device.type for device in devices_of(where)}
    assert all(kinds[device.name] == device.type for device in devices_of(left))
    assert within(counts, every[0])
    assert len(devices) == sum(counts)
