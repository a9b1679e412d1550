"""Reads the tables of a cluster file as they are written, and resolves the device types that they
name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

from meshwright import units
from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import (
    DeviceType,
    Islands,
    Link,
    LinkKind,
    Precision,
    ReachedShares,
)
from meshwright.errors import ClusterError, Problem
from meshwright.records import Count, Line, Name, PositiveShare, check_format, parse, record
from meshwright.text import did_you_mean, nearest

T = TypeVar("T")
MOST_IN_MATRIX = 512
"""Largest number of nodes in a `[matrix]`: its size grows with the square of this number."""


def _written(read: Callable[[str], float], example: str) -> BeforeValidator:
    """Validates a quantity that must be text with a unit: a bare number could mean bits or bytes,
    MB or MiB."""

    def check(value: object) -> float:
        if not isinstance(value, str):
            raise ValueError(f"a quantity with its unit, in quotes, like {example!r}")
        return read(value)

    return BeforeValidator(check)


SizeText = Annotated[int, _written(units.parse_bytes, "80 GiB")]
RateText = Annotated[float, _written(units.parse_bandwidth, "25 Gbit/s")]
FlopsText = Annotated[float, _written(units.parse_flops, "312 TFLOP/s")]
TimeText = Annotated[float, _written(units.parse_seconds, "50 us")]


@record
class LinkEntry:
    """Holds a link, written as `{ bandwidth = "10 Gbit/s", latency = "50 us" }`."""

    bandwidth: RateText
    """Line rate in one direction, unless `kind` is `measured`."""
    latency: TimeText
    shared: bool = False
    kind: LinkKind | None = None
    """What the link consists of."""
    single_flow: RateText | None = None
    """What one device alone gets of the bandwidth, where that is less than many get together."""


@record
class LinksEntry:
    """Holds the table `[links]`: the links of every node and site that does not name its own."""

    inside: LinkEntry | None = None
    network: LinkEntry | None = None
    uplink: LinkEntry | None = None


@record
class IslandsEntry:
    """Lists groups of devices of a node with a better link to each other, written as
    `{ devices = [[0, 1], [2, 3]], bandwidth = "56.25 GB/s", latency = "5 us" }`."""

    devices: tuple[tuple[Count, ...], ...]
    """Local indices of the devices of each group, from 0."""
    bandwidth: RateText
    latency: TimeText
    kind: LinkKind | None = None


@record
class NodeEntry:
    """Holds one table `[[node]]`, which describes one host, or `count` identical hosts."""

    name: Name
    devices: tuple[Name, ...]
    count: Count | None = None
    inside: LinkEntry | None = None
    islands: IslandsEntry | None = None
    """Groups of devices that reach each other over a better link than `inside`."""
    network: LinkEntry | None = None
    site: Name = "main"
    address: Name | tuple[Name, ...] | None = None
    """Host name or IP address in the network that training uses; with `count`, a list with one
    address for each host. If absent, the node's name is its host name."""
    interface: Name | None = None
    """Network interface that training uses, like `eth0`; if absent, the interface that has the
    address."""


@record
class SiteEntry:
    """Holds one table `[[site]]`, which describes a place whose nodes share one uplink."""

    name: Name
    uplink: LinkEntry | None = None


@record
class DeviceEntry:
    """Holds one table `[device.NAME]`, which defines a new device type, or changes figures of the
    type `like` or of the type with this name in the catalogue."""

    like: Name | None = None
    memory: SizeText | None = None
    memory_bandwidth: RateText | None = None
    peak: dict[Precision, FlopsText] | None = None
    """Peaks that are added to those of the type it changes; 0 removes a precision."""
    matmul_efficiency: PositiveShare | None = None
    """Replaces every share of the type that it changes, unless `matmul_shares` is given too."""
    matmul_shares: dict[Precision, ReachedShares] | None = None
    """Shares that matrix products reach by precision, like `{ fp32 = { forward = 0.6, backward =
    0.75 } }`, where they differ from `matmul_efficiency`."""
    attention_efficiency: PositiveShare | None = None
    memory_efficiency: PositiveShare | None = None
    processor: Literal["gpu", "cpu"] | None = None
    inside: LinkEntry | None = None
    source: Line | None = None


@record
class PairEntry:
    """Holds one table `[[link]]`, which gives the link between two nodes."""

    between: tuple[Name, Name]
    bandwidth: RateText
    latency: TimeText
    shared: bool = False
    kind: LinkKind | None = None
    single_flow: RateText | None = None


def _as_rows(value: object) -> object:
    if isinstance(value, str):
        return ((value,),)
    if isinstance(value, list):  # strict checking takes no list for a tuple
        return tuple(tuple(row) if isinstance(row, list) else row for row in value)
    return value


@record
class MatrixEntry:
    """Holds the table `[matrix]`, which gives the links between every pair of some nodes; `"-"`
    marks a pair that has no direct link."""

    nodes: Annotated[tuple[Name, ...], Field(max_length=MOST_IN_MATRIX)]
    bandwidth: tuple[tuple[Name, ...], ...]
    latency: Annotated[tuple[tuple[Name, ...], ...], BeforeValidator(_as_rows)]
    """Rows like those of `bandwidth`, or one text for all pairs."""


@record
class Entries:
    """Holds every table of a cluster file that could be read, by its path in the file."""

    name: str
    links: LinksEntry
    nodes: dict[str, NodeEntry]
    sites: dict[str, SiteEntry]
    devices: dict[str, DeviceEntry]
    """Device tables by type name."""
    pairs: dict[str, PairEntry]
    matrix: MatrixEntry | None
    unread: tuple[str, ...]
    """Names of the sections in which some table could not be read."""


_KNOWN = ("format", "name", "links", "node", "site", "device", "link", "matrix")


def entry_link(entry: LinkEntry | PairEntry) -> Link:
    """Returns the link that an entry describes."""
    return Link(
        bandwidth=entry.bandwidth,
        latency=entry.latency,
        shared=entry.shared,
        kind=entry.kind,
        single_flow=entry.single_flow,
    )


def islands_of(entry: IslandsEntry) -> Islands:
    """Returns the islands that an entry describes."""
    link = Link(bandwidth=entry.bandwidth, latency=entry.latency, kind=entry.kind)
    return Islands(groups=entry.devices, link=link)


def read_entries(data: dict[str, Any], source: str) -> tuple[Entries, list[Problem]]:
    """Returns the file's tables, and one Problem for each value in them that has a wrong shape."""
    reading = _Reading(source=source, problems=[*_header_problems(data, source)], unread=[])
    links = _table(reading, LinksEntry, "links", data.get("links", {}))
    matrix = _table(reading, MatrixEntry, "matrix", data["matrix"]) if "matrix" in data else None
    entries = Entries(
        name=str(data.get("name", "cluster")),
        links=links or LinksEntry(),
        nodes=_tables(reading, NodeEntry, "node", data.get("node", [])),
        sites=_tables(reading, SiteEntry, "site", data.get("site", [])),
        devices=_types(reading, data.get("device", {})),
        pairs=_tables(reading, PairEntry, "link", data.get("link", [])),
        matrix=matrix,
        unread=tuple(reading.unread),
    )
    return entries, reading.problems


@record
class _Reading:
    """Collects the problems that are found while a cluster file is read."""

    source: str
    problems: list[Problem]
    unread: list[str]


def _header_problems(data: dict[str, Any], source: str) -> Iterator[Problem]:
    try:
        check_format(data, source=source, error=ClusterError)
    except ClusterError as failure:
        yield from failure.problems
    try:
        parse(data.get("name", ""), Name, source=source, error=ClusterError)
    except ClusterError as failure:
        yield from (replace(each, field="name") for each in failure.problems)
    for key in data:
        if key not in _KNOWN:
            wanted, mend = f"one of: {', '.join(_KNOWN)}", did_you_mean(key, _KNOWN)
            yield Problem(source, key, "an unknown field", wanted, mend)


def _table(reading: _Reading, kind: type[T], where: str, value: object) -> T | None:
    try:
        return parse(value, kind, source=reading.source, error=ClusterError)
    except ClusterError as failure:
        for each in failure.problems:
            path = f"{where}.{each.field}" if each.field else where
            reading.problems.append(replace(each, field=path))
        reading.unread.append(where.partition("[")[0])
        return None


def _tables(reading: _Reading, kind: type[T], key: str, rows: object) -> dict[str, T]:
    if not isinstance(rows, list):
        wanted = f"tables under [[{key}]]"
        reading.problems.append(Problem(reading.source, key, type(rows).__name__, wanted))
        reading.unread.append(key)
        return {}
    read = {f"{key}[{i}]": _table(reading, kind, f"{key}[{i}]", row) for i, row in enumerate(rows)}
    return {where: entry for where, entry in read.items() if entry is not None}


def _types(reading: _Reading, rows: object) -> dict[str, DeviceEntry]:
    if not isinstance(rows, dict):
        wanted = "tables under [device.NAME]"
        reading.problems.append(Problem(reading.source, "device", type(rows).__name__, wanted))
        return {}
    read = {n: _table(reading, DeviceEntry, f"device.{n}", row) for n, row in rows.items()}
    # A type whose table has errors stays known, so that its nodes are not reported as well.
    return {name: entry or DeviceEntry(like="cpu") for name, entry in read.items()}


_NEEDED = ("memory", "memory_bandwidth", "peak")
_FIGURES = (
    "memory",
    "memory_bandwidth",
    "matmul_efficiency",
    "matmul_shares",
    "attention_efficiency",
    "memory_efficiency",
    "processor",
)


def nearest_types(name: str, known: Mapping[str, object]) -> str:
    """Returns a hint for a device type name that is not known."""
    names = sorted({*catalog(), *known})
    folded = {each.lower(): each for each in names}
    near = [each for each in folded if each.startswith(name.lower())]
    near = near or nearest(name.lower(), folded, count=3, cutoff=0.5)
    close = " or ".join(repr(folded[each]) for each in near)
    mend = f"Did you mean {close}? " if near else ""
    return f"{mend}Known: {', '.join(names)}; or define [device.{name}]."


def type_problems(devices: Mapping[str, DeviceEntry], source: str) -> Iterator[Problem]:
    """Yields a Problem for each wrong reference from one device type to another, and for each
    figure that a new type lacks."""
    for name, entry in devices.items():
        where = f"device.{name}"
        if entry.like is not None and entry.like not in devices and entry.like not in catalog():
            wanted, hint = "a known device type", nearest_types(entry.like, devices)
            yield Problem(source, f"{where}.like", repr(entry.like), wanted, hint)
        elif entry.like is not None and _is_circular(name, devices):
            wanted = "a type that does not lead back here"
            yield Problem(source, f"{where}.like", repr(entry.like), wanted)
        elif entry.like is None and name not in catalog():
            for figure in _NEEDED:
                if not getattr(entry, figure):
                    mend = 'Or derive it: like = "T4".'
                    wanted = f"this figure of a new device type{_missing_hint(figure)}"
                    yield Problem(source, f"{where}.{figure}", "nothing", wanted, mend)


def _missing_hint(figure: str) -> str:
    return ', like { fp32 = "8.1 TFLOP/s" }' if figure == "peak" else ""


def _base(name: str, entry: DeviceEntry) -> str | None:
    return entry.like or (name if name in catalog() else None)


def _is_circular(name: str, devices: Mapping[str, DeviceEntry]) -> bool:
    seen = {name}
    base = devices[name].like
    while base is not None and base in devices:
        if base in seen:
            return True
        seen.add(base)
        base = devices[base].like
    return False


def offer_problems(devices: Mapping[str, DeviceEntry], source: str) -> Iterator[Problem]:
    """Yields a Problem for each type whose peaks are all 0. The file must be free of
    `type_problems`."""
    for name in devices:
        if not resolve_type(name, devices)[0].peak:
            yield Problem(source, f"device.{name}.peak", "0 for all", "a precision that is offered")


def resolve_type(name: str, devices: Mapping[str, DeviceEntry]) -> tuple[DeviceType, Link | None]:
    """Returns a device type with every figure, and the link between two such devices in a node if
    one is known.

    The file must be free of `type_problems`.
    """
    chain: list[tuple[str, DeviceEntry]] = []
    base: str | None = name
    while base is not None and base in devices:
        chain.append((base, devices[base]))
        following = _base(base, devices[base])
        if following == base:
            break
        base = following
    known = catalog().get(base) if base is not None else None
    figures: dict[str, object] = {}
    inside = known.inside if known else None
    if known:
        figures = {each: getattr(known.type, each) for each in (*_FIGURES, "source")}
        figures["peak"] = dict(known.type.peak)
    for _, entry in reversed(chain):
        figures = _changed(figures, entry)
        inside = entry_link(entry.inside) if entry.inside else inside
    return DeviceType(name=name, **figures), inside  # type: ignore[arg-type]


def _changed(figures: dict[str, object], entry: DeviceEntry) -> dict[str, object]:
    given = {each: getattr(entry, each) for each in _FIGURES if getattr(entry, each) is not None}
    before = figures.get("peak")
    merged = {**(before if isinstance(before, dict) else {}), **(entry.peak or {})}
    peak = {precision: speed for precision, speed in merged.items() if speed}
    mended = ", ".join([*given, *(f"peak {each}" for each in entry.peak or {})])
    origin = f"{figures.get('source', '')}; from the cluster file: {mended}".removeprefix("; ")
    changed = {**figures, **given, "peak": peak}
    if "matmul_efficiency" in given:
        changed["matmul_shares"] = entry.matmul_shares
    if entry.source is not None or mended:
        changed["source"] = origin if entry.source is None else entry.source
    return changed
