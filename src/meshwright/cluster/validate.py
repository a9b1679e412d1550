"""Checks the tables of a cluster file against each other, once each of them has the right shape."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations

from meshwright.cluster.catalog import catalog
from meshwright.cluster.entries import (
    Entries,
    NodeEntry,
    nearest_types,
    offer_problems,
    resolve_type,
    type_problems,
)
from meshwright.cluster.figures import figure_problems, type_figure_problems
from meshwright.cluster.matrix import matrix_problems
from meshwright.errors import Problem
from meshwright.units import format_bandwidth

MOST_DEVICES = 100_000
DEFAULT_SITE = "main"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NAME_RULE = "letters, digits, '.', '_' and '-', beginning with a letter or digit"
_ADDRESS = re.compile(r"[A-Za-z0-9:][A-Za-z0-9.:_-]*")
_DEVICES = re.compile(r"\s*(?:([0-9]{1,18})\s*[x×]\s*)?(\S+)\s*")


def parse_devices(text: str) -> tuple[int, str] | None:
    """Parses `"4 x V100-16"` to (4, "V100-16") and `"T4"` to (1, "T4"); None if the text has
    another form."""
    match = _DEVICES.fullmatch(text)
    return (int(match[1] or 1), match[2]) if match else None


def node_names(entry: NodeEntry) -> list[str]:
    """Returns the names of the nodes that one `[[node]]` table describes: `p3` with `count = 2`
    gives `p3-0` and `p3-1`."""
    if entry.count is None:
        return [entry.name]
    return [f"{entry.name}-{index}" for index in range(entry.count)]


def table_problems(entries: Entries, source: str) -> Iterator[Problem]:
    """Yields every contradiction between the tables, and every value that is out of range."""
    of_types = [*type_problems(entries.devices, source)]
    yield from of_types or offer_problems(entries.devices, source)
    for where, site in entries.sites.items():
        if not _NAME.fullmatch(site.name):
            yield Problem(source, f"{where}.name", repr(site.name), _NAME_RULE)
    for name in entries.devices:
        if not _NAME.fullmatch(name):
            yield Problem(source, f"device.{name}", repr(name), _NAME_RULE)
    of_figures = [*figure_problems(entries, source)]
    yield from of_figures or ([] if of_types else type_figure_problems(entries, source))
    oversized = [*_size_problems(entries, source)]
    yield from oversized
    for where, node in entries.nodes.items():
        for problem in _node_problems(where, node, entries, source):
            yield replace(problem, each=("node", ""))
    yield from _duplicates("site", [site.name for site in entries.sites.values()], source)
    if oversized or "node" in entries.unread:
        return  # node names can be checked only if all node tables were read
    names = [name for node in entries.nodes.values() for name in node_names(node)]
    yield from _duplicates("node", names, source)
    for problem in _pair_problems(entries, set(names), source):
        yield replace(problem, each=("link", ""))
    if entries.matrix:
        yield from matrix_problems(entries.matrix, set(names), source)


def _size_problems(entries: Entries, source: str) -> Iterator[Problem]:
    if not entries.nodes and "node" not in entries.unread:
        yield Problem(source, "node", "no node", "at least one", "Write [[node]].")
    total = 0
    for node in entries.nodes.values():
        here = sum(read[0] for text in node.devices if (read := parse_devices(text)))
        total += max(node.count if node.count is not None else 1, 0) * max(here, 1)
    if total > MOST_DEVICES:
        yield Problem(source, "node", f"{total:,} devices", f"at most {MOST_DEVICES:,}")


def _endpoint_problems(where: str, node: NodeEntry, source: str) -> Iterator[Problem]:
    several = isinstance(node.address, tuple)
    given = node.address if isinstance(node.address, tuple) else [node.address]
    for address in given:
        if address is not None and not _ADDRESS.fullmatch(address):
            yield Problem(source, f"{where}.address", repr(address), "a host name or an IP address")
    count = 1 if node.count is None else node.count
    if node.address is not None and (len(given) != count or several != (node.count is not None)):
        wanted = "one address" if node.count is None else f"a list of {count}, one for each node"
        found = f"{len(given)} addresses" if several else "one address"
        yield Problem(source, f"{where}.address", found, wanted)
    if node.interface is not None and not _NAME.fullmatch(node.interface):
        yield Problem(source, f"{where}.interface", repr(node.interface), _NAME_RULE)


def _node_problems(where: str, node: NodeEntry, entries: Entries, source: str) -> Iterator[Problem]:
    if not _NAME.fullmatch(node.name):
        yield Problem(source, f"{where}.name", repr(node.name), _NAME_RULE)
    yield from _endpoint_problems(where, node, source)
    if node.count is not None and node.count < 1:
        yield Problem(source, f"{where}.count", str(node.count), "1 or more")
    if not node.devices:
        wanted = "at least one entry"
        yield Problem(source, f"{where}.devices", "an empty list", wanted, 'Like ["4 x T4"].')
    for index, text in enumerate(node.devices):
        field = f"{where}.devices[{index}]"
        read = parse_devices(text)
        if read is None or read[0] < 1:
            yield Problem(source, field, repr(text), "a number and a type, like '4 x T4'")
        elif read[1] not in entries.devices and read[1] not in catalog():
            hint = nearest_types(read[1], entries.devices)
            yield Problem(source, field, repr(read[1]), "a known device type", hint)
    sites = {site.name for site in entries.sites.values()}
    if node.site not in {*sites, DEFAULT_SITE} and "site" not in entries.unread:
        wanted = f"one of: {', '.join(sorted({*sites, DEFAULT_SITE}))}"
        yield Problem(source, f"{where}.site", repr(node.site), wanted, "Add it as [[site]].")
    yield from _missing_links(where, node, entries, source)
    yield from _island_problems(where, node, entries, source)


def _island_problems(
    where: str, node: NodeEntry, entries: Entries, source: str
) -> Iterator[Problem]:
    """Yields the mistakes in a node's islands: their devices, and a link that is no better."""
    if node.islands is None:
        return
    field = f"{where}.islands.devices"
    number = sum(read[0] for text in node.devices if (read := parse_devices(text)))
    if not node.islands.devices:
        yield Problem(source, field, "an empty list", "at least one group, like [[0, 1], [2, 3]]")
    for place, group in enumerate(node.islands.devices):
        if len(group) < 2:
            wanted = "two devices or more, which reach each other"
            yield Problem(source, f"{field}[{place}]", f"{len(group)} devices", wanted)
        for index in group:
            if index >= number:
                wanted = f"the index of one of the node's {number} devices, from 0"
                yield Problem(source, f"{field}[{place}]", f"device {index}", wanted)
    for index, times in Counter(chain(*node.islands.devices)).items():
        if times > 1:
            found = f"device {index} {times} times"
            yield Problem(source, field, found, "each device in one group at most")
    inside = node.inside or entries.links.inside
    # Two devices that send to each other share a bus: each gets half of it.
    least = inside.bandwidth / (1 + inside.shared) if inside else 0.0
    if node.islands.bandwidth < least:
        wanted = f"at least that of `inside`, {format_bandwidth(least)}"
        found = format_bandwidth(node.islands.bandwidth)
        yield Problem(source, f"{where}.islands.bandwidth", found, wanted)


def _missing_links(where: str, node: NodeEntry, entries: Entries, source: str) -> Iterator[Problem]:
    alone = len(entries.nodes) == 1 and node.count in (None, 1)
    given = node.network or entries.links.network
    if given is None and not alone and "links" not in entries.unread:
        mend = 'Give all nodes one: links.network = { bandwidth = "10 Gbit/s", latency = "50 us" }.'
        wanted = "this node's network interface"
        yield Problem(source, f"{where}.network", "nothing", wanted, mend)
    read = [each for text in node.devices if (each := parse_devices(text))]
    new = [kind for _, kind in read if kind in entries.devices and kind not in catalog()]
    if sum(count for count, _ in read) < 2 or node.inside or entries.links.inside or not new:
        return
    if any(type_problems(entries.devices, source)):
        return
    for kind in sorted(set(new)):
        if resolve_type(kind, entries.devices)[1] is None:
            wanted = f"the link between the devices, which for {kind!r} is not known"
            yield Problem(source, f"{where}.inside", "nothing", wanted)


def _duplicates(section: str, names: list[str], source: str) -> Iterator[Problem]:
    for name, times in Counter(names).items():
        if times > 1:
            yield Problem(source, f"{section}.name", f"{name!r} {times} times", "each name once")


def _pair_problems(entries: Entries, names: set[str], source: str) -> Iterator[Problem]:
    seen: set[frozenset[str]] = set()
    if entries.matrix:
        seen = {frozenset(pair) for pair in combinations(entries.matrix.nodes, 2)}
    for where, pair in entries.pairs.items():
        field = f"{where}.between"
        for name in pair.between:
            if name not in names:
                wanted = "the name of a node (p3-0, p3-1 ... if p3 has a count)"
                yield Problem(source, field, repr(name), wanted)
        if pair.between[0] == pair.between[1]:
            wanted = "two different nodes"
            yield Problem(source, field, f"{pair.between[0]!r} with itself", wanted)
        if frozenset(pair.between) in seen:
            found = " and ".join(repr(name) for name in pair.between)
            yield Problem(source, field, f"{found} again", "each pair of nodes once")
        seen.add(frozenset(pair.between))
