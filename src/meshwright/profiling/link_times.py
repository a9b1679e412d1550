"""Measures links from messages of several sizes: level by level, or for every class of device
pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.distributed as dist

from meshwright.cluster.spec import Cluster, Device, Link, devices_of
from meshwright.cluster.topology import path, topology
from meshwright.cost.links import (
    LinkReport,
    MessageTime,
    collective_times,
    fit_line,
    fitted_cluster,
    measured_link,
    pair_classes,
    pair_times,
)
from meshwright.cost.profile import LinkTimes
from meshwright.records import record
from meshwright.runtime.exchange import broadcast_record

SIZES = (2**12, 2**16, 2**20, 2**22)
"""Message sizes in bytes: small ones show the latency, large ones the bandwidth."""

LEVELS = ("islands", "inside", "network", "site")
"""Levels of the cluster's hierarchy: inside an island of a node, inside a node, between nodes of a
site, between sites."""


def measure_links(cluster: Cluster, device: torch.device, *, repeats: int) -> LinkTimes | None:
    """Measures the links of every level that two ranks span, and returns the same answer on every
    rank.

    Rank n runs on the cluster's device n. Returns None with a single rank.
    """
    world = dist.get_world_size()
    if world < 2:
        return None
    devices = devices_of(cluster)[:world]
    found: dict[str, Link] = {}
    for level, (a, b) in representative_pairs(devices).items():
        inside = next(node.inside for node in cluster.nodes if node.name == devices[a].node)
        points = [_median(one_round_trip(((a, b),), size, device), repeats) for size in SIZES]
        latency, bandwidth = fit_line(SIZES, points)
        together = _together(devices, a, b, latency, device, repeats)
        shared = level == "inside" and inside.shared
        found[level] = measured_link(latency, bandwidth, together, shared=shared)
    small = _median(one_all_reduce(SIZES[0], device), repeats)
    own = LinkTimes(all_reduce_latency=small / (2 * (world - 1)), **found)
    return broadcast_record(0, own, LinkTimes)


def representative_pairs(devices: Sequence[Device]) -> dict[str, tuple[int, int]]:
    """Returns the first pair of ranks at each level that any pair spans."""
    pairs: dict[str, tuple[int, int]] = {}
    for a, one in enumerate(devices):
        for b in range(a + 1, len(devices)):
            other = devices[b]
            parted = (one.island is None or one.island != other.island, one.node != other.node,
                      one.site != other.site)  # fmt: skip
            pairs.setdefault(LEVELS[sum(parted)], (a, b))
    return dict(sorted(pairs.items(), key=lambda item: LEVELS.index(item[0])))


def _together(
    devices: Sequence[Device],
    a: int,
    b: int,
    latency: float,
    device: torch.device,
    repeats: int,
) -> float | None:
    """Measures the bytes per second of messages of all devices of two nodes at the same time; None
    inside a node, and where a node has one device."""
    here, there = (
        [rank, *(r for r, d in enumerate(devices) if d.node == devices[rank].node and r != rank)]
        for rank in (a, b)
    )
    pairs = tuple(zip(here, there, strict=False))
    if devices[a].node == devices[b].node or len(pairs) < 2:
        return None
    seconds = _median(one_round_trip(pairs, SIZES[-1], device), repeats)
    return len(pairs) * SIZES[-1] / max(seconds - latency, 1e-9)


def one_round_trip(
    pairs: Sequence[tuple[int, int]], size: int, device: torch.device
) -> Callable[[], float]:
    """Returns a function that measures the time of a message one way, as half a round trip between
    the first pair, while the other pairs do the same."""
    rank = dist.get_rank()
    data = torch.zeros(size, dtype=torch.uint8, device=device)

    def act() -> float:
        dist.barrier()
        start = time.perf_counter()
        for a, b in pairs:
            if rank == a:
                dist.send(data, b)
                dist.recv(data, b)
            elif rank == b:
                dist.recv(data, a)
                dist.send(data, a)
        _settle(device)
        return (time.perf_counter() - start) / 2

    return act


def one_all_reduce(size: int, device: torch.device) -> Callable[[], float]:
    """Returns a function that measures the seconds of one all-reduce of `size` bytes over all
    ranks."""
    data = torch.zeros(size // 4, device=device)

    def act() -> float:
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(data)
        _settle(device)
        return time.perf_counter() - start

    return act


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median(act: Callable[[], float], repeats: int) -> float:
    """Returns the median of this rank's samples, after two for warm-up."""
    return median([act() for _ in range(repeats + 2)][2:])


SMALL = 2**12
"""Size of the smallest message in bytes."""
LARGE_SECONDS = 0.15
"""Time that the largest message should take at the bandwidth in the cluster file: long compared
with the bursts that a shaped link lets through."""
LARGEST = 2**24
"""Most bytes that the largest message may have."""
REPEATS = (7, 5, 5, 3)
"""Number of messages of each size, after the warm-up."""
WARM_UP = 1
"""Number of first messages that do not count."""


@record
class RankLinkTimes:
    """Holds the times of one pair's messages, or of all-reduces, as one rank has measured them."""

    points: tuple[MessageTime, ...]
    crowded: MessageTime | None = None
    """The largest message while another pair of the same nodes sends too; None if there is no
    other."""


def measure_pairs(cluster: Cluster, device: torch.device) -> LinkReport:
    """Measures every class of pairs that the ranks form, and returns the same answer on all of
    them.

    Rank n runs on the cluster's device n.
    """
    devices = devices_of(cluster)[: dist.get_world_size()]
    rank_of = {each.name: rank for rank, each in enumerate(devices)}
    links = topology(cluster)
    pairs = []
    for one, other in pair_classes(cluster, devices).values():
        way = path(links, one.name, other.name)
        sizes = _sizes(min(links.capacities[name] for name in way.resources))
        ends = ((rank_of[one.name], rank_of[other.name]),)
        points = [
            MessageTime(
                bytes=size, seconds=_median_after_warm_up(one_round_trip(ends, size, device), count)
            )
            for size, count in zip(sizes, REPEATS, strict=True)
        ]
        crowded = _crowded(one, other, devices, rank_of, sizes[-1], device)
        # Both ranks of the pair have measured it: the first one's times count.
        seen = RankLinkTimes(points=tuple(points), crowded=crowded)
        seen = broadcast_record(ends[0][0], seen, RankLinkTimes)
        pairs.append(pair_times((one.name, other.name), seen.points, seen.crowded))
    report = LinkReport(pairs=tuple(pairs))
    if len(devices) < 2 or len(devices) < len(devices_of(cluster)):
        return report
    fitted = fitted_cluster(cluster, report)
    points = [
        MessageTime(bytes=size, seconds=_median_after_warm_up(one_all_reduce(size, device), count))
        for size, count in zip(_sizes(min(links.capacities.values())), REPEATS, strict=True)
    ]
    points = [*broadcast_record(0, RankLinkTimes(points=tuple(points)), RankLinkTimes).points]
    return LinkReport(pairs=report.pairs, all_reduce=collective_times(fitted, points))


def _sizes(bandwidth: float) -> tuple[int, ...]:
    """Returns the bytes of the messages that show a link of this bandwidth."""
    large = min(max(int(bandwidth * LARGE_SECONDS), 64 * SMALL), LARGEST) // 1024 * 1024
    return SMALL, large // 16 // 4 * 4, large // 4, large


def _crowded(
    one: Device,
    other: Device,
    devices: Sequence[Device],
    rank_of: dict[str, int],
    size: int,
    device: torch.device,
) -> MessageTime | None:
    """Measures the largest message while other devices of the same two nodes exchange as much;
    returns None if there are none."""
    here = [d for d in devices if d.node == one.node and d not in (one, other)]
    there = [d for d in devices if d.node == other.node and d not in (one, other, *here[:1])]
    if not here or not there:
        return None
    ends = ((rank_of[one.name], rank_of[other.name]), (rank_of[here[0].name],
            rank_of[there[0].name]))  # fmt: skip
    return MessageTime(
        bytes=size, seconds=_median_after_warm_up(one_round_trip(ends, size, device), REPEATS[-1])
    )


def _median_after_warm_up(act: Callable[[], float], repeats: int) -> float:
    return median([act() for _ in range(repeats + WARM_UP)][WARM_UP:])
