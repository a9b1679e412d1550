"""Reads cluster files (TOML) to a `Cluster` and writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from meshwright import records, units
from meshwright.cluster.catalog import catalog
from meshwright.cluster.entries import (
    Entries,
    NodeEntry,
    entry_link,
    islands_of,
    read_entries,
    resolve_type,
)
from meshwright.cluster.matrix import matrix_links
from meshwright.cluster.spec import Cluster, DeviceType, DirectLink, Endpoint, Link, Node, Site
from meshwright.cluster.validate import DEFAULT_SITE, node_names, parse_devices, table_problems
from meshwright.errors import ClusterError, Problem
from meshwright.text import quoted

_BARE_KEY = re.compile("[A-Za-z0-9_-]+")
_UNUSED_NETWORK = Link(bandwidth=1.25e9, latency=50e-6)
"""Network interface assumed for a cluster of one machine whose file names none: 10 Gbit/s
Ethernet."""


def load_cluster(path: str | Path) -> Cluster:
    """Loads the cluster that a file describes.

    Raises ClusterError with one Problem for every mistake in the file.
    """
    try:
        data = records.read(Path(path), error=ClusterError)
    except ClusterError as failure:
        raise ClusterError(*map(_with_mend, failure.problems)) from None
    return cluster_from(data, source=str(path))


def _with_mend(problem: Problem) -> Problem:
    """Adds the mend for a table that occurs twice, as in two files that were joined by hand."""
    if "Cannot declare" not in problem.found and "Cannot overwrite" not in problem.found:
        return problem
    mend = "Files of several hosts are put together by: meshwright discover --merge a.toml b.toml"
    return replace(problem, mend=mend)


def cluster_from(data: dict[str, Any], *, source: str) -> Cluster:
    """Builds the cluster that the content of a cluster file describes. Raises ClusterError."""
    entries, problems = read_entries(data, source)
    ClusterError.check(chain(problems, table_problems(entries, source)))
    return _expand(entries)


def _expand(entries: Entries) -> Cluster:
    used = {kind for node in entries.nodes.values() for kind in _devices(node)}
    types = {
        name: resolve_type(name, entries.devices)[0] for name in sorted({*used, *entries.devices})
    }
    nodes = tuple(node for entry in entries.nodes.values() for node in _expand_node(entry, entries))
    direct = [
        DirectLink(between=pair.between, link=entry_link(pair)) for pair in entries.pairs.values()
    ]
    if entries.matrix:
        direct += matrix_links(entries.matrix)
    return Cluster(
        name=entries.name,
        types=types,
        nodes=nodes,
        sites=_sites(entries, nodes),
        direct=tuple(direct),
        endpoints=dict(_endpoints(entries)) or None,
    )


def _endpoints(entries: Entries) -> Iterator[tuple[str, Endpoint]]:
    for entry in entries.nodes.values():
        names = node_names(entry)
        given = entry.address if isinstance(entry.address, tuple) else [entry.address] * len(names)
        for name, address in zip(names, given, strict=True):
            if address is not None or entry.interface is not None:
                yield name, Endpoint(address=address, interface=entry.interface)


def _devices(entry: NodeEntry) -> tuple[str, ...]:
    read = [parse_devices(text) for text in entry.devices]
    return tuple(each[1] for each in read if each for _ in range(each[0]))


def _expand_node(entry: NodeEntry, entries: Entries) -> Iterator[Node]:
    devices = _devices(entry)
    network = entry.network or entries.links.network
    interface = entry_link(network) if network else _UNUSED_NETWORK
    given = entry.inside or entries.links.inside
    inside = entry_link(given) if given else _default_inside(devices, entries, interface)
    islands = islands_of(entry.islands) if entry.islands else None
    for name in node_names(entry):
        yield Node(
            name=name,
            site=entry.site,
            devices=devices,
            inside=inside,
            network=interface,
            islands=islands,
        )


def _default_inside(devices: tuple[str, ...], entries: Entries, network: Link) -> Link:
    """Returns the slowest link among those that the node's device types usually have."""
    links = [resolve_type(kind, entries.devices)[1] for kind in sorted({*devices})]
    known = [link for link in links if link is not None]
    return min(known, key=lambda link: link.bandwidth) if known else network


def _sites(entries: Entries, nodes: tuple[Node, ...]) -> tuple[Site, ...]:
    default = entry_link(entries.links.uplink) if entries.links.uplink else None
    sites = [
        Site(name=site.name, uplink=entry_link(site.uplink) if site.uplink else default)
        for site in entries.sites.values()
    ]
    if DEFAULT_SITE in {node.site for node in nodes} - {site.name for site in sites}:
        sites.insert(0, Site(name=DEFAULT_SITE, uplink=default))
    return tuple(sites)


def dump_cluster(cluster: Cluster) -> str:
    """Formats a cluster as TOML text that `load_cluster` reads back to an equal cluster."""
    networks = {node.network for node in cluster.nodes}
    shared = networks.pop() if len(networks) == 1 else None
    lines = [f"format = {records.FORMAT}", f"name = {quoted(cluster.name)}"]
    if shared:
        lines += ["", "[links]", f"network = {_link(shared)}"]
    for site in cluster.sites:
        lines += ["", "[[site]]", f"name = {quoted(site.name)}"]
        lines += [f"uplink = {_link(site.uplink)}"] if site.uplink else []
    endpoints = cluster.endpoints or {}
    for base, nodes in _runs(cluster.nodes, endpoints):
        lines += ["", *_node_lines(base, nodes, shared)]
        lines += _endpoint_lines(
            [endpoints.get(node.name, Endpoint()) for node in nodes], bool(base)
        )
    used = {kind for node in cluster.nodes for kind in node.devices}
    for name, kind in cluster.types.items():
        known = catalog().get(name)
        if name not in used or known is None or known.type != kind:
            lines += ["", *_type_lines(kind)]
    for direct in cluster.direct:
        lines += ["", "[[link]]", f"between = [{', '.join(map(quoted, direct.between))}]"]
        lines += _link_fields(direct.link)
    return "\n".join(lines) + "\n"


def _endpoint_lines(endpoints: list[Endpoint], several: bool) -> list[str]:
    addresses = [each.address for each in endpoints if each.address is not None]
    text = f"[{', '.join(map(quoted, addresses))}]" if several else ""
    lines = [f"address = {text or quoted(addresses[0])}"] if addresses else []
    interface = endpoints[0].interface
    return [*lines, f"interface = {quoted(interface)}"] if interface is not None else lines


def _runs(
    nodes: tuple[Node, ...], known: dict[str, Endpoint]
) -> list[tuple[str | None, list[Node]]]:
    """Groups the nodes, in order: identical neighbours named `base-0`, `base-1` ... come under
    their base, every other node alone under None."""

    def kind(node: Node) -> tuple[Node, bool, str | None]:
        endpoint = known.get(node.name, Endpoint())
        return replace(node, name=""), endpoint.address is None, endpoint.interface

    runs: list[tuple[str | None, list[Node]]] = []
    for node in nodes:
        base, _, index = node.name.rpartition("-")
        follows = runs and runs[-1][0] == base and index == str(len(runs[-1][1]))
        if follows and kind(node) == kind(runs[-1][1][0]):
            runs[-1][1].append(node)
            continue
        runs.append((base if base and index == "0" else None, [node]))
    return runs


def _node_lines(base: str | None, nodes: list[Node], shared: Link | None) -> list[str]:
    node = nodes[0]
    lines = ["[[node]]", f"name = {quoted(base or node.name)}"]
    lines += [f"count = {len(nodes)}"] if base else []
    runs = [(kind, len([*run])) for kind, run in groupby(node.devices)]
    lines += [f"devices = [{', '.join(quoted(f'{count} x {kind}') for kind, count in runs)}]"]
    lines += [f"inside = {_link(node.inside)}"]
    if node.islands:
        groups = [list(group) for group in node.islands.groups]
        fields = ", ".join((f"devices = {groups}", *_link_fields(node.islands.link)))
        lines += [f"islands = {{ {fields} }}"]
    lines += [] if shared else [f"network = {_link(node.network)}"]
    return [*lines, f"site = {quoted(node.site)}"]


def _type_lines(kind: DeviceType) -> list[str]:
    known = catalog()[kind.name].type.peak if kind.name in catalog() else {}
    peaks = ", ".join(
        f"{precision} = {_quantity(peak, units.format_flops, units.parse_flops, 'FLOP/s')}"
        for precision, peak in {**dict.fromkeys(known, 0.0), **kind.peak}.items()
    )
    throughput = _quantity(
        kind.memory_bandwidth, units.format_throughput, units.parse_bandwidth, "B/s"
    )
    return [
        f"[device.{kind.name if _BARE_KEY.fullmatch(kind.name) else quoted(kind.name)}]",
        f"memory = {_quantity(kind.memory, units.format_bytes, units.parse_bytes, 'B')}",
        f"memory_bandwidth = {throughput}",
        f"peak = {{ {peaks} }}",
        f"matmul_efficiency = {kind.matmul_efficiency!r}",
        *_shares(kind),
        f"attention_efficiency = {kind.attention_efficiency!r}",
        f"memory_efficiency = {kind.memory_efficiency!r}",
        f"processor = {quoted(kind.processor)}",
        f"source = {quoted(kind.source)}",
    ]


def _shares(kind: DeviceType) -> list[str]:
    fields = ", ".join(
        f"{precision} = {{ forward = {each.forward!r}, backward = {each.backward!r} }}"
        for precision, each in (kind.matmul_shares or {}).items()
    )
    return [f"matmul_shares = {{ {fields} }}"] if fields else []


def _link_fields(link: Link) -> list[str]:
    latency = _quantity(link.latency, units.format_seconds, units.parse_seconds, "s")
    fields = [f"bandwidth = {_rate(link.bandwidth)}", f"latency = {latency}"]
    fields += ["shared = true"] if link.shared else []
    fields += [f"kind = {quoted(link.kind)}"] if link.kind else []
    return [*fields, f"single_flow = {_rate(link.single_flow)}"] if link.single_flow else fields


def _link(link: Link) -> str:
    return f"{{ {', '.join(_link_fields(link))} }}"


def _rate(bytes_per_second: float) -> str:
    return _quantity(bytes_per_second, units.format_bandwidth, units.parse_bandwidth, "B/s")


def _quantity(value: float, show: Any, read: Any, unit: str) -> str:
    """Formats the value readably if that text is exact, else with all digits."""
    readable = show(value)
    return quoted(readable if read(readable) == value else f"{value!r} {unit}")
