"""Says what collectives reach of a link by its kind: a share of the stated bandwidth, and the
seconds of a step. The figures and their sources are in `link_rates.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from functools import lru_cache
from importlib.resources import files
from typing import Annotated

from pydantic import Field

from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import Link, LinkKind
from meshwright.errors import ClusterError
from meshwright.records import BytesPerSecond, Line, PositiveShare, Ratio, Seconds, parse, record


@record
class LinkRate:
    """Holds what collectives reach of one kind of link."""

    share: PositiveShare
    """Share of the stated bandwidth that large messages reach."""
    all_reduce_share: PositiveShare | None = None
    """Share that all-reduces in one node reach where its switch sums; None: as `share`."""
    step: Ratio = 1.0
    """Seconds of a step inside a node, over the stated latency."""
    quick_step: Ratio = 1.0
    """Seconds of a step in the protocol of small messages, over the stated latency."""
    quick_bytes: Annotated[float, Field(ge=1, le=100)] = 1.0
    """Seconds of a byte in the protocol of small messages, over those in that of large ones."""
    software: Seconds = 0.0
    """Seconds that a step between nodes takes beside the stated latency."""
    quick_software: Seconds = 0.0
    """The same in the protocol of small messages."""
    source: Line
    """Source of the figures."""

    @property
    def sum_share(self) -> float:
        """Returns the share of an all-reduce's bytes that links carry if their switch sums."""
        return self.share / self.all_reduce_share if self.all_reduce_share else 1.0


@lru_cache
def link_rates() -> dict[str, LinkRate]:
    """Returns what collectives reach, by kind of link; nothing for links whose figures are
    measured."""
    text = files("meshwright.cluster").joinpath("link_rates.toml").read_text(encoding="utf-8")
    return {
        kind: parse(row, LinkRate, source="link_rates.toml", error=ClusterError)
        for kind, row in tomllib.loads(text).items()
    }


def rate_of(kind: LinkKind | None) -> LinkRate | None:
    """Returns what is reached of links of a kind; None if their figures are measured."""
    return link_rates().get(kind) if kind else None


BETWEEN: frozenset[LinkKind | None] = frozenset({"infiniband", "roce", "ethernet"})
"""Kinds of networks, where all-reduces are trees."""
_NVLINKS: tuple[tuple[BytesPerSecond, LinkKind], ...] = (
    (160e9, "nvlink2"),
    (320e9, "nvlink3"),
    (500e9, "nvlink4"),
)
"""Largest bandwidth of a device's port for each generation of NVLink (NVIDIA's datasheets)."""
_FASTEST_PCIE: BytesPerSecond = 52e9
"""Bandwidth above which a port is none of PCIe: copies over 16 lanes of PCIe 5.0 reach 50 GB/s."""
RDMA_LATENCY: Seconds = 15e-6
"""Latency below which a network is taken for one with remote memory access: through TCP no message
is so quick."""


def kind_inside(link: Link, types: Iterable[str], *, island: bool = False) -> LinkKind:
    """Returns the kind of a link between devices of a node: the stated one, else the one that
    servers with these device types have. Islands of devices on PCIe are joined by bridges."""
    if link.kind:
        return link.kind
    known = [catalog()[each] for each in types if each in catalog()]
    usual = min(known, key=lambda entry: entry.inside.bandwidth, default=None)
    port = usual.inside.bandwidth if usual else link.bandwidth
    if usual and usual.link:
        return usual.link
    if port <= _FASTEST_PCIE and not island:
        return "pcie_host" if link.shared else "pcie"
    if port <= _FASTEST_PCIE:
        return "nvlink3"
    return next((kind for most, kind in _NVLINKS if port <= most), "nvlink5")


def kind_between(link: Link) -> LinkKind:
    """Returns the kind of a link between nodes: the stated one, else the one that its latency
    suggests."""
    if link.kind:
        return link.kind
    return "infiniband" if link.latency < RDMA_LATENCY else "ethernet"
