"""Edits of a cluster: what they change, what they leave alone, and what they refuse."""

from __future__ import annotations

import tomllib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.catalog import catalog
from meshwright.cluster.edit import edit_cluster
from meshwright.cluster.files import cluster_from, dump_cluster
from meshwright.cluster.spec import Cluster, devices_of
from meshwright.errors import ClusterError

MIXED = """\
format = 1
name = "mixed"
[links]
network = { bandwidth = "10 Gbit/s", latency = "50 us" }
[[site]]
name = "north"
uplink = { bandwidth = "1 Gbit/s", latency = "10 ms" }
[[site]]
name = "south.2"
[[node]]
name = "p3"
count = 3
devices = ["4 x V100-16"]
site = "north"
[[node]]
name = "g4.x"
devices = ["2 x T4", "1 x A10G"]
site = "south.2"
[[link]]
between = ["p3-0", "g4.x"]
bandwidth = "40 Gbit/s"
latency = "5 us"
"""


def mixed() -> Cluster:
    return cluster_from(tomllib.loads(MIXED), source="mixed.toml")


def count(cluster: Cluster) -> int:
    return len(devices_of(cluster))


def test_a_link_is_set_everywhere_at_one_node_or_at_all_of_a_count():
    everywhere = edit_cluster(mixed(), settings=["link.network=100Gbit/s"]).cluster
    assert {node.network.bandwidth for node in everywhere.nodes} == {12.5e9}
    assert {node.network.latency for node in everywhere.nodes} == {50e-6}
    one = edit_cluster(mixed(), settings=["node.g4.x.network.latency=1 us"]).cluster
    assert [node.network.latency for node in one.nodes] == [50e-6] * 3 + [1e-6]
    group = edit_cluster(mixed(), settings=['node.p3.inside.bandwidth="1 GB/s"']).cluster
    assert [node.inside.bandwidth == 1e9 for node in group.nodes] == [True] * 3 + [False]


def test_an_uplink_is_set_and_a_site_without_one_gets_it():
    changed = edit_cluster(mixed(), settings=["link.uplink=2Gbit/s"]).cluster
    assert [site.uplink.bandwidth for site in changed.sites if site.uplink] == [2.5e8, 2.5e8]
    one = edit_cluster(mixed(), settings=["site.south.2.uplink=2Gbit/s"]).cluster
    assert one.sites[0] == mixed().sites[0]


def test_figures_of_a_device_type_are_set():
    settings = ["device.T4.memory=24 GiB", "device.T4.peak.fp16=10 TFLOP/s"]
    changed = edit_cluster(mixed(), settings=[*settings, "device.T4.matmul_efficiency=0.5"]).cluster
    kind = changed.types["T4"]
    assert (kind.memory, kind.peak["fp16"], kind.matmul_efficiency) == (24 << 30, 1e13, 0.5)
    assert kind.peak["fp32"] == mixed().types["T4"].peak["fp32"]
    assert "what if: memory 24 GiB" in kind.source


@pytest.mark.parametrize(
    ("name", "left"), [("p3-1", 11), ("p3", 3), ("g4.x:2", 14), ("T4", 13), ("north", 3)]
)
def test_what_is_taken_away(name, left):
    changed = edit_cluster(mixed(), without=[name])
    assert count(changed.cluster) == left
    assert f"{15 - left} of 15 devices" in changed.notes[0]
    names = {node.name for node in changed.cluster.nodes}
    assert all(names.issuperset(each.between) for each in changed.cluster.direct)


def test_devices_are_those_of_the_cluster_as_it_was():
    changed = edit_cluster(mixed(), without=["g4.x:0", "g4.x:1"]).cluster
    assert changed.nodes[-1].devices == ("A10G",)


def test_a_new_node_is_wired_like_one_of_its_type_or_by_the_catalogue():
    like = edit_cluster(mixed(), added=["4 x T4"])
    node, known = like.cluster.nodes[-1], mixed().nodes[3]
    assert node.devices == ("T4",) * 4
    assert (node.inside, node.network, node.site) == (known.inside, known.network, known.site)
    assert "10 Gbit/s" in like.notes[0]
    fresh = edit_cluster(mixed(), added=["2 x H100"]).cluster
    assert fresh.types["H100"] == catalog()["H100"].type
    assert fresh.nodes[-1].inside == catalog()["H100"].inside
    assert fresh.nodes[-1].site == "north"


def test_nodes_like_an_existing_one_even_if_that_goes():
    changed = edit_cluster(mixed(), added=["2 x p3-0"], without=["p3"]).cluster
    assert [node.name for node in changed.nodes] == ["g4.x", "new-0", "new-1"]
    assert changed.nodes[1].devices == ("V100-16",) * 4


def test_edits_combine_and_the_result_is_a_cluster_file():
    changed = edit_cluster(
        mixed(), without=["T4"], added=["8 x H100"], settings=["node.new-0.network=1 Tbit/s"]
    ).cluster
    assert changed.nodes[-1].network.bandwidth == 1.25e11
    again = cluster_from(tomllib.loads(dump_cluster(changed)), source="again")
    assert again.nodes == changed.nodes
    assert again.sites == changed.sites


MISTAKES = {
    "link.ib=1Gbit/s": ("link.ib", "inside, islands, network, uplink"),
    "link.network.width=1": ("'width'", "bandwidth, latency"),
    "link.network=100": ("link.network", "'25 Gbit/s'"),
    "link.network=0 bit/s": ("link.network", "8 kbit/s"),
    "link.network=100 GiB": ("GiB", "25 Gbit/s"),
    "node.p4.network=1Gbit/s": ("'p4'", "Did you mean 'p3'"),
    "site.east.uplink=1Gbit/s": ("'east'", "north"),
    "site.south.2.uplink.latency=1 ms": ("no uplink", "bandwidth first"),
    "device.T5.memory=1 GiB": ("'T5'", "Did you mean 'T4'"),
    "device.T4.memroy=1 GiB": ("'memroy'", "Did you mean 'memory'"),
    "device.T4.peak.fp8=1 TFLOP/s": ("'fp8'", "bf16"),
    "device.T4.memory=1 kB": ("device.T4.memory", "1 MiB"),
    "device.T4.matmul_efficiency=1.5": ("1.5", "1.0"),
    "device.T4.matmul_efficiency=nan": ("'nan'", "a number"),
    "nodes": ("'nodes'", "FIELD=VALUE"),
    "=1": ("'=1'", "FIELD=VALUE"),
    "cluster.size=1": ("'cluster'", "link, node, site, device"),
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_a_mistaken_setting_is_refused_with_what_was_wanted(setting):
    with pytest.raises(ClusterError) as caught:
        edit_cluster(mixed(), settings=[setting])
    text = str(caught.value)
    assert text.startswith("--set")
    assert all(word in text for word in MISTAKES[setting]), text


@pytest.mark.parametrize(
    ("edits", "word"),
    [
        ({"without": ["p3-7"]}, "p3-7"),
        ({"without": ["p3", "g4.x"]}, "at least one device"),
        ({"added": ["4 x A100"]}, "A100-40"),
        ({"added": ["0 x T4"]}, "4 x T4"),
        ({"added": ["999999999 x T4"]}, "100,000"),
        ({"added": ["99999 x p3-0"]}, "100,000"),
        ({"added": [""]}, "4 x T4"),
    ],
)
def test_other_mistakes_are_refused(edits, word):
    with pytest.raises(ClusterError, match=word):
        edit_cluster(mixed(), **edits)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ClusterError) as caught:
        edit_cluster(mixed(), without=["x"], added=["2 x Y"], settings=["a=b", "link.z=1"])
    assert len(caught.value.problems) == 4


@given(st.lists(st.sampled_from(["p3-0", "p3-1", "g4.x", "p3-2:3", "A10G"]), unique=True))
def test_taking_away_never_leaves_an_empty_node(names):
    cluster = edit_cluster(mixed(), without=names).cluster
    assert all(node.devices for node in cluster.nodes)
    assert len({node.name for node in cluster.nodes}) == len(cluster.nodes)


@given(st.text(max_size=30), st.sampled_from(["without", "added", "settings"]))
def test_any_text_is_an_edit_or_a_refusal(text, what):
    with suppress(ClusterError):
        assert edit_cluster(mixed(), **{what: [text]}).cluster.nodes
