"""Checks figures: rejects those that no hardware has, and warns of those that exceed a
datasheet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from meshwright import units
from meshwright.cluster.catalog import catalog
from meshwright.cluster.entries import (
    Entries,
    IslandsEntry,
    LinkEntry,
    PairEntry,
    resolve_type,
)
from meshwright.cluster.ranges import (
    BANDWIDTH,
    LATENCY,
    MEMORY,
    MEMORY_BANDWIDTH,
    PEAK,
    AllowedRange,
    intensity_problems,
    out_of_range,
)
from meshwright.cluster.spec import Cluster, DeviceType
from meshwright.errors import Problem

_SUSPICIOUS = 1.5
"""Multiple of the datasheet's figure above which a value is doubted."""


def figure_problems(entries: Entries, source: str) -> Iterator[Problem]:
    """Yields one Problem for each bandwidth, latency, size or speed that is out of range."""
    for field, value, allowed in _figures(entries):
        yield from out_of_range(field, value, allowed, source)


def type_figure_problems(entries: Entries, source: str) -> Iterator[Problem]:
    """Yields one Problem for each type whose peak and memory bandwidth cannot be those of one
    device. The file must be free of `type_problems`."""
    for name, entry in entries.devices.items():
        if entry.peak or entry.memory_bandwidth:
            kind, _ = resolve_type(name, entries.devices)
            yield from intensity_problems(f"device.{name}", kind, source)


def _figures(entries: Entries) -> Iterator[tuple[str, float, AllowedRange]]:
    for field, link in _links(entries):
        yield f"{field}.bandwidth", link.bandwidth, BANDWIDTH
        yield f"{field}.latency", link.latency, LATENCY
        if not isinstance(link, IslandsEntry) and link.single_flow is not None:
            limit = replace(BANDWIDTH, most=max(link.bandwidth, BANDWIDTH.least))
            yield f"{field}.single_flow", link.single_flow, limit
    for name, entry in entries.devices.items():
        if entry.memory is not None:
            yield f"device.{name}.memory", entry.memory, MEMORY
        if entry.memory_bandwidth is not None:
            yield f"device.{name}.memory_bandwidth", entry.memory_bandwidth, MEMORY_BANDWIDTH
        for precision, peak in (entry.peak or {}).items():
            if peak:  # 0: this type does not offer the precision
                yield f"device.{name}.peak.{precision}", peak, PEAK


def _links(entries: Entries) -> Iterator[tuple[str, LinkEntry | IslandsEntry | PairEntry]]:
    optional: list[tuple[str, LinkEntry | IslandsEntry | None]] = [
        ("links.inside", entries.links.inside),
        ("links.network", entries.links.network),
        ("links.uplink", entries.links.uplink),
    ]
    for where, node in entries.nodes.items():
        optional += [(f"{where}.inside", node.inside), (f"{where}.network", node.network)]
        optional.append((f"{where}.islands", node.islands))
    optional += [(f"{where}.uplink", site.uplink) for where, site in entries.sites.items()]
    optional += [(f"device.{name}.inside", each.inside) for name, each in entries.devices.items()]
    yield from ((field, link) for field, link in optional if link is not None)
    yield from entries.pairs.items()


def cluster_warnings(cluster: Cluster) -> tuple[str, ...]:
    """Returns warnings on figures that are possible but exceed the datasheet by half or more.

    CPU processes are not checked: they have no datasheet, for their host decides what they get.
    """
    kinds = (cluster.types[name] for name in sorted(cluster.types))
    return tuple(doubt for kind in kinds if kind.processor == "gpu" for doubt in _doubts(kind))


def _doubts(kind: DeviceType) -> Iterator[str]:
    known = catalog()
    if kind.name in known:
        sheets, whose = [known[kind.name].type], "its datasheet's"
    else:
        sheets, whose = [entry.type for entry in known.values()], "the fastest known device's"
    pairs = [
        ("memory", kind.memory, max(s.memory for s in sheets), units.format_bytes),
        (
            "memory bandwidth",
            kind.memory_bandwidth,
            max(s.memory_bandwidth for s in sheets),
            units.format_throughput,
        ),
    ]
    for precision, peak in kind.peak.items():
        best = max(s.peak.get(precision, 0.0) for s in sheets)
        if best == 0:
            yield f"{kind.name}: {precision} is given, but its datasheet has no {precision}"
        else:
            pairs.append((f"{precision} peak", peak, best, units.format_flops))
    for what, value, best, show in pairs:
        if value > _SUSPICIOUS * best:
            times = value / best
            yield f"{kind.name}: {what} of {show(value)} is {times:.2g} times {whose} {show(best)}"
