"""Devices of a node that are joined better than the rest: what their files say and what it does."""

import tomllib

import pytest

from meshwright.cluster.discover import discover_toml
from meshwright.cluster.edit import edit_cluster
from meshwright.cluster.files import cluster_from, dump_cluster
from meshwright.cluster.hardware import Gpu, MachineHardware
from meshwright.cluster.spec import Cluster, Islands, Link, Node, Site
from meshwright.cluster.topology import path, topology
from meshwright.cluster.wiring import read_islands, read_mesh, read_wiring
from meshwright.cost.collective import all_reduce, uncontended_seconds
from meshwright.cost.reached_links import reached_links
from meshwright.errors import ClusterError
from meshwright.report.resources import resource_name

BRIDGE = Link(bandwidth=56.25e9, latency=5e-6)
PAIRS = """\
format = 1
name = "pairs"
[[node]]
name = "a"
devices = ["4 x RTX3090"]
inside = { bandwidth = "12 GB/s", latency = "10 us", shared = true }
network = { bandwidth = "10 Gbit/s", latency = "50 us" }
islands = { devices = [[0, 2], [1, 3]], bandwidth = "56.25 GB/s", latency = "5 us" }
[[node]]
name = "b"
devices = ["2 x RTX3090"]
inside = { bandwidth = "12 GB/s", latency = "10 us", shared = true }
network = { bandwidth = "10 Gbit/s", latency = "50 us" }
"""


def pairs() -> Cluster:
    return cluster_from(tomllib.loads(PAIRS), source="pairs.toml")


def test_islands_are_read_and_written():
    assert pairs().nodes[0].islands == Islands(groups=((0, 2), (1, 3)), link=BRIDGE)
    assert pairs().nodes[1].islands is None
    assert cluster_from(tomllib.loads(dump_cluster(pairs())), source="again") == pairs()


def test_traffic_inside_an_island_passes_its_ports_alone():
    built = topology(pairs())
    joined, apart = path(built, "a:0", "a:2"), path(built, "a:0", "a:1")
    assert [*map(resource_name, joined.resources)] == ["a:0 island out", "a:2 island in"]
    assert joined.latency == 5e-6
    assert [*map(resource_name, apart.resources)] == ["a bus"]
    assert apart.latency == 10e-6
    assert {built.capacities[each] for each in joined.resources} == {56.25e9}


def test_a_ring_leaves_every_island_once():
    carried = all_reduce(topology(pairs()), ["a:0", "a:1", "a:2", "a:3"], 4.0).bytes_by_resource
    assert sum(size for each, size in carried.items() if each.kind == "bus") == 2 * 6.0
    assert sum(size for each, size in carried.items() if each.kind == "island") == 4 * 6.0


def test_what_is_left_of_islands_stays_joined():
    edited = edit_cluster(pairs(), without=["a:0"]).cluster
    assert edited.nodes[0].islands == Islands(groups=((0, 2),), link=BRIDGE)
    edited = edit_cluster(pairs(), without=["a:0", "a:1"]).cluster
    assert edited.nodes[0].islands is None
    edited = edit_cluster(pairs(), without=["b", "a:1", "a:3"]).cluster
    assert edited.nodes[0].islands == Islands(groups=((0, 1),), link=BRIDGE)


def test_a_new_node_has_islands_of_the_same_size():
    edited = edit_cluster(pairs(), added=["5 x RTX3090"])
    assert edited.cluster.nodes[-1].islands == Islands(groups=((0, 1), (2, 3)), link=BRIDGE)
    assert "450 Gbit/s in islands of 2" in edited.notes[0]
    assert edit_cluster(pairs(), added=["1 x RTX3090"]).cluster.nodes[-1].islands is None
    assert edit_cluster(pairs(), added=["1 x a"]).cluster.nodes[-1].islands is not None


def test_the_link_of_islands_is_set_where_there_are_any():
    edited = edit_cluster(pairs(), settings=["link.islands=100 GB/s"]).cluster
    islands = edited.nodes[0].islands
    assert islands == Islands(groups=((0, 2), (1, 3)), link=Link(bandwidth=100e9, latency=5e-6))
    assert edited.nodes[1:] == pairs().nodes[1:]
    edited = edit_cluster(pairs(), settings=["node.a.islands.latency=1 us"]).cluster
    assert [node.islands and node.islands.link.latency for node in edited.nodes] == [1e-6, None]
    with pytest.raises(ClusterError, match="no islands"):
        edit_cluster(pairs(), settings=["node.b.islands=100 GB/s"])


def topo(*rows: str) -> str:
    head = "\t".join(("", *(f"GPU{i}" for i in range(len(rows))), "CPU Affinity"))
    lines = ("\t".join((f"GPU{i}", *row.split(), "0-31")) for i, row in enumerate(rows))
    return "\n".join((head, *lines)) + "\n"


BRIDGED = topo("X NV4 SYS SYS", "NV4 X SYS SYS", "SYS SYS X NV4", "SYS SYS NV4 X")
SWITCHED = topo("X PHB PIX PHB", "PHB X PHB PXB", "PIX PHB X PHB", "PHB PXB PHB X")
ONE_BRIDGE = topo("X NV4 PHB", "NV4 X PHB", "PHB PHB X")
CUBE_MESH = topo("X NV1 NV1 SYS", "NV1 X SYS NV1", "NV1 SYS X NV1", "SYS NV1 NV1 X")
SOCKETS = topo("X PHB SYS SYS", "PHB X SYS SYS", "SYS SYS X NODE", "SYS SYS NODE X")
LINE = topo("X NV1 SYS", "NV1 X NV1", "SYS NV1 X")
ALL_ALIKE = topo("X NV12 NV12", "NV12 X NV12", "NV12 NV12 X")


@pytest.mark.parametrize(
    ("text", "islands", "inside"),
    [
        (BRIDGED, ((0, 1), (2, 3)), "NV4"),
        (SWITCHED, ((0, 2), (1, 3)), "PXB"),
        (ONE_BRIDGE, ((0, 1),), "NV4"),
        (CUBE_MESH, ((0, 1), (2, 3)), "NVLink"),
        (SOCKETS, ((0, 1), (2, 3)), "NODE"),
        (LINE, (), None),
        (ALL_ALIKE, (), None),
        ("", (), None),
    ],
)
def test_islands_are_groups_in_which_all_are_joined(text, islands, inside):
    assert read_islands(text, text.count("GPU") // 2) == (islands, inside)


def test_a_bridged_machine_is_described_as_it_is():
    gpus = (Gpu(name="NVIDIA GeForce RTX 3090", memory=24 * 2**30, capability=(8, 6)),) * 4
    islands, inside = read_islands(BRIDGED, 4)
    found = MachineHardware(
        name="ws", gpus=gpus, wiring=read_wiring(BRIDGED), islands=islands, island_wiring=inside
    )
    text = discover_toml(found)
    assert "# islands: [0, 1] and [2, 3], NVLink, NV4" in text
    (node,) = cluster_from(tomllib.loads(text), source="found").nodes
    assert node.inside.shared
    assert node.islands == Islands(
        groups=((0, 1), (2, 3)), link=Link(bandwidth=100e9, latency=8e-6)
    )


DGX_1 = topo(
    "X NV1 NV1 NV2 NV2 SYS SYS SYS",
    "NV1 X NV2 NV1 SYS NV2 SYS SYS",
    "NV1 NV2 X NV2 SYS SYS NV1 SYS",
    "NV2 NV1 NV2 X SYS SYS SYS NV1",
    "NV2 SYS SYS SYS X NV1 NV1 NV2",
    "SYS NV2 SYS SYS NV1 X NV2 NV1",
    "SYS SYS NV1 SYS NV1 NV2 X NV2",
    "SYS SYS SYS NV1 NV2 NV1 NV2 X",
)


def _described(text: str, name: str, number: int, capability: tuple[int, int]) -> Node:
    gpus = (Gpu(name=name, memory=32510 * 2**20, capability=capability),) * number
    islands, inside = read_islands(text, number)
    found = MachineHardware(
        name="ws",
        gpus=gpus,
        wiring=read_wiring(text),
        islands=islands,
        island_wiring=inside,
        mesh_lanes=read_mesh(text, number),
    )
    (node,) = cluster_from(tomllib.loads(discover_toml(found)), source="found").nodes
    return node


def test_rings_of_a_cube_mesh_pass_neighbours_and_tensor_groups_stand_on_them():
    """Six lanes of 25 GB/s; all-reduces of eight reach 120 to 130 GB/s."""
    assert read_mesh(DGX_1, 8) == 6
    node = _described(DGX_1, "Tesla V100-SXM2-32GB", 8, (7, 0))
    assert node.inside == Link(bandwidth=150e9, latency=8e-6)
    assert node.islands
    assert node.islands.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    where = reached_links(
        Cluster(name="c", types={}, nodes=(node,), sites=(Site(name="main"),)), None
    )
    links = topology(where)
    ring = uncontended_seconds(links, all_reduce(links, [*links.devices], 2**28))
    assert 120e9 < 2 * 7 / 8 * 2**28 / ring < 135e9


def test_no_ring_no_mesh():
    for text in (BRIDGED, ALL_ALIKE, LINE, ONE_BRIDGE, ""):
        assert read_mesh(text, text.count("GPU") // 2) is None
    assert read_mesh(DGX_1, 4) is None


def test_devices_of_a_socket_reach_each_other_without_the_other_one():
    node = _described(SOCKETS, "NVIDIA A10G", 4, (8, 6))
    assert node.inside.shared
    assert node.islands
    assert node.islands.groups == ((0, 1), (2, 3))
    assert node.islands.link == Link(bandwidth=12e9, latency=10e-6, kind="pcie")


def test_islands_of_cards_that_are_not_taken_are_not_told():
    assert read_islands(BRIDGED, 4) != ((), None)
    assert read_islands(BRIDGED, 2) == ((), None)
