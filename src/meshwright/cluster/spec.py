"""What hardware there is: device types, devices in nodes, nodes at sites, and their links."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from meshwright.records import (
    Bytes,
    BytesPerSecond,
    Flops,
    Line,
    Name,
    PositiveShare,
    Seconds,
    fingerprint,
    record,
)

Precision = Literal["fp64", "fp32", "fp16", "bf16"]
"""Arithmetic of forward and backward. Weights and optimizer states stay fp32 (fp64 for fp64)."""


@record
class Link:
    """One hop. A switch or NVLink gives every device a port of this bandwidth in each direction;
    a `shared` link is one bus for all devices behind it (PCIe through the host)."""

    bandwidth: BytesPerSecond
    """Bytes per second in one direction."""
    latency: Seconds = 0.0
    """Seconds before the first byte arrives."""
    shared: bool = False


@record
class DeviceType:
    """One kind of accelerator (or CPU process): what its datasheet says, and what it reaches."""

    name: Name
    memory: Annotated[Bytes, Field(gt=0)]
    """Bytes that a program can use."""
    memory_bandwidth: BytesPerSecond
    peak: dict[Precision, Annotated[Flops, Field(gt=0)]]
    """Dense peak by precision, FLOP/s; a precision that is absent is not offered."""
    matmul_efficiency: PositiveShare = 0.6
    """Share of the peak that large matrix products reach."""
    attention_efficiency: PositiveShare = 0.35
    memory_efficiency: PositiveShare = 0.8
    processor: Literal["gpu", "cpu"] = "gpu"
    """A cpu process reserves no device context or collective buffers."""
    source: Line = ""
    """Where the figures are from."""


@record
class Node:
    """Devices that share a host."""

    name: Name
    site: Name
    devices: tuple[Name, ...]
    """Type name of each device, by local index."""
    inside: Link
    """Between devices of this node."""
    network: Link
    """This node's network interface."""


@record
class Site:
    """Nodes behind one uplink."""

    name: Name
    uplink: Link | None = None
    """None: sites meet at full network speed."""


@record
class DirectLink:
    """An explicit link between two nodes that replaces the hierarchy for that pair."""

    between: tuple[Name, Name]
    link: Link


@record
class Endpoint:
    """Where a node is found in the network that training uses."""

    address: Name | None = None
    """Host name or IP address; None: the node's name is its host name."""
    interface: Name | None = None
    """Network interface; None: the one that has the address."""


@record
class Device:
    """One accelerator of a cluster."""

    name: Name
    """`node:index`."""
    type: Name
    node: Name
    site: Name


@record
class Cluster:
    """All of it, expanded: one Node per host."""

    name: Name
    types: dict[Name, DeviceType]
    nodes: tuple[Node, ...]
    sites: tuple[Site, ...]
    direct: tuple[DirectLink, ...] = ()
    endpoints: dict[Name, Endpoint] | None = None
    """By node name, of the nodes that say so."""


def cluster_fingerprint(cluster: Cluster) -> str:
    """What plans remember their cluster by: the hardware, wherever it is found."""
    return fingerprint(replace(cluster, endpoints=None))


def node_of(device: str) -> str:
    """`"p3-0:1"` to `"p3-0"`."""
    return device.rpartition(":")[0]


def devices_of(cluster: Cluster) -> tuple[Device, ...]:
    """All devices, node by node: the order in which ranks are numbered."""
    return tuple(
        Device(name=f"{node.name}:{index}", type=kind, node=node.name, site=node.site)
        for node in cluster.nodes
        for index, kind in enumerate(node.devices)
    )
