"""Cluster files of several hosts, put together."""

from __future__ import annotations

import codecs
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.discover import discover_toml, hardware_cluster
from meshwright.cluster.estimate import DriverFigures
from meshwright.cluster.files import cluster_from, dump_cluster, load_cluster
from meshwright.cluster.hardware import Gpu, MachineHardware
from meshwright.cluster.merge import merged, merged_toml
from meshwright.cluster.networks import USUAL_NETWORK
from meshwright.cluster.spec import Cluster
from meshwright.errors import ClusterError

GIB = 2**30
TWO = """\
format = 1
name = "two"
[links]
network = { bandwidth = "10 Gbit/s", latency = "50 us" }
[[site]]
name = "north"
uplink = { bandwidth = "1 Gbit/s", latency = "5 ms" }
[[node]]
name = "x"
count = 2
devices = ["2 x mine"]
site = "north"
address = ["10.0.0.1", "10.0.0.2"]
[device.mine]
like = "T4"
memory = "12 GiB"
[[link]]
between = ["x-0", "x-1"]
bandwidth = "100 Gbit/s"
latency = "5 us"
"""


def host(name: str, *cards: tuple[str, int]) -> MachineHardware:
    told = DriverFigures(multiprocessors=40, memory_rate=5e11)
    gpus = tuple(
        Gpu(name=card, memory=gib * GIB, capability=(8, 6), figures=told) for card, gib in cards
    )
    return MachineHardware(name=name, gpus=gpus, cores=4, memory=64 * GIB, network=USUAL_NETWORK)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def together(text: str) -> Cluster:
    return cluster_from(tomllib.loads(text), source="together")


def test_files_of_several_hosts_are_one_file(tmp_path: Path) -> None:
    paths = [
        written(tmp_path, "a", discover_toml(host("a", ("Tesla T4", 15), ("Tesla T4", 15)))),
        written(tmp_path, "b", discover_toml(host("b", ("NVIDIA GeForce RTX 3080", 12)))),
        written(tmp_path, "two", TWO),
    ]
    text, notes = merged_toml(paths)
    cluster = together(text)
    parts = [load_cluster(path) for path in paths]
    assert cluster.nodes == tuple(node for part in parts for node in part.nodes)
    assert cluster.direct == parts[2].direct
    assert cluster.endpoints == parts[2].endpoints
    assert [site.name for site in cluster.sites] == ["main", "north"]
    assert {**parts[0].types, **parts[1].types, **parts[2].types} == cluster.types
    assert cluster.name == "a + b + two"
    assert notes == ()


def test_what_the_files_say_is_unusual_is_still_said(tmp_path: Path) -> None:
    paths = [
        written(tmp_path, name, discover_toml(host(name, ("NVIDIA A2", 8)))) for name in ("a", "b")
    ]
    text, _ = merged_toml(paths)
    assert text.count("not as the A2 of the catalogue") > 2
    assert f"# {paths[1]}:\n#   Found on this machine." in text


def test_types_that_differ_under_one_name_stay_apart() -> None:
    def part(name: str, memory: str) -> tuple[str, Cluster]:
        text = TWO.replace('"12 GiB"', f'"{memory}"').replace('"x', f'"{name}')
        return name, cluster_from(tomllib.loads(text), source=name)

    parts = [part("a", "12 GiB"), part("b", "10 GiB"), part("c", "10 GiB"), part("d", "12 GiB")]
    cluster, notes = merged(parts)
    kinds = [node.devices[0] for node in cluster.nodes[::2]]
    assert kinds == ["mine", "mine-b-0", "mine-b-0", "mine"]
    assert cluster.types["mine"].memory == 12 * GIB
    assert cluster.types["mine-b-0"].memory == 10 * GIB
    assert notes[0] == "mine of b is mine-b-0 here: it has other figures"
    assert cluster_from(tomllib.loads(dump_cluster(cluster)), source="dumped") == cluster


def test_a_changed_type_of_the_catalogue_does_not_change_that_of_others() -> None:
    own = TWO.replace("[device.mine]\nlike", "[device.T4]\nlike").replace("mine", "T4")
    own = own.replace('like = "T4"\n', "")
    parts = [
        ("own", cluster_from(tomllib.loads(own), source="own")),
        ("known", hardware_cluster(host("known", ("Tesla T4", 15)))[0]),
    ]
    cluster, _ = merged(parts)
    assert cluster.nodes[-1].devices == ("T4-known",)
    assert cluster.types["T4-known"].memory == 14 * GIB
    assert cluster.types["T4"].memory == 12 * GIB


def test_files_that_were_joined_by_hand_name_the_command(tmp_path: Path) -> None:
    card = ("NVIDIA GeForce RTX 3080", 10)
    joined = written(tmp_path, "joined", TWO + discover_toml(host("b", card)).split("\n\n", 2)[2])
    with pytest.raises(ClusterError, match=r"meshwright discover --merge a\.toml b\.toml"):
        load_cluster(joined)


def test_two_nodes_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [written(tmp_path, name, discover_toml(host("box"))) for name in ("a", "b")]
    with pytest.raises(ClusterError) as caught:
        merged_toml(paths)
    told = str(caught.value)
    assert f"{paths[1]}: node.name: found 'box', which is in {paths[0]} too" in told
    assert "another name" in told


def test_one_site_with_two_uplinks_is_refused(tmp_path: Path) -> None:
    other = TWO.replace('"1 Gbit/s"', '"2 Gbit/s"').replace('"x', '"y')
    with pytest.raises(ClusterError, match="'north' with another uplink"):
        merged_toml([written(tmp_path, "a", TWO), written(tmp_path, "b", other)])


def test_every_mistake_in_every_file_is_told(tmp_path: Path) -> None:
    bad = TWO.replace('"12 GiB"', "12")
    paths = [written(tmp_path, name, bad) for name in ("a", "b")]
    with pytest.raises(ClusterError) as caught:
        merged_toml([*paths, tmp_path / "none.toml"])
    assert [problem.source for problem in caught.value.problems] == [
        str(path) for path in (*paths, tmp_path / "none.toml")
    ]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_are_read_as_windows_saves_them(tmp_path: Path, mark: bytes, end: str) -> None:
    saved = tmp_path / "saved.toml"
    commented = f"# its network is ASSUMED\n{TWO}"
    saved.write_bytes(mark + commented.replace("\n", end).encode())
    plain = written(tmp_path, "plain", TWO)
    assert load_cluster(saved) == load_cluster(plain)
    text, _ = merged_toml([saved])
    assert together(text) == load_cluster(plain)
    assert "#   its network is ASSUMED\n" in text
    assert "\r" not in text


CARDS = st.tuples(
    st.sampled_from(["NVIDIA GeForce RTX 3080", "Tesla T4", "AMD Instinct MI300X", "cpu", ""]),
    st.sampled_from([8, 10, 12, 15, 192]),
)


@given(st.lists(st.lists(CARDS, max_size=3), min_size=1, max_size=5))
def test_any_hosts_together_have_what_each_has(hosts: list[list[tuple[str, int]]]) -> None:
    parts = [(f"h{i}", hardware_cluster(host(f"h{i}", *cards))[0]) for i, cards in enumerate(hosts)]
    cluster, _ = merged(parts)
    assert cluster_from(tomllib.loads(dump_cluster(cluster)), source="dumped") == cluster
    for node, (_, own) in zip(cluster.nodes, parts, strict=True):
        before = own.nodes[0]
        assert (node.name, node.inside, node.network) == (
            before.name,
            before.inside,
            before.network,
        )
        for now, then in zip(node.devices, before.devices, strict=True):
            mine, its = cluster.types[now], own.types[then]
            assert (mine.memory, mine.peak) == (its.memory, its.peak)
