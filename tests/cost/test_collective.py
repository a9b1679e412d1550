"""Communication costs: textbook formulas, sharing, and what must never happen."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.spec import Cluster, Link, Node, Site
from meshwright.cluster.topology import topology
from meshwright.cost.collective import (
    Traffic,
    all_gather,
    all_reduce,
    broadcast,
    concurrent,
    reduce_scatter,
    transfer,
    uncontended_seconds,
)
from meshwright.cost.links import with_measured_links
from meshwright.cost.profile import LinkTimes
from meshwright.report.resources import resource_name

COLLECTIVES = (all_reduce, all_gather, reduce_scatter, broadcast)


def cluster(nodes: int, devices: int, inside: Link, network: Link, uplink: Link | None = None):
    return Cluster(
        name="c",
        types={},
        nodes=tuple(
            Node(
                name=f"n-{i}",
                site=f"s{i % 2}" if uplink else "s0",
                devices=("T4",) * devices,
                inside=inside,
                network=network,
            )
            for i in range(nodes)
        ),
        sites=(Site(name="s0", uplink=uplink), Site(name="s1", uplink=uplink)),
    )


FAST = Link(bandwidth=100e9, latency=1e-6)
SLOW = Link(bandwidth=1e9, latency=20e-6)


def by_name(traffic: Traffic) -> dict[str, float]:
    return {resource_name(resource): size for resource, size in traffic.bytes_by_resource.items()}


sizes = st.floats(1, 1e10)
links = st.builds(
    Link, bandwidth=st.floats(1e6, 1e12), latency=st.floats(0, 1e-2), shared=st.booleans()
)
clusters = st.builds(cluster, st.integers(1, 4), st.integers(1, 4), links, links, st.none() | links)


@given(st.integers(2, 16), sizes, st.floats(1e6, 1e12), st.floats(0, 1e-2))
def test_rings_on_one_switch_are_the_textbook_formulas(n, size, bandwidth, latency):
    link = Link(bandwidth=bandwidth, latency=latency)
    flat = topology(cluster(1, n, link, SLOW))
    members = list(flat.devices)
    step = latency + size / n / bandwidth
    assert uncontended_seconds(flat, all_reduce(flat, members, size)) == pytest.approx(
        2 * (n - 1) * step
    )
    for half in (all_gather, reduce_scatter):
        assert uncontended_seconds(flat, half(flat, members, size)) == pytest.approx((n - 1) * step)
    chain = (n - 1) * latency + size / bandwidth
    assert uncontended_seconds(flat, broadcast(flat, members, size)) == pytest.approx(chain)


@given(st.integers(2, 5), st.integers(1, 4), sizes)
def test_a_ring_crosses_each_interface_once_whatever_the_order_of_its_members(nodes, each, size):
    built = topology(cluster(nodes, each, FAST, SLOW))
    members = sorted(built.devices, key=lambda name: name[::-1])
    n = len(members)
    carried = by_name(all_reduce(built, members, size))
    for i in range(nodes):
        for way in ("in", "out"):
            assert carried[f"n-{i} network {way}"] == pytest.approx(2 * (n - 1) / n * size)


def test_a_ring_crosses_each_uplink_once():
    built = topology(cluster(4, 2, FAST, SLOW, uplink=Link(bandwidth=1e8, latency=1e-2)))
    traffic = all_reduce(built, list(built.devices), 8e6)
    assert by_name(traffic)["s0 uplink out"] == 2 * 7 / 8 * 8e6
    assert traffic.latency == pytest.approx(14 * (1e-2 + 20e-6))


def seconds(built, groups, size):
    """Until all groups, which begin at the same moment, are done."""
    return uncontended_seconds(
        built, concurrent(all_reduce(built, group, size) for group in groups)
    )


@given(st.integers(1, 3), sizes)
def test_groups_that_share_an_interface_take_the_sum(groups, size):
    built = topology(cluster(2, 3, replace(FAST, latency=0.0), replace(SLOW, latency=0.0)))
    across = [[f"n-0:{i}", f"n-1:{i}"] for i in range(groups)]
    one = seconds(built, across[:1], size)
    assert seconds(built, across, size) == pytest.approx(groups * one)


def test_groups_that_share_nothing_take_no_longer_than_one():
    built = topology(cluster(2, 2, FAST, SLOW))
    inside = [["n-0:0", "n-0:1"], ["n-1:0", "n-1:1"]]
    assert seconds(built, inside, 1e9) == seconds(built, inside[:1], 1e9)


def test_a_bus_carries_every_hop_of_a_ring():
    bus = Link(bandwidth=10e9, latency=0.0, shared=True)
    built = topology(cluster(1, 4, bus, SLOW))
    assert seconds(built, [list(built.devices)], 1e9) == pytest.approx(2 * 3 * 1e9 / 10e9)


@given(clusters, sizes, st.floats(1, 100), st.sampled_from(["inside", "network"]), st.data())
def test_a_faster_link_never_takes_longer(slow, size, factor, level, data):
    def quicker(node: Node) -> Node:
        link = getattr(node, level)
        better = replace(link, bandwidth=link.bandwidth * factor, latency=link.latency / factor)
        return replace(node, **{level: better})

    fast = replace(slow, nodes=tuple(quicker(node) for node in slow.nodes))
    before, after = topology(slow), topology(fast)
    members = data.draw(st.lists(st.sampled_from([*before.devices]), min_size=1, unique=True))
    for collective in COLLECTIVES:
        was = uncontended_seconds(before, collective(before, members, size))
        assert uncontended_seconds(after, collective(after, members, size)) <= was * (1 + 1e-12)
    was = uncontended_seconds(before, transfer(before, members[0], members[-1], size))
    assert uncontended_seconds(after, transfer(after, members[0], members[-1], size)) <= was


@given(
    st.permutations(range(4)),
    st.sets(st.sampled_from([(i, j) for i in range(4) for j in (0, 1)])),
    sizes,
)
def test_relabelling_equal_nodes_changes_nothing(order, places, size):
    built = topology(cluster(4, 2, FAST, SLOW))
    group = [f"n-{i}:{j}" for i, j in sorted(places)]
    moved = [f"n-{order[i]}:{j}" for i, j in sorted(places)]
    for collective in COLLECTIVES[:3]:
        here = uncontended_seconds(built, collective(built, group, size))
        assert uncontended_seconds(built, collective(built, moved, size)) == pytest.approx(here)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_nobody_to_talk_to_costs_nothing(collective):
    built = topology(cluster(1, 1, FAST, SLOW))
    for members in ([], ["n-0:0"]):
        assert uncontended_seconds(built, collective(built, members, 1e9)) == 0
    assert uncontended_seconds(built, transfer(built, "n-0:0", "n-0:0", 1e9)) == 0


def test_a_broadcast_serves_its_own_node_before_it_leaves():
    built = topology(cluster(3, 2, FAST, SLOW))
    traffic = broadcast(built, ["n-1:1", "n-0:0", "n-0:1", "n-1:0", "n-2:0"], 1e6)
    assert by_name(traffic) == {
        "n-1:1 out": 1e6,
        "n-1:0 in": 1e6,
        "n-1 network out": 1e6,
        "n-0 network in": 1e6,
        "n-0:0 out": 1e6,
        "n-0:1 in": 1e6,
        "n-0 network out": 1e6,
        "n-2 network in": 1e6,
    }


def test_a_measured_step_counts_where_it_is_slower_than_the_hop():
    built = topology(cluster(2, 2, FAST, SLOW))
    inside, across = ["n-0:0", "n-0:1"], ["n-0:0", "n-1:0"]
    assert all_reduce(built, inside, 8, step_latency=15e-6).latency == 2 * 15e-6
    assert all_reduce(built, across, 8, step_latency=15e-6).latency == 2 * 20e-6


def test_together_adds_bytes_and_keeps_the_longest_latency():
    built = topology(cluster(2, 2, FAST, SLOW))
    both = concurrent([transfer(built, "n-0:0", "n-1:0", 5), transfer(built, "n-0:0", "n-0:1", 7)])
    assert both.latency == 20e-6
    assert by_name(both)["n-0 network out"] == 5
    assert by_name(both)["n-0:0 out"] == 7
    assert by_name(concurrent([])) == {}


def test_measured_links_replace_their_level_and_only_that():
    stated = cluster(2, 2, FAST, SLOW, uplink=SLOW)
    measured = Link(bandwidth=3e9, latency=30e-6)
    network = with_measured_links(stated, LinkTimes(network=measured))
    assert {node.network for node in network.nodes} == {measured}
    assert {node.inside for node in network.nodes} == {FAST}
    assert network.sites == stated.sites
    assert with_measured_links(stated, LinkTimes()) == stated


def test_a_transfer_between_sites_takes_the_latency_measured_for_it():
    stated = cluster(2, 2, FAST, SLOW, uplink=SLOW)
    site = Link(bandwidth=2e8, latency=5e-3)
    built = topology(with_measured_links(stated, LinkTimes(site=site)))
    across = transfer(built, "n-0:0", "n-1:0", 1e6)
    assert uncontended_seconds(built, across) == pytest.approx(5e-3 + 1e6 / 2e8)
