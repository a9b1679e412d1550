"""Changes one figure of a cluster: `node.p3-0.network.bandwidth = 25 Gbit/s`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast, get_args

from meshwright import units
from meshwright.cluster.ranges import (
    BANDWIDTH,
    LATENCY,
    MEMORY,
    MEMORY_BANDWIDTH,
    PEAK,
    AllowedRange,
    out_of_range,
)
from meshwright.cluster.spec import (
    Cluster,
    DeviceType,
    Link,
    Node,
    Precision,
    Site,
    with_island_link,
)
from meshwright.errors import ClusterError, Problem
from meshwright.records import record
from meshwright.text import did_you_mean

LEVELS = ("inside", "islands", "network", "uplink")
_TOPICS = ("link", "node", "site", "device")


@record
class _Figure:
    """Says how the text of a figure is parsed, and which values are allowed."""

    read: Callable[[str], Any]
    allowed: AllowedRange


def _parse_share(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"a number, not {text!r}")
    return value


_EFFICIENCY = _Figure(read=_parse_share, allowed=AllowedRange(least=1e-6, most=1.0, show=str))
_LINK = {
    "bandwidth": _Figure(read=units.parse_bandwidth, allowed=BANDWIDTH),
    "latency": _Figure(read=units.parse_seconds, allowed=LATENCY),
}
_DEVICE = {
    "memory": _Figure(read=units.parse_bytes, allowed=MEMORY),
    "memory_bandwidth": _Figure(read=units.parse_bandwidth, allowed=MEMORY_BANDWIDTH),
    "matmul_efficiency": _EFFICIENCY,
    "attention_efficiency": _EFFICIENCY,
    "memory_efficiency": _EFFICIENCY,
}


def with_setting(cluster: Cluster, setting: str, *, option: str = "--set") -> Cluster:
    """Returns the cluster with one figure changed; `setting` is `FIELD=VALUE`, with the fields

        link.LEVEL[.FIGURE]         of all nodes (inside, islands, network) or sites (uplink)
        node.NAME.LEVEL[.FIGURE]    of one node, or of all nodes of a `count` with base NAME
        site.NAME.uplink[.FIGURE]
        device.TYPE.FIGURE          memory, memory_bandwidth, peak.PRECISION, ..._efficiency

    A link's FIGURE is its bandwidth unless it says latency. Raises ClusterError.
    """
    field, equals, value = setting.partition("=")
    field, value = field.strip(), value.strip()
    if not equals or not field or not value:
        wanted = "FIELD=VALUE, for example link.network=100Gbit/s"
        raise ClusterError(Problem(option, "", repr(setting), wanted))
    topic, _, rest = field.partition(".")
    topic = topic.removesuffix("s")  # the cluster file says [links]
    if topic == "device":
        return _set_device(cluster, rest, value, _OptionField(option=option, field=field))
    if topic in _TOPICS:
        return _set_link(cluster, topic, rest, value, _OptionField(option=option, field=field))
    raise _unknown(_OptionField(option=option, field=field), topic, _TOPICS)


@record
class _OptionField:
    """Says where a mistake is: in which option of the command line, and in which field of it."""

    option: str
    field: str


def _unknown(place: _OptionField, found: str, known: tuple[str, ...]) -> ClusterError:
    mend = did_you_mean(found, known, cutoff=0.5)
    wanted = f"one of: {', '.join(known)}" if known else "nothing: the cluster has none"
    return ClusterError(Problem(place.option, place.field, repr(found), wanted, mend))


def _value(place: _OptionField, figure: _Figure, text: str) -> Any:
    try:
        value = figure.read(text.strip("\"'"))
    except ValueError as failure:
        raise ClusterError(Problem(place.option, place.field, repr(text), str(failure))) from None
    ClusterError.check(out_of_range(place.field, value, figure.allowed, place.option))
    return value


def longest_name(text: str, names: Mapping[str, object]) -> str | None:
    """Returns the longest of the names that `text` begins with, up to a dot; names may contain dots
    themselves."""
    fitting = [name for name in names if text == name or text.startswith(f"{name}.")]
    return max(fitting, key=len, default=None)


def nodes_named(cluster: Cluster) -> dict[str, tuple[Node, ...]]:
    """Returns the nodes by each name that may mean them: `p3-0` and `p3-1` by their own names, and
    both by `p3`."""
    named: dict[str, tuple[Node, ...]] = {}
    for node in cluster.nodes:
        base, _, index = node.name.rpartition("-")
        if base and index.isdigit():
            named[base] = (*named.get(base, ()), node)
    return {**named, **{node.name: (node,) for node in cluster.nodes}}


def _set_link(cluster: Cluster, topic: str, rest: str, value: str, place: _OptionField) -> Cluster:
    nodes = {node.name for node in cluster.nodes}
    sites = {site.name for site in cluster.sites}
    levels: tuple[str, ...] = LEVELS
    if topic != "link":
        groups = nodes_named(cluster)
        names = groups if topic == "node" else {site.name: () for site in cluster.sites}
        name = longest_name(rest, names)
        if name is None:
            raise _unknown(place, rest.partition(".")[0], tuple(names))
        rest = rest[len(name) :].removeprefix(".")
        nodes = {node.name for node in groups[name]} if topic == "node" else set()
        sites = {name} if topic == "site" else set()
        levels = ("inside", "islands", "network") if topic == "node" else ("uplink",)
    level, _, figure = rest.partition(".")
    if level not in levels:
        raise _unknown(place, level, levels)
    figure = figure or "bandwidth"
    if figure not in _LINK:
        raise _unknown(place, figure, tuple(_LINK))
    change = {figure: _value(place, _LINK[figure], value)}
    if level == "uplink":
        return _with_uplinks(cluster, sites, change, place)
    if level == "islands" and not any(n.islands for n in cluster.nodes if n.name in nodes):
        wanted = "nodes whose file gives some devices a better link to each other"
        raise ClusterError(Problem(place.option, place.field, "no islands", wanted))
    changed = tuple(_with_link(node, level, change, node.name in nodes) for node in cluster.nodes)
    return replace(cluster, nodes=changed)


def _with_link(node: Node, level: str, change: dict[str, Any], chosen: bool) -> Node:
    if not chosen:
        return node
    if level == "islands":
        return replace(node, islands=with_island_link(node, lambda link: replace(link, **change)))
    link = _changed(getattr(node, level), change)
    return replace(node, inside=link) if level == "inside" else replace(node, network=link)


def _changed(link: Link, change: dict[str, Any]) -> Link:
    """Returns a link with other figures; a limit of single flows that exceeds its bandwidth is
    none."""
    changed: Link = replace(link, **change)
    limit = changed.single_flow
    return replace(changed, single_flow=None) if limit and limit > changed.bandwidth else changed


def _with_uplinks(
    cluster: Cluster, names: set[str], change: dict[str, Any], place: _OptionField
) -> Cluster:
    def changed(site: Site) -> Site:
        if site.name not in names or (site.uplink is None and "bandwidth" not in change):
            return site
        return replace(site, uplink=_changed(site.uplink or Link(bandwidth=1.0), change))

    if "bandwidth" not in change and all(
        s.uplink is None for s in cluster.sites if s.name in names
    ):
        raise ClusterError(
            Problem(place.option, place.field, "no uplink", "a site that has one",
                    "set its bandwidth first: sites without an uplink meet at network speed")
        )  # fmt: skip
    return replace(cluster, sites=tuple(changed(site) for site in cluster.sites))


def _set_device(cluster: Cluster, rest: str, value: str, place: _OptionField) -> Cluster:
    name = longest_name(rest, cluster.types)
    if name is None:
        raise _unknown(place, rest.partition(".")[0], tuple(cluster.types))
    kind, figure = cluster.types[name], rest[len(name) :].removeprefix(".")
    changed = _with_figure(kind, figure, value, place)
    source = f"{kind.source}; what if: {figure} {value}".removeprefix("; ")
    return replace(cluster, types={**cluster.types, name: replace(changed, source=source)})


def _with_figure(kind: DeviceType, figure: str, value: str, place: _OptionField) -> DeviceType:
    whole, _, precision = figure.partition(".")
    if whole == "peak":
        if precision not in get_args(Precision):
            raise _unknown(place, precision, get_args(Precision))
        peak = _value(place, _Figure(read=units.parse_flops, allowed=PEAK), value)
        return replace(kind, peak={**kind.peak, cast("Precision", precision): peak})
    if figure not in _DEVICE:
        raise _unknown(place, figure, (*_DEVICE, "peak"))
    changed = replace(kind, **{figure: _value(place, _DEVICE[figure], value)})
    return replace(changed, matmul_shares=None) if figure == "matmul_efficiency" else changed
