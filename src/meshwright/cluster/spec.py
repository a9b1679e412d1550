"""Describes hardware: device types, devices in nodes, nodes at sites, and their links."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from meshwright.records import (
    Bytes,
    BytesPerSecond,
    Count,
    Flops,
    Line,
    Name,
    PositiveShare,
    Seconds,
    fingerprint,
    record,
)

Precision = Literal["fp64", "fp32", "tf32", "fp16", "bf16"]
"""Precision of forward and backward arithmetic; in tf32, matrix units round the factors of products
to 19 bits, and all numbers are kept in 32. Weights and optimizer states stay fp32 (fp64 for
fp64)."""

LinkKind = Literal[
    "nvlink2",
    "nvlink3",
    "nvlink4",
    "nvlink5",
    "xgmi",
    "pcie",
    "pcie_host",
    "infiniband",
    "roce",
    "ethernet",
    "measured",
]
"""What a link consists of. From it follows which share of the stated bandwidth is reached; figures
of a `measured` link are reached already."""


@record
class Link:
    """Describes one hop. It gives every device a port of this bandwidth in each direction, as a
    switch or NVLink does; a `shared` one is one bus for all devices (PCIe through the host)."""

    bandwidth: BytesPerSecond
    """Bytes per second in one direction: the line rate, unless the link is measured."""
    latency: Seconds = 0.0
    """Seconds before the first byte arrives."""
    shared: bool = False
    kind: LinkKind | None = None
    """What the link consists of; None: what its place, its device types and its latency suggest."""
    single_flow: BytesPerSecond | None = None
    """Bytes per second in one direction that one device alone gets; None: the whole bandwidth."""


@record
class ReachedShares:
    """Gives the shares of a peak that the matrix products of a layer's forward and of its backward
    reach."""

    forward: PositiveShare
    backward: PositiveShare


@record
class DeviceType:
    """Describes one kind of accelerator (or CPU process) by the figures of its datasheet and the
    share of them that programs reach."""

    name: Name
    memory: Annotated[Bytes, Field(gt=0)]
    """Bytes of memory that a program can use."""
    memory_bandwidth: BytesPerSecond
    peak: dict[Precision, Annotated[Flops, Field(gt=0)]]
    """Peak of dense arithmetic in FLOP/s, by precision; a precision that is absent is not
    supported."""
    matmul_efficiency: PositiveShare = 0.6
    """Share of the peak that large matrix products reach."""
    matmul_shares: dict[Precision, ReachedShares] | None = None
    """What matrix products reach in place of `matmul_efficiency`, for the precisions in which it is
    known for forward and backward apart."""
    attention_efficiency: PositiveShare = 0.35
    memory_efficiency: PositiveShare = 0.8
    processor: Literal["gpu", "cpu"] = "gpu"
    """Kind of processor; a `cpu` process reserves no memory for a device context or collective
    buffers."""
    source: Line = ""
    """Source of the figures."""


@record
class Islands:
    """Groups devices of a node that are joined better with each other than with the rest of it: by
    an NVLink bridge, or by a PCIe switch of their own."""

    groups: tuple[tuple[Count, ...], ...]
    """Local indices of the devices of each group; a device is in one group at most."""
    link: Link
    """Link between two devices of a group: each device has a port of this bandwidth for it, beside
    its port to the rest of the node."""


@record
class Node:
    """Describes one host, with the devices that it holds."""

    name: Name
    site: Name
    devices: tuple[Name, ...]
    """Type name of each device, by local index."""
    inside: Link
    """Link between devices of this node."""
    network: Link
    """This node's network interface."""
    islands: Islands | None = None
    """Groups of devices that have a better link than `inside` to each other."""


@record
class Site:
    """Describes a place whose nodes reach other sites through one uplink."""

    name: Name
    uplink: Link | None = None
    """Link to other sites; None if sites reach each other at the speed of the network
    interfaces."""


@record
class DirectLink:
    """Joins two nodes by a link of their own, in place of network interfaces and uplinks."""

    between: tuple[Name, Name]
    link: Link


@record
class Endpoint:
    """Says where other nodes reach a node in the network that training uses."""

    address: Name | None = None
    """Host name or IP address; None if the node's name is its host name."""
    interface: Name | None = None
    """Network interface; None for the interface that has the address."""


@record
class Device:
    """Identifies one accelerator of a cluster, and says what type it has and where it stands."""

    name: Name
    """Name of the device: `node:index`."""
    type: Name
    node: Name
    site: Name
    island: Name | None = None
    """Name of its island, which is that of the island's first device; None if it is in none."""


@record
class Cluster:
    """Describes a whole cluster, with one Node for each host."""

    name: Name
    types: dict[Name, DeviceType]
    nodes: tuple[Node, ...]
    sites: tuple[Site, ...]
    direct: tuple[DirectLink, ...] = ()
    endpoints: dict[Name, Endpoint] | None = None
    """Endpoints by node name, for the nodes that give one."""


def reached_shares_in(kind: DeviceType, precision: Precision) -> ReachedShares:
    """Returns the shares of its peak that a device type reaches in matrix products in a
    precision."""
    known = (kind.matmul_shares or {}).get(precision)
    share = kind.matmul_efficiency
    return known or ReachedShares(forward=share, backward=share)


def cluster_fingerprint(cluster: Cluster) -> str:
    """Returns the fingerprint by which a plan recognises its cluster: the hardware without
    addresses."""
    return fingerprint(replace(cluster, endpoints=None))


def with_island_link(node: Node, change: Callable[[Link], Link]) -> Islands | None:
    """Returns a node's islands with another link; None if it has none."""
    own = node.islands
    return replace(own, link=change(own.link)) if own else None


def flow_bandwidth(link: Link) -> BytesPerSecond:
    """Returns the bytes per second that one device alone gets of a link."""
    return link.bandwidth if link.single_flow is None else link.single_flow


def flow_seconds(link: Link, size: float, number: float) -> Seconds:
    """Returns the seconds in which as many devices send `size` bytes each over a link at once."""
    return size * max(number / link.bandwidth, 1 / flow_bandwidth(link))


def node_of(device: str) -> str:
    """Returns the node of a device: `"p3-0"` for `"p3-0:1"`."""
    return device.rpartition(":")[0]


def devices_of(cluster: Cluster) -> tuple[Device, ...]:
    """Returns all devices, node by node: the order in which ranks are numbered."""
    return tuple(device for node in cluster.nodes for device in _devices_of_node(node))


def _devices_of_node(node: Node) -> Iterator[Device]:
    first = {
        index: f"{node.name}:{min(group)}"
        for group in (node.islands.groups if node.islands else ())
        for index in group
    }
    for index, kind in enumerate(node.devices):
        yield Device(
            name=f"{node.name}:{index}",
            type=kind,
            node=node.name,
            site=node.site,
            island=first.get(index),
        )
