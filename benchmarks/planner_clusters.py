"""Clusters of every shape and size on which planning is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import combinations

from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import Cluster, DirectLink, Link, Node, Site

MIXED = ("A100-80", "V100-32", "T4")
NODE = 8
UPLINK = Link(bandwidth=12.5e9, latency=5e-4)
FAR = Link(bandwidth=1.25e9, latency=15e-3)
"""The uplink of a region."""

Nodes = tuple[int, str, int, float]
"""How many nodes, the device type, devices of each, and its network in bits per second."""


def mixed_cluster(devices: int) -> Cluster:
    """Half the nodes of the first type, a quarter of each other one; the slowest at a second site
    behind a thin uplink."""
    count = devices // NODE
    shares = (count - 2 * (count // 4), count // 4, count // 4) if count > 2 else (1, count - 1, 0)
    home = [(number, kind, NODE, 100e9) for number, kind in zip(shares, MIXED, strict=True)]
    sites = {"home": home[:2], "away": home[2:]}
    return _cluster(f"mixed-{devices}", sites, UPLINK, latency=5e-6)


def four_types(devices: int) -> Cluster:
    """Of 64 devices 8 are A100, 16 A10G, 16 V100 and 24 T4, in the nodes that clouds rent out."""
    if devices < 64:
        each = devices // 16
        nodes = [(each, kind, 4, 40e9) for kind in ("A100-40", "A10G", "V100-16", "T4")]
    else:
        each = devices // 64
        nodes = [
            (each, "A100-40", 8, 400e9),
            (4 * each, "A10G", 4, 40e9),
            (2 * each, "V100-16", 8, 25e9),
            (6 * each, "T4", 4, 50e9),
        ]
    return _cluster(f"four-types-{devices}", {"here": nodes}, None)


def regions(devices: int) -> Cluster:
    """Four types in two regions, 64 devices in each for every 128."""
    each = devices // 128
    east = [(2 * each, "A100-40", 8, 400e9), (12 * each, "T4", 4, 50e9)]
    west = [(2 * each, "V100-16", 8, 25e9), (12 * each, "A10G", 4, 40e9)]
    return _cluster(f"regions-{devices}", {"east": east, "west": west}, FAR)


def three_regions(devices: int) -> Cluster:
    """Two types in each of three regions."""
    each = devices // 192
    pairs = {"east": ("A100-40", "T4"), "west": ("V100-16", "A10G"), "south": ("A100-80", "L4")}
    sites = {
        site: [(4 * each, fast, 8, 100e9), (8 * each, slow, 4, 50e9)]
        for site, (fast, slow) in pairs.items()
    }
    return _cluster(f"three-regions-{devices}", sites, FAR)


def one_type(devices: int) -> Cluster:
    """Equal nodes of eight."""
    return _cluster(f"one-type-{devices}", {"here": [(devices // 8, "A100-80", 8, 200e9)]}, None)


def single_devices(devices: int) -> Cluster:
    """Nodes of one device."""
    return _cluster(f"single-devices-{devices}", {"here": [(devices, "T4", 1, 10e9)]}, None)


def two_halves(devices: int) -> Cluster:
    """Half the devices of one type, half of another, in nodes of eight."""
    half = devices // 16
    nodes = [(half, "A100-80", 8, 100e9), (half, "V100-32", 8, 100e9)]
    return _cluster(f"two-halves-{devices}", {"here": nodes}, None)


def eight_sites(devices: int) -> Cluster:
    """Nodes of eight spread over eight sites, of two types in turns."""
    each = devices // 64
    sites = {f"site{i}": [(each, ("A100-80", "V100-32")[i % 2], 8, 100e9)] for i in range(NODE)}
    return _cluster(f"eight-sites-{devices}", sites, UPLINK)


def cabled_pairs(devices: int) -> Cluster:
    """The mixed cluster, every second node joined to the next by a cable of its own."""
    plain = mixed_cluster(devices)
    names = [node.name for node in plain.nodes]
    cable = Link(bandwidth=50e9, latency=2e-6)
    direct = tuple(
        DirectLink(between=pair, link=cable) for pair in zip(names[::2], names[1::2], strict=False)
    )
    return replace(plain, name=f"cabled-pairs-{devices}", direct=direct)


def every_link(devices: int) -> Cluster:
    """Nodes of four of two types, whose links are all given pair by pair."""
    half = devices // 8
    nodes = [(half, "A100-40", 4, 100e9), (half, "V100-16", 4, 100e9)]
    plain = _cluster(f"every-link-{devices}", {"here": nodes}, None)
    links = (Link(bandwidth=12.5e9, latency=2e-5), Link(bandwidth=3e9, latency=5e-5))
    direct = tuple(
        DirectLink(between=(a.name, b.name), link=links[a.devices != b.devices])
        for a, b in combinations(plain.nodes, 2)
    )
    return replace(plain, direct=direct)


@dataclass(frozen=True, slots=True)
class Kind:
    """Clusters of one kind."""

    build: Callable[[int], Cluster]
    """Makes one of so many devices."""
    sizes: tuple[int, ...]
    """Devices of those that are timed."""


KINDS = {
    "mixed": Kind(mixed_cluster, (16, 128, 1024, 10240)),
    "four-types": Kind(four_types, (16, 64, 128, 1024, 10240)),
    "regions": Kind(regions, (128, 10240)),
    "three-regions": Kind(three_regions, (192,)),
    "one-type": Kind(one_type, (8000,)),
    "single-devices": Kind(single_devices, (10000,)),
    "two-halves": Kind(two_halves, (10000,)),
    "eight-sites": Kind(eight_sites, (10240,)),
    "cabled-pairs": Kind(cabled_pairs, (1024, 10240)),
    "every-link": Kind(every_link, (64, 256)),
}

MANY_TYPES = {"four-types", "regions", "three-regions"}
"""Kinds of four types and more."""


def _cluster(
    name: str, sites: dict[str, list[Nodes]], uplink: Link | None, *, latency: float = 5e-5
) -> Cluster:
    """The nodes of each site in a row."""
    entries = catalog()
    every = [(site, *each) for site, nodes in sites.items() for each in nodes if each[0]]
    nodes = tuple(
        Node(
            name=f"n{number}",
            site=site,
            devices=(kind,) * width,
            inside=entries[kind].inside,
            network=Link(bandwidth=bits / 8, latency=latency),
        )
        for number, (site, kind, width, bits) in enumerate(_one_by_one(every))
    )
    return Cluster(
        name=name,
        types={kind: entries[kind].type for kind in sorted({kind for _, _, kind, _, _ in every})},
        nodes=nodes,
        sites=tuple(Site(name=site, uplink=uplink) for site in sites),
    )


def _one_by_one(
    every: Iterable[tuple[str, int, str, int, float]],
) -> Iterable[tuple[str, str, int, float]]:
    for site, number, kind, width, bits in every:
        yield from [(site, kind, width, bits)] * number
