"""Links are priced at what they reach: shares and steps by kind, and what one device gets alone."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.files import cluster_from, dump_cluster
from meshwright.cluster.link_rates import kind_between, kind_inside, link_rates
from meshwright.cluster.settings import with_setting
from meshwright.cluster.spec import Cluster, Link, devices_of
from meshwright.cluster.topology import topology
from meshwright.cost.collective import (
    all_gather,
    all_reduce,
    broadcast,
    concurrent,
    reduce_scatter,
    transfer,
    uncontended_seconds,
)
from meshwright.cost.profile import LinkTimes, Profile
from meshwright.cost.reached_links import reached_links
from meshwright.errors import ClusterError
from meshwright.report.resources import resource_name
from meshwright.testbed.spec import TestbedFile, make_testbed

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "link_rates.py"
MIB = 2**20


def _benchmark():
    spec = importlib.util.spec_from_file_location("link_rates_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["link_rates_benchmark"] = module
    spec.loader.exec_module(module)
    return module


benchmark = _benchmark()
TABLES = benchmark.published()


def machines(
    devices: str, *, nodes: int = 1, inside: dict | None = None, network: dict | None = None
) -> Cluster:
    entry = {
        "name": "n",
        "count": nodes,
        "devices": [devices],
        "network": network or {"bandwidth": "100 Gbit/s", "latency": "5 us"},
        **({"inside": inside} if inside else {}),
    }
    return cluster_from({"format": 1, "name": "x", "node": [entry]}, source="x")


@pytest.mark.parametrize(
    ("table", "size"),
    [
        pytest.param(table, size, id=f"{table['name']} {size:g} MiB")
        for table in TABLES
        if table["chosen_with"]
        for size in benchmark.judged(table)
        if (table["name"], size) != ("2 T4, PCIe 3, host", 1)
    ],
)
def test_published_all_reduces_are_priced_within_a_tenth(table, size) -> None:
    """T4s that share memory of the host at 1 MiB are not: 14 % too quick."""
    assert benchmark.priced_us(table, size) == pytest.approx(table["us"][size], rel=0.1)


def test_every_kind_has_a_table_and_a_source() -> None:
    assert all(rate.source for rate in link_rates().values())
    assert {table["name"] for table in TABLES if not table["chosen_with"]}


def test_the_kind_follows_from_types_and_latency_unless_it_is_told() -> None:
    plain = Link(bandwidth=20e9, latency=10e-6)
    kinds = {name: kind_inside(plain, [name]) for name in ("V100-16", "A100-80", "H100", "T4")}
    assert kinds == {"V100-16": "nvlink2", "A100-80": "nvlink3", "H100": "nvlink4", "T4": "pcie"}
    assert kind_inside(plain, ["MI300X"]) == "xgmi"
    assert kind_inside(plain, ["T4", "H100"]) == "pcie"
    assert kind_inside(replace(plain, shared=True), ["T4"]) == "pcie_host"
    assert kind_inside(plain, ["T4"], island=True) == "nvlink3"
    assert kind_inside(replace(plain, kind="pcie"), ["H100"]) == "pcie"
    assert kind_inside(replace(plain, bandwidth=400e9), ["a card of one's own"]) == "nvlink4"
    assert kind_between(replace(plain, latency=5e-6)) == "infiniband"
    assert kind_between(replace(plain, latency=30e-6)) == "ethernet"
    assert kind_between(replace(plain, kind="roce")) == "roce"


def test_cpu_processes_and_measured_links_reach_what_is_stated() -> None:
    cores = machines("4 x cpu", nodes=2)
    reached = reached_links(cores, None)
    assert reached.nodes[0].network.bandwidth == cores.nodes[0].network.bandwidth
    gpus = machines("4 x T4", network={"bandwidth": "8 Gbit/s", "latency": "9 us",
                                       "kind": "measured"})  # fmt: skip
    assert reached_links(gpus, None).nodes[0].network == gpus.nodes[0].network
    seen = Profile(model="m", sequence=1, links=LinkTimes(inside=Link(bandwidth=3e9)))
    assert reached_links(gpus, seen).nodes[0].inside == Link(bandwidth=3e9)
    assert reached_links(reached_links(gpus, seen), seen).nodes[0].inside == Link(bandwidth=3e9)


@given(st.sampled_from(["8 x A100-80", "8 x H100", "4 x T4", "8 x V100-16"]),
       st.integers(1, 4), st.floats(1, 1e9), st.floats(1, 100))  # fmt: skip
def test_more_bytes_never_take_less_and_small_steps_are_never_dearer(kind, nodes, size, times):
    links = topology(reached_links(machines(kind, nodes=nodes), None))
    names = [*links.devices]
    for collective in (all_reduce, all_gather, reduce_scatter, broadcast):
        small, large = (
            uncontended_seconds(links, collective(links, names, each))
            for each in (size, size * times)
        )
        assert small <= large * (1 + 1e-12)
        assert large <= small * times * (1 + 1e-12)


def test_a_tree_over_nodes_takes_as_many_steps_as_twice_the_logarithm_of_their_number() -> None:
    """Of one T4 on each of n nodes; a step is 5 us of the network and 13 of NCCL."""
    for nodes, steps in ((2, 2), (4, 4), (8, 6), (9, 8)):
        links = topology(reached_links(machines("1 x T4", nodes=nodes), None))
        traffic = all_reduce(links, [*links.devices], 8.0)
        assert traffic.latency == pytest.approx(steps * 18e-6)


def test_sums_in_a_switch_pass_fewer_bytes_than_gathers_do() -> None:
    links = topology(reached_links(machines("8 x H100"), None))
    names = [*links.devices]
    both = [uncontended_seconds(links, half(links, names, 1e9)) for half in (all_gather,
            reduce_scatter)]  # fmt: skip
    assert uncontended_seconds(links, all_reduce(links, names, 1e9)) < 0.9 * sum(both)


LIMITED = {"bandwidth": "6 GB/s", "latency": "0 us", "kind": "measured", "single_flow": "2.4 GB/s"}
"""What one network gave many messages together and one alone."""


def test_one_message_gets_less_than_many_together() -> None:
    where = machines("4 x A100-80", nodes=2, network=LIMITED)
    links = topology(reached_links(where, None))
    one = transfer(links, "n-0:0", "n-1:0", 2.4e9)
    assert uncontended_seconds(links, one) == pytest.approx(1.0)
    assert "n-0:0 network flow out" in {resource_name(each) for each in one.bytes_by_resource}
    ring = all_reduce(links, ["n-0:0", "n-1:0"], 2.4e9)
    assert uncontended_seconds(links, ring) == pytest.approx(1.0, rel=1e-3)
    four = concurrent(transfer(links, f"n-0:{i}", f"n-1:{i}", 2.4e9) for i in range(4))
    assert uncontended_seconds(links, four) == pytest.approx(1.6)


def test_a_limit_of_a_single_flow_survives_the_file_and_exceeds_no_bandwidth() -> None:
    where = machines("2 x T4", nodes=2, inside={**LIMITED, "shared": True}, network=LIMITED)
    assert where.nodes[0].inside.single_flow == 2.4e9
    assert cluster_from(tomllib.loads(dump_cluster(where)), source="again") == where
    with pytest.raises(ClusterError) as caught:
        machines("2 x T4", nodes=2, network={**LIMITED, "single_flow": "7 GB/s"})
    (problem,) = caught.value.problems
    assert problem.field == "node[0].network.single_flow"
    assert "6 GB/s" in problem.wanted or "48 Gbit/s" in problem.wanted


@given(st.floats(1e6, 1e10), st.floats(0.01, 1), st.sampled_from([(1, 4), (2, 2), (3, 1)]))
def test_a_limit_never_makes_anything_quicker(bandwidth, share, shape):
    nodes, each = shape
    link = Link(bandwidth=bandwidth, latency=1e-5, kind="measured")
    limited = replace(link, single_flow=bandwidth * share)
    base = machines(f"{each} x T4", nodes=nodes)

    def of(link: Link) -> Cluster:
        own = tuple(replace(n, inside=link, network=link) for n in base.nodes)
        return replace(base, nodes=own)

    free, bound = topology(of(link)), topology(of(limited))
    names = [device.name for device in devices_of(base)]
    for collective in (all_reduce, all_gather, broadcast):
        quick, slow = (
            uncontended_seconds(links, collective(links, names, 1e8)) for links in (free, bound)
        )
        assert quick <= slow * (1 + 1e-12)
        if len(names) > 1:
            assert slow >= 1e8 / len(names) / (bandwidth * share)


def test_a_lower_bandwidth_takes_a_higher_limit_with_it() -> None:
    where = machines("2 x T4", nodes=2, network=LIMITED)
    slower = with_setting(where, "link.network.bandwidth=2 GB/s")
    assert {node.network.single_flow for node in slower.nodes} == {None}
    quicker = with_setting(where, "link.network.bandwidth=9 GB/s")
    assert {node.network.single_flow for node in quicker.nodes} == {2.4e9}


def test_an_emulated_network_limits_no_single_flow() -> None:
    where = machines("1 x T4", nodes=2, network=LIMITED)
    entry = TestbedFile(name="x", cluster="x.toml", mode="virtual")
    assert make_testbed(entry, where, source="x").cluster.nodes[0].network.single_flow is None
