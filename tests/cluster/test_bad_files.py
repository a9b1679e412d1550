"""Every mistake that a cluster file can hold."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.files import cluster_from, dump_cluster, load_cluster
from meshwright.cluster.spec import Cluster
from meshwright.errors import ClusterError


def read(text: str) -> Cluster:
    return cluster_from(tomllib.loads(text), source="c.toml")


LINKS = '[links]\nnetwork = { bandwidth = "10 Gbit/s", latency = "50 us" }\n'
NODE = '[[node]]\nname = "a"\ndevices = ["2 x T4"]\n'
OTHER = '[[node]]\nname = "b"\ndevices = ["2 x T4"]\n'
GOOD = "format = 1\n" + LINKS + NODE + OTHER
NEW = '[device.New]\nmemory = "8 GiB"\nmemory_bandwidth = "1 GB/s"\npeak = { fp32 = "1 TFLOP/s" }\n'


def matrix(bandwidth: str, latency: str = '"5 us"', nodes: str = '["a", "b"]') -> str:
    return GOOD + f"[matrix]\nnodes = {nodes}\nbandwidth = {bandwidth}\nlatency = {latency}\n"


def pair(between: str, bandwidth: str = "1 Gbit/s") -> str:
    return f'[[link]]\nbetween = {between}\nbandwidth = "{bandwidth}"\nlatency = "5 us"\n'


def island(devices: str, more: str = "") -> str:
    link = 'bandwidth = "50 GB/s", latency = "5 us"'
    return f"islands = {{ devices = {devices}, {link}{more} }}\n"


BAD = {
    "format missing": (LINKS + NODE, "format", "nothing"),
    "format of another version": ("format = 2\n" + NODE, "format", "format 1"),
    "islands of nobody": (GOOD + island("[]"), "node[1].islands.devices", "at least one group"),
    "an island of one": (GOOD + island("[[0]]"), "node[1].islands.devices[0]", "two devices"),
    "an island of strangers": (
        GOOD + island("[[0, 2]]"),
        "node[1].islands.devices[0]",
        "2 devices, from 0",
    ),
    "a device before the first": (
        GOOD + island("[[-1, 0]]"),
        "node[1].islands.devices[0][0]",
        "0",
    ),
    "islands that overlap": (
        GOOD + island("[[0, 1], [1, 0]]"),
        "node[1].islands.devices",
        "each device in one group at most",
    ),
    "an island on a bus": (
        GOOD + island("[[0, 1]]", ", shared = true"),
        "node[1].islands.shared",
        "one of: devices, bandwidth, latency",
    ),
    "an island that is slower": (
        GOOD + 'inside = { bandwidth = "99 GB/s", latency = "1 us" }\n' + island("[[0, 1]]"),
        "node[1].islands.bandwidth",
        "at least that of `inside`, 792 Gbit/s",
    ),
    "an island beyond the possible": (
        GOOD + island("[[0, 1]]").replace("50 GB", "500 TB"),
        "node[1].islands.bandwidth",
        "to 800 Tbit/s",
    ),
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
    "half a type": (
        GOOD.replace("2 x T4", "2 x A100", 1),
        "node[0].devices[0]",
        "Did you mean 'A100-40' or 'A100-40-PCIe' or 'A100-80' or 'A100-80-PCIe'?",
    ),
    "no such notation": (GOOD.replace("2 x T4", "T4 x 2", 1), "node[0].devices[0]", "4 x T4"),
    "zero devices": (GOOD.replace("2 x T4", "0 x T4", 1), "node[0].devices[0]", "4 x T4"),
    "empty node": (GOOD.replace('["2 x T4"]', "[]", 1), "node[0].devices", "at least one"),
    "count of zero": (GOOD + "count = 0", "node[1].count", "1 or more"),
    "count of a half": (GOOD + "count = 1.5", "node[1].count", "a whole number"),
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
    "no network": ("format = 1\n" + NODE + OTHER, "node[0-1].network", "links.network"),
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
        "a finite number",
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


WHOLE = tomllib.loads(
    GOOD
    + 'count = 2\nsite = "s"\ninside = { bandwidth = "1 GB/s", latency = "1 us", shared = true }\n'
    + '[[site]]\nname = "s"\nuplink = { bandwidth = "1 GB/s", latency = "1 ms" }\n'
    + NEW
    + pair('["b-0", "b-1"]')
    + '[matrix]\nnodes = ["a", "b-0"]\nbandwidth = [["-", "1 GB/s"], ["1 GB/s", "-"]]\n'
    + 'latency = "5 us"\n'
)
JUNK = st.sampled_from(
    [None, True, -1, 0, 2.5, float("nan"), float("inf"), "", "-", "a", "0 x T4", "1e999 GB/s"]
) | st.sampled_from([[], [[]], {}, ["-"], [{}], [[], "x"], {"a": {}}, {"": 1}])


def spoiled(value: object, data: st.DataObject) -> object:
    """`value` with one thing in it, however deep, replaced by junk or left out."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 3)) == 0:
        return data.draw(JUNK)
    key = data.draw(st.sampled_from([*value] if isinstance(value, dict) else range(len(value))))
    copy = value.copy()
    if data.draw(st.integers(0, 4)) == 0:
        del copy[key]
    else:
        copy[key] = spoiled(value[key], data)
    return copy


@given(st.data())
def test_a_spoiled_file_is_refused_in_words_or_still_makes_sense(data):
    content = {
        key: spoiled(value, data) if data.draw(st.booleans()) else value
        for key, value in WHOLE.items()
    }
    try:
        cluster = cluster_from(content, source="c.toml")
    except ClusterError as refusal:
        vague = [each for each in refusal.problems if not each.field or not each.wanted]
    else:
        vague = []
        assert read(dump_cluster(cluster)) == cluster
    assert vague == []


def test_the_whole_file_that_is_spoiled_above_is_good():
    assert len(cluster_from(WHOLE, source="c.toml").direct) == 2


def test_a_cluster_may_have_a_hundred_thousand_devices_and_no_more():
    text = "format = 1\n" + LINKS + NODE
    largest = read(text.replace("2 x", "100000 x"))
    assert len(largest.nodes[0].devices) == 100_000
    with pytest.raises(ClusterError, match="100,001 devices"):
        read(text.replace("2 x", "100001 x"))
