"""Measures messages between every class of device pairs, alone and while other pairs send too, and
all-reduces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.distributed as dist

from meshwright.cluster.spec import Cluster, Device, devices_of
from meshwright.cluster.topology import path, topology
from meshwright.cost.pairs import (
    LinkReport,
    Point,
    classes,
    collective_times,
    fitted_cluster,
    pair_times,
)
from meshwright.records import record
from meshwright.runtime.exchange import from_rank
from meshwright.runtime.profile_links import one_all_reduce, one_round_trip

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
class Seen:
    """The times of one pair's messages, or of all-reduces, as one rank has measured them."""

    points: tuple[Point, ...]
    crowded: Point | None = None
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
    for one, other in classes(cluster, devices).values():
        way = path(links, one.name, other.name)
        sizes = _sizes(min(links.capacities[name] for name in way.resources))
        ends = ((rank_of[one.name], rank_of[other.name]),)
        points = [
            Point(bytes=size, seconds=_median(one_round_trip(ends, size, device), count))
            for size, count in zip(sizes, REPEATS, strict=True)
        ]
        crowded = _crowded(one, other, devices, rank_of, sizes[-1], device)
        # Both ranks of the pair have measured it: the first one's times count.
        seen = Seen(points=tuple(points), crowded=crowded)
        seen = from_rank(ends[0][0], seen, Seen)
        pairs.append(pair_times((one.name, other.name), seen.points, seen.crowded))
    report = LinkReport(pairs=tuple(pairs))
    if len(devices) < 2 or len(devices) < len(devices_of(cluster)):
        return report
    fitted = fitted_cluster(cluster, report)
    points = [
        Point(bytes=size, seconds=_median(one_all_reduce(size, device), count))
        for size, count in zip(_sizes(min(links.capacities.values())), REPEATS, strict=True)
    ]
    points = [*from_rank(0, Seen(points=tuple(points)), Seen).points]
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
) -> Point | None:
    """Measures the largest message while other devices of the same two nodes exchange as much;
    returns None if there are none."""
    here = [d for d in devices if d.node == one.node and d not in (one, other)]
    there = [d for d in devices if d.node == other.node and d not in (one, other, *here[:1])]
    if not here or not there:
        return None
    ends = ((rank_of[one.name], rank_of[other.name]), (rank_of[here[0].name],
            rank_of[there[0].name]))  # fmt: skip
    return Point(bytes=size, seconds=_median(one_round_trip(ends, size, device), REPEATS[-1]))


def _median(act: Callable[[], float], repeats: int) -> float:
    return median([act() for _ in range(repeats + WARM_UP)][WARM_UP:])
