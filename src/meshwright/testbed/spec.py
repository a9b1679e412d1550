"""Reads testbed.toml: an ordinary cluster, and by how much its emulation is slower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from meshwright.cluster.catalog import catalog
from meshwright.cluster.files import cluster_from, load_cluster
from meshwright.cluster.spec import Cluster, DeviceType, Link, Node, devices_of
from meshwright.emulation.compute_lock import devices_at_once
from meshwright.errors import ClusterError, LaunchError, Problem
from meshwright.launch.local import PROCESS_BYTES
from meshwright.records import Format, Line, Name, PositiveShare, load, problems_in, record

Mode = Literal["dilation", "virtual", "quota"]
"""The way in which devices are made slow, see `TestbedFile.mode`."""
ClusterSource = Line | dict[Name, Any]
"""Path of a cluster file, or the content of one."""
Scale = Annotated[float, Field(gt=0, le=1e6)]
CoreShare = Annotated[float, Field(gt=0, le=1)]
"""Share of one core."""
Attempts = Annotated[int, Field(ge=1, le=100)]

FREE_CORES = 0.1
"""Share of the cores that stays free for messages and the launcher."""


@record
class TestbedFile:
    """Holds the content of `testbed.toml`."""

    format: Format = 1
    name: Name
    cluster: ClusterSource
    """A cluster file, relative to this one, or the content of one."""
    mode: Mode = "dilation"
    """The way in which devices are made slow. `dilation`: they compute, then sleep for the rest of
    their time; `virtual`: they only sleep; `quota`: they compute under a CPU quota."""
    fastest_share: CoreShare | None = None
    """Share of a core for the fastest device type; the others follow in proportion to their fp32
    peaks."""
    shares: dict[Name, CoreShare] = field(default_factory=dict)
    """Share of a core by device type, in place of the one that follows from the peaks."""
    compute_scale: Scale = 1.0
    """Speed of a virtual device divided by that of its type."""
    bandwidth_scale: Scale = 1.0
    """Factor of every link's bandwidth."""
    latency_scale: Scale = 1.0
    """Factor of every link's latency."""
    small_first: bool = True
    """On shaped links packets below 256 bytes overtake larger ones, as on a network card with many
    queues."""
    foreign_share: PositiveShare = 0.1
    """Share of the machine's CPU time that others may use before a run counts as disturbed."""
    attempts: Attempts = 3
    """Number of times that a disturbed run is tried; the least disturbed one counts."""


@record
class Testbed:
    """Describes a testbed that can be brought up."""

    name: Name
    source: Line
    """File that describes it, for errors."""
    mode: Mode
    cluster: Cluster
    """The emulated cluster: links and device types are scaled."""
    shares: dict[Name, CoreShare]
    """Share of a core by device type; empty for virtual devices."""
    small_first: bool
    foreign_share: PositiveShare
    attempts: Attempts


def load_testbed(path: Path) -> Testbed:
    """Reads the testbed that a file describes. Raises ClusterError with every mistake found."""
    entry = load(path, TestbedFile, error=ClusterError)
    if isinstance(entry.cluster, str):
        cluster = load_cluster(path.parent / entry.cluster)
    else:
        cluster = cluster_from(entry.cluster, source=f"{path}: cluster")
    return make_testbed(entry, cluster, source=str(path))


def make_testbed(entry: TestbedFile, cluster: Cluster, *, source: str) -> Testbed:
    """Makes a testbed of a file's content and its cluster. Raises ClusterError with every mistake
    found."""
    ClusterError.check(_mistakes(entry, cluster, source))
    shares = {} if entry.mode == "virtual" else _shares(entry, cluster)
    return Testbed(
        name=entry.name,
        source=source,
        mode=entry.mode,
        cluster=_emulated(entry, cluster, shares),
        shares=shares,
        small_first=entry.small_first,
        foreign_share=entry.foreign_share,
        attempts=entry.attempts,
    )


def _used(cluster: Cluster) -> list[str]:
    """Returns the device types that occur in a cluster."""
    return sorted({device.type for device in devices_of(cluster)})


def _mistakes(entry: TestbedFile, cluster: Cluster, source: str) -> Iterator[Problem]:
    yield from problems_in(entry, source=source)
    yield from _mistaken_shares(entry, _used(cluster), source)
    for node in cluster.nodes:
        if node.islands:
            wanted = "no islands: all messages inside an emulated node pass one loopback"
            yield Problem(source, f"node {node.name}", "islands", wanted, each=("node", node.name))


def _mistaken_shares(entry: TestbedFile, used: list[str], source: str) -> Iterator[Problem]:
    given = {f"shares.{kind}": share for kind, share in entry.shares.items()}
    if entry.fastest_share is not None:
        given["fastest_share"] = entry.fastest_share
    for kind in entry.shares.keys() - set(used):
        yield Problem(source, f"shares.{kind}", "no such device type", f"of {', '.join(used)}")
    if entry.mode == "virtual":
        for name in given:
            mend = "virtual devices do not compute: compute_scale says how fast they are"
            yield Problem(source, name, str(given[name]), "nothing in mode virtual", mend)
    elif entry.fastest_share is None:
        for kind in [kind for kind in used if kind not in entry.shares]:
            mend = "or fastest_share, and the others follow from their peaks"
            yield Problem(source, f"shares.{kind}", "nothing", "the share of a core", mend)


def _shares(entry: TestbedFile, cluster: Cluster) -> dict[str, float]:
    peaks = {kind: _peak(cluster.types[kind]) for kind in _used(cluster)}
    top = entry.fastest_share or 0.0
    derived = {kind: top * peak / max(peaks.values()) for kind, peak in peaks.items()}
    return derived | entry.shares


def _peak(kind: DeviceType) -> float:
    """Returns a type's peak in fp32, in which emulated devices compute; its largest if it has none
    in fp32."""
    return kind.peak.get("fp32") or max(kind.peak.values())


def _emulated(entry: TestbedFile, cluster: Cluster, shares: dict[str, float]) -> Cluster:
    core = catalog()["cpu"].type

    def kind(each: DeviceType) -> DeviceType:
        if entry.mode == "virtual":
            return _scaled(each, each, entry.compute_scale)
        return _scaled(each, core, shares[each.name])

    def link(each: Link) -> Link:
        return replace(
            each,
            bandwidth=each.bandwidth * entry.bandwidth_scale,
            latency=each.latency * entry.latency_scale,
            single_flow=None,  # a shaped interface gives one message all that it has
        )

    def node(each: Node) -> Node:
        # All messages inside a node pass one loopback, which is shared like a bus.
        inside = replace(link(each.inside), shared=True)
        return replace(each, inside=inside, network=link(each.network))

    return replace(
        cluster,
        types={name: kind(cluster.types[name]) for name in _used(cluster)},
        nodes=tuple(map(node, cluster.nodes)),
        sites=tuple(
            replace(site, uplink=link(site.uplink) if site.uplink else None)
            for site in cluster.sites
        ),
        direct=tuple(replace(each, link=link(each.link)) for each in cluster.direct),
    )


def _scaled(kind: DeviceType, like: DeviceType, scale: float) -> DeviceType:
    """Returns the type of a process that is `scale` times as fast as `like`, with the memory of
    `kind`."""
    return replace(
        kind,
        peak={precision: peak * scale for precision, peak in like.peak.items()},
        memory_bandwidth=like.memory_bandwidth * scale,
        matmul_efficiency=like.matmul_efficiency,
        matmul_shares=like.matmul_shares,
        attention_efficiency=like.attention_efficiency,
        memory_efficiency=like.memory_efficiency,
        processor="cpu",
        source=f"testbed: {scale:g} of {like.name}",
    )


def device_shares(testbed: Testbed) -> dict[str, float]:
    """Returns the share of a core of each device, by name; empty for virtual devices."""
    if not testbed.shares:
        return {}
    return {device.name: testbed.shares[device.type] for device in devices_of(testbed.cluster)}


def check_room(testbed: Testbed, *, cores: int, free_bytes: int) -> None:
    """Raises LaunchError if the emulated devices ask for more cores or memory than the machine
    has."""
    devices = len(devices_of(testbed.cluster))
    problems = []
    wanted = sum(device_shares(testbed).values())
    computing = cores if testbed.mode == "quota" else devices_at_once(cores)
    most = computing * (1 - FREE_CORES)
    if wanted > most:
        mend = 'lower the shares, or emulate with mode = "virtual"'
        found = f"{wanted:.2f} cores for {devices} devices"
        limit = f"at most {most:.2f} ({computing} of {cores} compute)"
        problems.append(Problem(testbed.source, "shares", found, limit, mend))
    if devices * PROCESS_BYTES > free_bytes:
        room = free_bytes // PROCESS_BYTES
        problems.append(
            Problem(
                testbed.source,
                "cluster",
                f"{devices} devices, a process each",
                f"at most {room}, for which this machine has memory free",
            )
        )
    LaunchError.check(problems)
