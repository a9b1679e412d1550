"""testbed.toml: an ordinary cluster, and how much smaller its emulation is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from meshwright.cluster.catalog import catalog
from meshwright.cluster.files import cluster_from, load_cluster
from meshwright.cluster.spec import Cluster, DeviceType, Link, Node, devices_of
from meshwright.errors import ClusterError, LaunchError, Problem
from meshwright.launch.local import PROCESS_BYTES
from meshwright.records import Format, Line, Name, PositiveShare, load, problems_in, record
from meshwright.runtime.turns import turns_at_once

Mode = Literal["dilation", "virtual", "quota"]
ClusterSource = Line | dict[Name, Any]
Scale = Annotated[float, Field(gt=0, le=1e6)]
CoreShare = Annotated[float, Field(gt=0, le=1)]
"""Share of one core."""
Attempts = Annotated[int, Field(ge=1, le=100)]

FREE_CORES = 0.1
"""Share of the cores that stays free for messages and the launcher."""


@record
class BedFile:
    """`testbed.toml`, as it is written."""

    format: Format = 1
    name: Name
    cluster: ClusterSource
    """A cluster file beside this one, or the content of one."""
    mode: Mode = "dilation"
    """How devices are slow: real arithmetic and then sleep; sleep alone; a CPU quota."""
    fastest_share: CoreShare | None = None
    """Of a core, for the fastest device type; the others in proportion to their fp32 peaks."""
    shares: dict[Name, CoreShare] = field(default_factory=dict)
    """Of a core, by device type, where the proportion of the peaks is not what is wanted."""
    compute_scale: Scale = 1.0
    """Speed of a virtual device over that of its type."""
    bandwidth_scale: Scale = 1.0
    """Of every link."""
    latency_scale: Scale = 1.0
    small_first: bool = True
    """On shaped links packets below 256 bytes overtake, as on a network card of many queues."""
    foreign_share: PositiveShare = 0.1
    """Share of the machine that others may use before a run counts as disturbed."""
    attempts: Attempts = 3
    """How often a disturbed run is tried; the least disturbed one counts."""


@record
class Bed:
    """A testbed that could be brought up."""

    name: Name
    source: Line
    mode: Mode
    cluster: Cluster
    """What is emulated: the cluster with its links and device types scaled."""
    shares: dict[Name, CoreShare]
    """Of a core, by device type; empty for virtual devices."""
    small_first: bool
    foreign_share: PositiveShare
    attempts: Attempts


def load_bed(path: Path) -> Bed:
    """The testbed that a file describes. Raises ClusterError with every mistake found."""
    entry = load(path, BedFile, error=ClusterError)
    if isinstance(entry.cluster, str):
        cluster = load_cluster(path.parent / entry.cluster)
    else:
        cluster = cluster_from(entry.cluster, source=f"{path}: cluster")
    return bed_of(entry, cluster, source=str(path))


def bed_of(entry: BedFile, cluster: Cluster, *, source: str) -> Bed:
    """The testbed of an entry. Raises ClusterError with every mistake found."""
    ClusterError.check(_mistakes(entry, cluster, source))
    shares = {} if entry.mode == "virtual" else _shares(entry, cluster)
    return Bed(
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
    return sorted({device.type for device in devices_of(cluster)})


def _mistakes(entry: BedFile, cluster: Cluster, source: str) -> Iterator[Problem]:
    yield from problems_in(entry, source=source)
    yield from _mistaken_shares(entry, _used(cluster), source)


def _mistaken_shares(entry: BedFile, used: list[str], source: str) -> Iterator[Problem]:
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


def _shares(entry: BedFile, cluster: Cluster) -> dict[str, float]:
    peaks = {kind: _peak(cluster.types[kind]) for kind in _used(cluster)}
    top = entry.fastest_share or 0.0
    derived = {kind: top * peak / max(peaks.values()) for kind, peak in peaks.items()}
    return derived | entry.shares


def _peak(kind: DeviceType) -> float:
    """In fp32, in which emulated devices compute; of a type without it, its largest."""
    return kind.peak.get("fp32") or max(kind.peak.values())


def _emulated(entry: BedFile, cluster: Cluster, shares: dict[str, float]) -> Cluster:
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
        )

    def node(each: Node) -> Node:
        # All of a node's messages to itself pass one loopback, which is a bus.
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
    """A process that is `scale` as fast as `like`, with the memory of `kind`."""
    return replace(
        kind,
        peak={precision: peak * scale for precision, peak in like.peak.items()},
        memory_bandwidth=like.memory_bandwidth * scale,
        matmul_efficiency=like.matmul_efficiency,
        attention_efficiency=like.attention_efficiency,
        memory_efficiency=like.memory_efficiency,
        processor="cpu",
        source=f"testbed: {scale:g} of {like.name}",
    )


def device_shares(bed: Bed) -> dict[str, float]:
    """Share of a core by device name; empty for virtual devices."""
    if not bed.shares:
        return {}
    return {device.name: bed.shares[device.type] for device in devices_of(bed.cluster)}


def check_room(bed: Bed, *, cores: int, free_bytes: int) -> None:
    """Raises LaunchError if the emulated devices ask for more than the machine has."""
    devices = len(devices_of(bed.cluster))
    problems = []
    wanted = sum(device_shares(bed).values())
    computing = cores if bed.mode == "quota" else turns_at_once(cores)
    most = computing * (1 - FREE_CORES)
    if wanted > most:
        mend = 'lower the shares, or emulate with mode = "virtual"'
        found = f"{wanted:.2f} cores for {devices} devices"
        limit = f"at most {most:.2f} ({computing} of {cores} compute)"
        problems.append(Problem(bed.source, "shares", found, limit, mend))
    if devices * PROCESS_BYTES > free_bytes:
        room = free_bytes // PROCESS_BYTES
        problems.append(
            Problem(
                bed.source,
                "cluster",
                f"{devices} devices, a process each",
                f"at most {room}, for which this machine has memory free",
            )
        )
    LaunchError.check(problems)
