"""testbed.toml: what it means, and every mistake in it at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from beds import bed, mixed_cluster

from meshwright.errors import ClusterError, LaunchError
from meshwright.testbed.spec import (
    TestbedFile,
    check_room,
    device_shares,
    load_testbed,
    make_testbed,
)

INLINE = """\
format = 1
name = "pair"
mode = "dilation"
fastest_share = 0.4
bandwidth_scale = 0.01

[cluster]
format = 1
name = "pair"
[[cluster.node]]
name = "a"
devices = ["1 x V100-16"]
network = { bandwidth = "10 Gbit/s", latency = "50 us" }
[[cluster.node]]
name = "b"
devices = ["1 x T4"]
network = { bandwidth = "5 Gbit/s", latency = "50 us" }
"""


def test_shares_follow_the_peaks_and_links_the_scale(tmp_path: Path) -> None:
    path = tmp_path / "testbed.toml"
    path.write_text(INLINE)
    found = load_testbed(path)
    assert found.shares == pytest.approx({"V100-16": 0.4, "T4": 0.4 * 8.1 / 15.7})
    assert [n.network.bandwidth for n in found.cluster.nodes] == [1.25e7, 0.625e7]
    assert {kind.processor for kind in found.cluster.types.values()} == {"cpu"}


def test_a_cluster_file_is_looked_for_beside_the_testbed(tmp_path: Path) -> None:
    _, _, cluster = INLINE.partition("[cluster]\n")
    (tmp_path / "cluster.toml").write_text(cluster.replace("cluster.", ""))
    path = tmp_path / "testbed.toml"
    path.write_text('name = "pair"\nmode = "virtual"\ncluster = "cluster.toml"\n')
    assert [n.name for n in load_testbed(path).cluster.nodes] == ["a", "b"]


def test_a_given_share_replaces_the_one_that_follows_from_the_peak() -> None:
    found = bed("dilation", shares={"slow": 0.2})
    assert found.shares == {"fast": 0.4, "slow": 0.2}
    assert device_shares(found) == {"a:0": 0.4, "a:1": 0.4, "b:0": 0.2, "c:0": 0.2}


def test_every_mistake_is_named() -> None:
    entry = TestbedFile(
        name="x",
        cluster="",
        mode="dilation",
        shares={"fast": 1.5, "other": 0.1},
        bandwidth_scale=0.0,
        latency_scale=float("nan"),
        attempts=0,
    )
    with pytest.raises(ClusterError) as caught:
        make_testbed(entry, mixed_cluster(), source="testbed.toml")
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {
        "shares.fast", "shares.other", "shares.slow",
        "bandwidth_scale", "latency_scale", "attempts",
    }  # fmt: skip


def test_virtual_devices_have_no_shares() -> None:
    with pytest.raises(ClusterError, match="compute_scale"):
        bed("virtual", shares={"fast": 0.1})


def test_more_speed_than_the_machine_has_is_refused() -> None:
    check_room(bed("dilation"), cores=4, free_bytes=2**40)
    check_room(bed("quota"), cores=2, free_bytes=2**40)
    with pytest.raises(LaunchError, match=r"1\.00 cores for 4 devices.*at most 0\.90 \(1 of 2 c"):
        check_room(bed("dilation"), cores=2, free_bytes=2**40)


def test_more_devices_than_the_memory_holds_are_refused() -> None:
    with pytest.raises(LaunchError, match=r"4 devices.*at most 2"):
        check_room(bed(), cores=1, free_bytes=800 * 2**20)
