"""Cluster files: what they mean, and the way back to text."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.catalog import catalog
from meshwright.cluster.figures import cluster_warnings
from meshwright.cluster.files import cluster_from, dump_cluster, load_cluster
from meshwright.cluster.spec import (
    Cluster,
    DeviceType,
    DirectLink,
    Islands,
    Link,
    Node,
    Precision,
    ReachedShares,
    Site,
    devices_of,
)

EXAMPLES = Path(__file__).parents[2] / "examples" / "clusters"


def read(text: str) -> Cluster:
    return cluster_from(tomllib.loads(text), source="c.toml")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_examples_load_without_doubts_and_come_back_from_text(path):
    cluster = load_cluster(path)
    assert cluster.name == path.stem
    assert cluster_warnings(cluster) == ()
    assert read(dump_cluster(cluster)) == cluster


def test_the_amp_cluster_is_what_its_file_says():
    cluster = load_cluster(str(EXAMPLES / "v100-t4.toml"))
    assert [node.name for node in cluster.nodes] == ["p3-0", "p3-1", "p3-2", "g4"]
    assert [device.type for device in devices_of(cluster)] == ["V100-16"] * 12 + ["T4"] * 4
    assert cluster.nodes[0].inside == Link(bandwidth=170e9 / 8, latency=10e-6)
    assert cluster.nodes[3].network == Link(bandwidth=50e9 / 8, latency=50e-6)


def test_links_come_from_the_node_then_the_defaults_then_the_catalogue():
    cluster = load_cluster(EXAMPLES / "two-sites.toml")
    assert [site.uplink.bandwidth for site in cluster.sites if site.uplink] == [125e6, 250e6]
    assert cluster.nodes[0].network.bandwidth == 12.5e9
    assert cluster.nodes[0].inside == catalog()["A100-80"].inside


def test_a_mixed_node_is_as_fast_inside_as_its_slowest_type():
    cluster = read('format = 1\n[[node]]\nname = "n"\ndevices = ["T4", "2 x H100"]')
    assert cluster.nodes[0].inside == catalog()["T4"].inside
    assert cluster.nodes[0].devices == ("T4", "H100", "H100")


def test_overrides_change_their_figures_only_and_zero_takes_a_precision_away():
    cluster = read(
        """
        format = 1
        [[node]]
        name = "n"
        devices = ["2 x T4", "slow"]
        [device.T4]
        memory = "13 GiB"
        [device.slow]
        like = "T4"
        peak = { fp16 = "20 TFLOP/s", fp32 = "0 TFLOP/s" }
        """
    )
    known = catalog()["T4"].type
    assert cluster.types["T4"].memory == 13 * 2**30
    assert cluster.types["T4"].peak == known.peak
    assert cluster.types["slow"].memory == 13 * 2**30
    assert cluster.types["slow"].peak == {"fp16": 20e12}
    assert "cluster file: peak fp16, peak fp32" in cluster.types["slow"].source


def test_a_matrix_becomes_direct_links():
    cluster = load_cluster(EXAMPLES / "irregular.toml")
    pairs = {each.between: each.link.bandwidth * 8 for each in cluster.direct}
    assert pairs == {("rack", "old"): 10e9, ("tower", "bench"): 10e9, ("tower", "rack"): 25e9}
    assert cluster.direct[1].link.latency == 30e-6


def test_an_override_far_beyond_the_datasheet_is_doubted():
    cluster = read(
        'format = 1\n[[node]]\nname = "n"\ndevices = ["T4"]\n'
        '[device.T4]\npeak = { fp16 = "300 TFLOP/s", bf16 = "65 TFLOP/s" }\nmemory = "80 GiB"'
    )
    doubts = cluster_warnings(cluster)
    assert len(doubts) == 3
    assert any("fp16 peak of 300 TFLOP/s is 4.6 times" in doubt for doubt in doubts)
    assert any("no bf16" in doubt for doubt in doubts)


links = st.builds(
    Link,
    bandwidth=st.floats(1e3, 1e14),
    latency=st.one_of(st.just(0.0), st.floats(1e-9, 10.0)),
    shared=st.booleans(),
)
PRINTABLE = st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"])
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True)
shares = st.floats(0.01, 1.0)


def kind_with(
    intensities: dict[Precision, float], memory_bandwidth: float, **own: Any
) -> DeviceType:
    """A device type whose peaks are these multiples of its memory bandwidth."""
    peak = {precision: each * memory_bandwidth for precision, each in intensities.items()}
    return DeviceType(peak=peak, memory_bandwidth=memory_bandwidth, **own)


reached = st.builds(ReachedShares, forward=shares, backward=shares)
PRECISIONS = st.sampled_from(["fp64", "fp32", "fp16", "bf16"])
kinds = st.builds(
    kind_with,
    name=st.one_of(names, st.sampled_from(["T4", "H100", "cpu"])),
    memory=st.integers(2**20, 2**44),
    memory_bandwidth=st.floats(1e8, 4e12),
    intensities=st.dictionaries(PRECISIONS, st.floats(0.06, 19_000), min_size=1),
    matmul_shares=st.none() | st.dictionaries(PRECISIONS, reached, min_size=1),
    matmul_efficiency=shares,
    attention_efficiency=shares,
    memory_efficiency=shares,
    processor=st.sampled_from(["gpu", "cpu"]),
    source=st.text(PRINTABLE, max_size=20),
)


@st.composite
def islands(draw: st.DrawFn, node: Node) -> Islands | None:
    """None, or one or two islands whose link is at least as fast as that inside the node."""
    order = draw(st.permutations(range(len(node.devices))))
    groups = tuple(tuple(order[i : i + 2]) for i in range(0, len(order) - 1, 2))
    link = Link(bandwidth=draw(st.floats(node.inside.bandwidth, 1e14)), latency=1e-6)
    return draw(st.none() | st.just(Islands(groups=groups, link=link))) if groups else None


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    types = {kind.name: kind for kind in draw(st.lists(kinds, max_size=2))}
    types["A100-40"] = catalog()["A100-40"].type
    sites = draw(
        st.lists(
            st.builds(Site, name=names, uplink=st.none() | links),
            min_size=1,
            max_size=3,
            unique_by=lambda site: site.name,
        )
    )
    few = draw(st.lists(links, min_size=1, max_size=2))
    node_names = names | st.sampled_from([f"p-{index}" for index in range(4)])
    nodes = [
        Node(
            name=name,
            site=draw(st.sampled_from(sites)).name,
            devices=("A100-40", *draw(st.lists(st.sampled_from([*types]), max_size=3))),
            inside=draw(st.sampled_from(few)),
            network=draw(st.sampled_from(few)),
        )
        for name in draw(st.lists(node_names, min_size=1, max_size=5, unique=True))
    ]
    nodes = [replace(node, islands=draw(islands(node))) for node in nodes]
    direct = (
        (DirectLink(between=(nodes[0].name, nodes[-1].name), link=draw(links)),)
        if len(nodes) > 1 and draw(st.booleans())
        else ()
    )
    return Cluster(
        name=draw(st.text(PRINTABLE, max_size=8)),
        types=types,
        nodes=tuple(nodes),
        sites=tuple(sites),
        direct=direct,
    )


@given(clusters())
def test_text_and_back_is_the_same_cluster(cluster):
    assert read(dump_cluster(cluster)) == cluster
