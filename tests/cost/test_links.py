"""Measured pairs of devices to the links of a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.files import cluster_from
from meshwright.cluster.spec import Cluster, Islands, Link, devices_of
from meshwright.cluster.topology import path, topology
from meshwright.cost.collective import all_reduce, uncontended_seconds
from meshwright.cost.links import (
    CollectiveTimes,
    LinkReport,
    MessageTime,
    collective_times,
    fit_line,
    fitted_cluster,
    load_links,
    pair_classes,
    pair_times,
    with_measured_links,
)
from meshwright.cost.profile import LinkTimes
from meshwright.errors import ProfileError
from meshwright.records import dumps

SIZES = (4096, 2**18, 2**20, 2**22)


def _cluster(rates: dict[str, str], uplink: str | None = None) -> Cluster:
    """A node of two devices for each rate; with an uplink, each at a site of its own."""
    return cluster_from(
        {
            "format": 1,
            "name": "x",
            **({"site": [{"name": n, "uplink": {"bandwidth": uplink, "latency": "1 ms"}}
                         for n in rates]} if uplink else {}),
            "node": [
                {"name": n, "devices": ["2 x T4"],
                 "inside": {"bandwidth": "80 Gbit/s", "latency": "10 us"},
                 "network": {"bandwidth": rate, "latency": "50 us"},
                 **({"site": n} if uplink else {})}
                for n, rate in rates.items()
            ],
        },
        source="x",
    )  # fmt: skip


def _measured(cluster: Cluster) -> LinkReport:
    """What perfect measurements on this cluster would show."""
    links = topology(cluster)
    pairs = []
    for one, other in pair_classes(cluster, devices_of(cluster)).values():
        way = path(links, one.name, other.name)
        rate = min(links.capacities[name] for name in way.resources)
        points = [MessageTime(bytes=size, seconds=way.latency + size / rate) for size in SIZES]
        pairs.append(pair_times((one.name, other.name), points, None))
    return LinkReport(pairs=tuple(pairs))


def test_a_cluster_is_found_again_from_its_messages() -> None:
    true = _cluster({"a": "10 Gbit/s", "b": "10 Gbit/s", "c": "2 Gbit/s"})
    nodes = tuple(
        replace(node, network=replace(node.network, bandwidth=node.network.bandwidth * 3))
        for node in true.nodes
    )
    stated = replace(true, nodes=nodes)
    found = fitted_cluster(stated, _measured(true))
    for node, wanted in zip(found.nodes, true.nodes, strict=True):
        assert node.network.bandwidth == pytest.approx(wanted.network.bandwidth)
        assert node.network.latency == pytest.approx(wanted.network.latency)
        assert node.inside.bandwidth == pytest.approx(wanted.inside.bandwidth)


def test_the_links_of_islands_are_found_again_from_their_messages() -> None:
    """Guessed as fast as the rest of the node, they are measured apart from it."""
    where = _cluster({"a": "10 Gbit/s", "b": "10 Gbit/s"})
    joined = Islands(groups=((0, 1),), link=Link(bandwidth=5e10, latency=5e-6))
    four = replace(where.nodes[0], devices=("T4",) * 4, islands=joined)
    where = replace(where, nodes=(four, where.nodes[1]))
    assert {kind[0] for kind in pair_classes(where, devices_of(where))} == {
        "islands",
        "inside",
        "network",
    }
    guess = replace(joined, link=four.inside)
    guessed = replace(where, nodes=(replace(four, islands=guess), where.nodes[1]))
    fitted = fitted_cluster(guessed, _measured(where))
    assert fitted.nodes[0].islands is not None
    assert fitted.nodes[0].islands.link.bandwidth == pytest.approx(5e10)
    assert fitted.nodes[0].inside.bandwidth == pytest.approx(1e10)


def test_a_profile_s_links_replace_those_of_islands_too() -> None:
    where = _cluster({"a": "10 Gbit/s"})
    joined = Islands(groups=((0, 1),), link=Link(bandwidth=5e10, latency=5e-6))
    where = replace(where, nodes=(replace(where.nodes[0], islands=joined),))
    slow, quick = Link(bandwidth=1e9), Link(bandwidth=4e10)
    (node,) = with_measured_links(where, LinkTimes(inside=slow)).nodes
    assert (node.inside, node.islands) == (slow, joined)
    (node,) = with_measured_links(where, LinkTimes(islands=quick)).nodes
    assert node.islands == replace(joined, link=quick)


def test_a_bottleneck_between_sites_belongs_to_the_uplink() -> None:
    sites = _cluster({"a": "10 Gbit/s", "b": "10 Gbit/s"}, uplink="1 Gbit/s")
    found = fitted_cluster(sites, _measured(sites))
    links = topology(found)
    way = path(links, "a:0", "b:0")
    assert min(links.capacities[n] for n in way.resources) == pytest.approx(1.25e8)


def test_what_is_slow_between_sites_slows_no_pair_inside_one() -> None:
    """Nodes a and b are at one site, c and d at another, and as quick as ever there. The uplinks
    are stated ten times as fast as they are."""
    apart = _cluster(dict.fromkeys("abcd", "10 Gbit/s"), uplink="1 Gbit/s")
    a, b, c, d = apart.nodes
    sites = replace(apart, nodes=(a, replace(b, site=a.site), c, replace(d, site=c.site)))
    hoped = tuple(replace(s, uplink=Link(bandwidth=1.25e9, latency=1e-3)) for s in sites.sites)
    found = fitted_cluster(replace(sites, sites=hoped), _measured(sites))
    ways = {two: path(topology(found), "a:0", two) for two in ("b:0", "c:0")}
    slowest = {
        two: min(topology(found).capacities[n] for n in way.resources) for two, way in ways.items()
    }
    assert slowest == pytest.approx({"b:0": 1.25e9, "c:0": 1.25e8})


def test_a_burst_does_not_pass_for_bandwidth() -> None:
    rate, burst = 2.5e7, 50_000
    points = [MessageTime(bytes=s, seconds=1e-4 + max(s - burst, 0) / rate) for s in SIZES]
    assert pair_times(("a:0", "b:0"), points, None).bandwidth == pytest.approx(rate)


def test_a_pair_that_gets_less_alone_than_two_together_shows_a_limit_of_single_flows() -> None:
    """One message 2.4 GB/s; two at the same time 4.8, as long as one alone."""
    true = _cluster({"a": "48 Gbit/s", "b": "48 Gbit/s"})
    (pair,) = (p for p in _measured(true).pairs if {x[0] for x in p.between} == {"a", "b"})
    alone = [MessageTime(bytes=p.bytes, seconds=5e-5 + p.bytes / 2.4e9) for p in pair.points]
    for seconds, limit in ((alone[-1].seconds, 2.4e9), (2 * alone[-1].seconds, None)):
        crowded = MessageTime(bytes=alone[-1].bytes, seconds=seconds)
        seen = LinkReport(pairs=(pair_times(pair.between, alone, crowded),))
        network = fitted_cluster(true, seen).nodes[0].network
        assert network.single_flow == (pytest.approx(limit) if limit else None)
        assert network.bandwidth == pytest.approx(4.8e9 if limit else 2.4e9, rel=0.05)


def test_two_pairs_that_share_a_link_take_the_time_of_twice_the_bytes() -> None:
    points = [MessageTime(bytes=s, seconds=s / 1e8) for s in SIZES]
    found = pair_times(("a:0", "b:0"), points, MessageTime(bytes=2**20, seconds=2 * 2**20 / 1e8))
    assert found.sharing == pytest.approx(1.0)
    assert found.residual == pytest.approx(0.0, abs=1e-9)


def test_all_reduces_show_the_cost_of_a_step() -> None:
    cluster = _cluster({"a": "10 Gbit/s", "b": "10 Gbit/s"})
    names = [device.name for device in devices_of(cluster)]
    links = topology(cluster)
    points = [
        MessageTime(bytes=size, seconds=uncontended_seconds(links, all_reduce(links, names, size,
                                                                  step_latency=3e-4)))
        for size in SIZES
    ]  # fmt: skip
    found = collective_times(cluster, points)
    assert found.step_latency == pytest.approx(3e-4)
    assert found.residuals == pytest.approx([0.0] * len(SIZES), abs=1e-9)


def test_a_report_is_read_for_the_cluster_that_it_is_of(tmp_path):
    cluster = _cluster({"a": "1 Gbit/s", "b": "1 Gbit/s"})
    points = tuple(MessageTime(bytes=size, seconds=1e-5 + size / 1e8) for size in SIZES)
    pair = pair_times(("a:0", "b:0"), points, None)
    whole = CollectiveTimes(points=points, step_latency=0.0, residuals=(0.0,) * len(points))
    good = LinkReport(pairs=(pair,), all_reduce=whole)
    path = tmp_path / "links.json"
    path.write_text(dumps(good))
    assert load_links(path, cluster) == good
    strange = replace(pair, between=("a:0", "z:0"))
    path.write_text(dumps(replace(good, pairs=(strange,), all_reduce=replace(whole, residuals=()))))
    with pytest.raises(ProfileError) as caught:
        load_links(path, cluster)
    assert [p.field for p in caught.value.problems] == [
        "pairs[0].between", "all_reduce.residuals"
    ]  # fmt: skip


@given(st.floats(1e-6, 1e-2), st.floats(1e6, 1e11))
def test_a_line_is_recovered(latency, bandwidth):
    seconds = [latency + size / bandwidth for size in SIZES]
    found = fit_line(SIZES, seconds)
    predicted = [found[0] + size / found[1] for size in SIZES]
    assert predicted == pytest.approx(seconds, rel=1e-6)


@given(st.lists(st.floats(1e-6, 1.0), min_size=len(SIZES), max_size=len(SIZES)))
def test_a_fit_to_noise_is_still_a_link(seconds):
    latency, bandwidth = fit_line(SIZES, seconds)
    assert latency >= 0
    assert bandwidth > 0
