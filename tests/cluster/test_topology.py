"""Paths through a cluster and the resources they share."""

from dataclasses import replace
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.spec import Cluster, DirectLink, Islands, Link, Node, Site
from meshwright.cluster.topology import Path, Resource, path, topology
from meshwright.report.resources import resource_name

GB = 1e9


def node(name: str, *, site: str = "main", shared: bool = False, network: float = 1.0) -> Node:
    return Node(
        name=name,
        site=site,
        devices=("H100", "H100"),
        inside=Link(bandwidth=100 * GB, latency=1e-6, shared=shared),
        network=Link(bandwidth=network * GB, latency=10e-6),
    )


def cluster(*nodes: Node, direct: tuple[DirectLink, ...] = ()) -> Cluster:
    uplinks = {"main": Link(bandwidth=GB / 10, latency=1e-3), "far": None}
    sites = tuple(Site(name=name, uplink=link) for name, link in uplinks.items())
    return Cluster(name="c", types={}, nodes=nodes, sites=sites, direct=direct)


def names(way: Path) -> tuple[str, ...]:
    return tuple(map(resource_name, way.resources))


def test_a_device_reaches_itself_for_nothing():
    way = path(topology(cluster(node("a"))), "a:0", "a:0")
    assert names(way) == ()
    assert way.latency == 0


def test_inside_a_node_ports_are_used_or_the_bus():
    built = topology(cluster(node("a"), node("b", shared=True)))
    assert names(path(built, "a:0", "a:1")) == ("a:0 out", "a:1 in")
    assert names(path(built, "a:1", "a:0")) == ("a:1 out", "a:0 in")
    assert names(path(built, "b:0", "b:1")) == ("b bus",)
    assert path(built, "b:0", "b:1").latency == 1e-6


def test_between_nodes_both_interfaces_and_only_buses_are_crossed():
    built = topology(cluster(node("a"), node("b", shared=True)))
    assert names(path(built, "a:0", "b:1")) == ("a network out", "b network in", "b bus")
    assert names(path(built, "b:0", "a:1")) == ("b bus", "b network out", "a network in")
    assert path(built, "a:0", "b:1").latency == 10e-6


def test_between_sites_uplinks_that_exist_are_crossed():
    way = path(topology(cluster(node("a"), node("b", site="far"))), "b:0", "a:0")
    assert names(way) == ("b network out", "main uplink in", "a network in")
    assert way.latency == 10e-6 + 1e-3


def test_a_direct_link_replaces_the_hierarchy_for_its_pair_both_ways():
    cable = DirectLink(between=("a", "b"), link=Link(bandwidth=5 * GB, latency=2e-6))
    built = topology(cluster(node("a"), node("b"), node("c"), direct=(cable,)))
    assert names(path(built, "a:0", "b:0")) == ("a > b",)
    assert names(path(built, "b:0", "a:0")) == ("b > a",)
    assert path(built, "b:0", "a:0").latency == 2e-6
    assert names(path(built, "b:0", "c:0")) == ("b network out", "c network in")
    capacities = {resource_name(resource): speed for resource, speed in built.capacities.items()}
    assert capacities["a > b"] == capacities["b > a"] == 5 * GB


def test_a_shared_link_has_one_capacity_for_both_directions():
    wire = Link(bandwidth=GB, latency=0.0, shared=True)
    cable = DirectLink(between=("b", "a"), link=wire)
    built = topology(cluster(node("a"), node("b"), direct=(cable,)))
    assert names(path(built, "a:0", "b:0")) == names(path(built, "b:0", "a:0")) == ("a - b",)


def test_resources_whose_names_read_alike_are_not_the_same():
    """Names are for people: what a resource is does not depend on them."""
    uplink, network = Resource("a", "uplink", "out"), Resource("a", "network", "out")
    port = Resource("a network", "port", "out")
    assert resource_name(network) == resource_name(port) == "a network out"
    assert len({uplink, network, port}) == 3


@st.composite
def clusters(draw) -> Cluster:
    """Nodes of one to three devices at two sites, shared links or not, explicit links or not."""
    link = st.builds(
        Link,
        bandwidth=st.floats(1e6, 1e12),
        latency=st.floats(0.0, 1e-2),
        shared=st.booleans(),
    )
    nodes = tuple(
        Node(
            name=f"n-{i}",
            site=draw(st.sampled_from(["main", "far"])),
            devices=("H100",) * draw(st.integers(1, 3)),
            inside=draw(link),
            network=draw(link),
        )
        for i in range(draw(st.integers(1, 4)))
    )
    nodes = tuple(
        replace(n, islands=Islands(groups=((0, 1),), link=draw(link)))
        if len(n.devices) > 1 and draw(st.booleans())
        else n
        for n in nodes
    )
    pairs = [(a.name, b.name) for a in nodes for b in nodes if a.name != b.name]
    chosen = st.lists(st.sampled_from(pairs), unique_by=frozenset, max_size=4)
    return Cluster(
        name="c",
        types={},
        nodes=nodes,
        sites=tuple(Site(name=name, uplink=draw(st.none() | link)) for name in ("main", "far")),
        direct=tuple(
            DirectLink(between=pair, link=draw(link)) for pair in (draw(chosen) if pairs else ())
        ),
    )


@given(clusters())
def test_every_resource_of_every_transfer_has_an_owner_of_its_kind(where: Cluster):
    built = topology(where)
    owners = {
        "port": set(built.devices),
        "island": set(built.devices),
        "bus": set(built.nodes),
        "network": set(built.nodes),
        "uplink": set(built.uplinks),
        "link": set(built.nodes),
    }
    for source, target in product(built.devices, repeat=2):
        for resource in path(built, source, target).resources:
            assert resource.owner in owners[resource.kind]
            assert built.capacities[resource] > 0
            joined = frozenset((resource.owner, resource.peer))
            linked = [frozenset(each.between) for each in where.direct]
            assert joined in linked if resource.kind == "link" else resource.peer == ""


@given(clusters())
def test_no_two_resources_of_a_cluster_have_the_same_name(where: Cluster):
    """So that tables and JSON, which are keyed by them, lose none."""
    resources = topology(where).capacities
    assert len({*map(resource_name, resources)}) == len(resources)


@given(st.data())
def test_every_resource_of_every_path_has_a_capacity(data):
    nodes = tuple(
        node(
            f"n-{i}",
            site=data.draw(st.sampled_from(["main", "far"])),
            shared=data.draw(st.booleans()),
        )
        for i in range(data.draw(st.integers(1, 4)))
    )
    built = topology(cluster(*nodes))
    source, target = (data.draw(st.sampled_from(sorted(built.devices))) for _ in range(2))
    way = path(built, source, target)
    assert set(way.resources) <= set(built.capacities)
    assert len(set(way.resources)) == len(way.resources)
    assert path(built, source, target) == way
    assert path(built, target, source).latency == way.latency


def test_order_keeps_sites_and_nodes_together():
    built = topology(cluster(node("a"), node("b", site="far"), node("c")))
    assert sorted(built.order, key=built.order.__getitem__) == [
        "a:0",
        "a:1",
        "c:0",
        "c:1",
        "b:0",
        "b:1",
    ]
