"""The search uses devices that are joined better than the rest of their node."""

from dataclasses import replace

from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import Cluster, Device, Islands, Link, devices_of
from meshwright.model.load import load_model
from meshwright.plan.spec import Job
from meshwright.search.costs import costs_of, group_kind
from meshwright.search.device_classes import device_classes
from meshwright.search.planner import find_plan
from meshwright.search.space import by_island, tensor_groups
from meshwright.simulate.symmetry import simulate_by_symmetry
from worlds import cluster, even_model, job

BRIDGE = Link(bandwidth=56.25e9, latency=8e-6, kind="measured")


def with_islands(where: Cluster, *groups: tuple[int, ...]) -> Cluster:
    islands = Islands(groups=groups, link=BRIDGE)
    return replace(where, nodes=tuple(replace(node, islands=islands) for node in where.nodes))


def names(devices: list[Device]) -> str:
    return "".join(device.name[-1] for device in devices)


def test_devices_of_an_island_become_neighbours():
    apart = devices_of(with_islands(cluster(("fast",) * 6), (0, 3), (1, 4)))
    assert names(by_island(apart)) == "031425"
    assert names(by_island(apart, 2)) == "031425"
    threes = devices_of(with_islands(cluster(("fast",) * 6), (0, 1, 2), (3, 4, 5)))
    assert names(by_island(threes, 2)) == "013425"
    assert names(by_island(devices_of(cluster(("fast",) * 3)), 2)) == "012"


def test_tensor_groups_are_cut_inside_islands():
    costs = costs_of(even_model(2), with_islands(cluster(("fast",) * 5), (0, 2), (1, 3)), job(4))
    every = [f"a:{index}" for index in range(5)]
    assert tensor_groups(costs, every, 2) == [("a:0", "a:2"), ("a:1", "a:3")]
    assert tensor_groups(costs, every[1:], 2) == [("a:1", "a:3"), ("a:2", "a:4")]
    inside, across = group_kind(costs, ("a:0", "a:2")), group_kind(costs, ("a:0", "a:1"))
    assert inside != across
    assert inside == group_kind(costs, ("a:1", "a:3"))
    assert group_kind(costs, ("a:0",)) == group_kind(costs, ("a:4",))


def test_a_class_of_nodes_knows_which_of_its_neighbours_are_joined():
    where = with_islands(cluster(("fast",) * 4, ("fast",) * 4), (0, 2), (1, 3))
    (found,) = device_classes(costs_of(even_model(2), where, job(4)))
    assert found.nodes[0] == ("a:0", "a:2", "a:1", "a:3")
    assert found.link_among(1) == found.link_among(2) == BRIDGE
    assert found.link_among(4) == where.nodes[0].inside
    half = replace(where, nodes=(where.nodes[0], replace(where.nodes[1], islands=None)))
    assert len(device_classes(costs_of(even_model(2), half, job(4)))) == 2


def workstation(*groups: tuple[int, ...]) -> Cluster:
    """Eight cards in one machine, on one PCIe bus, that bridges join in pairs."""
    kind = catalog()["A10G"].type
    where = cluster(
        ("A10G",) * 8,
        inside=Link(bandwidth=12e9, latency=10e-6, shared=True),
        types=(kind,),
    )
    return with_islands(where, *groups)


def test_tensor_groups_coincide_with_pairs_and_a_search_that_is_blind_to_them_loses():
    """More than 15 % of a step here."""
    where = workstation((0, 4), (1, 5), (2, 6), (3, 7))
    graph = load_model("llama-2-7b", 1024, "fp16")
    todo = Job(global_batch=16, sequence=1024, precision="fp16", optimizer="adamw")
    blind = replace(where, nodes=(replace(where.nodes[0], islands=None),))
    seen, unseen = find_plan(graph, where, todo), find_plan(graph, blind, todo)
    groups = {group for stage in seen.pipelines[0].stages for group in stage.devices}
    assert groups == {(f"a:{i}", f"a:{i + 4}") for i in range(4)}
    lost = simulate_by_symmetry(unseen, graph, where).step_seconds / seen.prediction.step_seconds
    assert lost > 1.15
