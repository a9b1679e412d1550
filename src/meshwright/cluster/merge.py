"""Merges the cluster files of several hosts into one."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path

from meshwright import files
from meshwright.cluster.files import cluster_from, dump_cluster, load_cluster
from meshwright.cluster.spec import Cluster, DeviceType, Endpoint, Node, Site
from meshwright.errors import ClusterError, Problem
from meshwright.text import NAME_LETTERS, printable

_COMMENTS_KEPT = 50
"""Largest number of comment lines kept from each file; they say what was not measured."""

Part = tuple[str, Cluster]
"""The name of a file, and the cluster that it describes."""


def merged_toml(paths: Sequence[Path]) -> tuple[str, tuple[str, ...]]:
    """Returns the text of the merged cluster file, and a note on each type that had to be renamed.
    Comments at the head of each file are kept. Raises ClusterError."""
    parts: list[Part] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            parts.append((str(path), load_cluster(path)))
        except ClusterError as failure:
            problems += failure.problems
    ClusterError.check(problems)
    cluster, notes = merged(parts)
    dumped = dump_cluster(cluster)
    cluster_from(tomllib.loads(dumped), source="the files together")
    head = [f"Put together from {', '.join(map(str, paths))}.", *notes]
    for path in paths:
        comments = [f"  {line}" for line in islice(_comments(path), _COMMENTS_KEPT)]
        head += [f"{path}:", *comments] if comments else []
    return "".join(f"# {printable(line)}\n" for line in head) + "\n" + dumped, notes


def _comments(path: Path) -> Iterator[str]:
    """Yields the comment lines at the head of a file."""
    lines = files.read_text(path, error=ClusterError).splitlines()
    for line in takewhile(lambda line: line.startswith("#"), lines):
        yield line.lstrip("#").strip()


def merged(parts: Sequence[Part]) -> tuple[Cluster, tuple[str, ...]]:
    """Merges several clusters into one; also returns a sentence for each type that was renamed.

    Types with one name and the same figures are one type; others are renamed. Raises ClusterError
    if two nodes have one name, or if two sites with one name differ.
    """
    ClusterError.check([*_node_clashes(parts), *_site_clashes(parts)])
    types: dict[str, DeviceType] = {}
    nodes: list[Node] = []
    notes: list[str] = []
    taken = {name for _, cluster in parts for name in cluster.types}
    for source, cluster in parts:
        names = {}
        for name, kind in cluster.types.items():
            names[name] = own = _name_for(kind, cluster, types, taken)
            types.setdefault(own, replace(kind, name=own))
            if own != name:
                notes.append(f"{name} of {source} is {own} here: it has other figures")
        nodes += [
            replace(node, devices=tuple(names[kind] for kind in node.devices))
            for node in cluster.nodes
        ]
    whole = Cluster(
        name=_name_of(parts),
        types=dict(sorted(types.items())),
        nodes=tuple(nodes),
        sites=tuple(_sites(parts).values()),
        direct=tuple(each for _, cluster in parts for each in cluster.direct),
        endpoints=_endpoints(parts) or None,
    )
    return whole, tuple(notes)


def _name_for(
    kind: DeviceType, cluster: Cluster, types: Mapping[str, DeviceType], taken: set[str]
) -> str:
    """Returns a type's own name, or, if other figures already have that name, the name with a
    node's name after it."""
    alike = [
        name
        for name, known in types.items()
        if replace(known, name=kind.name, source=kind.source) == kind
    ]
    if kind.name in alike or kind.name not in types:
        return kind.name
    renamed = [name for name in alike if name.startswith(f"{kind.name}-")]
    if renamed:
        return renamed[0]
    node = next((node.name for node in cluster.nodes if kind.name in node.devices), "other")
    stem = f"{kind.name}-{node}"[: NAME_LETTERS - 8]
    names = (stem, *(f"{stem}-{number}" for number in range(2, len(types) + len(taken) + 3)))
    return next(name for name in names if name not in types and name not in taken)


def _name_of(parts: Sequence[Part]) -> str:
    names = dict.fromkeys(cluster.name for _, cluster in parts)
    joined = " + ".join(names)
    return joined if len(joined) <= NAME_LETTERS else f"{len(parts)} clusters"


def _node_clashes(parts: Sequence[Part]) -> Iterator[Problem]:
    owner: dict[str, str] = {}
    for source, cluster in parts:
        for node in cluster.nodes:
            if node.name in owner:
                found = f"{node.name!r}, which is in {owner[node.name]} too"
                mend = (
                    "Give one of them another name; training finds it by `address`, its host name, "
                    "if the name is not that."
                )
                yield Problem(source, "node.name", found, "each node once", mend)
            owner.setdefault(node.name, source)


def _site_clashes(parts: Sequence[Part]) -> Iterator[Problem]:
    known = _sites(parts)
    for source, cluster in parts:
        for site in cluster.sites:
            if site != known[site.name]:
                found = f"{site.name!r} with another uplink than in the files before"
                mend = "Give both the same uplink, or the sites names of their own."
                yield Problem(source, "site", found, "one uplink for each site", mend)


def _sites(parts: Sequence[Part]) -> dict[str, Site]:
    sites: dict[str, Site] = {}
    for _, cluster in parts:
        for site in cluster.sites:
            sites.setdefault(site.name, site)
    return sites


def _endpoints(parts: Sequence[Part]) -> dict[str, Endpoint]:
    return {
        name: endpoint
        for _, cluster in parts
        for name, endpoint in (cluster.endpoints or {}).items()
    }
