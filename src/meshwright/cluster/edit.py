"""Edits a cluster for what-if questions: pure functions from Cluster to Cluster that also return
the assumptions they made.

`with_removed` removes nodes, devices, types or sites, `with_added` adds nodes, `with_setting`
changes a figure; `edit_cluster` does all of them in this order and reports every mistake at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

from meshwright.cluster.catalog import catalog
from meshwright.cluster.entries import nearest_types
from meshwright.cluster.settings import nodes_named, with_setting
from meshwright.cluster.spec import Cluster, DeviceType, Islands, Link, Node, devices_of
from meshwright.cluster.validate import MOST_DEVICES, parse_devices
from meshwright.errors import ClusterError, Problem
from meshwright.records import record
from meshwright.text import NAME_LETTERS, did_you_mean
from meshwright.units import format_bandwidth, format_seconds

EDITED_SUFFIX = ", edited"
"""Suffix of the name of a cluster that differs from its file."""


@record
class EditedCluster:
    """Holds a cluster after some edits, with a note on each of them."""

    cluster: Cluster
    notes: tuple[str, ...]
    """One sentence for each edit: what it did, or what it had to assume."""


def edit_cluster(
    cluster: Cluster,
    *,
    without: Sequence[str] = (),
    added: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> EditedCluster:
    """Removes nodes, then adds some, then sets figures. Raises ClusterError with one Problem for
    every edit at fault, and if no device is left."""
    problems: list[Problem] = []
    notes: list[str] = []

    def attempt(edit: Callable[[Cluster], EditedCluster], before: Cluster) -> Cluster:
        try:
            after = edit(before)
        except ClusterError as failure:
            problems.extend(failure.problems)
            return before
        notes.extend(after.notes)
        return after.cluster

    changed = cluster
    # New nodes may be modelled on a node that `without` removes: templates come from before.
    steps: list[Callable[[Cluster], EditedCluster]] = []
    if without:
        steps.append(partial(with_removed, names=without))
    steps += [partial(with_added, text=text, templates=cluster) for text in added]
    steps += [partial(_set, text=text) for text in settings]
    for step in steps:
        changed = attempt(step, changed)
    ClusterError.check(problems)
    stem = cluster.name.removesuffix(EDITED_SUFFIX)[: NAME_LETTERS - len(EDITED_SUFFIX)]
    name = f"{stem}{EDITED_SUFFIX}"
    return EditedCluster(cluster=replace(changed, name=name), notes=tuple(notes))


def _set(cluster: Cluster, text: str) -> EditedCluster:
    return EditedCluster(cluster=with_setting(cluster, text), notes=())


def with_removed(
    cluster: Cluster, names: Sequence[str], *, option: str = "--without"
) -> EditedCluster:
    """Returns the cluster without these nodes (or all nodes of a `count`), devices `node:index`,
    device types and sites. Later devices of a node get lower indices. Raises ClusterError."""
    gone: set[str] = set()
    problems: list[Problem] = []
    notes: list[str] = []
    for name in names:
        called = [(what, found) for what, found in _called(cluster, name).items() if found]
        if len(called) == 1:
            gone |= called[0][1]
            notes.append(
                f"without {name}: {len(called[0][1])} of {len(devices_of(cluster))} devices"
            )
        else:
            problems.append(_no_such(cluster, name, [what for what, _ in called], option))
    ClusterError.check(problems)
    left = without_devices(cluster, gone)
    if not left.nodes:
        found, wanted = ", ".join(names), "at least one device that is left"
        raise ClusterError(Problem(option, "", found, wanted))
    return EditedCluster(cluster=left, notes=tuple(notes))


def without_devices(cluster: Cluster, gone: Collection[str]) -> Cluster:
    """Returns the cluster without the devices of these names, without nodes that have none left,
    and without the explicit links of those nodes. Later devices of a node get lower indices."""
    nodes = tuple(_without(node, gone) for node in cluster.nodes)
    kept = tuple(node for node in nodes if node.devices)
    names = {node.name for node in kept}
    direct = tuple(each for each in cluster.direct if names.issuperset(each.between))
    return replace(cluster, nodes=kept, direct=direct)


def _without(node: Node, gone: Collection[str]) -> Node:
    """Returns a node without some devices. An island is dropped if only one of its devices is
    left."""
    left = [i for i in range(len(node.devices)) if f"{node.name}:{i}" not in gone]
    groups = [
        tuple(left.index(index) for index in group if index in left)
        for group in (node.islands.groups if node.islands else ())
    ]
    return replace(
        node,
        devices=tuple(node.devices[i] for i in left),
        islands=_with_groups(node.islands, [group for group in groups if len(group) > 1]),
    )


def _with_groups(islands: Islands | None, groups: Sequence[tuple[int, ...]]) -> Islands | None:
    return replace(islands, groups=tuple(groups)) if islands and groups else None


def _called(cluster: Cluster, name: str) -> dict[str, set[str]]:
    """Returns the devices that a name may mean, under each kind of thing: node, device, device type
    and site."""
    nodes = {node.name for node in nodes_named(cluster).get(name, ())}
    devices = devices_of(cluster)
    return {
        "node": {device.name for device in devices if device.node in nodes},
        "device": {device.name for device in devices if device.name == name},
        "device type": {device.name for device in devices if device.type == name},
        "site": {device.name for device in devices if device.site == name},
    }


def _no_such(cluster: Cluster, name: str, found: list[str], option: str) -> Problem:
    if found:
        what = f"{name!r}, which is a {' and a '.join(found)}"
        return Problem(option, "", what, "a name that only one thing has")
    kinds = {kind for node in cluster.nodes for kind in node.devices}
    known = [*nodes_named(cluster), *sorted(kinds), *sorted({node.site for node in cluster.nodes})]
    mend = did_you_mean(name, known, cutoff=0.5) or f"Known: {', '.join(known)}."
    wanted = "a node, a device like 'p3-0:1', a device type or a site"
    return Problem(option, "", repr(name), wanted, mend)


def with_added(
    cluster: Cluster, text: str, templates: Cluster | None = None, *, option: str = "--add"
) -> EditedCluster:
    """Returns the cluster with new nodes: `"4 x T4"` adds one node of four T4, `"2 x p3-0"` adds
    two nodes like p3-0. A name that is both a type and a node means the node; `templates` is the
    cluster in which such nodes are looked up. Raises ClusterError.

    A node of a type that the cluster has is wired like the first node with that type, its devices
    in islands of the size of that node's first one. Any other is wired inside as the catalogue
    says, and outside like most nodes of the cluster."""
    known = templates or cluster
    read = parse_devices(text)
    if read is None or read[0] < 1:
        wanted = "a number and a device type or node, like '4 x T4'"
        raise ClusterError(Problem(option, "", repr(text), wanted))
    count, name = read
    like = nodes_named(known).get(name)
    more = count * (len(like[0].devices) if like else 1)
    if len(devices_of(cluster)) + more > MOST_DEVICES:
        wanted = f"at most {MOST_DEVICES:,} devices in all"
        raise ClusterError(Problem(option, "", repr(text), wanted))
    if like:
        fresh = tuple(replace(like[0], name=each) for each in _free_names(cluster, count))
        notes = (f"{fresh[0].name}: like {like[0].name}, {_wired(fresh[0])}",)
        if count > 1:
            notes = (f"{fresh[0].name} to {fresh[-1].name}: like {name}, {_wired(fresh[0])}",)
        return EditedCluster(
            cluster=_with_types(cluster, known.types, (*cluster.nodes, *fresh)), notes=notes
        )
    node = _new_node(cluster, known, count, name, option)
    types = {**known.types} if name in known.types else {**known.types, name: _type(name)}
    note = f"{node.name}: {count} x {name}, {_wired(node)}"
    return EditedCluster(cluster=_with_types(cluster, types, (*cluster.nodes, node)), notes=(note,))


def _with_types(cluster: Cluster, types: dict[str, DeviceType], nodes: tuple[Node, ...]) -> Cluster:
    """Returns the cluster with these nodes and the device types that they need."""
    used = {kind for node in nodes for kind in node.devices}
    missing = {name: types[name] for name in sorted(used) if name not in cluster.types}
    return replace(cluster, nodes=nodes, types={**cluster.types, **missing})


def _type(name: str) -> DeviceType:
    return catalog()[name].type


def _new_node(cluster: Cluster, known: Cluster, count: int, name: str, option: str) -> Node:
    with_type = [node for node in known.nodes if name in node.devices]
    free = _free_names(cluster, 1)[0]
    if with_type:
        like = with_type[0]
        size = len(like.islands.groups[0]) if like.islands else count
        groups = [tuple(range(i, i + size)) for i in range(0, count - size + 1, size)]
        islands = _with_groups(like.islands, groups)
        return replace(like, name=free, devices=(name,) * count, islands=islands)
    if name not in known.types and name not in catalog():
        nodes = ", ".join(sorted(nodes_named(known)))
        mend = f"{nearest_types(name, known.types).partition('; or define')[0]}. Nodes: {nodes}."
        wanted = "a device type, or a node to be like"
        raise ClusterError(Problem(option, "", repr(name), wanted, mend))
    network = _commonest([node.network for node in known.nodes])
    inside = catalog()[name].inside if name in catalog() else network
    site = Counter(node.site for node in known.nodes).most_common(1)[0][0]
    return Node(name=free, site=site, devices=(name,) * count, inside=inside, network=network)


def _commonest(links: Sequence[Link]) -> Link:
    return Counter(links).most_common(1)[0][0]


def _free_names(cluster: Cluster, count: int) -> list[str]:
    taken = {node.name for node in cluster.nodes}
    names = (f"new-{index}" for index in range(len(taken) + count))
    return [name for name in names if name not in taken][:count]


def _wired(node: Node) -> str:
    inside, network = (
        f"{format_bandwidth(link.bandwidth)} and {format_seconds(link.latency)}"
        for link in (node.inside, node.network)
    )
    if node.islands:
        size = len(node.islands.groups[0])
        inside += f" inside ({format_bandwidth(node.islands.link.bandwidth)} in islands of {size})"
    else:
        inside += " inside"
    return f"assumed to have {inside}, {network} to the network, at site {node.site}"
