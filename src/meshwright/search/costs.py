"""Keeps prices that many candidates share: layer times, memory, boundaries, rings.

Letters: S stages, L layers, a stage's first layer, b one past its last. All of this is the cost
floor's; nothing here has a formula of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import Cluster, Device, Link, devices_of
from meshwright.cluster.topology import Topology
from meshwright.cost.collective import (
    Traffic,
    all_reduce,
    boundary_transfer,
    concurrent,
    step_seconds,
    uncontended_seconds,
)
from meshwright.cost.compute import LayerSeconds, layer_seconds
from meshwright.cost.constants import SystemConstants, system_constants
from meshwright.cost.memory import MemoryTable, memory_tables, stage_memory, usable_bytes
from meshwright.cost.profile import Profile
from meshwright.cost.reached_links import reached_links
from meshwright.cost.runtimes import as_run_by
from meshwright.cost.times import (
    LayerTimeCache,
    ReplicaWork,
    layer_time_cache,
    replica_seconds,
)
from meshwright.cost.weights import untied_parameters
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import gradient_bytes
from meshwright.plan.spec import Job
from meshwright.techniques.activation_checkpointing.price import repeated_seconds
from meshwright.techniques.backward_split.price import backward_shares
from meshwright.techniques.data_parallel.buckets import usual_bucket_bytes

Array = NDArray[np.float64]

PROBE_BYTES = 1 << 24
"""Size at which communications are priced once; their bytes per resource are proportional."""

UNLIMITED = 1 << 30
"""Micro-batches that fit where they take no memory."""

TensorGroup = tuple[str, ...]
"""Names of devices that share every layer by tensor parallelism."""

GroupKind = tuple[tuple[str, ...], int, tuple[int, ...]]
"""The device types of a tensor group, the number of its node's links, and which of its devices are
in one island, which set its pace."""


Prefixes = tuple[list[float], list[float]]
"""Cumulative seconds of the forward and of the backward, by number of layers."""

T = TypeVar("T")

_MISSING = object()


@dataclass(frozen=True, slots=True)
class Costs:
    """Holds the prices of one model and job on one cluster."""

    model: LayerGraph
    cluster: Cluster
    """The cluster with the links that the profile says are reached."""
    stated_cluster: Cluster
    """The cluster as its file states it. The price of a whole program takes this one, for it looks
    up the links of the profile itself."""
    job: Job
    profile: Profile | None
    times: LayerTimeCache
    """The layer times with which whole programs are priced."""
    links: Topology
    step_latency: float
    """Fixed seconds of one step of a ring."""
    system: SystemConstants
    bucket_bytes: int
    """Bytes of the gradients that are summed at once."""
    table: MemoryTable
    recomputed: MemoryTable | None
    """The table of stages that recompute; None if no stage may."""
    repeats: bool
    """Every stage recomputes, and `table` is that of such stages."""
    scatters: bool
    """Cuts may be of the kind scatter_gather where that is quicker."""
    devices: dict[str, Device]
    _inside: dict[str, int]
    """Number of the links inside each node."""
    _computed: dict[tuple[str, int, int], LayerSeconds] = field(default_factory=dict)
    _times: dict[tuple[GroupKind, int], tuple[Array, Array]] = field(default_factory=dict)
    _memory: dict[tuple[int, int, bool], tuple[Array, Array]] = field(default_factory=dict)
    _rings: dict[tuple[str, ...], Traffic] = field(default_factory=dict)
    _pairs: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    _distinct: dict[tuple[TensorGroup, ...], tuple[TensorGroup, ...]] = field(default_factory=dict)
    _kinds: dict[tuple[str, ...], GroupKind] = field(default_factory=dict)
    _prefixes: dict[tuple[GroupKind, int], Prefixes] = field(default_factory=dict)
    _remembered: dict[object, object] = field(default_factory=dict)


def costs_of(
    model: LayerGraph,
    cluster: Cluster,
    job: Job,
    profile: Profile | None = None,
    *,
    recomputation: bool = False,
    scatters: bool = False,
) -> Costs:
    """Makes the prices of a model on a cluster, of which none is worked out before it is asked for.
    Measured links replace those of the cluster. `recomputation`: stages that do not fit otherwise
    may recompute; `scatters`: tensors may cross cuts in parts that are gathered behind them."""
    profile = as_run_by(job.runtime, profile, model, compiled=job.compiled)
    stated_cluster, cluster = cluster, reached_links(cluster, profile)
    tables, times = memory_tables(model, job), layer_time_cache(model, stated_cluster, profile)
    links = {n.name: (n.inside, n.islands and n.islands.link) for n in cluster.nodes}
    numbers = {own: i for i, own in enumerate(dict.fromkeys(links.values()))}
    return Costs(
        model=model,
        cluster=cluster,
        stated_cluster=stated_cluster,
        job=job,
        profile=profile,
        times=times,
        links=times.links,
        step_latency=times.step_latency,
        system=system_constants(profile.calibration if profile else None),
        bucket_bytes=usual_bucket_bytes(model, job),
        table=tables.plain,
        recomputed=tables.recomputed if recomputation else None,
        repeats=False,
        scatters=scatters,
        devices={device.name: device for device in devices_of(cluster)},
        _inside={name: numbers[own] for name, own in links.items()},
    )


def recomputing(costs: Costs, recomputed: MemoryTable) -> Costs:
    """Returns the same prices where every stage recomputes."""
    return replace(
        costs,
        table=recomputed,
        recomputed=None,
        repeats=True,
        _times={},
        _memory={},
        _prefixes={},
        _remembered={},
    )


def remembered(costs: Costs, key: tuple[object, ...], make: Callable[[], T]) -> T:
    """Returns what `make` returns; it is called once for each key, which begins with the name of
    what is made."""
    found = costs._remembered.get(key, _MISSING)
    if found is _MISSING:
        found = costs._remembered[key] = make()
    return cast("T", found)


def layer_times(costs: Costs, kind: str, tensor: int, rows: int) -> LayerSeconds:
    """Returns the seconds of every layer on one tensor rank of a type, communication apart."""
    key = (kind, tensor, rows)
    if key not in costs._computed:
        device = costs.cluster.types[kind]
        costs._computed[key] = layer_seconds(costs.model, device, tensor, rows, costs.profile)
    return costs._computed[key]


def speeds(costs: Costs, kinds: Iterable[str]) -> dict[str, float]:
    """Returns the rows per second of the whole model at which a device of each type works alone."""
    found = {}
    for kind in kinds:
        seconds = layer_times(costs, kind, 1, 1)
        found[kind] = 1 / float(seconds.forward.sum() + seconds.backward.sum())
    return found


def group_times(costs: Costs, group: TensorGroup, rows: int) -> tuple[Array, Array]:
    """Returns the forward and backward seconds [L] of a micro-batch of `rows` rows on a
    tensor-parallel group, its all-reduces included."""
    key = (group_kind(costs, group), rows)
    if key not in costs._times:
        computed = [layer_times(costs, kind, len(group), rows) for kind in sorted(set(key[0][0]))]
        whole = (0, len(costs.model.layers))
        work = ReplicaWork(costs.model, whole, group, rows, costs.links, costs.step_latency)
        forward, backward = replica_seconds(work, computed)
        if costs.repeats:
            backward = backward + repeated_seconds(costs.model, whole, forward)
        costs._times[key] = forward, backward
    return costs._times[key]


def group_prefix(costs: Costs, group: TensorGroup, rows: int) -> Prefixes:
    """Returns the cumulative forward and backward seconds [L + 1] of `group_times`: entry l is the
    sum over the layers before l."""
    key = (group_kind(costs, group), rows)
    if key not in costs._prefixes:
        forward, backward = group_times(costs, group, rows)
        costs._prefixes[key] = (
            [0.0, *np.cumsum(forward).tolist()],
            [0.0, *np.cumsum(backward).tolist()],
        )
    return costs._prefixes[key]


def pace(costs: Costs, group: TensorGroup, rows: int = 1) -> float:
    """Returns a tensor group's seconds per row of the whole model, at this micro-batch size."""
    forward, backward = group_prefix(costs, group, rows)
    return (forward[-1] + backward[-1]) / rows


def split_prefix(costs: Costs, group: TensorGroup, rows: int) -> Prefixes:
    """Returns the cumulative seconds [L + 1] of the two parts of a backward on a tensor group: the
    gradients of the inputs, with the group's all-reduces, and those of the weights."""
    key = ("split", group_kind(costs, group), rows)
    return remembered(costs, key, lambda: _split_prefix(costs, group, rows))


def _split_prefix(costs: Costs, group: TensorGroup, rows: int) -> Prefixes:
    computed, parts = [], []
    for kind in sorted(set(group_kind(costs, group)[0])):
        own = layer_times(costs, kind, len(group), rows).backward
        device = costs.cluster.types[kind]
        shares = backward_shares(costs.model, device, len(group), rows, costs.profile)
        computed.append(own)
        parts.append(own[:, None] * shares)
    slowest = np.max(parts, axis=0)
    added = group_times(costs, group, rows)[1] - np.max(computed, axis=0)
    inputs, weights = slowest[:, 0] + added, slowest[:, 1]
    return [0.0, *np.cumsum(inputs).tolist()], [0.0, *np.cumsum(weights).tolist()]


def group_kind(costs: Costs, group: TensorGroup) -> GroupKind:
    """Returns what the pace of a group depends on."""
    known = costs._kinds.get(group)
    if known is None:
        devices = [costs.devices[name] for name in group]
        islands = [device.island for device in devices]
        alike = tuple(map(islands.index, islands)) if len(group) > 1 and any(islands) else ()
        kinds = tuple(device.type for device in devices)
        known = costs._kinds[group] = kinds, costs._inside[devices[0].node], alike
    return known


def distinct_groups(costs: Costs, groups: tuple[TensorGroup, ...]) -> tuple[TensorGroup, ...]:
    """Returns one tensor group of every kind."""
    found = costs._distinct.get(groups)
    if found is None:
        first = {group_kind(costs, group): group for group in reversed(groups)}
        found = costs._distinct[groups] = tuple(first.values())
    return found


def distinct_replicas(
    costs: Costs, groups: tuple[TensorGroup, ...], rows: tuple[int, ...]
) -> tuple[tuple[TensorGroup, int], ...]:
    """Returns one tensor group of each kind for every number of rows that such groups have."""
    kinds = distinct_groups(costs, groups)
    if len(kinds) == 1:
        return tuple((kinds[0], number) for number in sorted(set(rows)))
    pairs = zip(groups, rows, strict=True)
    return tuple({(group_kind(costs, u), r): (u, r) for u, r in pairs}.values())


def group_capacity(costs: Costs, group: TensorGroup) -> int:
    """Returns the bytes that tensors may take on the smallest device of a group, less one for each
    of the five parts that the final account rounds to whole bytes."""
    kinds = group_kind(costs, group)[0]
    return remembered(
        costs,
        ("capacity", kinds),
        lambda: min(usable_bytes(costs.cluster.types[kind]) for kind in kinds) - 5,
    )


def stage_bytes(
    costs: Costs, tensor: int, rows: int, *, recompute: bool = False
) -> tuple[Array, Array]:
    """Returns the bytes [L + 1, L + 1] on each device of a stage with layers [a, b): those that it
    always holds, and those of every micro-batch in flight. `recompute`: of a stage that
    recomputes."""
    key = (tensor, rows, recompute)
    if key not in costs._memory:
        table = costs.table
        if recompute:
            assert costs.recomputed is not None, "no stage may recompute"
            table = costs.recomputed
        size = len(costs.model.layers) + 1
        first, last = np.triu_indices(size, k=1)
        parts = stage_memory(table, (first, last), tensor, rows, 1)
        always, each = np.zeros((size, size)), np.zeros((size, size))
        always[first, last] = parts.parameters + parts.gradients + parts.optimizer + parts.buffers
        each[first, last] = parts.activations
        costs._memory[key] = (always, each)
    return costs._memory[key]


def micro_batches_held(
    costs: Costs,
    group: TensorGroup,
    rows: int,
    layers: tuple[int, int],
    *,
    recompute: bool = False,
) -> int:
    """Returns the micro-batches in flight that a tensor group with these layers has memory for: at
    least one, and UNLIMITED where they take none."""
    always, each = stage_bytes(costs, len(group), rows, recompute=recompute)
    room, size = group_capacity(costs, group) - always[layers], each[layers]
    return max(1, int(room / size)) if size else UNLIMITED


def reduced_width(costs: Costs) -> float:
    """Returns the bytes on the links for the gradient of one parameter."""
    return gradient_bytes(costs.job) * costs.system.gradient_width


def usual_cut_bytes(costs: Costs) -> float:
    """Returns the bytes that a row carries across a usual cut."""
    inner = costs.table.cut[1:-1]
    return remembered(costs, ("usual cut",), lambda: float(np.median(inner)) if len(inner) else 0.0)


def own_parameters(costs: Costs, layers: tuple[int, int], tensor: int) -> float:
    """Returns the trained numbers on each tensor rank of a stage that are not tied."""
    return float(untied_parameters(costs.table.weights.trained, layers, tensor))


def reduced_bytes(costs: Costs, layers: tuple[int, int], tensor: int) -> tuple[float, float]:
    """Returns the bytes of these layers' gradients on each tensor rank, without tied ones: of all,
    and of the last bucket, which has one layer at least."""
    width, first = reduced_width(costs), layers[0]
    everything = own_parameters(costs, layers, tensor) * width
    least = own_parameters(costs, (first, first + 1), tensor) * width
    return everything, min(everything, max(costs.bucket_bytes, least))


def ring(costs: Costs, members: tuple[str, ...]) -> Traffic:
    """Returns the traffic of an all-reduce of PROBE_BYTES among devices, with the least latency:
    that of a small one."""
    if members not in costs._rings:
        large, small = (
            all_reduce(costs.links, members, size, step_latency=costs.step_latency)
            for size in (PROBE_BYTES, 1.0)
        )
        costs._rings[members] = replace(large, latency=small.latency)
    return costs._rings[members]


def hop_latency(costs: Costs, link: Link) -> float:
    """Returns the latency of one step of a ring."""
    return max(step_seconds(link), costs.step_latency)


def pair(costs: Costs, source: str, target: str) -> Traffic:
    """Returns the traffic of a transfer of PROBE_BYTES between two devices."""
    if (source, target) not in costs._pairs:
        costs._pairs[source, target] = boundary_transfer(
            costs.links, source, target, PROBE_BYTES, costs.system.boundary
        )
    return costs._pairs[source, target]


def scaled(traffic: Traffic, size: float) -> Traffic:
    """Scales traffic of PROBE_BYTES to another size."""
    return Traffic(
        bytes_by_resource={
            name: carried * size / PROBE_BYTES
            for name, carried in traffic.bytes_by_resource.items()
        },
        latency=traffic.latency,
    )


def seconds_per_byte(costs: Costs, probes: Iterable[Traffic]) -> tuple[float, float]:
    """Returns the latency of communications that begin at once and carry equally many bytes, and
    the seconds for each of these bytes."""
    traffic = concurrent(probes)
    return traffic.latency, (
        uncontended_seconds(costs.links, traffic) - traffic.latency
    ) / PROBE_BYTES
