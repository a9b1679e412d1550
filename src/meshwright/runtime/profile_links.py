"""Measures latency and bandwidth of the links between ranks, by level, from messages of several
sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.distributed as dist

from meshwright.cluster.spec import Cluster, Device, Link, devices_of
from meshwright.cost.pairs import fit_line
from meshwright.cost.profile import LinkTimes
from meshwright.runtime.exchange import from_rank

SIZES = (2**12, 2**16, 2**20, 2**22)
"""Message sizes in bytes: small ones show the latency, large ones the bandwidth."""

LEVELS = ("inside", "network", "site")
"""Levels of the cluster's hierarchy: inside a node, between nodes of a site, between sites."""


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
        shared = level == "inside" and inside.shared
        found[level] = Link(bandwidth=bandwidth, latency=latency, shared=shared)
    small = _median(one_all_reduce(SIZES[0], device), repeats)
    own = LinkTimes(all_reduce_latency=small / (2 * (world - 1)), **found)
    return from_rank(0, own, LinkTimes)


def representative_pairs(devices: Sequence[Device]) -> dict[str, tuple[int, int]]:
    """Returns the first pair of ranks at each level that any pair spans."""
    pairs: dict[str, tuple[int, int]] = {}
    for a, one in enumerate(devices):
        for b in range(a + 1, len(devices)):
            other = devices[b]
            far = one.site != other.site
            level = LEVELS[2 if far else 1 if one.node != other.node else 0]
            pairs.setdefault(level, (a, b))
    return dict(sorted(pairs.items(), key=lambda item: LEVELS.index(item[0])))


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
