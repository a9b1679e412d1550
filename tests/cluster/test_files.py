"""Cluster files: what they mean, every mistake in them, and the way back to text."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.catalog import catalog
from meshwright.cluster.figures import cluster_warnings
from meshwright.cluster.files import cluster_from, dump_cluster, load_cluster
from meshwright.cluster.spec import Cluster, DeviceType, DirectLink, Link, Node, Site, devices_of
from meshwright.errors import ClusterError

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
    cluster = load_cluster(EXAMPLES / "v100-t4.toml")
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


LINKS = '[links]\nnetwork = { bandwidth = "10 Gbit/s", latency = "50 us" }\n'
NODE = '[[node]]\nname = "a"\ndevices = ["2 x T4"]\n'
OTHER = '[[node]]\nname = "b"\ndevices = ["2 x T4"]\n'
GOOD = "format = 1\n" + LINKS + NODE + OTHER
NEW = '[device.New]\nmemory = "8 GiB"\nmemory_bandwidth = "1 GB/s"\npeak = { fp32 = "1 TFLOP/s" }\n'


def matrix(bandwidth: str, latency: str = '"5 us"', nodes: str = '["a", "b"]') -> str:
    return GOOD + f"[matrix]\nnodes = {nodes}\nbandwidth = {bandwidth}\nlatency = {latency}\n"


def pair(between: str, bandwidth: str = "1 Gbit/s") -> str:
    return f'[[link]]\nbetween = {between}\nbandwidth = "{bandwidth}"\nlatency = "5 us"\n'


BAD = {
    "format missing": (LINKS + NODE, "format", "nothing"),
    "format of another version": ("format = 2\n" + NODE, "format", "format 1"),
    "no nodes": ("format = 1\n", "node", "at least one"),
    "node is no list": ("format = 1\nnode = 3", "node", "[[node]]"),
    "unknown top field": (GOOD + "[nodes]\n", "nodes", "Did you mean 'node'"),
    "unknown node field": (GOOD + "cuont = 2", "node[1].cuont", "Did you mean 'count'"),
    "unknown link field": (
        GOOD + 'network = { bandwith = "1 Gbit/s", bandwidth = "1 Gbit/s", latency = "1 us" }',
        "node[1].network.bandwith",
        "Did you mean 'bandwidth'",
    ),
    "name missing": (GOOD + '[[node]]\ndevices = ["T4"]', "node[2].name", "required"),
    "name with a colon": (GOOD.replace('"b"', '"b:0"'), "node[1].name", "letters, digits"),
    "unknown type": (GOOD.replace("2 x T4", "2 x v100_16", 1), "node[0].devices[0]", "'V100-16'"),
    "no such notation": (GOOD.replace("2 x T4", "T4 x 2", 1), "node[0].devices[0]", "4 x T4"),
    "zero devices": (GOOD.replace("2 x T4", "0 x T4", 1), "node[0].devices[0]", "4 x T4"),
    "empty node": (GOOD.replace('["2 x T4"]', "[]", 1), "node[0].devices", "at least one"),
    "count of zero": (GOOD + "count = 0", "node[1].count", "1 or more"),
    "count of a half": (GOOD + "count = 1.5", "node[1].count", "integer"),
    "too many nodes": (GOOD + "count = 1000000", "node", "at most 100,000"),
    "too many devices": (GOOD.replace("2 x", "99999999999 x", 1), "node", "at most 100,000"),
    "two of a name": (GOOD.replace('"b"', '"a"'), "node.name", "'a' 2 times"),
    "name taken by a count": (
        GOOD.replace('"b"', '"a-1"').replace('"a"', '"a"\ncount = 2'),
        "node.name",
        "'a-1' 2 times",
    ),
    "unknown site": (GOOD + 'site = "moon"', "node[1].site", "one of: main"),
    "site twice": (GOOD + '[[site]]\nname = "s"\n' * 2, "site.name", "'s' 2 times"),
    "no network": ("format = 1\n" + NODE + OTHER, "node[0].network", "links.network"),
    "zero bandwidth": (GOOD.replace("10 Gbit/s", "0 Gbit/s"), "links.network.bandwidth", "0 bit/s"),
    "absurd bandwidth": (
        GOOD.replace("10 Gbit/s", "10 Pbit/s"),
        "links.network.bandwidth",
        "10 Pbit/s",
    ),
    "negative bandwidth": (
        GOOD.replace("10 Gbit/s", "-1 Gbit/s"),
        "links.network.bandwidth",
        "not '-1 Gbit/s'",
    ),
    "bandwidth without unit": (
        GOOD.replace('"10 Gbit/s"', "10"),
        "links.network.bandwidth",
        "with its unit",
    ),
    "bandwidth in bytes": (GOOD.replace("Gbit/s", "GB"), "links.network.bandwidth", "no such unit"),
    "absurd latency": (GOOD.replace("50 us", "50 s"), "links.network.latency", "found 50 s"),
    "latency in bits": (GOOD.replace("50 us", "50 bit"), "links.network.latency", "no such unit"),
    "absurd memory": (
        GOOD + '[device.T4]\nmemory = "15 B"',
        "device.T4.memory",
        "found 15 B; wanted 1 MiB",
    ),
    "memory in bits per second": (
        GOOD + '[device.T4]\nmemory = "15 Gbit/s"',
        "device.T4.memory",
        "no such unit",
    ),
    "absurd peak": (
        GOOD + '[device.T4]\npeak = { fp16 = "65 FLOP/s" }',
        "device.T4.peak.fp16",
        "65 FLOP/s",
    ),
    "unknown precision": (
        GOOD + '[device.T4]\npeak = { fp12 = "65 TFLOP/s" }',
        "device.T4.peak.fp12",
        "'fp16'",
    ),
    "no precision left": (
        GOOD + '[device.T4]\npeak = { fp16 = "0 TFLOP/s", fp32 = "0 TFLOP/s" }',
        "device.T4.peak",
        "a precision",
    ),
    "efficiency above one": (
        GOOD + "[device.T4]\nmatmul_efficiency = 35",
        "device.T4.matmul_efficiency",
        "at most 1",
    ),
    "efficiency not a number": (
        GOOD + "[device.T4]\nmemory_efficiency = nan",
        "device.T4.memory_efficiency",
        "at most 1",
    ),
    "new type without figures": (
        GOOD + '[device.New]\nmemory = "8 GiB"',
        "device.New.peak",
        'like = "T4"',
    ),
    "like nothing known": (GOOD + '[device.New]\nlike = "T5"', "device.New.like", "'T4'"),
    "like in a circle": (
        GOOD + '[device.A]\nlike = "B"\n[device.B]\nlike = "A"',
        "device.A.like",
        "lead back",
    ),
    "new type without a link": (
        GOOD.replace("2 x T4", "2 x New", 1) + NEW,
        "node[0].inside",
        "'New'",
    ),
    "link to nowhere": (GOOD + pair('["a", "c"]'), "link[0].between", "'c'"),
    "link to itself": (GOOD + pair('["a", "a"]'), "link[0].between", "with itself"),
    "link of three": (GOOD + pair('["a", "b", "a"]'), "link[0].between", "at most 2"),
    "link twice": (
        GOOD + pair('["a", "b"]') + pair('["b", "a"]'),
        "link[1].between",
        "each pair of nodes once",
    ),
    "link also in the matrix": (
        matrix('[["-", "1 Gbit/s"], ["1 Gbit/s", "-"]]') + pair('["a", "b"]'),
        "link[0].between",
        "again",
    ),
    "matrix with an unknown node": (
        matrix('[["-", "1 Gbit/s"], ["1 Gbit/s", "-"]]', nodes='["a", "c"]'),
        "matrix.nodes[1]",
        "'c'",
    ),
    "matrix with a node twice": (
        matrix('[["-", "1 Gbit/s"], ["1 Gbit/s", "-"]]', nodes='["a", "a"]'),
        "matrix.nodes[1]",
        "each node once",
    ),
    "matrix that is not symmetric": (
        matrix('[["-", "1 Gbit/s"], ["2 Gbit/s", "-"]]'),
        "matrix.bandwidth[0][1]",
        "symmetric",
    ),
    "matrix with half a link": (
        matrix('[["-", "1 Gbit/s"], ["-", "-"]]'),
        "matrix.bandwidth[0][1]",
        "symmetric",
    ),
    "matrix with too few rows": (matrix('[["-", "1 Gbit/s"]]'), "matrix.bandwidth", "2 rows"),
    "matrix with a short row": (
        matrix('[["-", "1 Gbit/s"], ["1 Gbit/s"]]'),
        "matrix.bandwidth[1]",
        "2 entries",
    ),
    "matrix with a diagonal": (
        matrix('[["9 Gbit/s", "1 Gbit/s"], ["1 Gbit/s", "-"]]'),
        "matrix.bandwidth[0][0]",
        "no link to itself",
    ),
    "matrix with a wrong unit": (
        matrix('[["-", "1 Gbit"], ["1 Gbit", "-"]]'),
        "matrix.bandwidth[0][1]",
        "no such unit",
    ),
    "matrix with an absurd bandwidth": (
        matrix('[["-", "1 bit/s"], ["1 bit/s", "-"]]'),
        "matrix.bandwidth[0][1]",
        "1 bit/s",
    ),
    "matrix latency without a link": (
        matrix('[["-", "-"], ["-", "-"]]', '[["-", "5 us"], ["5 us", "-"]]'),
        "matrix.latency[0][1]",
        "where there is a bandwidth",
    ),
    "matrix latency misshapen": (
        matrix('[["-", "1 Gbit/s"], ["1 Gbit/s", "-"]]', '[["-"], ["5 us", "-"]]'),
        "matrix.latency[0]",
        "2 entries",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_named_with_its_field(case):
    text, field, message = BAD[case]
    with pytest.raises(ClusterError) as caught:
        read(text)
    problems = [each for each in caught.value.problems if each.field == field]
    assert problems, [str(each) for each in caught.value.problems]
    assert any(message in str(problem) for problem in problems), str(caught.value)
    assert problems[0].source == "c.toml"


def test_all_mistakes_are_reported_at_once():
    text = (
        GOOD.replace("10 Gbit/s", "10").replace("2 x T4", "2 x T5", 1)
        + 'count = 0\nsite = "moon"\n'
        + "[device.T4]\nmatmul_efficiency = 2\n"
    )
    with pytest.raises(ClusterError) as caught:
        read(text.replace("format = 1", "format = 7"))
    assert {problem.field for problem in caught.value.problems} == {
        "format",
        "links.network.bandwidth",
        "node[0].devices[0]",
        "node[1].count",
        "node[1].site",
        "device.T4.matmul_efficiency",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"format = ", "TOML"), (b"\xff\xfe", "readable text")],
)
def test_a_file_that_is_none_is_named(tmp_path, content, message):
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClusterError, match=message) as caught:
        load_cluster(path)
    assert str(path) in str(caught.value)


links = st.builds(
    Link,
    bandwidth=st.floats(1e3, 1e14),
    latency=st.one_of(st.just(0.0), st.floats(1e-9, 10.0)),
    shared=st.booleans(),
)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True)
shares = st.floats(0.01, 1.0)
kinds = st.builds(
    DeviceType,
    name=st.one_of(names, st.sampled_from(["T4", "H100", "cpu"])),
    memory=st.integers(2**20, 2**44),
    memory_bandwidth=st.floats(1e6, 1e15),
    peak=st.dictionaries(
        st.sampled_from(["fp64", "fp32", "fp16", "bf16"]), st.floats(1e6, 1e17), min_size=1
    ),
    matmul_efficiency=shares,
    attention_efficiency=shares,
    memory_efficiency=shares,
    source=st.text(st.characters(blacklist_categories=["Cs"]), max_size=20),
)


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
    direct = (
        (DirectLink(between=(nodes[0].name, nodes[-1].name), link=draw(links)),)
        if len(nodes) > 1 and draw(st.booleans())
        else ()
    )
    return Cluster(
        name=draw(st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)),
        types=types,
        nodes=tuple(nodes),
        sites=tuple(sites),
        direct=direct,
    )


@given(clusters())
def test_text_and_back_is_the_same_cluster(cluster):
    assert read(dump_cluster(cluster)) == cluster
